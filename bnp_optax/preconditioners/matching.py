"""Statistics that came with a step, checked against the kernels that they are for."""

from collections.abc import Mapping
from typing import Any

from bnp_optax._tree import KERNEL, absent, is_named, named_leaves, quoted
from bnp_optax.preconditioners.layout import Layers, Slot, aligned_bias_shape, kernels
from bnp_optax.statistics import LayerStats

LEFT_OUT = object()

_HOW_TO_PASS = (
    "Take the statistics from `loss, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, "
    "...)` and pass them on: `tx.update(grads, state, params, layer_stats=stats)`; "
    "`layer_stats=None` reuses the running ones."
)
_DROPPED = (
    " If you did, a wrapper dropped it: `optax.MultiSteps` inside a chain does, unless given as "
    "`optax.GradientTransformationExtraArgs(multi.init, multi.update)`."
)


def match_statistics(
    grads: Any, layers: Layers | None, layer_stats: Any
) -> list[tuple[Slot, LayerStats]]:
    """The kernels of `grads` with their statistics; none if there is nothing to update.

    Raises:
      ValueError: If statistics were left out, or do not fit the kernels.
    """
    if layer_stats is None:
        return []
    expected = kernels(grads, layers)
    if layer_stats is LEFT_OUT:
        if expected:
            names = quoted(expected)
            msg = f"`layer_stats` was left out, but there are layers to precondition: {names}. "
            raise ValueError(msg + _HOW_TO_PASS + _DROPPED)
        return []
    if not isinstance(layer_stats, Mapping):
        msg = f"`layer_stats` must be a dict of `LayerStats`, got {type(layer_stats).__name__}. "
        raise ValueError(msg + _HOW_TO_PASS)
    leaves = named_leaves(grads)
    _check_strangers(grads, leaves, layers, layer_stats)
    matched = []
    for name in expected:
        stats = layer_stats.get(name)
        if not isinstance(stats, LayerStats):
            came = "none for it, but"
            if stats is not None:
                came = f"a `{type(stats).__name__}` for it among"
            msg = (
                f"`{name}` is to be preconditioned and needs `LayerStats`; `layer_stats` has "
                f"{came} {quoted(layer_stats)}. `print(bnp_optax.summarize(loss_fn, params, ...))` "
                "says why a layer is not captured; to leave it as it is, pass "
                "`layers=bnp_optax.find_layers(loss_fn, params, ...)` to the preconditioner."
            )
            raise ValueError(msg)
        slot = _fit(name, stats, leaves)
        if slot.bias not in (None, expected[name]):
            msg = (
                f"`{name}` has the bias `{stats.bias}`, which its name does not tell: pass "
                "`layers=bnp_optax.find_layers(loss_fn, params, ...)` to the preconditioner."
            )
            raise ValueError(msg)
        matched.append((slot, stats))
    return matched


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
    if unnamed and not isinstance(layers, Mapping):
        msg = (
            f"`layer_stats` has {quoted(unnamed)}, which is not named `{KERNEL}`: pass "
            "`layers=bnp_optax.find_layers(loss_fn, params, ...)` to the preconditioner."
        )
        raise ValueError(msg)


def _fit(name: str, stats: LayerStats, leaves: Mapping[str, Any]) -> Slot:
    """What to keep for a kernel, as its statistics say."""
    kernel = tuple(leaves[name].shape)
    shape = tuple(stats.mean.shape)
    fits = len(shape) == len(kernel) and all(
        size in (1, full) for size, full in zip(shape, kernel, strict=True)
    )
    if not fits or stats.var.shape != shape or stats.sq_mean.shape != shape:
        msg = (
            f"The statistics of `{name}` have shapes mean {shape}, var {tuple(stats.var.shape)}, "
            f"sq_mean {tuple(stats.sq_mean.shape)}; expected one shape with {len(kernel)} axes "
            f"that broadcasts against the kernel's {kernel}. Capture them with the parameters "
            "that are optimized."
        )
        raise ValueError(msg)
    bias = stats.bias if stats.bias in leaves else None
    return Slot(name, bias, shape, aligned_bias_shape(kernel, stats.input_axes))
