"""The equations that only rearrange their operand, as operations on views."""

from typing import Any

from jax.extend.core import Literal
from jax.extend.core import primitives as prims

from bnp_optax.capture import views
from bnp_optax.capture.views import Shape, View

_SAME_NAMES = {"pvary", "pcast"}  # What `shard_map` puts in; not among the public primitives.
_SAME = {
    prims.convert_element_type_p,
    prims.copy_p,
    prims.sharding_constraint_p,
    prims.stop_gradient_p,
    prims.reduce_precision_p,
}


def is_cast(eqn: Any) -> bool:
    """Whether an equation changes the type of its operand and nothing else."""
    return eqn is not None and (
        eqn.primitive is prims.convert_element_type_p or eqn.primitive.name in _SAME_NAMES
    )


def rearranged(view: View, eqn: Any, definitions: dict[Any, Any]) -> View | None:
    """The view that an equation of one view makes, or None if it is no rearrangement."""
    primitive, params = eqn.primitive, eqn.params
    shape: Shape = tuple(eqn.outvars[0].aval.shape)
    if primitive in _SAME or primitive.name in _SAME_NAMES:
        return view
    if primitive is prims.transpose_p:
        return views.transpose(view, tuple(params["permutation"]))
    if primitive is prims.reshape_p and params.get("dimensions") is None:
        return views.reshape(view, shape)
    if primitive is prims.broadcast_in_dim_p:
        return views.broadcast(view, shape, tuple(params["broadcast_dimensions"]))
    if primitive is prims.squeeze_p:
        return views.squeeze(view, tuple(params["dimensions"]))
    if primitive is prims.rev_p:
        return views.reverse(view, tuple(params["dimensions"]))
    if primitive is prims.slice_p:
        start = tuple(params["start_indices"])
        strides = params["strides"] or (1,) * len(shape)
        return views.sliced(view, shape, lambda _: start, tuple(strides), start)
    if primitive is prims.dynamic_slice_p:
        index = eqn.invars[1:]
        places = tuple(_place(atom, definitions) for atom in index)
        return views.sliced(view, shape, lambda read: [read(atom) for atom in index], None, places)
    return None


def _place(atom: Any, definitions: dict[Any, Any], depth: int = 4) -> Any:
    """A name for an index, the same for indices that are computed alike in a few operations."""
    if isinstance(atom, Literal):
        return str(atom.val)
    eqn = definitions.get(atom)
    if eqn is None or len(eqn.outvars) > 1 or depth == 0:
        return atom
    return eqn.primitive.name, *(_place(x, definitions, depth - 1) for x in eqn.invars)
