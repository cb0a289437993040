"""Statistics that came with a step, checked against the kernels that they are for."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from bnp_optax._tree import KERNEL, absent, is_named, named_leaves, quoted
from bnp_optax.layers import Layers
from bnp_optax.preconditioners.layout import bias_axes, layers_of, placed
from bnp_optax.statistics import Layer, LayerStats

LEFT_OUT = object()

_HOW_TO_PASS = (
    "Take the statistics from `loss, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, "
    "...)` and pass them on: `tx.update(grads, state, params, layer_stats=stats)`, or "
    "`state.apply_gradients(grads=grads, layer_stats=stats)` of `bnp_optax.TrainState` (Flax's own "
    "does not pass them on); `layer_stats=None` reuses the running ones."
)
_DROPPED = (
    " If you did, what is around dropped it: `optax.MultiSteps` inside a chain does (use "
    "`bnp_optax.multi_steps` in its place), and `in_zspace` keeps it from what runs in z, whose "
    "inputs it does not describe (take one `in_zspace`; one P of two, each with `layers` of its "
    "own, makes `bnp_optax.compose`)."
)
_FIND_LAYERS = "`layers=bnp_optax.find_layers(loss_fn, params, ...)`"


def match_statistics(
    grads: Any, layers: Layers | None, layer_stats: Any
) -> dict[str, tuple[Layer, LayerStats]]:
    """The layers of `grads` with their statistics; none if there is nothing to update.

    Raises:
      ValueError: If statistics were left out, or do not fit the kernels.
    """
    if layer_stats is None:
        return {}
    expected = layers_of(grads, layers)
    if layer_stats is LEFT_OUT:
        if expected:
            names = quoted(expected)
            msg = f"`layer_stats` was left out, but there are layers to precondition: {names}. "
            raise ValueError(msg + _HOW_TO_PASS + _DROPPED)
        return {}
    if not isinstance(layer_stats, Mapping):
        msg = f"`layer_stats` must be a dict of `LayerStats`, got {type(layer_stats).__name__}. "
        raise ValueError(msg + _HOW_TO_PASS)
    leaves = named_leaves(grads)
    _check_strangers(grads, leaves, layers, layer_stats)
    matched = {}
    for name, layer in expected.items():
        stats = layer_stats.get(name)
        if not isinstance(stats, LayerStats):
            came = "none for it, but"
            if stats is not None:
                came = f"a `{type(stats).__name__}` for it among"
            msg = (
                f"`{name}` is to be preconditioned and needs `LayerStats`; `layer_stats` has "
                f"{came} {quoted(layer_stats)}. `print(bnp_optax.summarize(loss_fn, params, ...))` "
                f"says why a layer is not captured; to leave it as it is, pass {_FIND_LAYERS} to "
                "the preconditioner."
            )
            raise ValueError(msg)
        _check_shapes(layer, stats)
        if layers is None:
            layer = _settled(layer, placed(stats.layer, layer.kernel_shape, leaves))
        # A layer that was written by hand may lack the shape, which `LayerStats.input_mean` needs.
        of_shape = dataclasses.replace(stats.layer, kernel_shape=layer.kernel_shape)
        matched[name] = (layer, dataclasses.replace(stats, layer=of_shape))
    return matched


def check_same_layers(preconditioner: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raise unless the layers of the updates are those of the state."""
    if list(found) != list(expected):
        msg = (
            f"The updates have the layers {quoted(found)}, but the state of `{preconditioner}` was "
            f"made for {quoted(expected)}. Call `init` on parameters of the updates' structure."
        )
        raise ValueError(msg)


def _settled(guess: Layer, found: Layer) -> Layer:
    """The layer that was found by capture, if its bias is the one that its name tells.

    Without a bias, which axes are summed over makes no difference before the statistics come.
    """
    if found.bias is None and guess.bias is None:
        return found
    if (found.bias, bias_axes(found)) == (guess.bias, bias_axes(guess)):
        return found

    def described(layer: Layer) -> str:
        if layer.bias is None:
            return "no bias"
        return f"the bias `{layer.bias}` along the kernel's axes {bias_axes(layer)}"

    msg = (
        f"The statistics say that `{guess.kernel}` has {described(found)}; its name and shape "
        f"{guess.kernel_shape} tell of {described(guess)}. Pass {_FIND_LAYERS} to the "
        "preconditioner."
    )
    raise ValueError(msg)


def _check_strangers(
    grads: Any,
    leaves: Mapping[str, Any],
    layers: Layers | None,
    layer_stats: Mapping[str, Any],
) -> None:
    """Statistics of a kernel that is not there, or that nothing says to be one."""
    strangers = absent(layer_stats, grads)
    if strangers:
        msg = (
            f"`layer_stats` has {quoted(strangers)}, which the updates have not; their leaves are "
            f"{quoted(leaves)}. Capture and optimize the same tree, and precondition before "
            "anything, such as `optax.flatten`, changes its structure."
        )
        raise ValueError(msg)
    unnamed = [name for name in layer_stats if name in leaves and not is_named(name, KERNEL)]
    if unnamed and layers is None:
        msg = (
            f"`layer_stats` has {quoted(unnamed)}, which is not named `{KERNEL}`: pass "
            f"{_FIND_LAYERS} to the preconditioner."
        )
        raise ValueError(msg)


def _check_shapes(layer: Layer, stats: LayerStats) -> None:
    kernel, shape = layer.kernel_shape, tuple(jnp.shape(stats.mean))
    fits = len(shape) == len(kernel) and all(
        size in (1, full) for size, full in zip(shape, kernel, strict=True)
    )
    if not fits or stats.var.shape != shape or stats.sq_mean.shape != shape:
        msg = (
            f"The statistics of `{layer.kernel}` have shapes mean {shape}, var "
            f"{tuple(stats.var.shape)}, sq_mean {tuple(stats.sq_mean.shape)}; expected one shape "
            f"with {len(kernel)} axes that broadcasts against the kernel's {kernel}. Capture them "
            "with the parameters that are optimized."
        )
        raise ValueError(msg)
