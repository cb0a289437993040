"""Layers of one shape computed together.

A deep network has many layers of few shapes. What an update makes of the statistics of one, some
dozen operations on short vectors, is the same for all of a shape: stacked along a new axis, they
are computed at once, and XLA starts and compiles the kernels of one layer.

Two things keep what is left to each layer small. A layer's arrays of equal shape are stacked before
the layers are, which is one kernel a layer whatever their number. And a row is taken from the stack
by a gather at places that are an array: at places that are numbers XLA would compile the kernel of
each layer anew, 10 to 40 ms on a CPU, and of an array of one place it makes a number.
"""

import collections
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bnp_optax._explicit import fitted, spec_of

# Entries of a row of which a copy costs less than computing it anew may.
_SHORT = 2**15

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


def in_one_axis(x: Array, like: Array) -> Array:
    """Moments as matrices, or in a mesh of explicit axes without those where `like` has size 1."""
    if spec_of(like) is None:
        return jnp.broadcast_to(x, (len(x), *like.shape[1:])).reshape(len(x), -1)
    return jnp.squeeze(x, tuple(axis for axis, size in enumerate(like.shape) if size == 1))


def _at_once(function: Callable[..., Any], arguments: Sequence[Any]) -> list[Any]:
    of_one = jax.eval_shape(function, *arguments[0])

    def packed(args: Packed) -> Packed:
        rows = {key: list(arrays) for key, arrays in args.items()}
        results = _by_shape(function(*_unpacked(rows, arguments[0])))
        return {key: jnp.stack(arrays) for key, arrays in results.items()}

    by_layer = list(map(_by_shape, arguments))
    stacked = {key: _stacked([of[key] for of in by_layer]) for key in by_layer[0]}
    results = jax.tree.map(_computed, jax.vmap(packed, out_axes=1)(stacked))
    rows = {key: _rows_of(result) for key, result in results.items()}
    return [
        _unpacked({key: of[i] for key, of in rows.items()}, of_one) for i in range(len(arguments))
    ]


def _key(array: Any) -> tuple[Any, ...]:
    return array.shape, array.dtype


def _by_shape(tree: Any) -> dict[tuple[Any, ...], list[Array]]:
    alike = collections.defaultdict(list)
    for leaf in jax.tree.leaves(tree):
        alike[_key(leaf)].append(leaf)
    return alike


def _stacked(arrays: Sequence[Sequence[Array]]) -> Array:
    """The arrays of all layers, first along the layers."""
    if len(arrays[0]) == 1:
        return jnp.stack([one for (one,) in arrays])[:, None]
    return jnp.stack([jnp.stack(of_layer) for of_layer in arrays])


def _unpacked(rows: Mapping[tuple[Any, ...], Sequence[Array]], like: Any) -> Any:
    """A tree of the structure and shapes of `like`, from its arrays by shape."""
    left = {key: iter(arrays) for key, arrays in rows.items()}
    return jax.tree.map(lambda leaf: next(left[_key(leaf)]), like)


def _rows_of(stacked: Array) -> list[list[Array]]:
    """The rows of each layer."""
    n_rows, n_layers, *shape = stacked.shape
    flat = stacked.reshape(-1, *shape)
    choice = _choice((2, *shape), flat.dtype)

    def at(place: int) -> Array:
        # A neighbour's place beside its own, which alone would be a number to XLA.
        return _row(flat, np.array([[place], [place - 1 if place else 1]], np.int32), *choice)

    return [[at(j * n_layers + i) for j in range(n_rows)] for i in range(n_layers)]


@jax.jit
def _row(flat: Array, places: Array, is_first: Array, nothing: Array) -> Array:
    """The first of the rows at two places."""
    numbers = lax.GatherDimensionNumbers(tuple(range(1, flat.ndim)), (0,), (0,))
    sizes, mode = (1, *flat.shape[1:]), lax.GatherScatterMode.PROMISE_IN_BOUNDS
    # One kernel with the gather, which a slice is not.
    two = lax.gather(flat, places, numbers, sizes, mode=mode)
    return _first_of(two, is_first, nothing)


def _computed(stacked: Array) -> Array:
    """The same array, which XLA then does not compute anew in the kernel of each row taken.

    It copies what makes an array into the kernels that read it, however much that is, but for
    reductions. Long rows, such as eigenvectors, are no result of cheap operations.
    """
    if math.prod(stacked.shape[2:]) > _SHORT:
        return stacked
    two = jnp.broadcast_to(stacked, (2, *stacked.shape))
    return _first_of(two, *_choice(two.shape, two.dtype))


def _first_of(two: Array, is_first: Array, nothing: Array) -> Array:
    """The first of two arrays, by a maximum, whatever is in both."""
    return jnp.max(lax.select(fitted(is_first, two), two, fitted(nothing, two)), axis=0)


def _choice(shape: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
    """Where the first of two arrays is, and what not to choose; rows of one shape share them."""
    return lax.broadcasted_iota(np.int32, shape, 0) == 0, jnp.full(shape, -jnp.inf, dtype)
