"""Multiply gradients by M = P P^T."""

from typing import Any, NamedTuple, Unpack

import optax

from bnp_optax._checks import check_transformation
from bnp_optax.preconditioners import BNPOptions, Preconditioner, bnp, takes_options
from bnp_optax.preconditioners.base import check_preconditioner
from bnp_optax.transforms.extra_args import update_inner
from bnp_optax.transforms.integers import integers_held, integers_passed


class PreconditionState(NamedTuple):
    """State of `precondition` with a transformation `before`.

    Attributes:
      preconditioner: State of P.
      before: State of the transformation that the gradient goes through before M.
    """

    preconditioner: Any
    before: Any


def precondition(
    preconditioner: Preconditioner, before: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent in z, written in p: replace the gradient g by P P^T g.

    Put after it optimizers that are linear in the gradient: SGD, momentum, weight decay, schedules.
    An adaptive one, which divides by what it sees, undoes the preconditioning there or diverges:
    run it inside `in_zspace` instead.

    Args:
      preconditioner: Such as `bnp()`. It is refreshed with the gradient as it comes.
      before: What the gradient goes through before M multiplies it, such as momentum in p: with
        `optax.ema(b1)`, `precondition(rms(b2), before=optax.ema(b1))` is Adam.

    Returns:
      A transformation whose state is the preconditioner's, or `PreconditionState` with `before`.
      `update` passes extra arguments, such as `layer_stats`, on to the preconditioner.

    Raises:
      ValueError: If `preconditioner` or `before` is something else.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import optax
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jax.random.normal(jax.random.key(1), (8, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> tx = optax.chain(bnp_optax.precondition(bnp_optax.bnp()), optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
      >>> updates, state = tx.update(grads, state, params, layer_stats=stats)
      >>> bool(loss_fn(optax.apply_updates(params, updates)) < loss_fn(params))
      True

    Source: Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization", (5).
    """
    check_preconditioner(preconditioner)
    if before is not None:
        check_transformation("before", before)
    first = None if before is None else optax.with_extra_args_support(before)

    def init_fn(params: optax.Params) -> Any:
        state = preconditioner.init(params)
        return state if first is None else PreconditionState(state, first.init(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        came, updates = updates, integers_held(updates, params)
        p_state = state if first is None else state.preconditioner
        p_state = preconditioner.update(updates, p_state, params, **extra_args)
        P = preconditioner.operator(p_state)
        if first is None:
            return integers_passed(P.gram(updates), came, params), p_state
        updates, first_state = update_inner(first, updates, state.before, params, extra_args)
        updates = P.gram(integers_held(updates, params))
        return integers_passed(updates, came, params), PreconditionState(p_state, first_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@takes_options(bnp)
def bnp_precondition(**options: Unpack[BNPOptions]) -> optax.GradientTransformationExtraArgs:
    """Batch normalization preconditioning of the gradient, `precondition(bnp(**options))`.

    Follow it with SGD or momentum. **Not with Adam** or another adaptive optimizer, which divides
    the preconditioned gradient by its own size and can diverge: `bnp_adam(1e-3)`, which is
    `in_zspace(optax.adam(1e-3), bnp())`, runs Adam between P^T and P, where it belongs.

    Args:
      **options: Those of `bnp`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import optax
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jax.random.normal(jax.random.key(1), (8, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> tx = optax.chain(bnp_optax.bnp_precondition(decay=0.9), optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
      >>> updates, state = tx.update(grads, state, params, layer_stats=stats)
      >>> bool(loss_fn(optax.apply_updates(params, updates)) < loss_fn(params))
      True

    Source: Lange, Helfrich, Ye, JMLR 2022, Algorithms 2 and 3.
    """
    return precondition(bnp(**options))
