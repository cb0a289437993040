"""Rows of the inputs that a kernel meets, as they are, for their second moments.

A mean and a variance can be brought from the layout that a product has into that of the parameter,
for they have an entry for each entry of the kernel. A matrix of second moments has not. So the
rows themselves are brought there, a sample of them, each as an array that broadcasts against the
parameter, and the matrix is computed at the very end. A product by itself has few rows, or a sample
of few is taken, so that the rows are small beside the activations.

Example: x of shape (batch, in) in `x @ W.T`, with W of shape (out, in). Its rows in the product's
layout are values of shape (batch, in, 1), in the layout of W of shape (batch, 1, in), and the
second moment is the mean of their outer products, of shape (in, in).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnp_optax import sketches
from bnp_optax._explicit import replicated
from bnp_optax.capture.moments import Weights, Window, fitted, sample, wide
from bnp_optax.statistics import Layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of inputs, in some layout: arrays of as many axes, each full or of size 1.

    Attributes:
      values: The rows, along a leading axis.
      shares: The weight of each, along the same axis; they sum to 1, or to 0 where nothing ran.
      count: Number of rows that these stand for, without the leading axis.
    """

    values: jax.Array
    shares: jax.Array
    count: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The layout: what the values broadcast to, without the axis of rows."""
        return np.broadcast_shapes(
            self.values.shape[1:], self.shares.shape[1:], jnp.shape(self.count)
        )

    def map(self, function: Callable[[Any], Any]) -> "Rows":
        """Apply a rearrangement of the layout to every array."""
        each = jax.vmap(function)
        return Rows(each(self.values), each(self.shares), function(self.count))

    def average(self, axes: tuple[int, ...]) -> "Rows":
        """The union over `axes` of the layout, which keep their place with size 1."""
        shape = self.shape
        count = jnp.broadcast_to(self.count, _full(jnp.shape(self.count), axes, shape))
        total = jnp.sum(count, axis=axes, keepdims=True)
        weight = count / jnp.where(total > 0.0, total, 1.0)

        def folded(x: jax.Array) -> jax.Array:
            x = jnp.broadcast_to(x, (x.shape[0], *_full(x.shape[1:], axes, shape)))
            x = jnp.moveaxis(x, [1 + axis for axis in axes], range(1, 1 + len(axes)))
            n_rows = math.prod(x.shape[: 1 + len(axes)])
            x = x.reshape(n_rows, *x.shape[1 + len(axes) :])
            return jnp.expand_dims(x, tuple(1 + axis for axis in axes))

        return Rows(folded(self.values), folded(self.shares * weight[None]), total)


def _full(own: Sequence[int], axes: Sequence[int], shape: Sequence[int]) -> list[int]:
    return [shape[i] if i in axes else size for i, size in enumerate(own)]


def union(parts: list[Rows]) -> Rows:
    """The rows of several calls of one layer."""
    if len(parts) == 1:
        return parts[0]
    total = sum(part.count for part in parts)

    def joined(arrays: list[jax.Array]) -> jax.Array:
        layout = np.broadcast_shapes(*(x.shape[1:] for x in arrays))
        return jnp.concatenate([jnp.broadcast_to(x, (x.shape[0], *layout)) for x in arrays])

    safe = jnp.where(total > 0.0, total, 1.0)
    shares = [part.shares * (part.count / safe)[None] for part in parts]
    return Rows(joined([part.values for part in parts]), joined(shares), total)


def contraction(
    x: jax.Array, axis_of: Sequence[int | None], weights: Weights, n_rows: int, count: Any
) -> Rows:
    """Rows of `x` for a kernel whose axis i meets the axis `axis_of[i]` of `x`, or none."""
    met = [axis for axis in axis_of if axis is not None]
    axes = tuple(axis for axis in range(x.ndim) if axis not in met)
    sizes = tuple(x.shape[axis] for axis in axes)
    at, shares, share = _chosen(sizes, weights, n_rows)
    rows = jnp.transpose(replicated(x), (*axes, *sorted(met)))
    rows = rows.reshape(-1, *rows.shape[len(axes) :]) if at is None else rows[at]
    order = [0, *(1 + sorted(met).index(axis) for axis in met)]
    absent = tuple(1 + i for i, axis in enumerate(axis_of) if axis is None)
    return _rows(jnp.expand_dims(jnp.transpose(rows, order), absent), shares, count, share)


def patches(
    x: jax.Array,
    features: int,
    groups: int,
    window: Window,
    weights: Weights,
    n_rows: int,
    count: Any,
) -> Rows:
    """What the entries of a kernel (*spatial, in, features) meet at some output positions.

    They are picked from the map (batch, *spatial, channels) where it stands, so that it is neither
    padded nor copied.
    """
    sizes = (x.shape[0], *window.outputs)
    if weights is not None and weights.shape != sizes[: weights.ndim]:
        # Of positions of the input, say: a patch counts if its example has a row that does.
        weights = jnp.max(weights.reshape(weights.shape[0], -1), axis=1)
    at, shares, share = _chosen(sizes, weights, n_rows)
    if at is None:
        at = _places(sizes)
    n_axes = len(window.sizes)
    index, inside = [at[0].reshape(-1, *(1,) * n_axes)], jnp.ones((1,) * (n_axes + 1), bool)
    for axis in range(n_axes):
        offsets = window.kernel_dilation[axis] * np.arange(window.sizes[axis])
        begins = window.strides[axis] * at[1 + axis] - window.padding[axis][0]
        dilation, length = window.input_dilation[axis], x.shape[1 + axis]
        places = begins[:, None] + offsets[None]
        valid = (places >= 0) & (places < dilation * length) & (places % dilation == 0)
        shape = [-1, *(window.sizes[axis] if axis == i else 1 for i in range(n_axes))]
        index.append((places // dilation).clip(0, length - 1).reshape(shape))
        inside = inside & valid.reshape(shape)
    rows = replicated(x)[tuple(index)]
    rows = jnp.where(inside[..., None], rows, jnp.zeros((), rows.dtype))
    rows = rows.reshape(*rows.shape[:-1], groups, rows.shape[-1] // groups).swapaxes(-1, -2)
    # Features come group by group.
    n_each = features // groups if groups > 1 else 1
    rows = jnp.broadcast_to(rows[..., None], (*rows.shape, n_each))
    rows = rows.reshape(*rows.shape[:-2], rows.shape[-2] * n_each)
    return _rows(rows, shares, count, share)


def _places(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """For each axis of the given sizes, of which the first may be symbolic, every row's place."""
    n_rows = math.prod(sizes)
    if isinstance(n_rows, int):
        return np.unravel_index(np.arange(n_rows), sizes)
    places, rest = [], jnp.arange(n_rows)
    for size in sizes[:0:-1]:
        places.append(rest % size)
        rest = rest // size
    return rest, *reversed(places)


