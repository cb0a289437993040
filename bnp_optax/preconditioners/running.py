"""The running statistics of one layer, and what a batch's statistics make of them.

`bnp` calls `moved` for each layer. Layers of one shape are one function to trace.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from bnp_optax.statistics import LayerStats

Variance = Literal["auto", "batch", "running"]

# The running statistics are those of their start, not of the inputs, for a while.
_N_WHOLE = 10


class Running(NamedTuple):
    """Running statistics of a layer, as `BNPState` has them; `mean` is None without a bias."""

    mean: Array | None
    var: Array
    numbers: Float[Array, "_"]


class Batch(NamedTuple):
    """A batch's statistics; those of `LayerStats` and the batch size N."""

    mean: Array
    var: Array
    sq_mean: Array
    total_variance: Array
    n_rows: Float[Array, ""]
    size: Float[Array, ""]

    @classmethod
    def of(cls, stats: LayerStats) -> "Batch":
        """What of a layer's statistics enters."""
        of = (stats.mean, stats.var, stats.sq_mean, stats.total_variance)
        return cls(*of, stats.count, stats.batch_size)


class Rule(NamedTuple):
    """Which of the options of `bnp` are on, and the sizes of a layer. Static.

    Attributes:
      q: What N divides, and positions, in q^2 = max(fan_in / N, sqrt(positions)); None for q = 1.
      positions: Output positions that share the kernel.
      variance: As in `bnp`.
      warm_start: As in `bnp`.
      shrinks: Whether statistics are bias-corrected and shrunk.
      held: Whether the running statistics stay as they are.
    """

    q: tuple[float, float] | None
    positions: int
    variance: Variance
    warm_start: bool
    shrinks: bool
    held: bool = False


@functools.partial(jax.jit, static_argnames="rule")
def moved(
    old: Running,
    batch: Batch,
    decay: ArrayLike,
    rate: ArrayLike,
    max_ratio: ArrayLike | None,
    batch_size: ArrayLike | None,
    rule: Rule,
) -> Running:
    """Steps 1 and 2 of Algorithms 2 and 3, and q of step 3.

    Args:
      old: Before the batch.
      batch: What came.
      decay: rho.
      rate: 1 - rho, which float32 would round.
      max_ratio: As in `bnp`.
      batch_size: As in `bnp`.
      rule: As `Rule` says.
    """
    inv_q, n_entered, n_rejected, largest, largest_var, *spread = old.numbers
    first = None
    if rule.shrinks:
        first = 1.0 / (n_entered + 1.0)
    elif rule.warm_start:
        first = jnp.where(n_entered == 0, 1.0, 0.0)
    weights = _Weights(decay, rate)
    if first is not None:
        weights = _Weights(jnp.minimum(decay, 1.0 - first), jnp.maximum(rate, first))
    bound = _bound(max_ratio, n_entered, largest_var)
    mean, var = old.mean, old.var
    if not rule.held:
        mean, var = _mean_and_var(old, batch, weights, bound, rule)
    valid, new_largest_var = _validity_and_largest(batch, var)
    accept = valid & (batch.n_rows > 0.0)
    reject = ~valid & (batch.n_rows != 0.0)

    def entered(new: Array, old: Array) -> Array:
        return jnp.where(accept, new, old).astype(old.dtype)

    size = batch.size if batch_size is None else jnp.asarray(batch_size, jnp.float32)
    n = entered(jnp.maximum(size, largest) if batch_size is None else size, largest)
    numbers = [_inv_q(n, inv_q, accept, rule), n_entered + accept, n_rejected + reject, n]
    numbers.append(entered(new_largest_var, largest_var))
    if spread and rule.held:
        numbers.append(spread[0])
    elif spread:
        # Of N p rows that share a batch, those of one example are alike: as sqrt(p) examples.
        of_batch = 1.0 / (size * math.sqrt(rule.positions))
        numbers.append(entered(weights.old**2 * spread[0] + weights.new**2 * of_batch, spread[0]))
    new_mean = None if old.mean is None or mean is None else entered(mean, old.mean)
    return Running(new_mean, entered(var, old.var), jnp.stack(numbers))


class _Weights(NamedTuple):
    """What the running statistics and the batch's count for, scalars; their sum is 1."""

    old: Any
    new: Any


class _Bound(NamedTuple):
    """What one batch can do: the largest variance, and max_ratio in the reach of the mean."""

    var: Any
    max_ratio: Any


def _bound(max_ratio: ArrayLike | None, n_entered: Array, largest_var: Array) -> _Bound:
    if max_ratio is None:
        return _Bound(math.inf, None)
    whole = (n_entered < _N_WHOLE) | (largest_var == 0.0)
    return _Bound(jnp.where(whole, jnp.inf, max_ratio * largest_var), max_ratio)


def _mean_and_var(
    old: Running, batch: Batch, weights: _Weights, bound: _Bound, rule: Rule
) -> tuple[Array | None, Array]:
    if old.mean is None:
        square = jnp.minimum(batch.total_variance + batch.mean**2, bound.var)
        return None, weights.old * old.var + weights.new * square
    mean, var = batch.mean, batch.total_variance
    if bound.max_ratio is not None:
        # With mu^2, steps grow with the distance gone: mu follows a jump of many sigmas.
        reach = jnp.sqrt(bound.var + bound.max_ratio * old.mean**2)
        mean = jnp.maximum(jnp.minimum(mean, old.mean + reach), old.mean - reach)
    distance = mean - old.mean
    if rule.shrinks:
        # So that the running variance is about the running mean that results.
        var = var + weights.old * distance**2
    elif rule.variance == "running":
        var = var + distance**2
    elif rule.variance == "auto":
        var = var + jnp.where(batch.n_rows <= 1.0, distance**2, 0.0)
    var = jnp.minimum(var, bound.var)
    mean = weights.old * old.mean + weights.new * mean
    return mean, weights.old * old.var + weights.new * var


def _inv_q(n: Array, old: Array, accept: Array, rule: Rule) -> Array:
    if rule.q is None:
        return old
    fan_in, positions = rule.q
    squared = jnp.maximum(fan_in / n, math.sqrt(positions))
    return jnp.where(accept, jax.lax.rsqrt(squared), old)


def _validity_and_largest(batch: Batch, var: Array) -> tuple[Bool[Array, ""], Float[Array, ""]]:
    """Whether statistics may enter the running ones, and the largest variance that then results.

    They may if all numbers are finite, also after they have entered, and no variance is negative.
    0 x is 0 for finite x and NaN otherwise. The largest number that enters is less than
    4 (var + sq_mean), of a batch's mean at a distance from the running one.
    """
    zeros = 0.0 * (4.0 * (batch.var + batch.sq_mean)) + 0.0 * batch.mean
    # One reduction of one array: more would be kernels to start, and collectives where it is
    # sharded, which a network has little other work for.
    largest = jnp.max(jnp.where((zeros == 0.0) & (batch.var >= 0.0), var, jnp.inf))
    return jnp.isfinite(largest) & jnp.isfinite(batch.n_rows), largest
