"""Points that an optimizer keeps in its state, carried along when P moves.

Some optimizers store parameters: schedule-free its iterate, SAM the place that it returns to,
mechanize, DoG and Prodigy where they started. Inside `in_zspace` such a point is a
z = P_old^-1 p. With P refreshed it would stand for another p, and pull the parameters there. So it
becomes P_new^-1 P_old z, which stands for the p that it stood for.

Which leaves of a state are points is seen from `init`: they are copies of its argument. What it
makes of the parameters in another way, such as one vector of them all, cannot be carried, and is
refused; but for single numbers, such as their norm, which stand for no place.

That is not enough for an optimizer that places the parameters at x0 - (a sum of gradients): the sum
is one of older z. Such optimizers are refused too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal

from bnp_optax._tree import named_leaves, quoted, replace_leaves
from bnp_optax.capture.jaxprs import bare, called, is_call, is_identity
from bnp_optax.preconditioners import Operator

# Copies too, beside those of `is_identity`.
_COPIES = {"convert_element_type", "stop_gradient"}
# What a value has for its source that depends on parameters and is no copy of one.
_NO_COPY = -1
# Of optimizers that cannot run in z, the state, what to call it, and why.
_SUMMED = "it places the parameters by a sum of gradients in z, and P moves what z stands for"
_REFUSED = {
    "COCOBState": ("optax.contrib.cocob", _SUMMED),
    "MadgradState": ("optax.contrib.madgrad", _SUMMED),
    "LookaheadState": ("optax.lookahead", "its parameters are pairs of fast and slow ones"),
}
_LineSearch = optax.ScaleByBacktrackingLinesearchState | optax.ScaleByZoomLinesearchState
Pairs = tuple[tuple[int, int], ...]


def check_runs_in_z(state: Any) -> None:
    """Raise if `state` is that of an optimizer that cannot run in z.

    Raises:
      ValueError: Naming the optimizer, the reason, and what to use.
    """

    def is_refused(node: Any) -> bool:
        return type(node).__name__ in _REFUSED

    for node in jax.tree.leaves(state, is_leaf=is_refused):
        if is_refused(node):
            name, reason = _REFUSED[type(node).__name__]
            msg = (
                f"`{name}` cannot run inside `in_zspace`: {reason}. Use an optimizer that steps "
                "from where the parameters are, such as `optax.adam` or, without a learning rate, "
                "`optax.contrib.prodigy`; for slow averages, `optax.contrib.schedule_free`."
            )
            raise ValueError(msg)


def find_points(init: Callable[[Any], Any], params: Any) -> Pairs:
    """Which leaves of `init(params)` are copies of which leaves of `params`, by their places.

    Raises:
      ValueError: If one depends on parameters and is no copy.
    """
    leaves, treedef = jax.tree.flatten(params)

    def state_of(leaves: list[Any]) -> Any:
        z = treedef.unflatten(leaves)

        # L-BFGS keeps the last parameters, which it starts from zeros.
        def with_params(node: Any) -> Any:
            return node._replace(params=_filled(node.params, z)) if _is_lbfgs(node) else node

        return jax.tree.map(with_params, init(z), is_leaf=_is_lbfgs)

    closed, state = jax.make_jaxpr(state_of, return_shape=True)(leaves)
    sources = _sources(closed.jaxpr, range(len(leaves)))
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    changed = [
        jax.tree_util.keystr(path)
        for (path, leaf), source in zip(paths, sources, strict=True)
        if source == _NO_COPY and leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    if changed:
        raise ValueError(_changed_message(changed))
    return tuple((i, of) for i, of in enumerate(sources) if of is not None and of != _NO_COPY)


def carry_points(state: Any, points: Pairs, params: Any, old: Operator, new: Operator) -> Any:
    """`state` with its points z replaced by P_new^-1 P_old z.

    A state may hold a point of some leaves only, where an optimizer is masked: P mixes the leaves
    of a layer, so the others are those of the parameters.
    """
    leaves, treedef = jax.tree.flatten(state)
    base, params_def = jax.tree.flatten(old.solve(params))
    while points:
        # One copy of each parameter at a time.
        one = {of: at for at, of in reversed(points)}
        points = tuple((at, of) for at, of in points if one[of] != at)
        z = [leaves[one[i]].astype(x.dtype) if i in one else x for i, x in enumerate(base)]
        moved = jax.tree.leaves(new.solve(old.mv(params_def.unflatten(z))))
        for of, at in one.items():
            leaves[at] = moved[of].astype(leaves[at].dtype)
    return treedef.unflatten(leaves)


def forget_value(state: Any) -> Any:
    """`state` without the value that a line search keeps for `optax.value_and_grad_from_state`.

    The gradient that it keeps beside it is one in z, which must not be taken for one in p. Where
    the value is infinite, that function computes both anew.
    """

    def is_line_search(node: Any) -> bool:
        return isinstance(node, _LineSearch)

    def forget(node: Any) -> Any:
        if not is_line_search(node):
            return node
        return node._replace(value=jnp.full_like(node.value, jnp.inf))

    return jax.tree.map(forget, state, is_leaf=is_line_search)


def _is_lbfgs(node: Any) -> bool:
    return isinstance(node, optax.ScaleByLBFGSState)


def _filled(kept: Any, z: Any) -> Any:
    """The parameters in the tree that an optimizer keeps, which may be masked."""
    places, values = named_leaves(kept), named_leaves(z)
    if any(name not in values or values[name].shape != x.shape for name, x in places.items()):
        raise ValueError(_changed_message(["ScaleByLBFGSState.params"]))
    return replace_leaves(kept, {name: values[name] for name in places})


def _changed_message(places: Sequence[str]) -> str:
    return (
        f"`inner` cannot run inside `in_zspace`: its state keeps at {quoted(places)} parameters in "
        "another form than theirs, such as `optax.flatten` makes, and these cannot be carried "
        "along when P moves. Leave out what changes their form; or if they are not meant to be "
        "kept, let its `init` begin with `jnp.zeros_like`."
    )


def _sources(jaxpr: Any, given: Sequence[int | None]) -> list[int | None]:
    """What the outputs of a jaxpr are copies of, where its inputs are copies of `given`.

    None for what does not depend on any of these, `_NO_COPY` for what does in another way.
    """
    source = dict(zip(jaxpr.invars, given, strict=True))

    def of(atom: Any) -> int | None:
        return None if isinstance(atom, Literal) else source.get(atom)

    for eqn in jaxpr.eqns:
        operands = [of(atom) for atom in eqn.invars]
        inner = called(eqn) if is_call(eqn) else None
        if inner is not None:
            results = _sources(bare(inner), operands)
        elif is_identity(eqn) or eqn.primitive.name in _COPIES:
            results = operands
        else:
            depends = any(operand is not None for operand in operands)
            results = [_NO_COPY if depends else None] * len(eqn.outvars)
        source.update(zip(eqn.outvars, results, strict=True))
    return [of(atom) for atom in jaxpr.outvars]
