"""Gradient regularization: penalize the norm of the gradient, in p or in z."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from bnp_optax._checks import check_choice, check_positive, check_rate
from bnp_optax.preconditioners import Preconditioner
from bnp_optax.preconditioners.base import check_preconditioner
from bnp_optax.transforms.functions_of_z import derivative_of, gradient_of
from bnp_optax.transforms.integers import integers_held, integers_passed, is_integer

Norm = Literal["squared", "l2"]
Mode = Literal["exact", "forward", "backward"]
GradFn = Callable[[Any], Any]


class GradientRegularizationState(NamedTuple):
    """State of `gradient_regularization` and `zspace_grad_reg`.

    Attributes:
      count: Number of steps, for schedules of the strength.
      preconditioner: State of P; empty for the identity.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    preconditioner: Any


def gradient_regularization(
    strength: optax.ScalarOrSchedule,
    *,
    norm: Norm = "squared",
    mode: Mode = "exact",
    radius: ArrayLike = 0.01,
) -> optax.GradientTransformationExtraArgs:
    r"""Add the gradient of strength ||grad L||^2 (or of strength ||grad L||) to the gradient.

    With g = grad L and H the Hessian, at the parameters where the updates were taken,

        squared:  g + 2 strength H g,      l2:  g + strength H g / ||g||.

    `exact` takes the Hessian-vector product as the derivative of `grad_fn` along g, forward over
    reverse. `forward` and `backward` take it as a finite difference with a point at the distance
    `radius` up or down the gradient, by one evaluation of `grad_fn`:

        H g / ||g|| = (grad L(p + radius g / ||g||) - g) / radius + O(radius).

    With `norm='l2', mode='forward'`: strength = radius is SAM with rho = radius, and
    strength = alpha radius is the penalty of Zhao et al. with mixing alpha.

    **Which to use.** `exact` where second derivatives exist and memory allows. `forward` is
    cheaper and needs no second derivatives. In a ReLU network they are different penalties: the
    exact product does not see the kinks, a radius of SAM's size looks beyond them, and
    generalized best in Karakida et al. `l2` keeps its strength as the gradient
    shrinks, the square fades. With adaptive optimizers, warm the strength up from 0 by a schedule.
    Placed before an optimizer it regularizes in p; inside `in_zspace` it is that of z, like
    `zspace_grad_reg`.

    Args:
      strength: lambda >= 0, or a schedule of it.
      norm: `'squared'`, or `'l2'` for the norm itself.
      mode: `'exact'`, or a finite difference `'forward'` (up) or `'backward'` (down the gradient).
      radius: Distance > 0 of the finite difference, in the norm of the parameters.

    Returns:
      A transformation whose `update` needs the extra argument `grad_fn(params) -> grads` or
      `value_fn(params) -> value`, of the same batch as the updates.

    Raises:
      ValueError: If a hyper-parameter is out of its range; at `update`, if neither `grad_fn` nor
        `value_fn`, or no `params`, are given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import bnp_optax
      >>> loss_fn = lambda p: 0.5 * jnp.sum(jnp.array([1.0, 3.0]) * p**2)  # H = diag(1, 3)
      >>> p = jnp.array([2.0, 1.0])
      >>> tx = bnp_optax.gradient_regularization(0.1)
      >>> g, _ = tx.update(jax.grad(loss_fn)(p), tx.init(p), p, grad_fn=jax.grad(loss_fn))
      >>> h = jnp.array([1.0, 3.0])
      >>> bool(jnp.allclose(g, h * p + 0.2 * h * (h * p)))
      True

    Source: Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization", (11); Karakida et al., ICML 2023, for the finite differences; Zhao et al.,
    ICML 2022, for the l2 norm.
    """
    return _regularization(strength, norm, mode, radius, None)


