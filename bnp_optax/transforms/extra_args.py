"""What of a step's extra arguments an inner transformation gets."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

Function = Callable[..., Any]

# Attributes of functions that `in_zspace` maps: the gradient of a value, and what gives the
# derivative of a gradient in a direction, with the point that it is for.
_GRADIENT = "bnp_optax_gradient"
_DERIVATIVE = "bnp_optax_derivative"


def gradient_of(value_fn: Function) -> Function:
    """The gradient of `value_fn`."""
    return getattr(value_fn, _GRADIENT, None) or jax.grad(value_fn)


def with_gradient(value_fn: Function, grad_fn: Function) -> Function:
    """`value_fn`, for which `gradient_of` returns `grad_fn`."""
    setattr(value_fn, _GRADIENT, grad_fn)
    return value_fn


def derivative_of(grad_fn: Function, params: Any, direction: Any) -> Any:
    """The derivative of `grad_fn` at `params` along `direction`, forward over reverse."""
    point, derivative = getattr(grad_fn, _DERIVATIVE, (None, None))
    leaves, known = jax.tree.leaves(params), jax.tree.leaves(point)
    if derivative and len(leaves) == len(known) and all(map(_is, leaves, known)):
        return derivative(direction)
    direction = jax.tree.map(lambda p, d: d.astype(p.dtype), params, direction)
    return jax.jvp(grad_fn, (params,), (direction,))[1]


def with_derivative(grad_fn: Function, point: Any, derivative: Function) -> Function:
    """`grad_fn`, of which `derivative_of` takes `derivative` at `point`."""
    setattr(grad_fn, _DERIVATIVE, (point, derivative))
    return grad_fn


def _is(a: Any, b: Any) -> bool:
    return a is b


def update_inner(
    inner: optax.GradientTransformationExtraArgs,
    updates: optax.Updates,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, Any]:
    """`inner.update` with those extra arguments that it has a parameter for.

    Some of Optax's transformations raise on any other keyword. `layer_stats` are not passed on:
    they describe the layers' inputs in p, and the preconditioner outside has used them.
    """
    parameters = inspect.signature(inner.update).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    accepted = {
        name: value
        for name, value in extra_args.items()
        if name != "layer_stats" and (takes_any or name in parameters)
    }
    return inner.update(updates, state, params, **accepted)
