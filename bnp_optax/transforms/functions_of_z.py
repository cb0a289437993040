"""Functions of the parameters p as functions of z, where p = P z: values and gradients."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnp_optax.preconditioners import Operator
from bnp_optax.transforms.integers import integers_held, is_integer

Function = Callable[..., Any]


class Point(NamedTuple):
    """Where a step is taken: P, and the parameters in both spaces.

    Attributes:
      P: The change of variables.
      p: The parameters; None if the step was not given them.
      z: P^-1 p, or None.
    """

    P: Operator
    p: Any
    z: Any


class ValueInZ:
    """z -> f(P z)."""

    def __init__(self, value_fn: Function, point: Point) -> None:
        functools.update_wrapper(self, value_fn)
        self._value_fn = value_fn
        self._point = point

    def __call__(self, z: Any, *args: Any, **kwargs: Any) -> Any:
        """The value at P z."""
        return self._value_fn(self._point.P.mv(z), *args, **kwargs)

    def gradient(self) -> "GradientInZ":
        """Its gradient."""
        return GradientInZ(gradient_of(self._value_fn), self._point)


class GradientInZ:
    """z -> P^T grad f(P z)."""

    def __init__(self, grad_fn: Function, point: Point) -> None:
        functools.update_wrapper(self, grad_fn)
        self._grad_fn = grad_fn
        self._point = point

    def __call__(self, z: Any, *args: Any, **kwargs: Any) -> Any:
        """The gradient in z."""
        return self._point.P.transpose(self._grad_fn(self._point.P.mv(z), *args, **kwargs))

    def derivative(self, z: Any, direction: Any) -> Any:
        """The derivative at `z` along `direction`.

        Where the step is taken it is that at p itself: P(P^-1 p) is p but for rounding, so there
        the gradient that the training step has computed already would be computed once more.
        """
        P, p, known = self._point
        leaves, own = jax.tree.leaves(z), jax.tree.leaves(known)
        if len(leaves) == len(own) and all(x is y for x, y in zip(leaves, own, strict=True)):
            return P.transpose(derivative_of(self._grad_fn, p, P.mv(direction)))
        return _forward_over_reverse(self, z, direction)


def gradient_of(value_fn: Function) -> Function:
    """The gradient of `value_fn`."""
    return value_fn.gradient() if isinstance(value_fn, ValueInZ) else jax.grad(value_fn)


def derivative_of(grad_fn: Function, params: Any, direction: Any) -> Any:
    """The derivative of `grad_fn` at `params` along `direction`."""
    if isinstance(grad_fn, GradientInZ):
        return grad_fn.derivative(params, direction)
    return _forward_over_reverse(grad_fn, params, direction)


def _forward_over_reverse(grad_fn: Function, params: Any, direction: Any) -> Any:
    def tangent(p: Any, d: Any) -> Any:
        # The type that JAX has for the derivatives of integers, all of them zero.
        return np.zeros(jnp.shape(p), jax.dtypes.float0) if is_integer(p) else d.astype(p.dtype)

    direction = jax.tree.map(tangent, params, direction)
    _, derivative = jax.jvp(grad_fn, (params,), (direction,))
    return integers_held(derivative, params)
