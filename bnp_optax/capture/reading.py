"""What a product of inputs with a kernel says of the inputs: which of them a kernel entry meets."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bnp_optax.statistics import moments

ConvStatistics = Literal["channel", "patch"]
Moments = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Options:
    """How finely statistics are taken.

    Attributes:
      conv_statistics: `'channel'` or `'patch'`.
      sample_rows: Number of rows to take them from; None for all.
    """

    conv_statistics: ConvStatistics = "channel"
    sample_rows: int | None = None


@dataclasses.dataclass(frozen=True)
class Reading:
    """One product, as far as its kernel is concerned.

    Attributes:
      moments: Computes the mean and variance of the inputs, in the kernel's layout.
      input_axes: Axes of the kernel that are summed over, negative.
      positions: Output positions that share the kernel.
      count: Batch size x positions.
    """

    moments: Callable[[], Moments]
    input_axes: tuple[int, ...]
    positions: int
    count: int


class NotCovered(Exception):  # noqa: N818 - a result of looking at a layer, not a failure
    """A layer whose kernel cannot be preconditioned; the message says why."""


def contraction(
    inputs: Any, axis_of: tuple[int | None, ...], contracted: set[int], options: Options
) -> Reading:
    """A product in which kernel axis i meets input axis `axis_of[i]`, or none of them.

    Args:
      inputs: What the kernel multiplies; need only have a shape until moments are asked for.
      axis_of: Input axis for each kernel axis, or None.
      contracted: The input axes that are summed over.
      options: How finely to take the statistics.
    """
    met = tuple(axis for axis in axis_of if axis is not None)
    reduce_axes = tuple(axis for axis in range(len(inputs.shape)) if axis not in met)
    order = tuple(sorted(met).index(axis) for axis in met)
    new_axes = tuple(i for i, axis in enumerate(axis_of) if axis is None)

    def arrange(stat: jax.Array) -> jax.Array:
        return jnp.expand_dims(jnp.transpose(stat, order), new_axes)

    def compute() -> Moments:
        rows, axes = _sampled(jnp.asarray(inputs), reduce_axes, options.sample_rows)
        mean, var = moments(rows, axes)
        return arrange(mean), arrange(var)

    return Reading(
        moments=compute,
        input_axes=tuple(i - len(axis_of) for i, axis in enumerate(axis_of) if axis in contracted),
        positions=1,
        count=math.prod(inputs.shape[axis] for axis in reduce_axes),
    )


@dataclasses.dataclass(frozen=True)
class Window:
    """How a convolution slides, per spatial axis.

    Attributes:
      sizes: Of the kernel.
      strides: Of the window.
      padding: Before and after; after alone is implied by `outputs`.
      input_dilation: 2 puts a zero between neighbours of the input, as transposed convolutions do.
      kernel_dilation: Distance of neighbours in the window.
      outputs: Number of output positions.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    outputs: tuple[int, ...]

    def meetings(self, axis: int, length: int) -> np.ndarray:
        """How often kernel row i meets input row h along a spatial axis, 0 or 1, as (i, h)."""
        rows = self.strides[axis] * np.arange(self.outputs[axis])
        offsets = self.kernel_dilation[axis] * np.arange(self.sizes[axis])
        at = offsets[:, None] + rows[None, :] - self.padding[axis][0]
        inputs = self.input_dilation[axis] * np.arange(length)
        return (at[:, :, None] == inputs[None, None, :]).sum(axis=1)


