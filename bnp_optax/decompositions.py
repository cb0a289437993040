"""Decompositions of stacks of matrices, on a CPU of one matrix after the other.

Of a stack, JAX on a CPU gives parts to the threads that run the program, and the kernel waits for
them in one of these threads. Once all of them wait, the program hangs, as it did for stacked layers
of two shapes on eight virtual devices. A single matrix is given to nobody. LAPACK has threads of
its own for a large one, so that this takes little more time; a GPU, where a stack is much faster,
decomposes it at once.

Example: `jax.vmap(eigh)` of matrices (5, n, n) is a loop of five turns on a CPU, as is `eigh`.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Float

Decomposition = Callable[[Array], tuple[Array, Array]]


def eigh(matrices: Float[Array, "*stack n n"]) -> tuple[Array, Array]:
    """Eigenvalues in rising order, and eigenvectors, of symmetric matrices."""
    return _of_stack(_eigh, matrices)


def qr(matrices: Float[Array, "*stack n k"]) -> tuple[Array, Array]:
    """Q and R, where Q is of the shape of the matrices, which are no wider than high."""
    return _of_stack(_qr, matrices)


def _eigh(matrices: Array) -> tuple[Array, Array]:
    vectors, values = lax.linalg.eigh(matrices)
    return values, vectors


def _qr(matrices: Array) -> tuple[Array, Array]:
    q, r = lax.linalg.qr(matrices, full_matrices=False)
    return q, r


def _of_stack(function: Decomposition, matrices: Array) -> tuple[Array, Array]:
    def one_by_one(matrices: Array) -> tuple[Array, Array]:
        # Also if the caller is vmapped, which would make a stack again.
        of_stack: Any = sequential_vmap(function)
        for _ in matrices.shape[:-2]:
            of_stack = jax.vmap(of_stack)
        return of_stack(matrices)

    return lax.platform_dependent(matrices, cpu=one_by_one, default=function)