def lookup(
    indices: jax.Array, n_rows_of_table: int, n_features: int, weights: Weights, n_rows: int
) -> Rows:
    """One-hot rows at `indices`, for a table (n_rows_of_table, *features)."""
    at, shares, share = _chosen(indices.shape, weights, n_rows)
    chosen = replicated(indices)[... if at is None else at].reshape(-1)
    rows = jax.nn.one_hot(chosen, n_rows_of_table, dtype=jnp.float32)
    rows = rows.reshape(*rows.shape, *(1,) * n_features)
    return _rows(rows, shares, math.prod(indices.shape), share)


def _rows(values: jax.Array, shares: Any, count: Any, share: Any) -> Rows:
    layout = (1,) * (values.ndim - 1)
    # What a row of no weight holds, which may be anything, must not reach a sum.
    if shares is None:
        n_rows = values.shape[0]  # A number that may be symbolic, as `len` is not.
        shares = jnp.full((n_rows, *layout), 1.0 / max(n_rows, 1), jnp.float32)
    else:
        shares = shares.reshape(-1, *layout)
        values = jnp.where(shares > 0.0, values, jnp.zeros((), values.dtype))
    count = jnp.asarray(count).astype(jnp.float32) * share
    values = values.astype(wide(values.dtype))
    return Rows(values, shares, count.reshape(layout))


