"""Which layers of a tree are preconditioned: those given, or those that Flax's names tell."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from bnp_optax._tree import KERNEL, absent, is_named, named_leaves, quoted
from bnp_optax.layers import Layers, by_convention
from bnp_optax.statistics import Axes, Layer, Shape


def layers_of(tree: Any, layers: Layers | None) -> dict[str, Layer]:
    """The layers of `tree` that are preconditioned, by kernel, in flattening order.

    They are those of `layers`; without it, every real leaf named `kernel` with two or more axes,
    with its sibling `bias` where the shapes are as Flax has them. A bias that is not in `tree`,
    such as one hidden by a mask, leaves a layer that cannot be centered.

    Raises:
      ValueError: If a kernel is complex, or `layers` does not fit `tree`.
    """
    leaves = named_leaves(tree)
    if layers is not None:
        _check_fit(layers, tree, leaves)
    result = {}
    for name, leaf in leaves.items():
        shape = tuple(jnp.shape(leaf))
        if layers is not None:
            layer = layers.get(name)
        else:
            layer = by_convention(name, shape, leaves) if is_named(name, KERNEL) else None
        if layer is None:
            continue
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            msg = (
                f"`{name}` is complex ({leaf.dtype}); the statistics of its inputs are "
                "defined for real kernels only. Leave it out with `optax.masked` or `layers=`."
            )
            raise ValueError(msg)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and 0 not in shape:
            result[name] = placed(layer, shape, leaves)
    return result


def placed(layer: Layer, kernel_shape: Shape, leaves: Mapping[str, Any]) -> Layer:
    """`layer` with the shape of its kernel, and without a bias that is not among `leaves`."""
    bias = layer.bias if layer.bias in leaves else None
    return dataclasses.replace(layer, kernel_shape=kernel_shape, bias=bias)


def bias_axes(layer: Layer) -> Axes:
    """For each axis of the bias, the axis of the kernel that it runs along, counted from 0."""
    ndim = len(layer.kernel_shape)
    if layer.bias_axes is not None:
        return tuple(axis % ndim for axis in layer.bias_axes)
    inputs = {axis % ndim for axis in layer.input_axes}
    return tuple(axis for axis in range(ndim) if axis not in inputs)


def _check_fit(layers: Layers, tree: Any, leaves: Mapping[str, Any]) -> None:
    remedy = "Call `find_layers` on the `params` that the optimizer gets."
    missing = absent(layers, tree) if leaves else []
    if missing:
        msg = (
            f"`layers` has {quoted(missing)}, which the parameters have not; their leaves "
            f"are {quoted(leaves)}. {remedy}"
        )
        raise ValueError(msg)
    for name, layer in layers.items():
        shape = tuple(jnp.shape(leaves[name])) if name in leaves else layer.kernel_shape
        if layer.kernel_shape not in ((), shape):
            msg = (
                f"`layers` has `{name}` with shape {layer.kernel_shape}, but the parameters "
                f"have it with shape {shape}. {remedy}"
            )
            raise ValueError(msg)


def to_matrix(layer: Layer, kernel: Array) -> Array:
    """A kernel as matrices of inputs by outputs, (*blocks, n, m)."""
    cut, order = _matrix_axes(layer)
    blocks, n = layer.block_shape, layer.fan_in
    return jnp.transpose(kernel.reshape(cut), order).reshape(*blocks, n, -1)


def from_matrix(layer: Layer, matrix: Array) -> Array:
    """What `to_matrix` made of a kernel, back in the kernel's shape."""
    cut, order = _matrix_axes(layer)
    moved = matrix.reshape([cut[axis] for axis in order])
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return jnp.transpose(moved, inverse).reshape(layer.kernel_shape)


def _matrix_axes(layer: Layer) -> tuple[list[int], list[int]]:
    """The kernel's shape with axes of groups cut in two, and its axes: blocks, inputs, outputs."""
    inputs, blocks = layer.block_layout
    numbers = dict(blocks)
    cut: list[int] = []
    first, second, third = [], [], []
    for axis, size in enumerate(layer.kernel_shape):
        if axis in numbers and numbers[axis] != size:
            first.append(len(cut))
            third.append(len(cut) + 1)
            cut += [numbers[axis], size // numbers[axis]]
            continue
        kind = second if axis in inputs else first if axis in numbers else third
        kind.append(len(cut))
        cut.append(size)
    return cut, [*first, *second, *third]
