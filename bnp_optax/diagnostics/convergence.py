"""What the curvature says of gradient descent near a minimizer."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from bnp_optax._tree import is_concrete
from bnp_optax.diagnostics.checks import check_curvature
from bnp_optax.diagnostics.lanczos import hessian_extremes


def optimal_learning_rate(lmin: ArrayLike, lmax: ArrayLike) -> Float[Array, ""]:
    r"""The learning rate at which gradient descent converges fastest near a minimizer.

        alpha = 2 / (lambda_min + lambda_max)

    It minimizes max(|1 - alpha lambda_min|, |1 - alpha lambda_max|), the factor by which the
    error shrinks in a step. With the eigenvalues of P^T H P it is the rate of gradient descent
    in z.

    Args:
      lmin: lambda_min > 0, of the Hessian; of a singular one, its smallest nonzero eigenvalue.
      lmax: lambda_max >= lambda_min.

    Raises:
      ValueError: If a curvature is not positive, or lmax < lmin.

    Example:
      >>> from bnp_optax.diagnostics import convergence_factor, optimal_learning_rate
      >>> rate = optimal_learning_rate(0.5, 1.5)
      >>> bool(abs(1 - rate * 0.5) == convergence_factor(1.5 / 0.5))
      True

    Source: Lange, Helfrich, Ye, JMLR 2022, before (6); Ye, "Preconditioning for Accelerated
    Gradient Descent Optimization and Regularization", Theorem 1.
    """
    check_curvature("lmin", lmin)
    check_curvature("lmax", lmax)
    if is_concrete(lmin, lmax) and np.any(np.asarray(lmin) > np.asarray(lmax)):
        msg = f"`lmin` must not exceed `lmax`, got lmin={lmin} and lmax={lmax}: swap them."
        raise ValueError(msg)
    return jnp.asarray(2.0 / (jnp.asarray(lmin) + jnp.asarray(lmax)))


def convergence_factor(kappa: ArrayLike) -> Float[Array, ""]:
    r"""The factor by which a step of gradient descent shrinks the error, at the optimal rate.

        r = (kappa - 1) / (kappa + 1)

    About kappa / 2 steps shrink the error by e. For a singular Hessian take lambda_max over the
    smallest nonzero eigenvalue.

    Args:
      kappa: Condition number of the Hessian, or of P^T H P for gradient descent in z; >= 1.

    Raises:
      ValueError: If kappa < 1 or is not a number.

    Example:
      >>> import math
      >>> from bnp_optax.diagnostics import convergence_factor
      >>> float(convergence_factor(1.0)), float(convergence_factor(3.0))
      (0.0, 0.5)
      >>> float(convergence_factor(math.inf))
      1.0

    Source: Lange, Helfrich, Ye, JMLR 2022, (6); Ye, "Preconditioning for Accelerated Gradient
    Descent Optimization and Regularization", (3).
    """
    if is_concrete(kappa) and not np.all(np.asarray(kappa) >= 1.0):
        msg = f"`kappa` must be a condition number, >= 1; got {kappa}."
        raise ValueError(msg)
    return jnp.asarray(1.0 - 2.0 / (jnp.asarray(kappa) + 1.0))


def max_stable_learning_rate(
    curvature: ArrayLike | Callable[..., Any], *args: Any, **kwargs: Any
) -> Float[Array, ""]:
    r"""The learning rate above which gradient descent moves away from every minimizer.

        alpha < 2 / lambda_max

    Where a layer's curvature is much larger than that of the others, it sets this bound for all of
    them: see `report`.

    Args:
      curvature: lambda_max > 0; or a loss function, whose lambda_max `hessian_extremes` finds.
      *args: With a loss function, those of `hessian_extremes`: the parameters and further
        arguments of the loss.
      **kwargs: With a loss function, those of `hessian_extremes`; with `preconditioner` and
        `state` the bound is that of gradient descent in z.

    Raises:
      ValueError: If lambda_max is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from bnp_optax.diagnostics import max_stable_learning_rate
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 8.0]) * w**2)
      >>> bool(max_stable_learning_rate(8.0) == 2.0 / 8.0)
      True
      >>> bool(jnp.isclose(max_stable_learning_rate(loss_fn, jnp.ones(2)), 2.0 / 8.0))
      True

    Source: Lange, Helfrich, Ye, JMLR 2022, Section 3.1.
    """
    if callable(curvature):
        curvature = hessian_extremes(curvature, *args, **kwargs).max
    elif args or kwargs:
        msg = (
            "`max_stable_learning_rate` takes an eigenvalue alone, or a loss function with its "
            f"arguments; got the eigenvalue {curvature} and further arguments."
        )
        raise ValueError(msg)
    check_curvature("lmax", curvature)
    return jnp.asarray(2.0 / jnp.asarray(curvature))
