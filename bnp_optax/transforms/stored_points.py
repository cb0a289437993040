"""Points that an optimizer keeps in its state, carried along when P moves.

Some optimizers store parameters: schedule-free its iterate, SAM the place that it returns to,
mechanize, DoG and Prodigy where they started. Inside `in_zspace` such a point is a
z = P_old^-1 p. With P refreshed it would stand for another p, and pull the parameters there. So it
becomes P_new^-1 P_old z, which stands for the p that it stood for.

Which leaves of a state are points is seen from `init`: they are copies of its argument. That is
not enough for an optimizer that places the parameters at x0 - (a sum of gradients): the sum is one
of older z. Such optimizers are refused.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Var

from bnp_optax.preconditioners import Operator

# Of operations, those that copy.
_COPIES = ("copy", "copy_p", "convert_element_type", "optimization_barrier")
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
    """Which leaves of `init(params)` are copies of which leaves of `params`, by their places."""
    leaves, treedef = jax.tree.flatten(params)

    def state_leaves(leaves: list[Any]) -> list[Any]:
        z = treedef.unflatten(leaves)

        # L-BFGS keeps the last parameters, which it starts from zeros.
        def with_params(node: Any) -> Any:
            whole = _is_lbfgs(node) and jax.tree.structure(node.params) == treedef
            return node._replace(params=z) if whole else node

        return jax.tree.leaves(jax.tree.map(with_params, init(z), is_leaf=_is_lbfgs))

    jaxpr = jax.make_jaxpr(state_leaves)(leaves).jaxpr
    source = {var: i for i, var in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _COPIES:
            for old, new in zip(eqn.invars, eqn.outvars, strict=True):
                if isinstance(old, Var) and old in source:
                    source[new] = source[old]
    outputs = enumerate(jaxpr.outvars)
    return tuple((i, source[v]) for i, v in outputs if isinstance(v, Var) and v in source)


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