def zspace_grad_reg(
    strength: optax.ScalarOrSchedule,
    preconditioner: Preconditioner,
    *,
    norm: Norm = "squared",
    mode: Mode = "exact",
    radius: ArrayLike = 0.01,
) -> optax.GradientTransformationExtraArgs:
    r"""Regularize by the gradient in z: add the p-space form of strength ||grad_z L(P z)||^2.

    With M = P P^T this is g + 2 strength H M g before preconditioning, or for `l2`
    g + strength H M g / ||P^T g||. So `chain(zspace_grad_reg(s, P), precondition(P), opt)` equals
    `in_zspace(chain(gradient_regularization(s), opt), P)` for an optimizer that is linear in the
    gradient. In z the penalty is one of well scaled variables. Prefer the form inside `in_zspace`:
    it keeps one state of P and works with any optimizer.

    Args:
      strength: lambda >= 0, or a schedule of it.
      preconditioner: Such as `bnp()`; keeps a state of its own here.
      norm: As in `gradient_regularization`.
      mode: As in `gradient_regularization`.
      radius: As in `gradient_regularization`; a distance in z.

    Returns:
      A transformation whose `update` needs `grad_fn` or `value_fn`, and what the preconditioner
      needs.

    Raises:
      ValueError: As `gradient_regularization`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import bnp_optax
      >>> loss_fn = lambda p: 0.5 * jnp.sum(jnp.array([1.0, 3.0]) * p**2)  # H = diag(1, 3)
      >>> p = jnp.array([2.0, 1.0])
      >>> tx = bnp_optax.zspace_grad_reg(0.1, bnp_optax.rms(eps=0.0))
      >>> g, _ = tx.update(jax.grad(loss_fn)(p), tx.init(p), p, grad_fn=jax.grad(loss_fn))
      >>> h = jnp.array([1.0, 3.0])
      >>> bool(jnp.allclose(g, h * p + 0.2 * h * jnp.sign(h * p)))  # M = diag(1 / |g|)
      True

    Source: Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization", (12).
    """
    check_preconditioner(preconditioner)
    return _regularization(strength, norm, mode, radius, preconditioner)


def _regularization(
    strength: optax.ScalarOrSchedule,
    norm: Norm,
    mode: Mode,
    radius: ArrayLike,
    preconditioner: Preconditioner | None,
) -> optax.GradientTransformationExtraArgs:
    check_rate("strength", strength)
    check_choice("norm", norm, ("squared", "l2"))
    check_choice("mode", mode, ("exact", "forward", "backward"))
    check_positive("radius", radius)

    def init_fn(params: optax.Params) -> GradientRegularizationState:
        state = optax.EmptyState() if preconditioner is None else preconditioner.init(params)
        return GradientRegularizationState(jnp.zeros((), jnp.int32), state)

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, GradientRegularizationState]:
        grad_fn = _grad_fn(params, extra_args)
        came, updates = updates, integers_held(updates, params)
        p_state = state.preconditioner
        in_z, direction = updates, updates
        if preconditioner is not None:
            p_state = preconditioner.update(updates, p_state, params, **extra_args)
            P = preconditioner.operator(p_state)
            in_z = P.transpose(updates)
            direction = P.mv(in_z)
        length = optax.tree.norm(in_z)
        weight = strength(state.count) if callable(strength) else strength
        # Of a zero gradient, both norms' gradients are taken to be 0.
        inverse = jnp.where(length > 0.0, 1.0 / jnp.where(length > 0.0, length, 1.0), 0.0)
        if mode == "exact":
            # Along the gradient as it is: scaled to length 1, it would be one more copy of it.
            curvature = derivative_of(grad_fn, params, direction)
            weight = 2.0 * weight if norm == "squared" else weight * inverse
        else:
            step = jnp.asarray(radius) * (1.0 if mode == "forward" else -1.0)
            curvature = _difference(grad_fn, params, updates, direction, step * inverse)
            weight = (2.0 * weight * length if norm == "squared" else weight) / step
        updates = jax.tree.map(lambda g, h: (g + weight * h).astype(g.dtype), updates, curvature)
        updates = integers_passed(updates, came, params)
        return updates, GradientRegularizationState(state.count + 1, p_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _grad_fn(params: Any, extra_args: dict[str, Any]) -> GradFn:
    """`grad_fn`, or the gradient of `value_fn`."""
    if params is None:
        msg = "Gradient regularization needs `params`: call `tx.update(grads, state, params, ...)`."
        raise ValueError(msg)
    if extra_args.get("grad_fn") is not None:
        return extra_args["grad_fn"]
    if extra_args.get("value_fn") is not None:
        return gradient_of(extra_args["value_fn"])
    msg = (
        "Gradient regularization needs the gradient as a function of the parameters. Add it: "
        "`tx.update(grads, state, params, grad_fn=lambda p: jax.grad(loss_fn)(p, *batch))`, or "
        "`value_fn=lambda p: loss_fn(p, *batch)`, with the batch that `grads` is of."
    )
    raise ValueError(msg)


def _difference(grad_fn: GradFn, params: Any, grads: Any, direction: Any, step: Array) -> Any:
    """The gradient at a distance along `direction`, less that at `params`."""

    def moved(p: Array, d: Array) -> Array:
        return p if is_integer(p) else (p + step * d).astype(p.dtype)

    def difference(there: Array, here: Array) -> Array:
        return here if is_integer(here) else there - here

    there = grad_fn(jax.tree.map(moved, params, direction))
    return jax.tree.map(difference, there, grads)
