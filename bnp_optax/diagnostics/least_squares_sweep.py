"""Which learning rates work: `gd`, `bngd` and `bnp_gd` over rates and dimensions."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from bnp_optax._checks import check_positive
from bnp_optax.diagnostics.least_squares import LeastSquares, bngd, bnp_gd, gd, least_squares


class Sweep(NamedTuple):
    """Excess loss after the last step over that at the start; inf where it overflowed.

    Attributes:
      dimensions: d.
      learning_rates: eps.
      gd: Of gradient descent, by dimension, problem and rate.
      bngd: Of gradient descent with batch normalization.
      bnp: Of batch normalization preconditioning.
    """

    dimensions: tuple[int, ...]
    learning_rates: Float[np.ndarray, " rates"]
    gd: Float[np.ndarray, "dimensions problems rates"]
    bngd: Float[np.ndarray, "dimensions problems rates"]
    bnp: Float[np.ndarray, "dimensions problems rates"]


def random_least_squares(
    key: Array, dimension: int, condition: float = 100.0
) -> tuple[LeastSquares, Float[Array, " d"]]:
    """A regression on 4 d random inputs of unequal variance, and where to start.

    The variances are evenly spaced from 1 / condition to 1; H is scaled to lambda_max = 1. The
    solution has independent standard normal entries; the start is a random direction of length 1.

    Args:
      key: Random key.
      dimension: d.
      condition: Largest over smallest variance, >= 1. H itself is a few times worse.

    Returns:
      The problem and the start.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bnp_optax.diagnostics import random_least_squares
      >>> problem, w = random_least_squares(jax.random.key(0), 5)
      >>> lmax = jnp.linalg.eigvalsh(problem.hessian)[-1]
      >>> bool(jnp.isclose(lmax, 1.0) & jnp.isclose(jnp.linalg.norm(w), 1.0))
      True

    Source: the slides "Batch Normalization on Ordinary Least Squares", whose problem it is.
    """
    if dimension < 1 or condition < 1.0:
        msg = f"`dimension` and `condition` must be >= 1, got {dimension} and {condition}."
        raise ValueError(msg)
    keys = jax.random.split(key, 3)
    variances = jnp.linspace(1.0 / condition, 1.0, dimension)
    x = jax.random.normal(keys[0], (4 * dimension + 1, dimension)) * jnp.sqrt(variances)[None]
    hessian = least_squares(x, x[:, 0]).hessian
    hessian = hessian / jnp.linalg.eigvalsh(hessian)[-1]
    w = jax.random.normal(keys[2], (dimension,))
    solution = jax.random.normal(keys[1], (dimension,))
    return LeastSquares(hessian, hessian @ solution), w / jnp.linalg.norm(w)


def sweep(
    dimensions: Sequence[int],
    learning_rates: ArrayLike,
    num_steps: int = 1000,
    *,
    num_problems: int = 4,
    condition: float = 100.0,
    scale_rate: float = 1.0,
    key: Array | None = None,
) -> Sweep:
    """Run the three methods on random problems, compiled once for each dimension.

    Args:
      dimensions: Each d.
      learning_rates: Each eps > 0; lambda_max(H) is 1.
      num_steps: Steps of a run.
      num_problems: Problems of each dimension, of `random_least_squares`.
      condition: As there.
      scale_rate: eps_a of `bngd`.
      key: Of the problems. None takes `jax.random.key(0)`.

    Example:
      >>> from bnp_optax.diagnostics import sweep
      >>> result = sweep([8], [1.0, 3.0], num_steps=200)
      >>> (result.gd.max(axis=(0, 1)) < 1e-2).tolist()
      [True, False]
      >>> (result.bngd.max(axis=(0, 1)) < 1e-2).tolist()
      [True, True]

    Source: the slides "Batch Normalization on Ordinary Least Squares", the summary of results.
    """
    rates = jnp.asarray(learning_rates)
    for rate in np.ravel(learning_rates):
        check_positive("learning_rates", float(rate))
    check_positive("scale_rate", scale_rate)
    key = jax.random.key(0) if key is None else key
    results = []
    for dimension in dimensions:
        keys = jax.random.split(key, num_problems)
        pairs = [random_least_squares(k, dimension, condition) for k in keys]
        problems, starts = jax.tree.map(lambda *x: jnp.stack(x), *pairs)
        results.append(_ratios(problems, starts, rates, scale_rate, num_steps))
    columns = (np.stack(column) for column in zip(*results, strict=True))
    return Sweep(tuple(dimensions), np.asarray(rates), *columns)


@partial(jax.jit, static_argnames="num_steps")
def _ratios(
    problems: LeastSquares, starts: Array, rates: Array, scale_rate: Array, num_steps: int
) -> tuple[Array, Array, Array]:
    def of_one(problem: LeastSquares, w: Array) -> tuple[Array, ...]:
        methods = (gd, partial(bngd, scale_rate=scale_rate), bnp_gd)

        def at(rate: Array) -> tuple[Array, ...]:
            paths = [method(problem, rate, w, num_steps).excess for method in methods]
            start = paths[0][0]
            ratios = (path[-1] / start for path in paths)
            return tuple(jnp.where(jnp.isfinite(ratio), ratio, jnp.inf) for ratio in ratios)

        return jax.vmap(at)(rates)

    gd_, bngd_, bnp_ = jax.vmap(of_one)(problems, starts)
    return gd_, bngd_, bnp_
