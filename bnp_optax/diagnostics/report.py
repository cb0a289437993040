"""A table and a figure of each layer's conditioning, before and after preconditioning."""

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bnp_optax._tree import named_leaves
from bnp_optax.diagnostics.checks import operator_of
from bnp_optax.diagnostics.conditioning import condition_number, conditioning
from bnp_optax.diagnostics.displacement import find_layers, unit_coordinates
from bnp_optax.diagnostics.hessian import hessians_of_units
from bnp_optax.diagnostics.inputs import InputConditioning, input_conditioning
from bnp_optax.diagnostics.lanczos import extremes
from bnp_optax.layers import Layers
from bnp_optax.preconditioners.base import Operator, Preconditioner
from bnp_optax.preconditioners.bnp_operator import bnp_states
from bnp_optax.preconditioners.whiten_operator import whiten_states
from bnp_optax.statistics import Layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEADER = ("kernel", "fan-in", "units", "κ(H)", "κ(PᵀHP)", "κ(D)", "share of H", "of PᵀHP")
_OF_INPUTS = ("κ(M)", "κ(PᵀMP)")
_COUNTED = ("seen", "rejected")
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"


class LayerReport(NamedTuple):
    """What is known of one layer.

    Attributes:
      kernel: Name of the kernel.
      fan_in: Number of weights of a unit.
      units: Number of units.
      units_used: Number of units whose Hessian entered the medians.
      kappa: Median over these of the condition number of the unit's Hessian; NaN for none.
      kappa_preconditioned: The same of P^T H P.
      kappa_d: kappa(D) from the running statistics; NaN without them.
      curvature: Largest |eigenvalue| of the layer's diagonal block of H.
      curvature_preconditioned: The same of P^T H P; NaN without P.
      seen: Number of batches in the running statistics, inf where they are `fixed`; None without
        the state of `bnp` or `whiten`.
      rejected: Number of batches that did not enter them, being not finite; None likewise.
      inputs: Condition numbers of the second moment M = E[h^ h^^T] of the extended inputs, before
        and after P; None if they were not asked for, or the layer has several P.
    """

    kernel: str
    fan_in: int
    units: int
    units_used: int
    kappa: float
    kappa_preconditioned: float
    kappa_d: float
    curvature: float
    curvature_preconditioned: float
    seen: float | None = None
    rejected: int | None = None
    inputs: InputConditioning | None = None


