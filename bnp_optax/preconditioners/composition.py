"""One change of variables after another."""

from typing import Any, NamedTuple

import jax

from bnp_optax._tree import named_leaves, quoted
from bnp_optax.preconditioners.base import Operator, Preconditioner, check_preconditioner
from bnp_optax.preconditioners.bnp_operator import BNPState
from bnp_optax.preconditioners.mean_activation import MeanActivationState
from bnp_optax.preconditioners.whiten_operator import WhitenState

# The states that have statistics of layers, and the field that has an array at each of these.
_OF_LAYERS = {BNPState: "moments", WhitenState: "covariance", MeanActivationState: "mean"}


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

    Statistics of a layer are of its inputs in p, which those in y are not: used twice, they would
    center and scale twice. So a layer has statistics in one of the two only.

    Args:
      outer: The first change of variables from p.
      inner: The second.

    Raises:
      ValueError: If an argument is no `Preconditioner`; at `init`, if both keep statistics of one
        layer.

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
    check_preconditioner(outer, "outer")
    check_preconditioner(inner, "inner")

    def init(params: Any) -> ComposeState:
        state = outer.init(params)
        inner_state = inner.init(outer.operator(state).solve(params))
        _check_apart(state, inner_state)
        return ComposeState(state, inner_state)

    def update(grads: Any, state: ComposeState, params: Any = None, **extra: Any) -> ComposeState:
        outer_state = outer.update(grads, state.outer, params, **extra)
        P = outer.operator(outer_state)
        y = None if params is None else P.solve(params)
        return ComposeState(outer_state, inner.update(P.transpose(grads), state.inner, y, **extra))

    def operator(state: ComposeState) -> Product:
        return Product(outer.operator(state.outer), inner.operator(state.inner))

    return Preconditioner(init, update, operator)


def _check_apart(outer: Any, inner: Any) -> None:
    """Raise if both states have statistics of one layer."""
    there = _layers_in(inner)
    both = [name for name in _layers_in(outer) if name in there]
    if both:
        msg = (
            f"`compose` has two preconditioners that keep statistics of {quoted(both)}: the inputs "
            "that the statistics describe are those in p, so the inner one would center and scale "
            "once more what the outer one has. Take one of the two, or give each its own layers: "
            "`layers={name: layer for name, layer in found.items() if ...}`, of "
            "`found = bnp_optax.find_layers(loss_fn, params, ...)`."
        )
        raise ValueError(msg)


def _layers_in(state: Any) -> list[str]:
    """The layers of which a preconditioner's state has statistics, by kernel."""
    kinds = tuple(_OF_LAYERS)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return [
        name
        for node in nodes
        if isinstance(node, kinds)
        for name in named_leaves(getattr(node, _OF_LAYERS[type(node)]))
    ]
