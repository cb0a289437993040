"""`find_layers`, `summarize` and `value_and_grad`: what users call to capture statistics."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp

from bnp_optax._checks import check_choice, check_count
from bnp_optax._tree import BIAS, KERNEL, is_named, named_leaves, quoted
from bnp_optax.capture import jaxpr, linen
from bnp_optax.capture.layer import Layer, idle_statistics, public
from bnp_optax.capture.reading import ConvStatistics, Options
from bnp_optax.statistics import LayerStats

Capture = Literal["auto", "linen", "jaxpr"]


@dataclasses.dataclass(frozen=True)
class _Discovery:
    """What an abstract trace of a loss tells.

    Attributes:
      layers: The covered layers.
      reasons: Why other leaves are not covered.
      unused: Those on which the loss does not depend.
    """

    layers: dict[str, Layer]
    reasons: dict[str, str]
    unused: list[str]


def _options(
    capture: Capture,
    conv_statistics: ConvStatistics,
    sample_rows: int | None,
    embeddings: bool,
    weighted: bool = False,
) -> Options:
    check_choice("capture", capture, ("auto", "linen", "jaxpr"))
    check_choice("conv_statistics", conv_statistics, ("channel", "patch"))
    check_count("sample_rows", sample_rows)
    options = Options(conv_statistics, sample_rows, embeddings, weighted)
    if capture == "linen" and options.need_jaxpr:
        msg = (
            f"{options.need_jaxpr} needs `capture='jaxpr'` or `'auto'`: the Linen engine sees a "
            "layer's inputs, but not its window, lookups or steps in time."
        )
        raise ValueError(msg)
    return options


def _by_linen(
    loss_fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    capture: Capture,
    options: Options,
) -> _Discovery | None:
    """What the Linen engine finds, or None if the loss is for the other engine."""
    may_be_linen = linen.has_kernels(params) and not options.need_jaxpr
    if capture == "jaxpr" or (capture == "auto" and not may_be_linen):
        return None
    found = _Discovery(*linen.discover(loss_fn, params, args, kwargs, options))
    return found if found.layers or capture == "linen" else None


def _discover(
    loss_fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    capture: Capture,
    options: Options,
) -> _Discovery:
    found = _by_linen(loss_fn, params, args, kwargs, capture, options)
    if found is not None:
        return found
    traced = jaxpr.find(loss_fn, params, args, kwargs, options)
    return _Discovery(jaxpr.layers(traced), traced.reasons, traced.unused)


def find_layers(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    capture: Capture = "auto",
    conv_statistics: ConvStatistics = "channel",
    embeddings: bool = False,
    **kwargs: Any,
) -> dict[str, Layer]:
    """The layers whose input statistics can be captured, found by an abstract trace (no FLOPs).

    Filter the result and pass it as `layers=` to choose what is preconditioned; pass it whole to
    give the optimizer its final shapes before the first step.

    Args:
      loss_fn: A loss, `loss_fn(params, *args, **kwargs)`.
      params: The parameters, arrays or `jax.ShapeDtypeStruct`s.
      *args: Further arguments, likewise.
      capture: As in `value_and_grad`.
      conv_statistics: As in `value_and_grad`; it decides the statistics' shapes.
      embeddings: As in `value_and_grad`.
      **kwargs: Further keyword arguments.

    Returns:
      A dict from kernel name to `Layer`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import bnp_optax
      >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> layers = bnp_optax.find_layers(loss_fn, params)
      >>> {name: (layer.kind, layer.fan_in) for name, layer in layers.items()}
      {'layers_0/kernel': ('Dense', 3), 'layers_2/kernel': ('Dense', 8)}
    """
    options = _options(capture, conv_statistics, None, embeddings)
    found = _discover(loss_fn, params, args, kwargs, capture, options).layers
    return {n: public(layer) for n, layer in found.items()}


@dataclasses.dataclass(frozen=True)
class Summary:
    """Every kernel of a loss: the covered ones, and why the others are not. `print` it.

    Attributes:
      layers: The covered layers by kernel name.
      uncovered: Reason by leaf name, for every other leaf of two or more axes but biases.
      shapes: Shape by leaf name, of all of these.
    """

    layers: dict[str, Layer]
    uncovered: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    def __str__(self) -> str:
        """A table with a row for each kernel."""
        header = ("kernel", "layer", "shape", "fan-in", "positions", "q²", "bias", "covered")
        rows: list[tuple[str, ...]] = [header]
        for name, shape in self.shapes.items():
            text = "x".join(map(str, shape))
            layer = self.layers.get(name)
            if layer is None:
                rows.append((name, "", text, "", "", "", "", f"no: {self.uncovered[name]}"))
            else:
                bias = "yes" if layer.bias else "no"
                fan_in, q_squared = str(layer.fan_in), f"{layer.q_squared:.4g}"
                positions = str(layer.positions)
                facts = (layer.kind, text, fan_in, positions, q_squared, bias)
                rows.append((name, *facts, f"yes, by {layer.engine}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        n_entries = sum(math.prod(shape) for shape in self.shapes.values())
        n_covered = sum(math.prod(self.shapes[name]) for name in self.layers)
        share = 100 * n_covered / n_entries if n_entries else 0.0
        lines.append(
            f"{len(self.layers)} of {len(self.shapes)} kernels covered, "
            f"{share:.1f}% of their {n_entries:,} entries."
        )
        return "\n".join(lines)


def summarize(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    capture: Capture = "auto",
    embeddings: bool = False,
    **kwargs: Any,
) -> Summary:
    """What is preconditioned and what is not, and why: print the result.

    Lists every floating-point leaf that is covered or has two or more axes, but for biases. q² is
    that of one call of the layer on these arguments.

    Args:
      loss_fn: As for `find_layers`.
      params: As for `find_layers`.
      *args: Further arguments of the loss.
      capture: As in `value_and_grad`.
      embeddings: As in `value_and_grad`.
      **kwargs: Further keyword arguments of the loss.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import bnp_optax
      >>> model, x = nn.Sequential([nn.Embed(10, 4), nn.Dense(2)]), jnp.ones((8,), jnp.int32)
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> print(bnp_optax.summarize(loss_fn, params))
      kernel              layer  shape  fan-in  positions  q²  bias  covered
      ------------------  -----  -----  ------  ---------  --  ----  ---------------------------
      layers_0/embedding         10x4                                no: not a kernel of a layer
      layers_1/kernel     Dense  4x2    4       1          1   yes   yes, by linen
      1 of 2 kernels covered, 16.7% of their 48 entries.
    """
    options = _options(capture, "channel", None, embeddings)
    found = _discover(loss_fn, params, args, kwargs, capture, options)
    layers = found.layers
    biases = {layer.bias for layer in layers.values()}
    shapes = {
        name: tuple(leaf.shape)
        for name, leaf in named_leaves(params).items()
        if name in layers or (name not in biases and _may_be_kernel(name, leaf))
    }
    uncovered = {
        name: found.reasons.get(name, "not a kernel of a layer")
        for name in shapes
        if name not in layers
    }
    return Summary(layers, uncovered, shapes)


def _may_be_kernel(name: str, leaf: Any) -> bool:
    is_matrix = len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.inexact)
    return is_matrix and not is_named(name, BIAS)


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    layers: Mapping[str, Layer] | None = None,
    capture: Capture = "auto",
    *,
    conv_statistics: ConvStatistics = "channel",
    sample_rows: int | None = None,
    embeddings: bool = False,
    weights: Callable[..., Any] | None = None,
    fixed: Mapping[str, LayerStats] | None = None,
) -> Callable[..., tuple[Any, Any, dict[str, LayerStats]]]:
    """`jax.value_and_grad` that also returns the statistics of every layer's inputs.

    The network is run once and is not changed. The value and the gradient are those that
    `jax.value_and_grad` gives.

    There are two engines. `'linen'` captures by Flax's interceptors; while it is differentiated,
    the loss sees beside each kernel a leaf of zeros more than `params` has. `'jaxpr'` works for
    any JAX code (NNX, Equinox, Haiku, functions of arrays): it finds the products that parameters
    enter in what the loss is traced to, through `jit`, `checkpoint`, `scan`, `cond`, `vmap`,
    `shard_map`, and functions with derivatives of their own. `'auto'` takes Linen's where the loss
    runs Linen layers, else the other.

    Use it under `jax.jit`. Under data parallelism with explicit collectives, average the
    statistics like the gradients: `jax.lax.pmean(stats, axis_name)`.

    Args:
      loss_fn: The loss, `loss_fn(params, *args, **kwargs)`; returns a scalar, or
        `(scalar, aux)` with `has_aux`.
      has_aux: As in `jax.value_and_grad`.
      layers: The layers to capture, from `find_layers`; None finds all of them at trace time.
      capture: `'linen'`, `'jaxpr'`, or `'auto'`.
      conv_statistics: Of convolutions: `'channel'` takes the moments of each channel of the
        feature map, (21) and (22) of the JMLR paper; `'patch'` those of the entries that each
        kernel entry meets, zeros of the padding included, (19) and (20), by the jaxpr engine.
        They differ at the map's border only (Proposition 10).
      sample_rows: Take the statistics from this many rows of the batch (examples, positions of a
        sequence, pixels), spread evenly and always the same; None for all. `count` stays that
        of the whole batch.
      embeddings: Whether to cover tables that rows are looked up in, as layers without a bias of
        one-hot inputs, whose mean is the row's frequency (by the jaxpr engine).
      weights: A function of the loss's arguments, `weights(*args, **kwargs)`, that returns weights
        >= 0 of shape (batch,), or (batch, length) such as a padding mask: rows of weight 0 do not
        count (by the jaxpr engine). It changes the statistics only, not the loss.
      fixed: Statistics from `dataset_statistics`, returned as they are for layers that then cost
        nothing.

    Returns:
      A function of `(params, *args, **kwargs)` that returns `(loss, grads, stats)`; `loss` is
      `(loss, aux)` with `has_aux`; `stats` is a dict from kernel name to `LayerStats`. A layer
      that exists but never runs has statistics with `count == 0`.

    Raises:
      ValueError: If no layer is found, `layers` names one that `params` has not, or an option
        is not one of those above.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p, x: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> loss, grads, stats = jax.jit(bnp_optax.value_and_grad(loss_fn))(params, x)
      >>> sorted(stats), stats["kernel"].mean.shape
      (['kernel'], (3, 1))
      >>> bool(jnp.allclose(loss, loss_fn(params, x)))
      True

      Without a framework, each product with a parameter is a layer:

      >>> loss_fn = lambda p, x: jnp.mean((jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]) ** 2)
      >>> params = {"w1": jnp.ones((3, 2)), "b1": jnp.zeros(2), "w2": jnp.ones((2, 1))}
      >>> loss, grads, stats = jax.jit(bnp_optax.value_and_grad(loss_fn))(params, x)
      >>> {name: (s.bias, s.mean.shape) for name, s in stats.items()}
      {'w1': ('b1', (3, 1)), 'w2': (None, (2, 1))}
    """
    options = _options(capture, conv_statistics, sample_rows, embeddings, weights is not None)

    @functools.wraps(loss_fn)
    def wrapped(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, dict[str, LayerStats]]:
        leaves = named_leaves(params)
        known = dict(fixed or {})
        _check_names("fixed", dict.fromkeys(known), leaves)
        chosen, unused = None if layers is None else dict(layers), []
        if chosen is not None:
            _check_names("layers", {n: layer.kernel_shape for n, layer in chosen.items()}, leaves)
        if True:
            found = _by_linen(loss_fn, params, args, kwargs, capture, options)
            by_linen = found is not None
            if found is not None:
                chosen = {n: l for n, l in found.layers.items() if chosen is None or n in chosen}
                unused = found.unused
                _check_any(found, leaves)
        if by_linen:
            captured = {n: layer for n, layer in (chosen or {}).items() if n not in known}
            value, grads, stats = linen.value_and_grad(
                loss_fn, captured, params, args, kwargs, has_aux, options
            )
            stats |= {name: idle_statistics(name, leaves) for name in unused}
        else:
            value, grads, stats = jaxpr.value_and_grad(
                loss_fn,
                chosen,
                params,
                args,
                kwargs,
                has_aux,
                options,
                left_out=known,
                weights=None if weights is None else jnp.asarray(weights(*args, **kwargs)),
            )
        return value, grads, stats | known

    return wrapped


def _check_any(found: _Discovery, leaves: Mapping[str, Any]) -> None:
    """Raise if the Linen engine, asked for by name, finds nothing."""
    if found.layers:
        return
    kernels = "; ".join(f"`{name}`: {reason}" for name, reason in found.reasons.items())
    msg = (
        "The loss runs no Linen layer whose inputs could be captured "
        f"({kernels or f'no leaf is named `{KERNEL}`'}). Call a `flax.linen` model in the loss "
        "with the `params` that it is given, or capture with `capture='jaxpr'`."
    )
    raise ValueError(msg)


def _check_names(
    argument: str, shapes: Mapping[str, tuple[int, ...] | None], leaves: Mapping[str, Any]
) -> None:
    """Raise unless `params` has kernels of these names, and of these shapes if given."""
    for name, expected in shapes.items():
        shape = tuple(leaves[name].shape) if name in leaves else None
        if shape is None or expected not in (None, shape):
            kernels = [leaf for leaf in leaves if is_named(leaf, KERNEL)] or list(leaves)
            of_shape = "" if expected is None else f" of shape {expected}"
            msg = (
                f"`{argument}` has `{name}`{of_shape}, but `params` has "
                f"{'no such leaf' if shape is None else f'it with shape {shape}'}. The kernels "
                f"of `params` are {quoted(kernels)}. Call `find_layers` on these `params`."
            )
            raise ValueError(msg)
