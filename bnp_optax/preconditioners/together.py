"""Layers of one shape computed together.

A deep network has many layers of few shapes. What an update makes of the statistics of one, some
dozen operations on short vectors, is the same for all of a shape: stacked along a new axis, they
are computed at once, and XLA starts and compiles the kernels of one layer.

Two things keep what is left to each layer small. A layer's arrays of equal shape are stacked before
the layers are, which is one kernel a layer whatever their number. And a row is taken from the stack
by a gather at places that are an array: at places that are numbers XLA would compile the kernel of
each layer anew, 10 to 40 ms on a CPU, and where it is one row it makes a number of the array.
"""

import collections
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnp_optax._explicit import fitted

# By shape and type of arrays, these stacked.
Packed = dict[tuple[Any, ...], Array]


def together(
    function: Callable[..., Any], arguments: Mapping[str, Any], kinds: Mapping[str, Hashable]
) -> dict[str, Any]:
    """`function(kind, *arguments)` of each layer; of layers of one kind and equal shapes at once.

    Args:
      function: Takes a kind, which is static, and trees of arrays; gives a tree of float32 arrays.
      arguments: Tuples of trees of arrays, by layer.
      kinds: By layer.
    """
    alike = collections.defaultdict(list)
    for name, args in arguments.items():
        leaves, treedef = jax.tree.flatten(args)
        alike[kinds[name], treedef, tuple(map(jax.typeof, leaves))].append(name)
    result = {}
    for (kind, *_), names in alike.items():
        of_kind = functools.partial(function, kind)
        if len(names) == 1:
            result[names[0]] = of_kind(*arguments[names[0]])
        else:
            found = _at_once(of_kind, [arguments[name] for name in names])
            result |= dict(zip(names, found, strict=True))
    return {name: result[name] for name in arguments}


def _at_once(function: Callable[..., Any], arguments: Sequence[Any]) -> list[Any]:
    of_one = jax.eval_shape(function, *arguments[0])

    def packed(args: Packed) -> Packed:
        return _packed(function(*_unpacked(_rows(args), arguments[0])))

    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *map(_packed, arguments))
    results = jax.vmap(packed)(stacked)
    rows = {key: _rows_of(result) for key, result in results.items()}
    return [
        _unpacked({key: of[i] for key, of in rows.items()}, of_one) for i in range(len(arguments))
    ]


def _key(array: Any) -> tuple[Any, ...]:
    return array.shape, array.dtype


def _packed(tree: Any) -> Packed:
    """The arrays of `tree`, those of one shape stacked."""
    alike = collections.defaultdict(list)
    for leaf in jax.tree.leaves(tree):
        alike[_key(leaf)].append(leaf)
    return {key: jnp.stack(leaves) for key, leaves in alike.items()}


def _unpacked(rows: Mapping[tuple[Any, ...], Sequence[Array]], like: Any) -> Any:
    """What `_packed` made of a tree of the structure and shapes of `like`, given its rows."""
    left = {key: iter(arrays) for key, arrays in rows.items()}
    return jax.tree.map(lambda leaf: next(left[_key(leaf)]), like)


def _rows(packed: Packed) -> dict[tuple[Any, ...], list[Array]]:
    return {key: list(arrays) for key, arrays in packed.items()}


def _rows_of(stacked: Array) -> list[list[Array]]:
    """The rows of each layer."""
    n_layers, n_rows, *shape = stacked.shape
    flat = stacked.reshape(-1, *shape)
    first = lax.broadcasted_iota(np.int32, (2, *shape), 0) == 0
    nothing = jnp.full((2, *shape), -jnp.inf, stacked.dtype)

    def at(place: int) -> Array:
        # A neighbour's place beside its own, which alone would be a number to XLA.
        places = np.array([[place], [place - 1 if place else 1]], np.int32)
        return _row(flat, places, first, nothing)

    return [[at(i * n_rows + j) for j in range(n_rows)] for i in range(n_layers)]


@jax.jit
def _row(flat: Array, places: Array, first: Array, nothing: Array) -> Array:
    """The first of the rows at two places; the others are shared by all rows of a stack."""
    numbers = lax.GatherDimensionNumbers(tuple(range(1, flat.ndim)), (0,), (0,))
    sizes, mode = (1, *flat.shape[1:]), lax.GatherScatterMode.PROMISE_IN_BOUNDS
    two = lax.gather(flat, places, numbers, sizes, mode=mode)
    # The maximum takes the first whatever is in both, and is one kernel with the gather.
    return jnp.max(lax.select(fitted(first, two), two, fitted(nothing, two)), axis=0)
