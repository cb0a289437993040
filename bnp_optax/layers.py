"""Layers as users give them, and as Flax's names tell."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from bnp_optax._tree import BIAS, sibling
from bnp_optax.statistics import Layer, Shape

# As `find_layers` gives them.
Layers = Mapping[str, Layer]


def check_layers(layers: Any, argument: str = "layers") -> None:
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
        f"`{argument}` must be a dict of `Layer` by kernel name; got {got}. To choose layers, "
        "filter those of `layers = bnp_optax.find_layers(loss_fn, params, ...)`: "
        "`layers={name: layer for name, layer in layers.items() if 'head' not in name}`."
    )
    raise ValueError(msg)


def by_convention(name: str, kernel: Shape, leaves: Mapping[str, Any]) -> Layer | None:
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