def convolution(
    inputs: Any,
    positions: int,
    features: int,
    groups: int,
    options: Options,
    window: Window | None = None,
) -> Reading:
    """A convolution of `inputs` (batch, *spatial, channels) with a kernel (*spatial, in, out).

    Statistics are (21) and (22) of the JMLR paper, of the feature map's channels; with
    `conv_statistics='patch'`, which needs `window`, they are (19) and (20), of the entries that
    each kernel entry meets.
    """
    n_spatial = len(inputs.shape) - 2

    def by_group(stat: jax.Array) -> jax.Array:
        # Output channels come group by group, and each meets the input channels of its group.
        if groups == 1:
            return stat[..., None]
        per_group = jnp.moveaxis(stat.reshape(*stat.shape[:-1], groups, -1), -2, -1)
        return jnp.repeat(per_group, features // groups, axis=-1)

    def compute() -> Moments:
        x = jnp.asarray(inputs)
        if options.conv_statistics == "patch":
            assert window is not None
            mean, var = _patch_moments(_sampled_examples(x, options.sample_rows), window)
        else:
            rows, axes = _sampled(x, tuple(range(x.ndim - 1)), options.sample_rows)
            mean, var = (m.reshape((1,) * n_spatial + m.shape) for m in moments(rows, axes))
        return by_group(mean), by_group(var)

    return Reading(
        moments=compute,
        input_axes=tuple(range(-n_spatial - 2, -1)),
        positions=positions,
        count=inputs.shape[0] * positions,
    )


def _patch_moments(x: jax.Array, window: Window) -> Moments:
    """Mean and variance of what each kernel entry meets, zeros of the padding included.

    They are those of the whole map less rows and columns that an entry does not reach. The map
    is first summed over the batch, about the channels' means so that no digits are lost; then
    each spatial axis is summed by a small matrix of zeros and ones. No patch is formed.
    """
    spatial = range(len(window.sizes))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    center = jnp.mean(x, axis=tuple(range(x.ndim - 1)))
    y = x - center
    meetings = [window.meetings(axis, x.shape[1 + axis]) for axis in spatial]

    def reached(total: jax.Array) -> jax.Array:
        for axis in spatial:
            total = jnp.moveaxis(
                jnp.tensordot(
                    meetings[axis].astype(np.float32), total, (1, axis), precision="highest"
                ),
                0,
                axis,
            )
        return total

    n = x.shape[0] * math.prod(window.outputs)
    counts = x.shape[0] * np.asarray(_outer([m.sum(axis=1) for m in meetings]))[..., None]
    inside = (counts / n).astype(np.float32)
    first = reached(jnp.sum(y, axis=0)) / n
    second = reached(jnp.sum(y**2, axis=0)) / n
    mean = jnp.asarray(inside * center + first)
    # Entries of the padding are 0, at a distance `mean` from the mean.
    shift = center - mean
    var = second + 2 * shift * first + inside * shift**2 + (1 - inside) * mean**2
    return mean.astype(jnp.float32), jnp.maximum(var, 0.0).astype(jnp.float32)


def _outer(vectors: list[np.ndarray]) -> np.ndarray:
    product = np.ones(())
    for vector in vectors:
        product = np.multiply.outer(product, vector)
    return product


def _stride(n_rows: int, n_sampled: int) -> int:
    """A step that spreads the sample over all rows and shares no factor with their number.

    So that the sample runs over every position of a sequence, and every column of an image.
    """
    step = max(n_rows // n_sampled, 1)
    while math.gcd(step, n_rows) > 1:
        step += 1
    return step


def _sampled(
    x: jax.Array, axes: tuple[int, ...], sample_rows: int | None
) -> tuple[jax.Array, tuple[int, ...]]:
    """`sample_rows` of the rows that run over `axes`, and the axes to average the result over."""
    n_rows = math.prod(x.shape[axis] for axis in axes)
    if sample_rows is None or n_rows <= sample_rows:
        return x, axes
    rest = tuple(axis for axis in range(x.ndim) if axis not in axes)
    rows = jnp.transpose(x, (*axes, *rest)).reshape(n_rows, *(x.shape[axis] for axis in rest))
    chosen = _stride(n_rows, sample_rows) * np.arange(sample_rows) % n_rows
    return rows[np.sort(chosen)], (0,)


def _sampled_examples(x: jax.Array, sample_rows: int | None) -> jax.Array:
    """As many whole examples as make up `sample_rows` rows, at least one."""
    if sample_rows is None:
        return x
    n_sampled = max(sample_rows // math.prod(x.shape[1:-1]), 1)
    if n_sampled >= x.shape[0]:
        return x
    chosen = _stride(x.shape[0], n_sampled) * np.arange(n_sampled) % x.shape[0]
    return x[np.sort(chosen)]
