"""What equations inside `shard_map` do across devices, and over how many devices rows may lie.

Their primitives have no public names, and some have had several, so they are known by name.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType

# Sums over devices, which leave a product as it is, but for what it is a sum over.
_SUMS = {"psum", "psum2", "psum_invariant", "reduce_scatter"}
# After these all devices hold the same.
_EQUAL = {
    *("psum", "psum2", "psum_invariant", "pmax", "pmin"),
    *("all_gather", "all_gather_invariant"),
}


def is_sum_over_devices(eqn: Any) -> bool:
    """Whether each result of an equation is the sum of an operand over devices."""
    return eqn.primitive.name in _SUMS


def _axes(eqn: Any) -> frozenset[str]:
    names = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    return frozenset((names,) if isinstance(names, str) else names)


def equal_along(eqn: Any) -> frozenset[str]:
    """The mesh axes along which an equation makes values equal."""
    name = eqn.primitive.name
    is_whole = name in _EQUAL and eqn.params.get("axis_index_groups") is None
    return _axes(eqn) if is_whole else frozenset()


def different_along(eqn: Any) -> frozenset[str]:
    """The mesh axes along which an equation makes values different."""
    name = eqn.primitive.name
    return _axes(eqn) if name in {"axis_index", "reduce_scatter"} else frozenset()


def mesh_axes(spec: Any) -> Sequence[str]:
    """The mesh axes that a `PartitionSpec` names."""
    return [n for names in spec for n in dimension_axes(names)]


def dimension_axes(names: Any) -> Sequence[str]:
    """The mesh axes that one entry of a `PartitionSpec` names."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def n_groups(x: Any, axes: Sequence[int], plain: bool) -> int:
    """Into how many equal groups to cut rows along the first of `axes`, so that none is cut itself.

    Rows may be spread over devices. Explicit shardings say how. Other ones are not known when
    tracing; there it is as many groups as there are devices that rows may be spread over, since
    shards are a divisor of them. Explicit shardings of other axes, or of rows that are not `plain`
    (they have weights, or a sample is taken), leave one group.
    """
    sizes = [x.shape[axis] for axis in axes]
    # A size may be symbolic, as in `jax.export`; and no rows are one group of none.
    if not sizes or not isinstance(sizes[0], int) or 0 in sizes:
        return 1
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        spec = tuple(jax.typeof(x).sharding.spec)
        names = dimension_axes(spec[axes[0]])
        alone = all(names is None for axis, names in enumerate(spec) if axis != axes[0])
        return math.prod(mesh.shape[name] for name in names) if plain and alone else 1
    manual = [
        size
        for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind is AxisType.Manual
    ]
    n_devices = jax.device_count() if mesh.empty else math.prod(mesh.axis_sizes)
    return math.gcd(n_devices // math.prod(manual), sizes[0])
