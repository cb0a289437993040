"""The equations that only rearrange their operand, as operations on views."""

from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal
from jax.extend.core import primitives as prims

from bnp_optax.capture import views
from bnp_optax.capture.jaxprs import is_identity
from bnp_optax.capture.views import Shape, View


def is_cast(eqn: Any) -> bool:
    """Whether an equation changes the floating-point type of real numbers and nothing else.

    `astype(int)` drops digits, `astype(bool)` all but one: these are no mere casts.
    """
    if eqn is None or eqn.primitive is not prims.convert_element_type_p:
        return eqn is not None and eqn.primitive.name in {"pcast", "pvary"}
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    return jnp.issubdtype(new, jnp.floating) and not jnp.issubdtype(old, jnp.complexfloating)


def rearranged(view: View, eqn: Any, definitions: dict[Any, Any]) -> View | None:
    """The view that an equation of one view makes, or None if it is no rearrangement."""
    primitive, params = eqn.primitive, eqn.params
    shape: Shape = tuple(eqn.outvars[0].aval.shape)
    if is_identity(eqn):
        return view
    if primitive is prims.real_p:
        return view
    if primitive is prims.convert_element_type_p:
        return view if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact) else None
    if primitive is prims.transpose_p:
        return views.transpose(view, tuple(params["permutation"]))
    if primitive is prims.reshape_p:
        order = params.get("dimensions")  # As `vmap` puts it in before a convolution.
        return views.reshape(view if order is None else views.transpose(view, tuple(order)), shape)
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
    if primitive.name in {"all_gather", "all_gather_invariant"}:
        names, axis = params["axis_name"], params["all_gather_dimension"]
        names = (names,) if isinstance(names, str) else tuple(names)
        if len(names) == 1 and params.get("axis_index_groups") is None:
            return views.gather(view, shape, names[0], axis, params["tiled"])
    return None


def joined(taken: list[View], eqn: Any) -> View | None:
    """The view that an equation makes of several, or None if it does not put them side by side."""
    if eqn.primitive is prims.concatenate_p:
        return views.concatenate(taken, eqn.params["dimension"])
    if eqn.primitive.name == "stack":
        axis = eqn.params["axis"]
        layers = [views.reshape(v, (*v.shape[:axis], 1, *v.shape[axis:])) for v in taken]
        return views.concatenate(layers, axis)
    return None


def parts(view: View, eqn: Any) -> list[View] | None:
    """The views that an equation takes a view apart into, or None if it does not."""
    name, axis = eqn.primitive.name, eqn.params.get("axis", 0)
    if name not in {"split", "unstack"}:
        return None
    sizes = eqn.params.get("sizes", (1,) * view.shape[axis])
    result, start = [], [0] * len(view.shape)
    for size in sizes:
        shape = tuple(size if i == axis else n for i, n in enumerate(view.shape))
        at = tuple(start)
        part = views.sliced(view, shape, lambda _, at=at: at, (1,) * len(shape), at)
        result.append(part if name == "split" else views.squeeze(part, (axis,)))
        start[axis] += size
    return result


def _place(atom: Any, definitions: dict[Any, Any], depth: int = 4) -> Any:
    """A name for an index, the same for indices that are computed alike in a few operations."""
    if isinstance(atom, Literal):
        return str(atom.val)
    eqn = definitions.get(atom)
    if eqn is None or len(eqn.outvars) > 1 or depth == 0:
        return atom
    return eqn.primitive.name, *(_place(x, definitions, depth - 1) for x in eqn.invars)
