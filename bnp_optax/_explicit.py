"""Arrays whose sharding is part of their type, as in a mesh of explicit axes.

There an operation on two arrays asks that their shardings agree, and a sum over a sharded axis that
its result's is told. Statistics, kernels and biases of a layer are sharded each as the user, or the
product that they come from, has it; what meets a kernel is brought to the kernel's sharding. In any
other mesh types say nothing of shardings, and all of this is the identity.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.sharding
from jax.sharding import NamedSharding, PartitionSpec

# The name has moved.
_reshard = getattr(jax, "reshard", None) or jax.sharding.reshard


def spec_of(x: Any) -> tuple[Any, ...] | None:
    """For each axis of `x` the mesh axes of its type, or None if the type names none."""
    if not isinstance(x, jax.Array):
        return None
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec if any(names is not None for names in spec) else None


def fitted(x: jax.Array, like: Any) -> jax.Array:
    """`x`, which broadcasts against `like`, sharded as `like` where both have an axis."""
    spec, target = spec_of(x), spec_of(like)
    if spec is None and target is None:
        return x
    names = target or (None,) * x.ndim
    names = tuple(n if size > 1 else None for n, size in zip(names, x.shape, strict=True))
    if names == (spec or (None,) * x.ndim):
        return x
    mesh = jax.typeof(x if target is None else like).sharding.mesh
    return _reshard(x, NamedSharding(mesh, PartitionSpec(*names)))


def sharding_of_sum(x: jax.Array, kept: Sequence[int]) -> PartitionSpec | None:
    """What `out_sharding` a product that sums `x` over all axes but `kept` asks for."""
    spec = spec_of(x)
    return None if spec is None else PartitionSpec(*(spec[axis] for axis in kept))


def gathered(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """`x`, along `axes` whole on every device."""
    spec = spec_of(x)
    if spec is None or all(spec[axis] is None for axis in axes):
        return x
    mesh = jax.typeof(x).sharding.mesh
    names = (None if axis in axes else name for axis, name in enumerate(spec))
    return _reshard(x, NamedSharding(mesh, PartitionSpec(*names)))


def replicated(x: jax.Array) -> jax.Array:
    """`x`, whole on every device."""
    return gathered(x, range(x.ndim))
