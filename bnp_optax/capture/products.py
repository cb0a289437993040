"""Equations that multiply inputs with parameters: what they sum over, and what is measured."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bnp_optax.capture import moments, rows, views
from bnp_optax.capture.moments import Moments, Options, Weights, Window
from bnp_optax.capture.views import View


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of inputs with a view of parameters.

    Attributes:
      view: Of the parameters; of a convolution's with the axes in the order of a kernel's.
      inputs: The variable that holds the inputs.
      measure: The moments of such inputs, in the view's layout.
      summed: Axes of `view` that are summed over.
      varying: Axes of `view` along which the moments vary.
      batch: Axes of `view` along which there is a product each.
      out_axes: For each axis of the result that of `view` along it, or None.
      positions: Output positions that share the kernel.
      count: Batch size x positions.
      kind: Of the layer: `'Dense'`, `'Conv'` or `'Embed'`.
      rows: At most a number of rows of such inputs, in the view's layout; None if they cannot be
        told from the inputs.
      window: Axes of the inputs that a window slides over.
      n_groups: Of a convolution, into how many its features fall.
    """

    view: View
    inputs: Any
    measure: Callable[[Any, Weights], Moments]
    summed: Sequence[int]
    varying: Sequence[int]
    batch: Sequence[int]
    out_axes: Sequence[int | None]
    positions: int
    count: Any
    kind: str
    rows: Callable[[Any, Weights, int], rows.Rows] | None
    window: Sequence[int] = ()
    n_groups: int = 1


def dot_general(eqn: Any, side: int, view: View, options: Options) -> Product | str:
    """A `dot_general` whose operand `side` is `view`, or why it is no layer's product."""
    contract, batch = eqn.params["dimension_numbers"]
    inputs = eqn.invars[1 - side]
    if not contract[side]:
        return "dot_general that sums over none of its axes"
    # Along axes of copies a parameter is one, so these are averaged over like rows.
    met = {
        ours: theirs
        for ours, theirs in zip(batch[side], batch[1 - side], strict=True)
        if not view.is_filled(ours)
    }
    met |= dict(zip(contract[side], contract[1 - side], strict=True))
    axes = range(len(view.shape))
    axis_of = tuple(met.get(axis) for axis in axes)
    free = [axis for axis in axes if axis not in contract[side] and axis not in batch[side]]
    shape = inputs.aval.shape
    rest = [None] * (len(shape) - len(contract[1 - side]) - len(batch[1 - side]))
    count = math.prod(n for axis, n in enumerate(shape) if axis not in met.values())
    return Product(
        view=view,
        inputs=inputs,
        measure=lambda x, weights: moments.contraction(x, axis_of, weights, options),
        rows=lambda x, weights, n: rows.contraction(x, axis_of, weights, n, count),
        summed=tuple(contract[side]),
        varying=tuple(met),
        batch=batch[side],
        out_axes=[*batch[side], *((free + rest) if side == 0 else (rest + free))],
        positions=1,
        count=count,
        kind="Dense",
    )


def conv(eqn: Any, kernel: View, options: Options) -> Product | str:
    """A convolution with `kernel`, or why it is no layer's product."""
    params = eqn.params
    if params["batch_group_count"] != 1:
        return "conv_general_dilated with batch groups"
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    to_standard = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    inputs_first = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    standard = views.transpose(kernel, to_standard)
    inputs, out_shape = eqn.invars[0], eqn.outvars[0].aval.shape
    window = Window(
        sizes=standard.shape[:-2],
        strides=tuple(params["window_strides"]),
        padding=tuple(params["padding"]),
        input_dilation=tuple(params["lhs_dilation"]),
        kernel_dilation=tuple(params["rhs_dilation"]),
        outputs=tuple(out_shape[axis] for axis in numbers.out_spec[2:]),
    )
    last = len(standard.shape) - 1
    features, positions = standard.shape[last], math.prod(window.outputs)

    def measure(x: Any, weights: Weights) -> Moments:
        x = jnp.transpose(x, inputs_first)
        return moments.convolution(x, features, groups, window, weights, options)

    count = inputs.aval.shape[numbers.lhs_spec[0]] * positions

    def rows_of(x: Any, weights: Weights, n_rows: int) -> rows.Rows:
        x = jnp.transpose(x, inputs_first)
        return rows.patches(x, features, groups, window, weights, n_rows, count)

    varying = range(last) if options.conv_statistics == "patch" else [last - 1]
    out_axes: list[int | None] = [None] * len(out_shape)
    out_axes[numbers.out_spec[1]] = last
    return Product(
        view=standard,
        inputs=inputs,
        measure=measure,
        rows=rows_of,
        summed=range(last),
        varying=[*varying, *([last] if groups > 1 else [])],
        batch=(),
        out_axes=out_axes,
        positions=positions,
        count=count,
        kind="Conv",
        n_groups=groups,
        window=numbers.lhs_spec[2:] if options.conv_statistics == "channel" else (),
    )


def patches(found: Product, named: Any, options: Options) -> Product | None:
    """A product of patches with a flattened kernel as the convolution of the map `named`.

    That is what a Linen `Conv` is that was given a convolution of this kind. None if the product is
    none of the kind.
    """
    kernel, shape = found.view.before, named.aval.shape
    n_spatial = 0 if kernel is None else len(kernel.shape) - 2
    is_map = n_spatial > 0 and len(shape) == n_spatial + 2 == len(found.inputs.aval.shape)
    found_rows = found.rows
    if kernel is None or found_rows is None or not is_map or tuple(found.summed) != (0,):
        return None
    n_channels, window = kernel.shape[-2], math.prod(kernel.shape[:-1])
    if shape[-1] != n_channels or found.inputs.aval.shape[-1] != window:
        return None
    last = len(kernel.shape) - 1
    if options.conv_statistics == "patch":
        return None  # The product's own inputs are the patches.
    axis_of = (*(None,) * n_spatial, len(shape) - 1, None)

    def unflattened(x: Any) -> Any:
        return x.reshape((*kernel.shape[:-1], 1) if x.shape[0] == window else (1,) * (last + 1))

    return dataclasses.replace(
        found,
        view=kernel,
        inputs=named,
        measure=lambda x, weights: moments.contraction(x, axis_of, weights, options),
        rows=lambda x, weights, n: found_rows(x, weights, n).map(unflattened),
        summed=range(last),
        varying=(last - 1,),
        out_axes=[None if axis is None else last for axis in found.out_axes],
        positions=found.count // shape[0],
        kind="Conv",
    )


def takes_rows(eqn: Any, table: View) -> bool:
    """Whether a `gather` takes whole rows of `table`."""
    numbers = eqn.params["dimension_numbers"]
    return (
        numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and tuple(eqn.params["slice_sizes"]) == (1, *table.shape[1:])
    )


def lookup(eqn: Any, table: View, options: Options) -> Product:
    """A `gather` of rows of `table`, as a product with one-hot inputs."""
    n_rows, n_features = table.shape[0], len(table.shape) - 1
    indices = eqn.invars[1]

    def measure(x: jax.Array, weights: Weights) -> Moments:
        return moments.lookup(x, n_rows, n_features, weights, options)

    return Product(
        view=table,
        inputs=indices,
        measure=measure,
        rows=lambda x, weights, n: rows.lookup(x, n_rows, n_features, weights, n),
        summed=(0,),
        varying=(0,),
        batch=(),
        out_axes=[None] * len(eqn.outvars[0].aval.shape),
        positions=1,
        count=math.prod(indices.aval.shape),
        kind="Embed",
    )
