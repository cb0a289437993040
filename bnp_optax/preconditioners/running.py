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

from bnp_optax.preconditioners.numbers import Numbers, floored, shrunk
from bnp_optax.statistics import LayerStats, total_variance

Variance = Literal["auto", "batch", "running"]

# The running statistics are those of their start, not of the inputs, for a while.
_N_WHOLE = 10


class Running(NamedTuple):
    """Running statistics of a layer, as `BNPState` has them."""

    moments: Array
    numbers: Float[Array, "11"]

    @property
    def mean(self) -> Array | None:
        """None without a bias."""
        return self.moments[0] if len(self.moments) > 1 else None

    @property
    def var(self) -> Array:
        """The mean square without a bias."""
        return self.moments[-1]


class Batch(NamedTuple):
    """A batch's statistics, as in `LayerStats`; `n_rows` is `count` there.

    Attributes:
      moments: mean, var and sq_mean, along a first axis.
      n_rows: How many rows they are of.
    """

    moments: Array
    n_rows: Float[Array, ""]

    @classmethod
    def of(cls, stats: LayerStats) -> "Batch":
        """What of a layer's statistics enters."""
        return cls(jnp.stack([stats.mean, stats.var, stats.sq_mean]), stats.count)

    @property
    def mean(self) -> Array:
        """As in `LayerStats`."""
        return self.moments[0]

    @property
    def var(self) -> Array:
        """As in `LayerStats`."""
        return self.moments[1]

    @property
    def sq_mean(self) -> Array:
        """As in `LayerStats`."""
        return self.moments[2]

    @property
    def total_variance(self) -> Array:
        """As in `LayerStats`."""
        return total_variance(self.mean, self.var, self.sq_mean)


class Options(NamedTuple):
    """Hyper-parameters of `bnp`, of its names; `rate` is 1 - decay, which float32 would round."""

    decay: ArrayLike
    rate: ArrayLike
    eps_rel: ArrayLike
    eps_abs: ArrayLike
    shrinkage: ArrayLike | None
    max_ratio: ArrayLike | None
    batch_size: ArrayLike | None


class Rule(NamedTuple):
    """Which of the options of `bnp` are on, and the sizes of a layer. Static.

    Attributes:
      q: What N divides, and positions, in q^2 = max(fan_in / N, sqrt(positions)); None for q = 1.
      fan_in: Inputs of a unit.
      positions: Output positions that share the kernel.
      variance: As in `bnp`.
      warm_start: As in `bnp`.
      shrinks: Whether statistics are bias-corrected and shrunk.
      scale_bias: As in `bnp`.
      held: Whether the running statistics stay as they are.
    """

    q: tuple[float, float] | None
    fan_in: int
    positions: int
    variance: Variance
    warm_start: bool
    shrinks: bool
    scale_bias: bool
    held: bool = False


@functools.partial(jax.jit, static_argnames="rule")
def moved(old: Running, batch: Batch, options: Options, rule: Rule) -> Running:
    """Steps 1 and 2 of Algorithms 2 and 3, and q of step 3.

    Args:
      old: Before the batch.
      batch: What came.
      options: Numbers of `bnp`.
      rule: Which of its options are on.
    """
    batch = jax.lax.stop_gradient(batch)
    numbers = Numbers.of(old.numbers)
    first = None
    if rule.shrinks:
        first = 1.0 / (numbers.entered + 1.0)
    elif rule.warm_start:
        first = jnp.where(numbers.entered == 0, 1.0, 0.0)
    weights = _Weights(options.decay, options.rate)
    if first is not None:
        weights = _Weights(jnp.minimum(weights.old, 1.0 - first), jnp.maximum(weights.new, first))
    bound = _bound(options.max_ratio, numbers.entered, numbers.largest_var)
    mean, var = old.mean, old.var
    if not rule.held:
        mean, var = _mean_and_var(old, batch, weights, bound, rule)
    valid, largest_var = _validity_and_largest(batch, var)
    accept = valid & (batch.n_rows > 0.0)
    reject = ~valid & (batch.n_rows != 0.0)

    size = batch.n_rows / rule.positions
    n = jnp.maximum(size, numbers.batch_size)
    if options.batch_size is not None:
        size = n = jnp.asarray(options.batch_size, jnp.float32)
    new = numbers._replace(
        inv_q=_inv_q(n, numbers.inv_q, rule),
        entered=numbers.entered + 1.0,
        batch_size=n,
        largest_var=largest_var,
    )
    if not rule.held:
        # Of N p rows that share a batch, those of one example are alike: as sqrt(p) examples.
        of_batch = 1.0 / (size * math.sqrt(rule.positions))
        sample = weights.old**2 * numbers.inv_sample + weights.new**2 * of_batch
        new = new._replace(inv_sample=sample)
    new = _of_operator(new, mean, var, options, rule)

    def entered(new: Array, old: Array) -> Array:
        return jnp.where(accept, new, old).astype(old.dtype)

    counted = jnp.asarray(Numbers(*[0.0] * len(numbers))._replace(rejected=1.0), jnp.float32)
    moments = jnp.stack([var] if mean is None else [mean, var])
    return Running(
        entered(moments, old.moments), entered(new.vector(), old.numbers + counted * reject)
    )


def _of_operator(
    numbers: Numbers, mean: Array | None, var: Array, options: Options, rule: Rule
) -> Numbers:
    """The numbers that P takes of the layer."""
    weight, mean_square, floor = jnp.ones(()), jnp.zeros(()), jnp.zeros(())
    if rule.shrinks and not rule.held:
        weight = 1.0 / (1.0 + options.shrinkage * numbers.inv_sample)
        spread = shrunk(mean, var, weight)
        square = jnp.zeros_like(var) if mean is None else (weight * mean) ** 2
        average, mean_square = _means(spread, square)
        floor = (1.0 - weight + options.eps_rel) * average + options.eps_abs
    elif not rule.held:
        floor = options.eps_rel * numbers.largest_var + options.eps_abs
        if mean is not None and rule.scale_bias:
            mean_square = jnp.mean(mean**2)
    square_beta = 1.0 + mean_square if rule.scale_bias else jnp.ones(())
    gains = 1.0 / floored(mean, var, weight, floor)
    shifts = jnp.zeros_like(var) if mean is None else (weight * mean) ** 2 * gains
    shift, square_gain = _means(shifts, gains)
    inv_q = numbers.inv_q
    return numbers._replace(
        weight=weight,
        floor=floor,
        bias=inv_q * jnp.sqrt(square_beta),
        # A square of 1 / q would be two kernels more, since XLA makes a quotient of it.
        gram_bias=inv_q * (inv_q * (square_beta + rule.fan_in * shift)),
        square_gain=square_gain,
    )


def _means(*arrays: Array) -> Array:
    """The means of arrays, in one reduction, of which each is two kernels or three on a CPU."""
    stacked = jnp.stack(arrays)
    return jnp.mean(stacked, axis=tuple(range(1, stacked.ndim)))


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


def _inv_q(n: Array, old: Array, rule: Rule) -> Array:
    if rule.q is None:
        return old
    fan_in, positions = rule.q
    return jax.lax.rsqrt(jnp.maximum(fan_in / n, math.sqrt(positions)))


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
