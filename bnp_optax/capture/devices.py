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


def n_shards() -> int:
    """Over how many devices the compiler may spread rows, for all that is known when tracing.

    All devices, less those that `shard_map` has spread them over already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    manual = math.prod(size for size, kind in sizes if kind is AxisType.Manual)
    return max(jax.device_count() // manual, 1)
