"""One change of variables after another."""

from typing import Any, NamedTuple

from bnp_optax.preconditioners.base import Preconditioner


class ComposeState(NamedTuple):
    """State of `compose`.

    Attributes:
      outer: State of the outer preconditioner.
      inner: State of the inner one.
    """

    outer: Any
    inner: Any


def compose(outer: Preconditioner, inner: Preconditioner) -> Preconditioner:
    """P = P_outer P_inner: p = P_outer y, y = P_inner z.

    The inner preconditioner sees the outer one's space: its gradients are P_outer^T g. So
    `compose(bnp(), rms())` is RMSProp's scaling of the gradient in BNP's z.

    Args:
      outer: The first change of variables from p.
      inner: The second.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnp_optax
      >>> P = bnp_optax.compose(bnp_optax.rms(0.9), bnp_optax.adagrad())
      >>> p, g = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -4.0])}
      >>> state = P.update(g, P.init(p), p, layer_stats=None)
      >>> bool(jnp.allclose(P.apply(state, P.solve(state, p))["w"], p["w"]))
      True

    Source: Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization", (4), applied twice.
    """

    def init(params: Any) -> ComposeState:
        state = outer.init(params)
        return ComposeState(state, inner.init(outer.solve(state, params)))

    def update(grads: Any, state: ComposeState, params: Any = None, **extra: Any) -> ComposeState:
        outer_state = outer.update(grads, state.outer, params, **extra)
        y = None if params is None else outer.solve(outer_state, params)
        pulled_back = outer.apply_transpose(outer_state, grads)
        return ComposeState(outer_state, inner.update(pulled_back, state.inner, y, **extra))

    def apply(state: ComposeState, z: Any) -> Any:
        return outer.apply(state.outer, inner.apply(state.inner, z))

    def apply_transpose(state: ComposeState, g: Any) -> Any:
        return inner.apply_transpose(state.inner, outer.apply_transpose(state.outer, g))

    def solve(state: ComposeState, p: Any) -> Any:
        return inner.solve(state.inner, outer.solve(state.outer, p))

    return Preconditioner(init, update, apply, apply_transpose, solve)
