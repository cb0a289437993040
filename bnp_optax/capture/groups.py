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

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from bnp_optax.capture import views
from bnp_optax.capture.views import Measure


def each(function: Callable[..., Measure], *measures: Measure) -> Measure:
    """`function` of every group's measurements, stacked again; all have the same groups."""
    counted = len(measures[0].count) > 1

    def of_group(*fields: jax.Array) -> tuple[jax.Array, ...]:
        parts = zip(*[iter(fields)] * 3, strict=True)
        group = function(*(Measure(*part) for part in parts))
        return group.mean, group.var, group.count

    fields = [x for m in measures for x in (m.mean, m.var, m.count)]
    if len(measures[0].mean) == 1:
        return Measure(*(x[None] for x in of_group(*(x[0] for x in fields))))
    # What all groups share stays one.
    axes = (0, 0, 0 if counted else None)
    fields = [x[0] if i % 3 == 2 and not counted else x for i, x in enumerate(fields)]
    mean, var, count = jax.vmap(of_group, axes * len(measures), axes)(*fields)
    return Measure(mean, var, count if counted else count[None])


def union(measures: list[Measure]) -> Measure:
    """The statistics of several measurements of the same parameter, in groups if these agree."""
    if len({(len(measure.mean), len(measure.count)) for measure in measures}) > 1:
        measures = [views.average(measure, (0,)) for measure in measures]
    return each(lambda *group: views.union(list(group)), *measures)


def joined(measures: Mapping[str, Measure]) -> dict[str, Measure]:
    """The statistics of all rows, without the axis of groups."""
    many = {name: measure for name, measure in measures.items() if len(measure.mean) > 1}
    firsts = {name: _first(measure) for name, measure in many.items()}
    if many:
        # No second sum before all first ones, so that the compiler can make one sum of each.
        firsts = lax.optimization_barrier(firsts)
    return {
        name: _second(measure, firsts[name]) if name in many else measure.map(lambda x: x[0])
        for name, measure in measures.items()
    }


def _first(measure: Measure) -> Measure:
    n_groups = len(measure.mean) // len(measure.count)
    return Measure(
        _mean(measure.mean, measure.count),
        _mean(measure.var, measure.count),
        n_groups * jnp.sum(measure.count, axis=0),
    )


def _second(measure: Measure, first: Measure) -> Measure:
    between = _mean((measure.mean - first.mean) ** 2, measure.count)
    return Measure(first.mean, first.var + between, first.count)


def _mean(x: jax.Array, count: jax.Array) -> jax.Array:
    """The mean over groups of `count` rows each, by sums that do not wait for one another."""
    if len(count) == 1:
        return jnp.mean(x, axis=0)
    total = jnp.sum(count, axis=0)
    return jnp.sum(count * x, axis=0) / jnp.where(total > 0.0, total, 1.0)
