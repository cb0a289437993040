"""Run any optimizer on z, where p = P z."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from bnp_optax.preconditioners import Preconditioner
from bnp_optax.preconditioners.base import check_preconditioner
from bnp_optax.transforms.extra_args import (
    derivative_of,
    gradient_of,
    update_inner,
    with_derivative,
    with_gradient,
)
from bnp_optax.transforms.proximal_l1 import ProximalL1State

Map = Callable[[Any], Any]


class InZspaceState(NamedTuple):
    """State of `in_zspace`.

    Attributes:
      preconditioner: State of P.
      inner: State of the optimizer that runs on z.
      before: State of the transformation that the gradient goes through in p.
    """

    preconditioner: Any
    inner: Any
    before: Any


def in_zspace(
    inner: optax.GradientTransformation,
    preconditioner: Preconditioner,
    before: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on z, where p = P z: updates = P inner(P^T g).

    This is how an adaptive optimizer meets a preconditioner. Whatever `inner` looks at is mapped:
    gradients and the extra argument `grad` by P^T, parameters by P^-1, and the functions
    `grad_fn` and `value_fn` become functions of z. So a regularizer in `inner` acts on z: with
    `optax.adamw`, decay shrinks z, which is decoupled decay of p.

    Args:
      inner: Any Optax transformation. It gets those extra arguments that its `update` takes,
        other than `layer_stats`.
      preconditioner: Such as `bnp()`. It is refreshed with the gradient as it comes.
      before: What the gradient goes through in p, before P^T, such as Adam's momentum; None for
        nothing. A `gradient_regularization` in `inner` would take that momentum for the gradient:
        use `before=optax.chain(zspace_grad_reg(strength, preconditioner), optax.ema(decay))`.

    Returns:
      A transformation with state `InZspaceState`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import optax
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jax.random.normal(jax.random.key(1), (8, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
      >>> in_z = bnp_optax.in_zspace(optax.sgd(0.1), bnp_optax.bnp())
      >>> in_p = optax.chain(bnp_optax.bnp_precondition(), optax.sgd(0.1))
      >>> one, _ = in_z.update(grads, in_z.init(params), params, layer_stats=stats)
      >>> two, _ = in_p.update(grads, in_p.init(params), params, layer_stats=stats)
      >>> bool(jnp.allclose(one["kernel"], two["kernel"], rtol=1e-4))
      True

    Source: Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization", (4) and (9).
    """
    check_preconditioner(preconditioner)
    inner = optax.with_extra_args_support(inner)
    first = optax.with_extra_args_support(before or optax.identity())

    def init_fn(params: optax.Params) -> InZspaceState:
        state = preconditioner.init(params)
        z = preconditioner.solve(state, params)
        return InZspaceState(state, inner.init(z), first.init(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, InZspaceState]:
        p_state = preconditioner.update(updates, state.preconditioner, params, **extra_args)
        updates, first_state = update_inner(first, updates, state.before, params, extra_args)
        to_p = functools.partial(preconditioner.apply, p_state)
        pull_back = functools.partial(preconditioner.apply_transpose, p_state)
        if extra_args.get("grad") is not None:
            extra_args["grad"] = pull_back(extra_args["grad"])
        z = None if params is None else preconditioner.solve(p_state, params)
        for name, mapped in (("value_fn", _mapped_value), ("grad_fn", _mapped_gradient)):
            if extra_args.get(name) is not None:
                extra_args[name] = mapped(extra_args[name], params, z, to_p, pull_back)
        z_updates, inner_state = update_inner(inner, pull_back(updates), state.inner, z, extra_args)
        updates = to_p(z_updates)
        if params is not None and _may_set_zeros(inner_state):
            updates = jax.tree.map(_exact_zero, updates, params, z_updates, z)
        return updates, InZspaceState(p_state, inner_state, first_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _may_set_zeros(inner_state: Any) -> bool:
    def is_proximal(node: Any) -> bool:
        return isinstance(node, ProximalL1State)

    return any(map(is_proximal, jax.tree.leaves(inner_state, is_leaf=is_proximal)))


def _exact_zero(update: Array, p: Array, z_update: Array, z: Array) -> Array:
    """`update`, but exactly -p where z and p both become 0 but for rounding.

    P(P^-1 p) is p up to rounding, so where the new z is 0, the new p would be about 1e-8 p. Nor is
    the new z exactly 0 where the compiler fuses its product into the sum.
    """

    def vanishes(x: Array, change: Array) -> Array:
        return jnp.abs(x + change) <= 8 * jnp.finfo(x.dtype).eps * jnp.abs(x)

    return jnp.where(vanishes(z, z_update) & vanishes(p, update), -p, update).astype(update.dtype)


def _mapped_value(
    value_fn: Callable[..., Any], params: Any, z: Any, to_p: Map, pull_back: Map
) -> Callable[..., Any]:
    """`value_fn` of p as one of z."""

    @functools.wraps(value_fn)
    def of_z(z: Any, *args: Any, **kwargs: Any) -> Any:
        return value_fn(to_p(z), *args, **kwargs)

    gradient = _mapped_gradient(gradient_of(value_fn), params, z, to_p, pull_back)
    return with_gradient(of_z, gradient)


def _mapped_gradient(
    grad_fn: Callable[..., Any], params: Any, z: Any, to_p: Map, pull_back: Map
) -> Callable[..., Any]:
    """`grad_fn` of p as one of z.

    At z, its derivative is taken at p itself: P(P^-1 p) is p but for rounding, so there the
    gradient that the training step has computed already would be computed once more.
    """

    @functools.wraps(grad_fn)
    def of_z(z: Any, *args: Any, **kwargs: Any) -> Any:
        return pull_back(grad_fn(to_p(z), *args, **kwargs))

    return with_derivative(
        of_z, z, lambda direction: pull_back(derivative_of(grad_fn, params, to_p(direction)))
    )
