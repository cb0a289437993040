"""The loss as a function of a step from the parameters, as one flat vector or one unit."""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from bnp_optax._tree import KERNEL, named_leaves, quoted, replace_leaves
from bnp_optax.layers import Layers, check_layers
from bnp_optax.preconditioners.base import Operator
from bnp_optax.preconditioners.layout import bias_axes, layers_of
from bnp_optax.statistics import Layer


class Coordinates(NamedTuple):
    """Flat coordinates of the floating-point leaves of a tree.

    Attributes:
      zero: The origin; float32 at least.
      embed: From coordinates to a tree, zero at the other leaves.
      extract: From a tree to coordinates.
    """

    zero: Float[Array, " n"]
    embed: Callable[[Array], Any]
    extract: Callable[[Any], Array]


def coordinates(params: Any, only: Collection[str] | None = None) -> Coordinates:
    """Coordinates of the floating-point leaves of `params`, or of those named in `only`.

    Raises:
      ValueError: If there is no such leaf.
    """
    named = named_leaves(params)
    names = [
        name
        for name, leaf in named.items()
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and (only is None or name in only)
    ]
    if not names:
        msg = f"`params` has no floating-point leaf to differentiate by; it has {quoted(named)}."
        raise ValueError(msg)

    def extract(tree: Any) -> Array:
        leaves = named_leaves(tree)
        # In bfloat16 an orthogonal basis would not stay orthogonal.
        return ravel_pytree([promoted(leaves[name]) for name in names])[0]

    zero, unravel = ravel_pytree([promoted(jnp.zeros_like(named[name])) for name in names])

    def embed(flat: Array) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return replace_leaves(zeros, dict(zip(names, unravel(flat), strict=True)))

    return Coordinates(zero, embed, extract)


def promoted(leaf: Array) -> Array:
    """The leaf in float32 at least."""
    return jnp.asarray(leaf).astype(jnp.promote_types(leaf.dtype, jnp.float32))


def displaced(
    loss_fn: Callable[..., Any], params: Any, args: tuple[Any, ...], step: Any
) -> Float[Array, ""]:
    """The loss at `params` + `step`."""
    return loss_fn(jax.tree.map(jnp.add, params, step), *args)


def find_layers(params: Any, layers: Layers | None) -> dict[str, Layer]:
    """The layers of `params` by kernel: those of `layers`, else of the leaves named `kernel`.

    Raises:
      ValueError: If there is none.
    """
    check_layers(layers)
    found = layers_of(params, layers)
    if not found:
        msg = (
            f"`params` has no leaf named `{KERNEL}` with two or more axes; it has "
            f"{quoted(named_leaves(params))}. For kernels of other names pass "
            "`layers=bnp_optax.find_layers(loss_fn, params, ...)`."
        )
        raise ValueError(msg)
    return found


def find_kernel(params: Any, kernel_path: str, layers: Layers | None) -> Layer:
    """The kernel of that name and its bias.

    Raises:
      ValueError: If there is no such kernel; the message lists those that exist.
    """
    found = find_layers(params, layers)
    if kernel_path not in found:
        msg = (
            f"`kernel_path` is {kernel_path!r}, which names no layer; the kernels of `params` are "
            f"{quoted(found, limit=32)}."
        )
        raise ValueError(msg)
    return found[kernel_path]


class Unit(NamedTuple):
    """Coordinates [b, w] of the units of one layer.

    Attributes:
      units: Number of units.
      size: Length of [b, w].
      has_bias: Whether there is a b.
      embed: From [b, w] and the index of the unit to a tree, zero elsewhere.
    """

    units: int
    size: int
    has_bias: bool
    embed: Callable[[Array, Any], Any]

    def extract(self, tree: Any, unit: Any) -> Array:
        """[b, w] of a unit in a tree of float32 at least."""
        zero = jnp.zeros(self.size, jnp.result_type(*jax.tree.leaves(tree)))
        (v,) = jax.linear_transpose(lambda v: self.embed(v, unit), zero)(tree)
        return v


def unit_coordinates(params: Any, layer: Layer) -> Unit:
    """Coordinates [b, w] of the units of a layer; w is in the order of the kernel's axes."""
    shape = layer.kernel_shape
    outputs = sorted(bias_axes(layer))
    inputs = [axis for axis in range(len(shape)) if axis not in outputs]
    order = (*inputs, *outputs)
    inverse = [order.index(axis) for axis in range(len(shape))]
    fan_in = math.prod(shape[axis] for axis in inputs)
    units = math.prod(shape[axis] for axis in outputs)
    has_bias = layer.bias is not None

    def embed(v: Array, unit: Any) -> Any:
        columns = jnp.zeros((fan_in, units), v.dtype).at[:, unit].set(v[1:] if has_bias else v)
        kernel = columns.reshape([shape[axis] for axis in order]).transpose(inverse)
        new = {layer.kernel: kernel}
        if layer.bias is not None:
            row = jnp.zeros(units, v.dtype).at[unit].set(v[0])
            aligned = row.reshape([n if i in outputs else 1 for i, n in enumerate(shape)])
            new[layer.bias] = layer.restore_bias(aligned, named_leaves(params)[layer.bias].shape)
        return replace_leaves(jax.tree.map(jnp.zeros_like, params), new)

    return Unit(units, fan_in + has_bias, has_bias, embed)


def multiply(P: Operator | None, tree: Any) -> Any:
    """P times a tree; the tree itself without P."""
    return tree if P is None else P.mv(tree)