class Report(NamedTuple):
    """The conditioning of a network, layer by layer: `print` it, or draw its `figure()`.

    A layer's share of the curvature is the largest |eigenvalue| of its diagonal block of the
    Hessian, over the sum of these over the layers. One learning rate serves all layers and is
    bounded by the largest: shares should be alike.

    Attributes:
      layers: A row for each kernel.
    """

    layers: tuple[LayerReport, ...]

    @property
    def shares(self) -> list[float]:
        """Each layer's share of the curvature of H."""
        return _shares([layer.curvature for layer in self.layers])

    @property
    def shares_preconditioned(self) -> list[float]:
        """Each layer's share of the curvature of P^T H P."""
        return _shares([layer.curvature_preconditioned for layer in self.layers])

    def _cells(self) -> list[tuple[str, ...]]:
        rows = []
        shares = zip(self.shares, self.shares_preconditioned, strict=True)
        for layer, (share, share_preconditioned) in zip(self.layers, shares, strict=True):
            kappas = (layer.kappa, layer.kappa_preconditioned, layer.kappa_d)
            rows.append(
                (
                    layer.kernel,
                    str(layer.fan_in),
                    f"{layer.units_used} of {layer.units}",
                    *(_number(kappa, ".3g") for kappa in kappas),
                    _number(share, ".1%"),
                    _number(share_preconditioned, ".1%"),
                    *self._of_inputs(layer),
                    *_counts(layer),
                )
            )
        return rows

    @property
    def _has_inputs(self) -> bool:
        return any(layer.inputs is not None for layer in self.layers)

    def _of_inputs(self, layer: LayerReport) -> tuple[str, ...]:
        if not self._has_inputs:
            return ()
        kappas = layer.inputs or (float("nan"), float("nan"))
        return tuple(_number(kappa, ".3g") for kappa in kappas)

    def _header(self) -> tuple[str, ...]:
        counted = any(_counts(layer) for layer in self.layers)
        return (
            *_HEADER,
            *(_OF_INPUTS if self._has_inputs else ()),
            *(_COUNTED if counted else ()),
        )

    def __str__(self) -> str:
        """A table with a row for each layer."""
        rows = [self._header(), *self._cells()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(lines)

    def __rich__(self) -> Any:
        """The same table for `rich.print`."""
        from rich.table import Table

        table = Table(*self._header())
        for row in self._cells():
            table.add_row(*row)
        return table

    def figure(self) -> "Figure":
        """Bars of the condition numbers and of the shares of the curvature.

        Returns:
          A matplotlib figure; `figure.savefig(path)` writes it.

        Raises:
          ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            msg = (
                "`Report.figure` needs matplotlib, which is not installed: "
                "pip install 'bnp-optax[diagnostics]'"
            )
            raise ImportError(msg) from error
        figure = Figure(figsize=(9.5, 1.4 + 0.62 * len(self.layers)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        columns = (
            ("κ of a unit's Hessian", _ORANGE, [row.kappa for row in self.layers]),
            ("κ of its PᵀHP", _BLUE, [row.kappa_preconditioned for row in self.layers]),
            ("κ(D)²", _GREEN, [row.kappa_d**2 for row in self.layers]),
        )
        _bars(left, columns)
        left.set_xscale("log")
        left.set_xlim(left=1.0)
        left.set_xlabel("condition number, median over units")
        left.set_yticks(range(len(self.layers)), [row.kernel for row in self.layers])
        left.invert_yaxis()
        columns = (
            ("H", _ORANGE, [100 * share for share in self.shares]),
            ("PᵀHP", _BLUE, [100 * share for share in self.shares_preconditioned]),
        )
        _bars(right, columns)
        right.set_xlim(0, 100)
        right.set_xlabel("share of the curvature, %")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False)
        return figure


def _bars(axis: Any, columns: Sequence[tuple[str, str, list[float]]]) -> None:
    shown = [column for column in columns if not np.all(np.isnan(column[2]))]
    height = 0.8 / len(shown)
    for i, (label, color, values) in enumerate(shown):
        places = np.arange(len(values)) + (i - (len(shown) - 1) / 2) * height
        axis.barh(places, values, 0.9 * height, color=color, label=label)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)


def _counts(layer: LayerReport) -> tuple[str, ...]:
    return () if layer.seen is None else (f"{layer.seen:.0f}", str(layer.rejected))


def _number(value: float, form: str) -> str:
    return "" if np.isnan(value) else format(value, form)


def _shares(curvatures: list[float]) -> list[float]:
    total = sum(curvatures)
    return [curvature / total if total else float("nan") for curvature in curvatures]


def report(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    preconditioner: Preconditioner | Operator | None = None,
    state: Any = None,
    layers: Layers | None = None,
    max_units: int = 4,
    max_fan_in: int = 1024,
    num_lanczos: int = 30,
    inputs: bool = False,
) -> Report:
    """The conditioning of every layer: condition numbers and shares of the curvature.

    The condition numbers are those of unit Hessians, `unit_hessian`; of a layer with many units,
    some that are evenly spaced are taken. A unit whose Hessian is zero, such as a ReLU that is
    never active, is left out. The curvature of a layer's block is found by Lanczos' method.

    In float32, condition numbers above 8e6 / (fan-in + 1) cannot be seen: see `condition_number`.

    Args:
      loss_fn: `loss_fn(params, *args)`, a scalar; it is compiled.
      params: Parameters; their leaves named `kernel` with two or more axes are the layers.
      *args: Further arguments of the loss.
      preconditioner: Such as `bnp()`, or P itself, an `Operator`; None leaves out its columns.
      state: State of the preconditioner. If it contains a `BNPState` or a `WhitenState`, kappa(D)
        and the numbers of batches are read from it.
      layers: As for `unit_hessian`.
      max_units: Units of a layer to take, >= 1.
      max_fan_in: Layers with more weights a unit get no condition number of H: it takes
        n + 1 Hessian-vector products and (n + 1)^3 operations.
      num_lanczos: Products for the curvature of each block.
      inputs: Whether to add the condition number of the second moment M = E[h^ h^^T] of each
        layer's extended inputs, and of P^T M P: what P can do something about, where H also has the
        loss's part. It captures second moments of the layers of at most `max_fan_in`.

    Raises:
      ValueError: If there is no layer, a Hessian is not finite, or of `preconditioner` and
        `state` only one is given.
      ImportError: If `matfree` is not installed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> from bnp_optax import diagnostics
      >>> model, x = nn.Dense(2), jnp.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> print(diagnostics.report(loss_fn, params))
      kernel  fan-in  units   κ(H)  κ(PᵀHP)  κ(D)  share of H  of PᵀHP
      ------  ------  ------  ----  -------  ----  ----------  -------
      kernel  2       2 of 2  9                    100.0%

    Source: Lange, Helfrich, Ye, JMLR 2022, Sections 3.3 and 5.1, Figure 8.
    """
    P = operator_of(preconditioner, state)
    if max_units < 1:
        msg = f"`max_units` must be at least 1, got {max_units}."
        raise ValueError(msg)
    found = find_layers(params, layers)
    states = [*bnp_states(state), *whiten_states(state)]
    kappas_d = conditioning(state) if states else {}
    counted = {
        name: (float(numbers[1]), int(numbers[2]))
        for one in states
        for name, numbers in named_leaves(one.numbers).items()
    }
    choices = [None] if P is None else [None, P]
    small = {name: layer for name, layer in found.items() if layer.fan_in <= max_fan_in}
    of_inputs = input_conditioning(loss_fn, params, args, small, layers, P) if inputs else {}

    def row(layer: Layer) -> LayerReport:
        unit = unit_coordinates(params, layer)
        fan_in = unit.size - unit.has_bias
        chosen = np.linspace(0, unit.units - 1, min(max_units, unit.units)).astype(int).tolist()
        names = {layer.kernel} | ({layer.bias} if layer.bias else set())
        kappas, curvatures = [float("nan")] * 2, [float("nan")] * 2
        used = 0
        for i, choice in enumerate(choices):
            ends = extremes(loss_fn, params, args, choice, names, num_lanczos, None)
            curvatures[i] = float(jnp.maximum(jnp.abs(ends.min), jnp.abs(ends.max)))
            if fan_in > max_fan_in:
                continue
            hessians = hessians_of_units(loss_fn, params, layer, chosen, args, choice)
            known = [
                float(condition_number(h, symmetric=True)) for h in hessians if jnp.any(h != 0)
            ]
            used = len(known)
            kappas[i] = statistics.median(known) if known else float("nan")
        seen, rejected = counted.get(layer.kernel, (None, None))
        return LayerReport(
            kernel=layer.kernel,
            fan_in=fan_in,
            units=unit.units,
            units_used=used,
            kappa=kappas[0],
            kappa_preconditioned=kappas[1],
            kappa_d=float(kappas_d.get(layer.kernel, float("nan"))),
            curvature=curvatures[0],
            curvature_preconditioned=curvatures[1],
            seen=seen,
            rejected=rejected,
            inputs=of_inputs.get(layer.kernel),
        )

    return Report(tuple(map(row, found.values())))
