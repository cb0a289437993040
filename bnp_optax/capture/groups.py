"""Statistics of groups of rows, one group or more on each device, joined at the very end.

Where a batch is spread over devices, a layer's variance would wait for its mean to come from all of
them, and every layer would wait twice. A group's own mean and variance wait for nothing. With n_g
rows, mean m_g and variance v_g of each group,

    m = sum n_g m_g / sum n_g,    v = sum n_g (v_g + (m_g - m)^2) / sum n_g

(Chan's formula) need two sums over devices that depend on each other, and these are those of all
layers at once. Digits are kept as by two passes over all rows.

Example: rows 1, 3 on one device and 5, 11 on another have means 2 and 8 and variances 1 and 9.
Together: m = 5, v = (1 + 9) / 2 + (9 + 9) / 2 = 14.

A `Measure` of groups has them along the leading axis; `count` has size 1 there where all groups
have equally many rows.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnp_optax.capture import views
from bnp_optax.capture.views import Measure


def each(function: Callable[..., Measure], *measures: Measure) -> Measure:
    """`function` of every group's measurements, stacked again; all have the same groups."""
    if len(measures[0].mean) == 1:
        return function(*(m.map(lambda x: x[0]) for m in measures)).map(lambda x: x[None])
    if len(measures[0].count) > 1:
        return jax.vmap(function)(*measures)
    # What all groups share stays one.
    axes = Measure(mean=0, var=0, rest=0, count=None)
    measures = tuple(dataclasses.replace(m, count=m.count[0]) for m in measures)
    result = jax.vmap(function, (axes,) * len(measures), axes)(*measures)
    return dataclasses.replace(result, count=result.count[None])


def union(measures: list[Measure]) -> Measure:
    """The statistics of several measurements of the same parameter, in groups if these agree."""
    if len(measures) == 1:
        return measures[0]
    if len({(len(measure.mean), len(measure.count)) for measure in measures}) > 1:
        measures = [views.average(measure, (0,)) for measure in measures]
    return each(lambda *group: views.union(list(group)), *measures)


class Joined(NamedTuple):
    """Statistics of all rows, as in `Measure`, without the axis of groups."""

    mean: jax.Array
    var: jax.Array
    count: Any


def joined(measures: Mapping[str, Measure]) -> dict[str, Joined]:
    """The statistics of all rows."""
    alike, result = collections.defaultdict(list), {}
    for name, measure in measures.items():
        # Explicit shardings do not mix.
        alike[
            len(measure.mean), len(measure.count), jax.typeof(measure.mean).sharding.spec[0]
        ].append(name)
    for (n_groups, *_), names in alike.items():
        found = [measures[name] for name in names]
        found = _joined(found) if n_groups > 1 else [_of_one_group(m) for m in found]
        result |= dict(zip(names, found, strict=True))
    return {name: result[name] for name in measures}


def _of_one_group(measure: Measure) -> Joined:
    return Joined(*(x.squeeze(0) for x in (measure.mean, measure.var, measure.count)))


def _joined(measures: list[Measure]) -> list[Joined]:
    """The statistics of all rows in measurements of as many groups, by two sums for all of them.

    They are laid side by side. Left to itself, XLA merges sums over devices as long as none waits
    for another, in the order that it meets them in, and of each layer there one waits.
    """
    shapes = [measure.mean.shape[1:] for measure in measures]
    sizes = [math.prod(shape) for shape in shapes]

    def beside(fields: Iterable[tuple[jax.Array, ...]]) -> jax.Array:
        # Stacked first: where features are sharded, each concatenation moves every layer's pieces.
        flat = [
            jnp.stack([jnp.broadcast_to(x, (len(x), *s)).reshape(len(x), -1) for x in each], 1)
            for each, s in zip(fields, shapes, strict=True)
        ]
        return jnp.concatenate(flat, axis=2)

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=0, keepdims=True)

    mean, var, rest = jnp.moveaxis(beside((m.mean, m.var, m.rest) for m in measures), 1, 0)
    if len(measures[0].count) == 1:
        common = total(mean) / len(mean)
        whole = [common, total(var + ((mean - common) + rest) ** 2) / len(mean)]
    else:
        count = beside((m.count,) for m in measures)[:, 0]
        n_rows = total(count)
        # The sum is divided, and not its terms, so that it need not wait for the total.
        divisor = jnp.where(n_rows > 0.0, n_rows, 1.0)
        common = total(count * mean) / divisor
        whole = [common, total(count * (var + ((mean - common) + rest) ** 2)) / divisor, n_rows]
    whole = jnp.concatenate(whole)
    result = []
    for measure, size, start in zip(measures, sizes, np.cumsum([0, *sizes]), strict=False):
        # By a gather and no slice, through which the compiler would propagate that a kernel is
        # sharded, and move pieces of the row between devices.
        at = int(start) + jnp.arange(size)
        fields = jnp.take(whole, at, axis=1, mode="clip").reshape(-1, *measure.mean.shape[1:])
        count = fields[2] if len(fields) == 3 else len(measure.mean) * measure.count[0]
        result.append(Joined(fields[0], fields[1], count))
    return result
