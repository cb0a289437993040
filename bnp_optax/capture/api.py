"""`find_layers`, `summarize` and `value_and_grad`: what users call to capture statistics."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp

from bnp_optax._checks import check_choice
from bnp_optax._tree import BIAS, KERNEL, is_named, named_leaves, quoted, sibling
from bnp_optax.capture import linen
from bnp_optax.capture.layer import Layer
from bnp_optax.statistics import LayerStats

Capture = Literal["auto", "linen"]


def find_layers(
    loss_fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> dict[str, Layer]:
    """The layers whose input statistics can be captured, found by an abstract trace (no FLOPs).

    Filter the result and pass it as `layers=` to choose what is preconditioned; pass it whole to
    give the optimizer its final shapes before the first step.

    Args:
      loss_fn: A loss that calls a Linen model, `loss_fn(params, *args, **kwargs)`.
      params: The parameters, arrays or `jax.ShapeDtypeStruct`s.
      *args: Further arguments, likewise.
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
    layers, _, _ = linen.discover(loss_fn, params, args, kwargs)
    return layers


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
                rows.append((name, layer.kind, text, fan_in, positions, q_squared, bias, "yes"))
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


def summarize(loss_fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Summary:
    """What is preconditioned and what is not, and why: print the result.

    Lists every floating-point leaf with two or more axes that is not named `bias`. q² is that of
    one call of the layer on these arguments.

    Args:
      loss_fn: As for `find_layers`.
      params: As for `find_layers`.
      *args: Further arguments of the loss.
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
      layers_1/kernel     Dense  4x2    4       1          1   yes   yes
      1 of 2 kernels covered, 16.7% of their 48 entries.
    """
    layers, reasons, _ = linen.discover(loss_fn, params, args, kwargs)
    shapes = {
        name: tuple(leaf.shape)
        for name, leaf in named_leaves(params).items()
        if name in layers or _may_be_kernel(name, leaf)
    }
    uncovered = {
        name: reasons.get(name, "not a kernel of a layer") for name in shapes if name not in layers
    }
    return Summary(layers, uncovered, shapes)


def _may_be_kernel(name: str, leaf: Any) -> bool:
    is_matrix = len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.inexact)
    return is_matrix and not is_named(name, BIAS)


def _idle_stats(name: str, params: dict[str, Any]) -> LayerStats:
    """Statistics of a layer that never runs: of no input at all."""
    kernel, bias = params[name], sibling(name, BIAS)
    shape = (*kernel.shape[:-1], 1)
    zeros = jnp.zeros(shape, jnp.float32)
    return LayerStats(
        mean=zeros,
        var=zeros,
        sq_mean=zeros,
        count=jnp.zeros((), jnp.float32),
        kernel=name,
        bias=bias if bias in params else None,
        input_axes=tuple(range(-kernel.ndim, -1)),
        positions=1,
    )


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    layers: Mapping[str, Layer] | None = None,
    capture: Capture = "auto",
) -> Callable[..., tuple[Any, Any, dict[str, LayerStats]]]:
    """`jax.value_and_grad` that also returns the statistics of every layer's inputs.

    The network is run once and is not changed. During the pass the loss sees, beside each kernel,
    a leaf of zeros more than `params` has; the value and the gradient are those that
    `jax.value_and_grad` gives.

    Use it under `jax.jit`. Under data parallelism with explicit collectives, average the
    statistics like the gradients: `jax.lax.pmean(stats, axis_name)`.

    Args:
      loss_fn: A loss that calls a Linen model, `loss_fn(params, *args, **kwargs)`; returns a
        scalar, or `(scalar, aux)` with `has_aux`.
      has_aux: As in `jax.value_and_grad`.
      layers: The layers to capture, from `find_layers`; None finds all of them at trace time.
      capture: `'linen'`, by Flax's interceptors; `'auto'` chooses.

    Returns:
      A function of `(params, *args, **kwargs)` that returns `(loss, grads, stats)`; `loss` is
      `(loss, aux)` with `has_aux`; `stats` is a dict from kernel name to `LayerStats`. A layer
      that exists but never runs has statistics with `count == 0`.

    Raises:
      ValueError: If no layer is found, or `layers` names one that `params` has not.

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
    """
    check_choice("capture", capture, ("auto", "linen"))

    @functools.wraps(loss_fn)
    def wrapped(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, dict[str, LayerStats]]:
        leaves = named_leaves(params)
        unused: list[str] = []
        if layers is None:
            chosen, reasons, unused = linen.discover(loss_fn, params, args, kwargs)
            if not chosen:
                kernels = [f"`{name}`: {reason}" for name, reason in reasons.items()]
                found = "; ".join(kernels) or f"no leaf is named `{KERNEL}`"
                msg = (
                    f"The loss runs no Linen layer whose inputs could be captured ({found}). Call "
                    "a `flax.linen` model in the loss with the `params` that it is given, or use "
                    "`jax.value_and_grad` if there is nothing to precondition."
                )
                raise ValueError(msg)
        else:
            chosen = dict(layers)
        _check_layers(chosen, leaves)
        value, grads, stats = linen.value_and_grad(loss_fn, chosen, params, args, kwargs, has_aux)
        return value, grads, stats | {name: _idle_stats(name, leaves) for name in unused}

    return wrapped


def _check_layers(layers: Mapping[str, Layer], leaves: Mapping[str, Any]) -> None:
    for name, layer in layers.items():
        shape = tuple(leaves[name].shape) if name in leaves else None
        if shape != layer.kernel_shape:
            kernels = [leaf for leaf in leaves if is_named(leaf, KERNEL)]
            msg = (
                f"`layers` has `{name}` of shape {layer.kernel_shape}, but `params` has "
                f"{'no such leaf' if shape is None else f'it with shape {shape}'}. The kernels "
                f"of `params` are {quoted(kernels)}. Call `find_layers` on these `params`."
            )
            raise ValueError(msg)