def _chosen(
    sizes: tuple[int, ...], weights: Weights, n_chosen: int
) -> tuple[tuple[Any, ...] | None, Any, Any]:
    """Which of the rows, that run over axes of `sizes`, to take; at most `n_chosen`.

    Returns:
      Their places along each axis, None for all; their shares, None where all are equal; and the
      mean weight of all rows, 1 without weights.
    """
    n_rows = math.prod(sizes)
    is_whole = not isinstance(n_rows, int) or n_rows <= n_chosen
    if weights is None:
        at = None if is_whole else np.unravel_index(sample(n_rows, n_chosen), sizes)
        return at, None, 1.0
    flat = fitted(weights, sizes).ravel().astype(jnp.float32)
    share, at = jnp.sum(flat) / max(n_rows, 1), None
    if not is_whole:
        # Of those that count, so that a sample is not of padding.
        counts = jnp.cumsum(flat > 0.0)
        n_counting = counts[-1]
        part = np.arange(n_chosen)
        places = (sample(2**20, n_chosen) / 2**20).astype(np.float32)
        ranks = jnp.floor(places * n_counting).astype(counts.dtype)
        few = n_counting <= n_chosen
        ranks = jnp.where(few, part, jnp.minimum(ranks, n_counting - 1))
        chosen = jnp.minimum(jnp.searchsorted(counts, ranks + 1), n_rows - 1)
        flat = jnp.where(ranks < n_counting, flat[chosen], 0.0)
        at = jnp.unravel_index(chosen, sizes)
    total = jnp.sum(flat)
    return at, flat / jnp.where(total > 0.0, total, 1.0), share


@dataclasses.dataclass(frozen=True)
class Limits:
    """How finely second moments are taken.

    Attributes:
      rows: From how many rows at most.
      fan_in: Of more inputs than these there is a sketch.
    """

    rows: int
    fan_in: int

    def n_products(self, layer: Layer) -> int | None:
        """Of a layer's sketch; None if its second moment is a matrix."""
        return sketches.n_products(layer.fan_in) if layer.fan_in > self.fan_in else None


def second_moments(rows: Rows, layer: Layer, limits: Limits) -> dict[str, jax.Array]:
    """Fields of `LayerStats` from rows in the parameter's layout.

    In float32 E[h h^T] loses the covariance where the mean is large beside the deviation, so that
    is summed from differences to the mean.
    """
    inputs, blocks = layer.block_layout
    apart = (*inputs, *(axis for axis, _ in blocks))
    others = tuple(axis for axis, n in enumerate(rows.shape) if n > 1 and axis not in apart)
    if others:
        rows = rows.average(others)

    def arranged(x: jax.Array) -> jax.Array:
        full = [n if axis in apart else 1 for axis, n in enumerate(layer.kernel_shape)]
        x = jnp.broadcast_to(x, (x.shape[0], *full))
        for axis, number in blocks:
            x = jax.lax.slice_in_dim(x, 0, None, full[axis] // number, axis=1 + axis)
        rest = [axis for axis in range(len(full)) if axis not in apart]
        order = [0, *(1 + axis for axis in (*(a for a, _ in blocks), *inputs, *rest))]
        return jnp.transpose(x, order).reshape(x.shape[0], *layer.block_shape, layer.fan_in)

    values, shares = arranged(rows.values), rows.shares
    # Mostly all inputs of a row have one share.
    if math.prod(shares.shape[1:]) == 1:
        shares = shares.reshape(-1, *(1,) * (values.ndim - 1))
    else:
        shares = arranged(shares)
    n_rows = values.shape[0]
    if isinstance(n_rows, int) and n_rows > limits.rows:
        chosen = sample(n_rows, limits.rows)
        values, shares = values[chosen], shares[chosen]
        total = jnp.sum(shares, axis=0, keepdims=True)
        shares = shares / jnp.where(total > 0.0, total, 1.0)
    mean = jnp.sum(shares * values, axis=0)
    # What the mean lacks by rounding is as much as 1e-3 of a deviation 1e4 times smaller.
    mean = mean + jnp.sum(shares * (values - mean[None]), axis=0)
    differences = jnp.sqrt(shares) * (values - mean[None])
    covariance = sketches.of_rows(differences, limits.n_products(layer))
    moment = covariance + sketches.outer(mean, covariance)
    fields = {"second_moment": moment, "covariance": covariance, "rows_mean": mean}
    return {name: x.astype(jnp.float32) for name, x in fields.items()}


def no_second_moments(layer: Layer, limits: Limits) -> dict[str, jax.Array]:
    """The same fields for a layer that never runs."""
    k = limits.n_products(layer)
    zeros = jnp.zeros((*layer.block_shape, k + 1 if k else layer.fan_in, layer.fan_in), jnp.float32)
    return {"second_moment": zeros, "covariance": zeros, "rows_mean": zeros[..., 0, :]}
