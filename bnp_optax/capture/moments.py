"""Means and variances of the inputs that a kernel meets, accurate where |mean| >> deviation.

A product with a kernel is described by which axis of its inputs each axis of the kernel meets;
all other axes of the inputs are *reduction axes*, the rows that the moments are taken over. For
`x @ W` with x of shape (batch, in) and W (in, out), kernel axis 0 meets input axis 1, kernel
axis 1 meets none, and the rows run over input axis 0: mean and variance have the shape (in, 1).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bnp_optax.capture.devices import n_groups

ConvStatistics = Literal["channel", "patch"]
# Weights of the rows, or None where all rows count alike.
Weights = jax.Array | None
# Axes of an array.
Axes = tuple[int, ...]
# Mean, variance, and what the mean lacks of the true one by rounding.
Stats = tuple[jax.Array, jax.Array, jax.Array]
# These, and the share of all rows that the weights leave: 1 without weights. All with a leading
# axis of groups of rows.
Moments = tuple[jax.Array, jax.Array, jax.Array, Any]

# Sums of fewer float32 numbers keep their digits in any order.
_MANY_ROWS = 2**14
_MANY_WEIGHTED_ROWS = 2**10


@dataclasses.dataclass(frozen=True)
class Options:
    """How finely statistics are taken.

    Attributes:
      conv_statistics: `'channel'` or `'patch'`, as in `value_and_grad`.
      sample_rows: Number of rows to take them from; None for all.
      embeddings: Whether a lookup counts as a product with one-hot rows.
    """

    conv_statistics: ConvStatistics = "channel"
    sample_rows: int | None = None
    embeddings: bool = False


@functools.partial(jax.jit, static_argnames=("axis_of", "options"))
def contraction(
    x: jax.Array, axis_of: Sequence[int | None], weights: Weights, options: Options
) -> Moments:
    """Moments of `x` for a kernel whose axis i meets the axis `axis_of[i]` of `x`, or none."""
    met = [axis for axis in axis_of if axis is not None]
    rows = tuple(axis for axis in range(x.ndim) if axis not in met)
    order = [0, *(1 + sorted(met).index(axis) for axis in met)]
    absent = tuple(1 + i for i, axis in enumerate(axis_of) if axis is None)
    *stats, share = _moments(x, rows, weights, options.sample_rows)
    mean, var, rest = (jnp.expand_dims(jnp.transpose(stat, order), absent) for stat in stats)
    return mean, var, rest, share


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


@functools.partial(jax.jit, static_argnames=("features", "groups", "window", "options"))
def convolution(
    x: jax.Array, features: int, groups: int, window: Window, weights: Weights, options: Options
) -> Moments:
    """Moments of a map `x` (batch, *spatial, channels) for a kernel (*spatial, in, features).

    They are (21) and (22) of the JMLR paper, of the map's channels, in the shape (1, .., in, 1);
    with `conv_statistics='patch'` (19) and (20), of the entries that each kernel entry meets, in
    the shape (*spatial, in, 1). With groups, the last axis has one entry for each feature.
    """
    if options.conv_statistics == "patch":
        *stats, share = _patch_moments(x, window, weights, options.sample_rows)
    else:
        axes = tuple(range(x.ndim - 1))
        *stats, share = _moments(x, axes, weights, options.sample_rows)
        stats = [jnp.expand_dims(stat, tuple(range(1, x.ndim - 1))) for stat in stats]

    def by_group(stat: jax.Array) -> jax.Array:
        # Output channels come group by group, and each meets the input channels of its group.
        if groups == 1:
            return stat[..., None]
        per_group = jnp.moveaxis(stat.reshape(*stat.shape[:-1], groups, -1), -2, -1)
        return jnp.repeat(per_group, features // groups, axis=-1)

    mean, var, rest = map(by_group, stats)
    return mean, var, rest, share


def lookup(
    indices: jax.Array, n_rows: int, n_features: int, weights: Weights, options: Options
) -> Moments:
    """Moments of one-hot vectors at `indices`, for a table (n_rows, *features).

    The mean of a one-hot input is the frequency f of its row, its variance f (1 - f).
    """

    def of_rows(rows: jax.Array, _: Axes, shares: Weights) -> Stats:
        shares = jnp.full(rows.size, 1.0 / max(rows.size, 1)) if shares is None else shares
        frequency = jnp.zeros(n_rows, jnp.float32).at[rows.ravel()].add(shares, mode="drop")
        frequency = frequency.reshape(n_rows, *(1,) * n_features)
        return frequency, frequency * (1.0 - frequency), jnp.zeros_like(frequency)

    axes = tuple(range(indices.ndim))
    return _by_group(of_rows, indices, axes, weights, options.sample_rows)


def _moments(x: jax.Array, axes: Axes, weights: Weights, sample_rows: int | None) -> Moments:
    """Mean and biased variance over `axes`, in two passes.

    The variance is summed from differences to the mean, which are of the size of the spread.
    """

    def of_rows(rows: jax.Array, axes: Axes, shares: Weights) -> Stats:
        rows = rows.astype(wide(rows.dtype))
        if any(rows.shape[axis] == 0 for axis in axes):
            zeros = jnp.zeros([n for axis, n in enumerate(rows.shape) if axis not in axes])
            return zeros, zeros, zeros
        if shares is None:
            mean = _mean(rows, axes)
            deviations = rows - jnp.expand_dims(mean, axes)
            var, rest = _mean(deviations**2, axes), _mean(deviations, axes)
        else:
            mean = _weighted_sum(shares, rows)
            var = _weighted_sum(shares, (rows - mean[None]) ** 2)
            rest = _weighted_sum(shares, rows - mean[None])
        return mean.astype(jnp.float32), var.astype(jnp.float32), rest.astype(jnp.float32)

    return _by_group(of_rows, x, axes, weights, sample_rows)


def _patch_moments(
    x: jax.Array, window: Window, weights: Weights, sample_rows: int | None
) -> Moments:
    """Mean and variance of what each kernel entry meets, zeros of the padding included.

    They are those of the whole map less rows and columns that an entry does not reach. The map
    is first averaged over the batch, about the channels' means so that no digits are lost; then
    each spatial axis is summed by a small matrix of zeros and ones. No patch is formed.
    """
    n_examples = None if sample_rows is None else max(sample_rows // math.prod(x.shape[1:-1]), 1)
    spatial = range(len(window.sizes))
    meetings = [window.meetings(axis, x.shape[1 + axis]) for axis in spatial]
    met = np.ones(())
    for meeting in meetings:
        met = np.multiply.outer(met, meeting.sum(axis=1))
    n_outputs = math.prod(window.outputs)
    inside = jnp.asarray((met / n_outputs)[..., None], jnp.float32)

    def of_rows(x: jax.Array, _: Axes, shares: Weights) -> Stats:
        x = x.astype(wide(x.dtype))
        of_row = jnp.full(x.shape[0], 1.0 / max(x.shape[0], 1)) if shares is None else shares
        center = jnp.einsum("b,b...->...", of_row, jnp.mean(x, axis=tuple(range(1, x.ndim - 1))))
        y = x - center.reshape((1,) * (x.ndim - 1) + center.shape)

        def reached(powers: jax.Array) -> jax.Array:
            """The average over the batch, summed over the positions that each entry meets."""
            total = jnp.einsum("b,b...->...", of_row, powers, precision="highest") / n_outputs
            for axis in spatial:
                rows = jnp.asarray(meetings[axis], total.dtype)
                summed = jnp.tensordot(rows, total, (1, axis), precision="highest")
                total = jnp.moveaxis(summed, 0, axis)
            return total

        first, second = reached(y), reached(y**2)
        # Below, `center` and so on have the shape (*sizes, channels).
        center = center.reshape((1,) * len(window.sizes) + center.shape)
        center = jnp.broadcast_to(center, first.shape)
        mean = inside * center + first
        # Entries of the padding are 0, at a distance `mean` from the mean.
        shift = center - mean
        var = second + 2 * shift * first + inside * shift**2 + (1 - inside) * mean**2
        rest = (inside * center - mean) + first
        var = jnp.maximum(var, 0.0)
        return mean.astype(jnp.float32), var.astype(jnp.float32), rest.astype(jnp.float32)

    return _by_group(of_rows, x, (0,), weights, n_examples)


def _by_group(
    of_rows: Callable[[jax.Array, Axes, Weights], Stats],
    x: jax.Array,
    axes: Axes,
    weights: Weights,
    n_chosen: int | None,
) -> Moments:
    """Moments of each group of rows, as `of_rows(rows, axes, shares)` computes them.

    Args:
      of_rows: Their statistics over the `axes` of `rows`, whose shares sum to 1 or are equal.
      x: The inputs.
      axes: Those that the rows run over, in order; the first is cut into groups.
      weights: Of the rows.
      n_chosen: The number of rows to look at; None for all. If it is not less than that of the
        groups, it is rounded up to as many in each.
    """
    sizes = tuple(x.shape[axis] for axis in axes)
    n_rows = math.prod(sizes)
    if not isinstance(n_rows, int):
        n_chosen = None  # As in `jax.export`, where it is not known how many there are.
    flat = None if weights is None else fitted(weights, sizes).ravel().astype(jnp.float32)
    groups = n_groups(x, axes, weights is None and n_chosen is None)
    if n_chosen is not None and n_chosen < groups:
        groups = math.gcd(groups, n_chosen)
    chosen = None
    if n_chosen is not None and -(-n_chosen // groups) * groups < n_rows:
        chosen = sample(n_rows, -(-n_chosen // groups) * groups).reshape(groups, -1)
        chosen = chosen - n_rows // groups * np.arange(groups)[:, None]

    def of_group(x: jax.Array, flat: Weights, chosen: Any) -> Moments:
        rows, axes_of_rows, shares, share = _rows(x, axes, flat, chosen)
        return *of_rows(rows, axes_of_rows, shares), share

    if groups == 1:
        one = of_group(x, flat, None if chosen is None else chosen[0])
        return jax.tree.map(lambda stat: jnp.asarray(stat)[None], one)
    first = axes[0]
    x = x.reshape(*x.shape[:first], groups, -1, *x.shape[first + 1 :])
    flat = None if flat is None else flat.reshape(groups, -1)
    chosen = None if chosen is None else jnp.asarray(chosen)
    return jax.vmap(of_group, in_axes=(first, 0, 0))(x, flat, chosen)


def wide(dtype: Any) -> Any:
    """The type to compute in; promotion has no rule for eight bits and fewer."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def sample(n_rows: int, n_chosen: int) -> np.ndarray:
    """`n_chosen` of `n_rows` rows, one of each of so many equal parts, always the same.

    Its place in the part goes by multiples of the golden ratio, so that no period, such as the
    length of a sequence or the width of an image, hides some of the places.
    """
    part = np.arange(n_chosen)
    place = part * ((np.sqrt(5) - 1) / 2) % 1.0
    return ((part + place) * n_rows / n_chosen).astype(int)


