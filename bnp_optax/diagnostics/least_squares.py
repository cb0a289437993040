"""Batch normalization on ordinary least squares, beside gradient descent and BNP."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from bnp_optax._checks import check_positive
from bnp_optax._tree import is_concrete
from bnp_optax.diagnostics.checks import check_matrix

Seen = tuple[Array, Array]


class LeastSquares(NamedTuple):
    """The moments of a linear regression y = x^T w + noise, x of mean 0.

    Attributes:
      hessian: H = E[x x^T], positive definite.
      correlation: g = E[x y].
    """

    hessian: Float[Array, "d d"]
    correlation: Float[Array, " d"]

    @property
    def solution(self) -> Float[Array, " d"]:
        """The minimizer u = H^-1 g."""
        return jnp.linalg.solve(self.hessian, self.correlation)

    def excess(self, w: Float[Array, " d"]) -> Float[Array, ""]:
        """J_0(w) - J_0(u), where J_0(w) = E[(y - x^T w)^2] / 2."""
        error = w - self.solution
        return 0.5 * error @ self.hessian @ error


class Run(NamedTuple):
    """A run of gradient descent; the first entry is that of the start.

    Attributes:
      excess: Loss above its minimum: J_0(w) - J_0(u), for `bngd` that of a w / sqrt(w^T H w).
      norm: Length of w.
      w: The last w.
      a: The last a of `bngd`; 1 for the others.
    """

    excess: Float[Array, " steps+1"]
    norm: Float[Array, " steps+1"]
    w: Float[Array, " d"]
    a: Float[Array, ""]


def least_squares(x: ArrayLike, y: ArrayLike) -> LeastSquares:
    """The moments of data, less the mean of x.

    Args:
      x: Inputs, (N, d).
      y: Targets, (N,).

    Raises:
      ValueError: If the shapes do not fit, or `x` is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from bnp_optax.diagnostics import least_squares
      >>> x, u = jnp.array([[1.0, 1.0], [1.0, -1.0], [-2.0, 0.0]]), jnp.array([3.0, -2.0])
      >>> bool(jnp.allclose(least_squares(x, x @ u).solution, u, atol=1e-5))
      True

    Source: the slides "Batch Normalization on Ordinary Least Squares".
    """
    check_matrix("x", x)
    x, y = jnp.asarray(x), jnp.asarray(y)
    if y.shape != x.shape[:1]:
        msg = f"`y` must have one target for each of the {x.shape[0]} rows of `x`, got {y.shape}."
        raise ValueError(msg)
    x = x - jnp.mean(x, axis=0, keepdims=True)
    return LeastSquares(x.T @ x / len(x), x.T @ y / len(x))


def gd(problem: LeastSquares, learning_rate: ArrayLike, w: ArrayLike, num_steps: int) -> Run:
    r"""Gradient descent on J_0.

        w <- w + eps (g - H w)

    It converges for 0 < eps < 2 / lambda_max(H) only.

    Args:
      problem: H and g.
      learning_rate: eps > 0; may be traced, so that `jax.vmap` runs over rates.
      w: Where to start.
      num_steps: Number of steps.

    Example:
      >>> import jax.numpy as jnp
      >>> from bnp_optax.diagnostics import LeastSquares, gd
      >>> problem = LeastSquares(jnp.diag(jnp.array([1.0, 2.0])), jnp.array([1.0, 4.0]))
      >>> bool(jnp.allclose(gd(problem, 0.6, jnp.ones(2), 50).w, problem.solution))
      True

    Source: the slides "Batch Normalization on Ordinary Least Squares".
    """
    check_positive("learning_rate", learning_rate)
    w = jnp.asarray(w)
    return _descend(problem, jnp.ones_like(w), jnp.asarray(learning_rate), w, num_steps)


def bnp_gd(problem: LeastSquares, learning_rate: ArrayLike, w: ArrayLike, num_steps: int) -> Run:
    r"""Batch normalization preconditioning on the same problem.

        w <- w + eps D^2 (g - H w),   D = diag(1 / sqrt(H_ii))

    The inputs have mean 0 and there is no bias, so P = D: gradient descent on inputs of unit
    variance. It converges for 0 < eps < 2 / lambda_max(D H D).

    Args:
      problem: H and g.
      learning_rate: eps > 0; may be traced.
      w: Where to start.
      num_steps: Number of steps.

    Example:
      >>> import jax.numpy as jnp
      >>> from bnp_optax.diagnostics import LeastSquares, bnp_gd
      >>> problem = LeastSquares(jnp.diag(jnp.array([1e-6, 2.0])), jnp.array([1e-6, 4.0]))
      >>> bool(jnp.allclose(bnp_gd(problem, 1.0, jnp.zeros(2), 1).w, problem.solution))
      True

    Source: Lange, Helfrich, Ye, JMLR 2022, (12) and (15).
    """
    check_positive("learning_rate", learning_rate)
    scale = 1.0 / jnp.diagonal(problem.hessian)
    return _descend(problem, scale, jnp.asarray(learning_rate), jnp.asarray(w), num_steps)


def bngd(
    problem: LeastSquares,
    learning_rate: ArrayLike,
    w: ArrayLike,
    num_steps: int,
    *,
    a: ArrayLike = 1.0,
    scale_rate: ArrayLike = 1.0,
) -> Run:
    r"""Gradient descent with batch normalization, N(x^T w) = x^T w / sigma, sigma^2 = w^T H w.

        J(a, w) = E[(y - a N(x^T w))^2] / 2
        a <- a + eps_a (w^T g / sigma - a)
        w <- w + eps (a / sigma) (g - (w^T g / sigma^2) H w)

    both with the a and w of the step before. It converges for any eps > 0 provided
    0 < eps_a <= 1: a step of w is orthogonal to w, so that its length never decreases, and a
    longer w takes smaller steps.

    Args:
      problem: H and g.
      learning_rate: eps > 0; may be traced.
      w: Where to start, not 0.
      num_steps: Number of steps.
      a: Where a starts.
      scale_rate: eps_a, in (0, 1] for convergence.

    Raises:
      ValueError: If w is 0 or a rate is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from bnp_optax.diagnostics import LeastSquares, bngd
      >>> problem = LeastSquares(jnp.diag(jnp.array([1.0, 2.0])), jnp.array([1.0, 4.0]))
      >>> run = bngd(problem, 30.0, jnp.ones(2), 1000)
      >>> sigma = jnp.sqrt(run.w @ problem.hessian @ run.w)
      >>> bool(jnp.allclose(run.a * run.w / sigma, problem.solution, rtol=1e-4))
      True

    Source: the slides "Batch Normalization on Ordinary Least Squares".
    """
    check_positive("learning_rate", learning_rate)
    check_positive("scale_rate", scale_rate)
    if is_concrete(w) and not np.any(np.asarray(w)):
        msg = "`w` must not be 0: nothing can be normalized then. Start from random weights."
        raise ValueError(msg)
    w, a = jnp.asarray(w), jnp.asarray(a)
    rates = jnp.asarray(learning_rate), jnp.asarray(scale_rate)
    return _normalized(problem, *rates, w, a.astype(w.dtype), num_steps)


@partial(jax.jit, static_argnames="num_steps")
def _descend(problem: LeastSquares, scale: Array, rate: Array, w: Array, num_steps: int) -> Run:
    u, one = problem.solution, jnp.ones((), w.dtype)

    def observe(w: Array) -> tuple[Array, Seen]:
        gradient = problem.hessian @ w - problem.correlation
        return gradient, (0.5 * (w - u) @ gradient, jnp.linalg.norm(w))

    def step(w: Array, _: None) -> tuple[Array, Seen]:
        gradient, seen = observe(w)
        return w - rate * scale * gradient, seen

    last, path = lax.scan(step, w, length=num_steps)
    excess, norm = map(_with_last, path, observe(last)[1])
    return Run(excess, norm, last, one)


@partial(jax.jit, static_argnames="num_steps")
def _normalized(
    problem: LeastSquares, rate: Array, scale_rate: Array, w: Array, a: Array, num_steps: int
) -> Run:
    g, u = problem.correlation, problem.solution

    def observe(a: Array, w: Array) -> tuple[Array, Array, Seen]:
        h_w = problem.hessian @ w
        sigma = jnp.sqrt(w @ h_w)
        excess = 0.5 * (a * w / sigma - u) @ (a * h_w / sigma - g)
        return h_w, sigma, (excess, jnp.linalg.norm(w))

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Seen]:
        a, w = carry
        h_w, sigma, seen = observe(a, w)
        new_w = w + rate * (a / sigma) * (g - (w @ g / sigma**2) * h_w)
        return (a + scale_rate * (w @ g / sigma - a), new_w), seen

    (last_a, last_w), path = lax.scan(step, (a, w), length=num_steps)
    excess, norm = map(_with_last, path, observe(last_a, last_w)[2])
    return Run(excess, norm, last_w, last_a)


def _with_last(path: Array, last: Array) -> Array:
    return jnp.concatenate([path, last[None]])
