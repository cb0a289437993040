"""How to shard the state of an optimizer, given how its parameters are sharded."""

import itertools
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from bnp_optax._tree import named_leaves, path_name, quoted
from bnp_optax.drop_in import LAYER_STATS, PARAMS
from bnp_optax.preconditioners.bnp_operator import BNPState
from bnp_optax.preconditioners.whiten_operator import WhitenState
from bnp_optax.transforms.multi_steps import MultiStepsState

Spec = PartitionSpec | Sharding
T = TypeVar("T")


def state_sharding(tx: optax.GradientTransformation, params: Any, shardings: Any) -> Any:
    """The shardings of `tx.init(params)`, for `jax.jit(..., out_shardings=...)` and checkpoints.

    An array of the state that belongs to a parameter, such as a moment of Adam, is sharded as the
    parameter is. Where it has another shape, it keeps of the parameter's sharding what fits:
    moments of shape (2, in, 1) beside a kernel of shape (in, out) are sharded along the second axis
    as the kernel is along its first, as are the (memory, in, out) of L-BFGS; a factored moment of
    `optax.adafactor`, of shape (in,) or (out,), is sharded as that axis of the kernel is, if its
    size tells which one it is. All else is replicated: counts, what `bnp` keeps in a few numbers,
    and all that `whiten` keeps, or `multi_steps` for it.

    Which parameter an array belongs to is told by the end of its path in the state; with `drop_in`
    that of the bare parameter will do.

    Args:
      tx: The optimizer, of this library or not.
      params: The parameters, or `jax.ShapeDtypeStruct` in their place, boxed (`nn.Partitioned`,
        `nnx.Variable`) or not.
      shardings: A tree of the parameters' structure, boxed or not, with a `PartitionSpec` or a
        `Sharding` for each parameter, or None for one that is replicated; from
        `nn.get_partition_spec` or `nnx.get_partition_spec`, say. Specs name mesh axes:
        put logical ones through `nn.logical_to_mesh` first.

    Returns:
      A tree of the structure of `tx.init(params)`, of `PartitionSpec` if `shardings` are that,
      else of `Sharding`.

    Raises:
      ValueError: If `shardings` lacks a parameter, mixes specs and shardings, or has a sharding
        that is neither a `NamedSharding` nor the same for all shapes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> import bnp_optax
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
      >>> specs = {"kernel": P("data", "model"), "bias": P("model")}
      >>> found = bnp_optax.state_sharding(bnp_optax.bnp_adam(1e-3), params, specs)
      >>> found.preconditioner.moments["kernel"] == P(None, "data", None)
      True
      >>> found.inner[0].mu == specs
      True
    """
    arrays, given = named_leaves(params), _by_name(shardings)
    missing = [name for name in arrays if name not in given]
    if missing:
        msg = (
            f"`shardings` has nothing for {quoted(missing)}; it has {quoted(given)}. Give a tree "
            "of the parameters' structure, with None where one is replicated."
        )
        raise ValueError(msg)
    replicated = _replicated(given)
    if isinstance(params, Mapping) and set(params) == {PARAMS, LAYER_STATS}:
        arrays, given = _with_bare_names(arrays), _with_bare_names(given)

    def of_array(path: Any, array: Any) -> Spec:
        name = _parameter(path_name(path), arrays)
        spec = None if name is None else given[name]
        if name is None or spec is None:
            return replicated
        return _fitted(spec, tuple(arrays[name].shape), tuple(array.shape))

    def of_moment(path: Any, array: Any, mean: Any, var: Any) -> Spec:
        # A covariance may have the shape of the kernel, and is of its inputs alone.
        return replicated if len(var.shape) > len(mean.shape) else of_array(path, array)

    def of_node(path: Any, node: Any) -> Any:
        if isinstance(node, WhitenState):
            return jax.tree.map(lambda _: replicated, node)  # Decomposed whole on every device.
        if isinstance(node, BNPState):
            moments = jax.tree_util.tree_map_with_path(of_array, node.moments)
            rest = jax.tree.map(lambda _: replicated, node[1:])
            return BNPState(moments, *rest)
        if isinstance(node, MultiStepsState):
            mean, var = (
                jax.tree_util.tree_map_with_path(of_moment, tree, node.mean, node.var)
                for tree in (node.mean, node.var)
            )
            rows = jax.tree.map(lambda _: replicated, node.rows)
            return MultiStepsState(of_state(node.multi_steps), mean, var, rows)
        return of_array(path, node)

    def of_state(state: Any) -> Any:
        flat, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_of_layers)
        return treedef.unflatten([of_node(path, node) for path, node in flat])

    return of_state(jax.eval_shape(tx.init, params))