def _rows(
    x: jax.Array, axes: Axes, weights: Weights, chosen: Any
) -> tuple[jax.Array, Axes, Weights, Any]:
    """The rows of `x`, which run over `axes`, that statistics are taken from.

    Args:
      x: The inputs.
      axes: Those that the rows run over.
      weights: Of all rows, in one axis; None where they count alike.
      chosen: Numbers of the rows to take, None for all.

    Returns:
      The rows; the axes that they run over; their shares, which sum to 1, or None where all are
      equal; and the mean weight of all rows, 1 without weights.
    """
    if weights is None and chosen is None:
        return x, axes, None, 1.0
    n_rows = math.prod(x.shape[axis] for axis in axes)
    rest = tuple(axis for axis in range(x.ndim) if axis not in axes)
    rows = jnp.transpose(x, (*axes, *rest)).reshape(n_rows, *(x.shape[axis] for axis in rest))
    share = 1.0 if weights is None else jnp.sum(weights) / max(n_rows, 1)
    if chosen is not None:
        rows, weights = rows[chosen], None if weights is None else weights[chosen]
    if weights is None:
        return rows, (0,), None, share
    total = jnp.sum(weights)
    shares = weights / jnp.where(total > 0.0, total, 1.0)
    # What a row of no weight holds, which may be anything, must not reach a sum.
    counts = (weights > 0.0).reshape(-1, *(1,) * len(rest))
    return jnp.where(counts, rows, jnp.zeros((), rows.dtype)), (0,), shares, share


