"""What a product of inputs with a kernel says of the inputs: which of them a kernel entry meets."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bnp_optax.statistics import MANY_ROWS, moments

ConvStatistics = Literal["channel", "patch"]
# Mean, variance, and the sum of the rows' weights with the number of rows.
Moments = tuple[jax.Array, jax.Array, tuple[Any, int]]
Weights = jax.Array | None


@dataclasses.dataclass(frozen=True)
class Options:
    """How finely statistics are taken.

    Attributes:
      conv_statistics: `'channel'` or `'patch'`.
      sample_rows: Number of rows to take them from; None for all.
      embeddings: Whether a lookup counts as a product with one-hot rows.
      weighted: Whether rows have weights.
    """

    conv_statistics: ConvStatistics = "channel"
    sample_rows: int | None = None
    embeddings: bool = False
    weighted: bool = False

    @property
    def need_jaxpr(self) -> str:
        """The option that only the jaxpr engine has, for a message; empty if there is none."""
        needs = {
            "`conv_statistics='patch'`": self.conv_statistics == "patch",
            "`embeddings=True`": self.embeddings,
            "`weights`": self.weighted,
        }
        return next((option for option, needed in needs.items() if needed), "")


@dataclasses.dataclass(frozen=True)
class Reading:
    """One product, as far as its kernel is concerned.

    Attributes:
      moments: Computes the mean and variance of the inputs, in the kernel's layout, given weights
        of their rows or None; and the sum of these weights with the number of rows.
      input_axes: Axes of the kernel that are summed over, negative.
      positions: Output positions that share the kernel.
      count: Batch size x positions.
    """

    moments: Callable[[Weights], Moments]
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

    def compute(weights: Weights) -> Moments:
        x = jnp.asarray(inputs)
        mean, var, mass = _moments(x, reduce_axes, weights, options.sample_rows)
        return arrange(mean), arrange(var), mass

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

    def compute(weights: Weights) -> Moments:
        x = jnp.asarray(inputs)
        if options.conv_statistics == "patch" and window is not None:
            mean, var, mass = _patch_moments(x, window, weights, options.sample_rows)
        else:
            axes = tuple(range(x.ndim - 1))
            mean, var, mass = _moments(x, axes, weights, options.sample_rows)
            mean, var = (m.reshape((1,) * n_spatial + m.shape) for m in (mean, var))
        return by_group(mean), by_group(var), mass

    return Reading(
        moments=compute,
        input_axes=tuple(range(-n_spatial - 2, -1)),
        positions=positions,
        count=inputs.shape[0] * positions,
    )


def lookup(indices: Any, n_rows: int, n_features: int, options: Options) -> Reading:
    """A lookup of rows of a table (n_rows, *features), as a product with one-hot vectors.

    The mean of a one-hot input is the frequency f of its row, its variance f (1 - f).
    """

    def compute(weights: Weights) -> Moments:
        rows = jnp.asarray(indices)
        axes = tuple(range(rows.ndim))
        rows, _, share, mass = _rows(rows, axes, weights, options.sample_rows)
        share = jnp.full(rows.size, 1.0 / rows.size) if share is None else share
        frequency = jnp.zeros(n_rows, jnp.float32).at[rows.ravel()].add(share, mode="drop")
        frequency = frequency.reshape(n_rows, *(1,) * n_features)
        return frequency, frequency * (1.0 - frequency), mass

    return Reading(
        moments=compute,
        input_axes=(-1 - n_features,),
        positions=1,
        count=math.prod(indices.shape),
    )


def _patch_moments(
    x: jax.Array, window: Window, weights: Weights, sample_rows: int | None
) -> Moments:
    """Mean and variance of what each kernel entry meets, zeros of the padding included.

    They are those of the whole map less rows and columns that an entry does not reach. The map
    is first averaged over the batch, about the channels' means so that no digits are lost; then
    each spatial axis is summed by a small matrix of zeros and ones. No patch is formed.
    """
    spatial = range(len(window.sizes))
    n_examples = None if sample_rows is None else max(sample_rows // math.prod(x.shape[1:-1]), 1)
    x, _, share, mass = _rows(x, (0,), weights, n_examples)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    share = jnp.full(x.shape[0], 1.0 / x.shape[0]) if share is None else share
    center = jnp.einsum("b,b...->...", share, jnp.mean(x, axis=tuple(range(1, x.ndim - 1))))
    y = x - center.reshape((1,) * (x.ndim - 1) + center.shape)
    meetings = [window.meetings(axis, x.shape[1 + axis]) for axis in spatial]
    inside = np.ones(())
    for meeting in meetings:
        inside = np.multiply.outer(inside, meeting.sum(axis=1))
    n_outputs = math.prod(window.outputs)
    inside = jnp.asarray((inside / n_outputs)[..., None], jnp.float32)

    def reached(powers: jax.Array) -> jax.Array:
        """The average over the batch, summed over the positions that each entry meets."""
        total = jnp.einsum("b,b...->...", share, powers, precision="highest") / n_outputs
        for axis in spatial:
            rows = jnp.asarray(meetings[axis], total.dtype)
            summed = jnp.tensordot(rows, total, (1, axis), precision="highest")
            total = jnp.moveaxis(summed, 0, axis)
        return total

    first, second = reached(y), reached(y**2)
    # Below, `center` and so on have the shape (*sizes, channels).
    center = jnp.broadcast_to(center.reshape((1,) * len(window.sizes) + center.shape), first.shape)
    mean = inside * center + first
    # Entries of the padding are 0, at a distance `mean` from the mean.
    shift = center - mean
    var = second + 2 * shift * first + inside * shift**2 + (1 - inside) * mean**2
    var = jnp.maximum(var, 0.0)
    return mean.astype(jnp.float32), var.astype(jnp.float32), mass


def _sample(n_rows: int, n_chosen: int) -> np.ndarray:
    """`n_chosen` of `n_rows` rows, one of each of so many equal parts, always the same.

    Its place in the part goes by multiples of the golden ratio, so that no period, such as the
    length of a sequence or the width of an image, hides some of the places.
    """
    part = np.arange(n_chosen)
    place = part * ((np.sqrt(5) - 1) / 2) % 1.0
    return ((part + place) * n_rows / n_chosen).astype(int)


def _rows(
    x: jax.Array, axes: tuple[int, ...], weights: Weights, n_chosen: int | None
) -> tuple[jax.Array, tuple[int, ...], Weights, tuple[Any, int]]:
    """The rows of `x`, which run over `axes`, that statistics are taken from.

    Returns:
      The rows; the axes that they run over; their shares, which sum to 1, or None where all are
      equal; and the sum of all rows' weights with the number of all rows.
    """
    sizes = tuple(x.shape[axis] for axis in axes)
    n_rows = math.prod(sizes)
    sampled = n_chosen is not None and n_chosen < n_rows
    if weights is None and not sampled:
        return x, axes, None, (n_rows, n_rows)
    rest = tuple(axis for axis in range(x.ndim) if axis not in axes)
    rows = jnp.transpose(x, (*axes, *rest)).reshape(n_rows, *(x.shape[axis] for axis in rest))
    flat = None if weights is None else _fitted(weights, sizes).ravel().astype(jnp.float32)
    mass = (n_rows if flat is None else jnp.sum(flat), n_rows)
    if n_chosen is not None and sampled:
        chosen = _sample(n_rows, n_chosen)
        rows, flat = rows[chosen], None if flat is None else flat[chosen]
    if flat is None:
        return rows, (0,), None, mass
    total = jnp.sum(flat)
    share = flat / jnp.where(total > 0.0, total, 1.0)
    # What a row of no weight holds, which may be anything, must not reach a sum.
    counts = (flat > 0.0).reshape(-1, *(1,) * len(rest))
    return jnp.where(counts, rows, jnp.zeros((), rows.dtype)), (0,), share, mass


def _fitted(weights: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """Weights of rows that run over axes of the given sizes, of examples or of their positions."""
    shape = weights.shape
    if shape == sizes[: len(shape)]:
        padded = weights.reshape(shape + (1,) * (len(sizes) - len(shape)))
        return jnp.broadcast_to(padded, sizes)
    if shape[: len(sizes)] == sizes:
        # A row for all positions of an example counts if one of them does.
        return jnp.max(weights, axis=tuple(range(len(sizes), len(shape))))
    if sizes == (math.prod(shape),):
        return weights.reshape(sizes)
    msg = (
        f"`weights` of shape {shape} do not fit inputs whose rows run over axes of sizes {sizes}: "
        "they must be the first of these axes, (batch,) or (batch, length)"
    )
    raise ValueError(msg)


def _moments(
    x: jax.Array, axes: tuple[int, ...], weights: Weights, sample_rows: int | None
) -> Moments:
    """Mean and variance over `axes`."""
    rows, axes, share, mass = _rows(x, axes, weights, sample_rows)
    if share is None:
        return *moments(rows, axes), mass
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    mean = _weighted_sum(share, rows)
    var = _weighted_sum(share, (rows - mean[None]) ** 2)
    return mean.astype(jnp.float32), var.astype(jnp.float32), mass


def _weighted_sum(share: jax.Array, rows: jax.Array) -> jax.Array:
    """The sum of rows times their shares; of many rows in parts, for one long sum loses digits."""
    if len(share) <= MANY_ROWS:
        return jnp.tensordot(share, rows, 1, precision="highest")
    parts = math.isqrt(len(share) - 1) + 1
    rest = parts**2 - len(share)
    share, rows = (
        jnp.pad(y, ((0, rest), *((0, 0),) * (y.ndim - 1))).reshape(parts, parts, *y.shape[1:])
        for y in (share, rows)
    )
    return jnp.sum(jnp.einsum("pr,pr...->p...", share, rows, precision="highest"), axis=0)
