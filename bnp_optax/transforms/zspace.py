"""Run any optimizer on z, where p = P z."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from bnp_optax.preconditioners import Preconditioner
from bnp_optax.preconditioners.base import check_preconditioner
from bnp_optax.transforms.extra_args import update_inner


class InZspaceState(NamedTuple):
    """State of `in_zspace`.

    Attributes:
      preconditioner: State of P.
      inner: State of the optimizer that runs on z.
    """

    preconditioner: Any
    inner: Any


def in_zspace(
    inner: optax.GradientTransformation, preconditioner: Preconditioner
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on z, where p = P z: updates = P inner(P^T g).

    This is how an adaptive optimizer meets a preconditioner. Whatever `inner` looks at is mapped:
    gradients and the extra argument `grad` by P^T, parameters by P^-1, and the functions
    `grad_fn` and `value_fn` become functions of z. So a regularizer in `inner` acts on z: with
    `optax.adamw`, decay shrinks z, which is decoupled decay of p.

    Args:
      inner: Any Optax transformation. It gets those extra arguments that its `update` takes,
        other than `layer_stats`.
      preconditioner: Such as `bnp()`.

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

    def init_fn(params: optax.Params) -> InZspaceState:
        state = preconditioner.init(params)
        return InZspaceState(state, inner.init(preconditioner.solve(state, params)))

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, InZspaceState]:
        p_state = preconditioner.update(updates, state.preconditioner, params, **extra_args)
        to_p = functools.partial(preconditioner.apply, p_state)
        pull_back = functools.partial(preconditioner.apply_transpose, p_state)
        if extra_args.get("value_fn") is not None:
            extra_args["value_fn"] = _mapped(extra_args["value_fn"], to_p, lambda value: value)
        if extra_args.get("grad_fn") is not None:
            extra_args["grad_fn"] = _mapped(extra_args["grad_fn"], to_p, pull_back)
        if extra_args.get("grad") is not None:
            extra_args["grad"] = pull_back(extra_args["grad"])
        z = None if params is None else preconditioner.solve(p_state, params)
        z_updates, inner_state = update_inner(inner, pull_back(updates), state.inner, z, extra_args)
        return to_p(z_updates), InZspaceState(p_state, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _mapped(
    function: Callable[..., Any], to_p: Callable[[Any], Any], then: Callable[[Any], Any]
) -> Callable[..., Any]:
    """`function` of p as one of z."""

    @functools.wraps(function)
    def of_z(z: Any, *args: Any, **kwargs: Any) -> Any:
        return then(function(to_p(z), *args, **kwargs))

    return of_z