def fitted(weights: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
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


def _are_many(n_rows: Any) -> bool:
    """Whether so many rows need care; a symbolic number, as in `jax.export`, may be large."""
    return not isinstance(n_rows, int) or n_rows > _MANY_ROWS


def _mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean over `axes`; of many rows axis by axis, from the last on.

    XLA may sum over several axes one by one (on the CPU before jax 0.10), which loses digits.
    """
    if not _are_many(math.prod(x.shape[axis] for axis in axes)):
        return jnp.mean(x, axis=axes)
    for axis in sorted(axes, reverse=True):
        x = jnp.mean(x, axis=axis)
    return x


def _weighted_sum(shares: jax.Array, rows: jax.Array) -> jax.Array:
    """The sum of rows times their shares; of many rows in parts, for one long sum loses digits.

    Of fewer rows than where all count alike: in a group of rows it is a plain loop on the CPU.
    """
    n_rows = shares.shape[0]
    if not isinstance(n_rows, int) or n_rows <= _MANY_WEIGHTED_ROWS:
        return jnp.tensordot(shares, rows, 1, precision="highest")
    parts = math.isqrt(n_rows - 1) + 1
    rest = parts**2 - n_rows
    shares, rows = (
        jnp.pad(y, ((0, rest), *((0, 0),) * (y.ndim - 1))).reshape(parts, parts, *y.shape[1:])
        for y in (shares, rows)
    )
    return jnp.sum(jnp.einsum("pr,pr...->p...", shares, rows, precision="highest"), axis=0)
