"""The one abstraction: an invertible linear change of variables p = P z."""

from collections.abc import Callable
from typing import Any, NamedTuple

State = Any
Tree = Any


class Preconditioner(NamedTuple):
    """A change of variables p = P z, with a state from which P is made.

    Use it in two ways: `precondition` multiplies the gradient by M = P P^T; `in_zspace` runs any
    optimizer on z.

    Attributes:
      init: `init(params) -> state`.
      update: `update(grads, state, params, *, layer_stats, **extra) -> state` refreshes P.
      apply: `apply(state, z) -> P z`.
      apply_transpose: `apply_transpose(state, g) -> P^T g`.
      solve: `solve(state, p) -> P^-1 p`.
      gram: `gram(state, g) -> P P^T g` in one pass, or None where `apply(apply_transpose(g))` is
        as good.
    """

    init: Callable[[Tree], State]
    update: Callable[..., State]
    apply: Callable[[State, Tree], Tree]
    apply_transpose: Callable[[State, Tree], Tree]
    solve: Callable[[State, Tree], Tree]
    gram: Callable[[State, Tree], Tree] | None = None


def check_preconditioner(value: Any) -> None:
    """Raise unless `value` is a `Preconditioner`."""
    if not isinstance(value, Preconditioner):
        name = getattr(value, "__name__", type(value).__name__)
        msg = f"`preconditioner` must be a `Preconditioner`, such as `bnp()`; got `{name}`."
        raise ValueError(msg)
