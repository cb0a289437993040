"""P = U D / q of one layer, and its transpose, inverse and square, without forming matrices.

A layer is a kernel w, a bias b broadcast against it, the mean mu of its inputs (both None where
it is not centered), the scale s = 1 / (sigma~ q) of the kernel and s_b = 1 / q of the bias, or
beta / q. Then

    P [z_b, z_w] = [s_b z_b - sum_i mu_i s_i z_i, s z_w].
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnp_optax._explicit import sharding_of_sum

# Entries of a kernel whose passes cost less than what it takes to start them.
_SMALL = 2**16

Kernel = Float[Array, "..."]
Bias = Float[Array, "..."] | None
Stats = Float[Array, "..."]
Pair = tuple[Kernel, Bias]


class Entries(NamedTuple):
    """Entries of P in one layer.

    Attributes:
      s: 1 / (sigma~ q), broadcasts against the kernel.
      mu: The mean of the inputs; None where P does not center.
      s_b: 1 / q, or beta / q.
      gram_b: s_b^2 and the sum of (mu s)^2 over the inputs of a unit; None where it is not known.
    """

    s: Stats
    mu: Stats | None
    s_b: Stats
    gram_b: Stats | None = None


@jax.jit
def mv(w: Kernel, b: Bias, P: Entries) -> Pair:
    """P z."""
    if b is None or P.mu is None:
        return P.s * w, None
    return P.s * w, P.s_b * b - _sum(P.mu * P.s, w, b.shape)


@jax.jit
def transpose(w: Kernel, b: Bias, P: Entries) -> Pair:
    """P^T g."""
    if b is None or P.mu is None:
        return P.s * w, None
    return P.s * (w - P.mu * b), P.s_b * b


@jax.jit
def solve(w: Kernel, b: Bias, P: Entries) -> Pair:
    """P^-1 p."""
    if b is None or P.mu is None:
        return w / P.s, None
    return w / P.s, (b + _sum(P.mu, w, b.shape)) / P.s_b


@jax.jit
def gram(w: Kernel, b: Bias, P: Entries) -> Pair:
    """P P^T g, steps 4 and 5 of Algorithms 2 and 3.

    Step 5 sums mu times the updated G_w, which is s^2 (G_w - mu G_b). Split into a product with
    the raw G_w and one with G_b, the updated G_w need not be written and read again.
    """
    if b is None or P.mu is None:
        return P.s**2 * w, None
    gram_b = P.gram_b
    if gram_b is None:
        gram_b = P.s_b**2 + squared_length(P.s * P.mu, w, b)
    # Of one example G_w is an outer product, which a sum would write out first and a product does
    # not; but on a CPU a product takes longer to compile than all the rest of a small layer.
    along = _dot if w.size > _SMALL else _sum
    s = P.s**2
    return s * (w - P.mu * b), gram_b * b - along(P.mu * s, w, b.shape)


@jax.jit
def squared_length(c: Stats, w: Kernel, b: Float[Array, "..."]) -> Float[Array, "..."]:
    """Sum of c^2 over the inputs of a unit; c broadcasts against w, and the result against b."""
    axes = tuple(axis for axis, size in enumerate(b.shape) if size == 1)
    repeats = math.prod(w.shape[axis] for axis in axes if c.shape[axis] == 1)
    return repeats * jnp.sum(c**2, axis=axes, keepdims=True)


def _sum(c: Stats, w: Kernel, bias_shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Sum of c w over the axes on which the bias does not extend; c broadcasts against w."""
    axes = tuple(axis for axis, size in enumerate(bias_shape) if size == 1)
    return jnp.sum(c * w, axis=axes, keepdims=True)


def _dot(c: Stats, w: Kernel, bias_shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The same, by a product."""
    axes = list(range(w.ndim))
    varying = [axis for axis in axes if c.shape[axis] > 1]
    kept = [axis for axis in axes if bias_shape[axis] > 1]
    flat = jnp.squeeze(c, tuple(axis for axis in axes if c.shape[axis] == 1))
    out_sharding = sharding_of_sum(w, kept)
    # In bfloat16 or TF32, as accelerators multiply by default, P^-1 would not undo P.
    dot = jnp.einsum(
        flat, varying, w, axes, kept, precision=jax.lax.Precision.HIGHEST, out_sharding=out_sharding
    )
    return dot.reshape(bias_shape)