def _is_of_layers(node: Any) -> bool:
    return isinstance(node, BNPState | WhitenState | MultiStepsState)


def _with_bare_names(by_name: dict[str, T]) -> dict[str, T]:
    """Also by the names of the bare parameters, which the optimizer inside a `drop_in` sees."""
    parts = {name: name.split("/") for name in by_name}
    bare = {"/".join(part[1:]): by_name[name] for name, part in parts.items() if part[0] == PARAMS}
    return bare | by_name


def _by_name(shardings: Any) -> dict[str, Spec | None]:
    """Specs or shardings by the names of their parameters."""
    marked = jax.tree.map(
        lambda spec: _Leaf(spec),
        shardings,
        is_leaf=lambda node: node is None or isinstance(node, PartitionSpec | Sharding),
    )
    return {name: leaf.spec for name, leaf in named_leaves(marked).items()}


class _Leaf:
    """What is a leaf of any tree, also where None or a spec is none."""

    def __init__(self, spec: Spec | None) -> None:
        self.spec = spec


def _replicated(given: dict[str, Spec | None]) -> Spec:
    """What all else in the state gets."""
    kinds = {
        type(spec) if isinstance(spec, PartitionSpec | NamedSharding) else Sharding
        for spec in given.values()
        if spec is not None
    }
    if len(kinds) > 1:
        msg = (
            "`shardings` has some of "
            f"{sorted(kind.__name__ for kind in kinds)}; give specs for all parameters, or a "
            "`NamedSharding` for each."
        )
        raise ValueError(msg)
    first = next((spec for spec in given.values() if spec is not None), PartitionSpec())
    return _fitted(first, (0,), ())


def _parameter(name: str, parameters: dict[str, Any]) -> str | None:
    """The parameter that an array of the state is named after; the longest name is the one."""
    parts = name.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    whole = "" if "" in parameters else None
    return next((end for end in ends if end in parameters), whole)


def _fitted(spec: Spec, shape: tuple[int, ...], part: tuple[int, ...]) -> Spec:
    """The spec or sharding of an array of shape `shape`, for one of shape `part`."""
    if isinstance(spec, PartitionSpec):
        return PartitionSpec(*_fitted_names(tuple(spec), shape, part))
    if isinstance(spec, NamedSharding):
        names = _fitted_names(tuple(spec.spec), shape, part)
        return NamedSharding(spec.mesh, PartitionSpec(*names), memory_kind=spec.memory_kind)
    if spec.is_fully_replicated:
        return spec
    msg = (
        f"`shardings` has {spec}, which says nothing of arrays of another shape; give a "
        "`PartitionSpec` or a `NamedSharding`."
    )
    raise ValueError(msg)


def _fitted_names(
    spec: tuple[Any, ...], shape: tuple[int, ...], part: tuple[int, ...]
) -> tuple[Any, ...]:
    """The mesh axes along each axis of `part`, by the axis of `shape` that it stands for."""
    if part == shape:
        return spec
    names = (*spec, *[None] * (len(shape) - len(spec)))
    if len(part) == len(shape) + 1:
        return None, *_fitted_names(spec, shape, part[1:])  # Several, along a first axis.
    if len(part) == len(shape):
        # What has not the parameter's size, has size 1.
        same = zip(names, shape, part, strict=True)
        return tuple(name if whole == size else None for name, whole, size in same)
    ways = {
        tuple(names[axis] for axis in axes)
        for axes in itertools.combinations(range(len(shape)), len(part))
        if tuple(shape[axis] for axis in axes) == part
    }
    return ways.pop() if len(ways) == 1 else (None,) * len(part)
