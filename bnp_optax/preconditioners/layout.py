"""Which layers of a tree are preconditioned: those given, or those that Flax's names tell."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from bnp_optax._tree import BIAS, KERNEL, absent, is_named, named_leaves, quoted, sibling
from bnp_optax.statistics import Axes, Layer, Shape

# As `find_layers` gives them.
Layers = Mapping[str, Layer]


def check_layers(layers: Any) -> None:
    """Raise unless `layers` is None or a dict of `Layer` by kernel name."""
    if layers is None:
        return
    if not isinstance(layers, Mapping):
        got = f"a `{type(layers).__name__}`"
    else:
        others = [name for name, layer in layers.items() if not isinstance(layer, Layer)]
        if not others:
            return
        got = f"a dict with a `{type(layers[others[0]]).__name__}` for `{others[0]}`"
    msg = (
        f"`layers` must be a dict of `Layer` by kernel name; got {got}. To choose layers, filter "
        "what `find_layers` returns: `layers = bnp_optax.find_layers(loss_fn, params, ...)`, then "
        "`layers={name: layer for name, layer in layers.items() if 'head' not in name}`."
    )
    raise ValueError(msg)


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
            layer = _convention(name, shape, leaves) if is_named(name, KERNEL) else None
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


def _convention(name: str, kernel: Shape, leaves: Mapping[str, Any]) -> Layer | None:
    """The layer that a leaf named `kernel` is by Flax's conventions, from shapes alone.

    A bias has the axes of its kernel less the input axes, which precede the features and follow
    stacked axes. Where the sibling bias is not like that, which bias the layer has is unknown.
    Without a bias, all but the last axis are taken for input axes. Three or more input axes are
    those of a convolution, whose statistics do not vary in space.
    """
    ndim = len(kernel)
    if ndim < 2:
        return None
    bias = sibling(name, BIAS)
    axes, found = range(ndim - 1), None
    if bias in leaves:
        shape = tuple(jnp.shape(leaves[bias]))
        n_inputs = ndim - len(shape)
        for start in range(len(shape) - 1, -1, -1):
            if n_inputs > 0 and kernel[:start] + kernel[start + n_inputs :] == shape:
                axes, found = range(start, start + n_inputs), bias
                break
    inputs = tuple(axis - ndim for axis in axes)
    stacked = tuple(range(-ndim, inputs[0]))
    varying = stacked + (inputs[-1:] if len(inputs) >= 3 else inputs)
    return Layer(name, found, inputs, stats_axes=varying, kernel_shape=kernel)
