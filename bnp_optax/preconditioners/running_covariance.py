"""The running mean and covariance of a layer's inputs, and its eigenvectors now and then.

With the mean m and covariance B of a batch, M2 <- (1 - r) M2 + r (B + m m^T) and mu <- (1 - r) mu +
r m are the same as, for C = M2 - mu mu^T,

    C <- (1 - r) (C + r d d^T) + r B,   mu <- mu + r d,   d = m - mu

in which no two large numbers are subtracted. Without a bias mu stays 0, and C is M2. All of it is
linear in C, B and d d^T, so that in a wide layer their sketches take their places.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from bnp_optax import sketches
from bnp_optax.statistics import Layer, LayerStats


class Running(NamedTuple):
    """Running statistics of one layer, the fields of `WhitenState`."""

    mean: Float[Array, "*blocks n"] | None
    covariance: Float[Array, "*blocks n_or_fewer n"]
    vectors: Float[Array, "*blocks n k"]
    values: Float[Array, "*blocks k_or_more"]
    numbers: Float[Array, "3"]


def start(layer: Layer, rank: int, max_fan_in: int) -> Running:
    """Those of a layer before the first batch, of mu = 0 and M2 = I."""
    n, blocks = layer.fan_in, layer.block_shape
    mean = jnp.zeros((*blocks, n), jnp.float32) if layer.bias else None
    numbers = jnp.zeros(3, jnp.float32)

    def everywhere(x: ArrayLike) -> Array:
        x = jnp.asarray(x, jnp.float32)
        # A copy, for a donated state must not have one array twice.
        return jnp.array(jnp.broadcast_to(x, (*blocks, *x.shape)), copy=True)

    def eye(columns: int) -> np.ndarray:
        return np.eye(n, columns, dtype=np.float32)

    if n <= max_fan_in:
        values = everywhere(np.ones(n))
        return Running(mean, everywhere(eye(n)), everywhere(eye(n)), values, numbers)
    rank = min(rank, n)
    products = sketches.n_products(n, rank)
    covariance = eye(n) if products is None else sketches.of_identity(products, n)
    values = everywhere(np.ones(rank + 1))
    return Running(mean, everywhere(covariance), everywhere(eye(rank)), values, numbers)


def updated(before: Running, stats: LayerStats, decay: ArrayLike, refresh_every: int) -> Running:
    """The running statistics with those of a batch, unless these are not finite or of no input."""
    mean, covariance, vectors, values, numbers = before
    refreshed, entered, rejected = numbers
    batch_mean, batch = stats.input_mean, stats.total_covariance
    assert batch is not None  # Who calls has seen to it.
    batch = sketches.fitted(batch, covariance)
    rate = jnp.maximum(1.0 - jnp.asarray(decay, jnp.float32), 1.0 / (entered + 2.0))
    distance = batch_mean if mean is None else batch_mean - mean
    gap = 1.0 if mean is None else 1.0 - rate

    def moved(old: Array, batch: Array, square: Array) -> Array:
        return (1.0 - rate) * old + rate * (batch + gap * square)

    # The diagonal by itself, so that the matrix is read and written once.
    variances = sketches.diagonal(batch)
    valid = _are_valid(
        batch, moved(sketches.diagonal(covariance), variances, distance**2), stats.count
    )
    accept = valid & (stats.count > 0.0)
    new = moved(covariance, batch, sketches.outer(distance, covariance))
    covariance = jnp.where(accept, new, covariance)
    if mean is not None:
        mean = jnp.where(accept, mean + rate * distance, mean)
    entered, rejected = entered + accept, rejected + (~valid & (stats.count != 0.0))
    due = accept & _is_due(entered, refresh_every)
    values, vectors = jax.lax.cond(
        due,
        lambda values, vectors, covariance: decomposed(covariance, values, vectors),
        lambda values, vectors, _: (values, vectors),
        *(values, vectors, covariance),
    )
    numbers = jnp.stack([jnp.where(due, entered, refreshed), entered, rejected])
    return Running(mean, covariance, vectors, values, numbers)


def _are_valid(batch: Array, new_variances: Array, count: Array) -> Bool[Array, ""]:
    """Whether a batch may enter: all numbers are finite, and no variance is negative.

    A sum of numbers is finite only if all of them are. The new variances are finite only if the
    distance of the means is, and no entry of a covariance is larger than they are.
    """
    variances = sketches.diagonal(batch)
    sums = jnp.stack([jnp.sum(batch), jnp.sum(new_variances), count])
    return jnp.all(jnp.isfinite(sums)) & jnp.all(variances >= 0.0)


def _is_due(entered: Array, refresh_every: int) -> Bool[Array, ""]:
    """Whether to decompose after so many batches: 1, 2, 4, 8, .. and multiples of the period."""
    number = entered.astype(jnp.int32)
    early = (number & (number - 1)) == 0
    return (number % refresh_every == 0) | (early & (number < refresh_every))


def decomposed(covariance: Array, values: Array, vectors: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors anew, as many as there were."""
    rank = vectors.shape[-1]
    if values.shape[-1] > rank:
        return sketches.leading(covariance, rank)
    return sketches.eigh(covariance)
