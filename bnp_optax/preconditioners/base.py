"""The one abstraction: an invertible linear change of variables p = P z."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

State = Any
Tree = Any


class Operator(abc.ABC):
    """An invertible linear map P on trees of the parameters' structure.

    Subclasses give `mv`, `transpose` and `solve`; leaves that P does not act on pass through.

    Example:
      >>> import jax
      >>> import bnp_optax
      >>> class Twice(bnp_optax.Operator):
      ...     def mv(self, z):
      ...         return jax.tree.map(lambda x: 2.0 * x, z)
      ...     transpose = mv
      ...     def solve(self, p):
      ...         return jax.tree.map(lambda x: x / 2.0, p)
      >>> Twice().gram({"w": 3.0})
      {'w': 12.0}
    """

    @abc.abstractmethod
    def mv(self, z: Tree) -> Tree:
        """P z."""

    @abc.abstractmethod
    def transpose(self, g: Tree) -> Tree:
        """P^T g."""

    @abc.abstractmethod
    def solve(self, p: Tree) -> Tree:
        """P^-1 p."""

    def gram(self, g: Tree) -> Tree:
        """P P^T g; override it where one pass does."""
        return self.mv(self.transpose(g))


class Preconditioner(NamedTuple):
    """A change of variables p = P z, with a state from which P is made.

    Use it in two ways: `precondition` multiplies the gradient by M = P P^T; `in_zspace` runs any
    optimizer on z.

    Attributes:
      init: `init(params) -> state`.
      update: `update(grads, state, params, *, layer_stats, **extra) -> state` refreshes P.
      operator: `operator(state) -> P`, an `Operator`.
    """

    init: Callable[[Tree], State]
    update: Callable[..., State]
    operator: Callable[[State], Operator]


def check_preconditioner(value: Any, argument: str = "preconditioner") -> Preconditioner:
    """`value`, or an error unless it is a `Preconditioner`."""
    if not isinstance(value, Preconditioner):
        name = getattr(value, "__name__", type(value).__name__)
        msg = f"`{argument}` must be a `Preconditioner`, such as `bnp()`; got `{name}`."
        raise ValueError(msg)
    return value
