"""Equations that multiply inputs with parameters: what they sum over, and what is measured."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnp_optax.capture import reading, views
from bnp_optax.capture.reading import Options, Reading, Window
from bnp_optax.capture.views import View


class Multiplied(NamedTuple):
    """A product of inputs with a view of parameters.

    Attributes:
      view: Of the parameters; of a convolution's with the axes in the order of a kernel's.
      inputs: The variable that holds them.
      measure: Reads the inputs.
      batch: Axes of `view` along which there is a product each.
      out_axes: For each axis of the result that of `view` along it, or None.
      kind: Of the layer.
    """

    view: View
    inputs: Any
    measure: Callable[[Any], Reading]
    batch: Sequence[int]
    out_axes: Sequence[int | None]
    kind: str


def dot_general(eqn: Any, side: int, view: View, options: Options) -> Multiplied | str:
    """A `dot_general` whose operand `side` is `view`, or why it is no layer's product."""
    contract, batch = eqn.params["dimension_numbers"]
    inputs = eqn.invars[1 - side]
    if not contract[side]:
        return "dot_general that sums over none of its axes"
    met = dict(zip(contract[side], contract[1 - side], strict=True))
    summed = set(met.values())
    # Along axes of copies a parameter is one, so these are averaged over like rows.
    met |= {
        ours: theirs
        for ours, theirs in zip(batch[side], batch[1 - side], strict=True)
        if not view.is_filled(ours)
    }
    axes = range(len(view.shape))
    axis_of = tuple(met.get(axis) for axis in axes)
    free = [axis for axis in axes if axis not in contract[side] and axis not in batch[side]]
    rest = [None] * (len(inputs.aval.shape) - len(contract[1 - side]) - len(batch[1 - side]))
    return Multiplied(
        view,
        inputs,
        lambda x: reading.contraction(x, axis_of, summed, options),
        batch[side],
        [*batch[side], *((free + rest) if side == 0 else (rest + free))],
        "Dense",
    )


def conv(eqn: Any, kernel: View, options: Options) -> Multiplied | str:
    """A convolution with `kernel`, or why it is no layer's product."""
    params = eqn.params
    if params["batch_group_count"] != 1:
        return "conv_general_dilated with batch groups"
    numbers = params["dimension_numbers"]
    to_standard = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    inputs_first = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    standard = views.transpose(kernel, to_standard)
    out_shape = eqn.outvars[0].aval.shape
    window = Window(
        sizes=standard.shape[:-2],
        strides=tuple(params["window_strides"]),
        padding=tuple(params["padding"]),
        input_dilation=tuple(params["lhs_dilation"]),
        kernel_dilation=tuple(params["rhs_dilation"]),
        outputs=tuple(out_shape[axis] for axis in numbers.out_spec[2:]),
    )

    def measure(x: Any) -> Reading:
        if isinstance(x, jax.ShapeDtypeStruct):
            x = jax.ShapeDtypeStruct([x.shape[axis] for axis in inputs_first], x.dtype)
        else:
            x = jnp.transpose(x, inputs_first)
        groups = params["feature_group_count"]
        positions, features = math.prod(window.outputs), standard.shape[-1]
        return reading.convolution(x, positions, features, groups, options, window)

    out_axes: list[int | None] = [None] * len(out_shape)
    out_axes[numbers.out_spec[1]] = len(standard.shape) - 1
    return Multiplied(standard, eqn.invars[0], measure, (), out_axes, "Conv")


def takes_rows(eqn: Any, table: View) -> bool:
    """Whether a `gather` takes whole rows of `table`."""
    numbers = eqn.params["dimension_numbers"]
    return (
        numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and tuple(eqn.params["slice_sizes"]) == (1, *table.shape[1:])
    )


def lookup(eqn: Any, table: View, options: Options) -> Multiplied:
    """A `gather` of rows of `table`, as a product with one-hot inputs."""
    n_rows, n_features = table.shape[0], len(table.shape) - 1
    nowhere = [None] * len(eqn.outvars[0].aval.shape)

    def measure(x: Any) -> Reading:
        return reading.lookup(x, n_rows, n_features, options)

    return Multiplied(table, eqn.invars[1], measure, (), nowhere, "Embed")
