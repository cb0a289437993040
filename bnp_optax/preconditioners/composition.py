"""One change of variables after another."""

from typing import Any, NamedTuple

from bnp_optax.preconditioners.base import Operator, Preconditioner


class ComposeState(NamedTuple):
    """State of `compose`.

    Attributes:
      outer: State of the outer preconditioner.
      inner: State of the inner one.
    """

    outer: Any
    inner: Any


class Product(Operator):
    """P_outer P_inner."""

    def __init__(self, outer: Operator, inner: Operator) -> None:
        self._outer = outer
        self._inner = inner

    def mv(self, z: Any) -> Any:
        """P_outer P_inner z."""
        return self._outer.mv(self._inner.mv(z))

    def transpose(self, g: Any) -> Any:
        """P_inner^T P_outer^T g."""
        return self._inner.transpose(self._outer.transpose(g))

    def solve(self, p: Any) -> Any:
        """P_inner^-1 P_outer^-1 p."""
        return self._inner.solve(self._outer.solve(p))


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
      >>> both = bnp_optax.compose(bnp_optax.rms(0.9), bnp_optax.adagrad())
      >>> p, g = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -4.0])}
      >>> P = both.operator(both.update(g, both.init(p), p, layer_stats=None))
      >>> bool(jnp.allclose(P.mv(P.solve(p))["w"], p["w"]))
      True

    Source: Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization", (4), applied twice.
    """

    def init(params: Any) -> ComposeState:
        state = outer.init(params)
        return ComposeState(state, inner.init(outer.operator(state).solve(params)))

    def update(grads: Any, state: ComposeState, params: Any = None, **extra: Any) -> ComposeState:
        outer_state = outer.update(grads, state.outer, params, **extra)
        P = outer.operator(outer_state)
        y = None if params is None else P.solve(params)
        return ComposeState(outer_state, inner.update(P.transpose(grads), state.inner, y, **extra))

    def operator(state: ComposeState) -> Product:
        return Product(outer.operator(state.outer), inner.operator(state.inner))

    return Preconditioner(init, update, operator)
