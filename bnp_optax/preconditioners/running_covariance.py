"""The running mean and covariance of a layer's inputs, and its eigenvectors now and then.

With the mean m and covariance B of a batch, M2 <- (1 - r) M2 + r (B + m m^T) and mu <- (1 - r) mu +
r m are the same as, for C = M2 - mu mu^T,

    C <- (1 - r) (C + r d d^T) + r B,   mu <- mu + r d,   d = m - mu

in which no two large numbers are subtracted. Without a bias mu stays 0, and C is M2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from bnp_optax.statistics import Layer, LayerStats

# Products with C before those that give eigenvalues, in a refresh of a wide layer.
_N_POWERS = 2


class Running(NamedTuple):
    """Running statistics of one layer, the fields of `WhitenState`."""

    mean: Float[Array, "*blocks n"] | None
    covariance: Float[Array, "*blocks n n"] | None
    vectors: Float[Array, "*blocks n k"]
    values: Float[Array, "*blocks k_or_more"]
    numbers: Float[Array, "3"]


def start(layer: Layer, rank: int, max_fan_in: int) -> Running:
    """Those of a layer before the first batch, of mu = 0 and M2 = I."""
    n, blocks = layer.fan_in, layer.block_shape
    mean = jnp.zeros((*blocks, n), jnp.float32) if layer.bias else None
    numbers = jnp.array([1.0, 0.0, 0.0], jnp.float32)

    def everywhere(x: ArrayLike) -> Array:
        x = jnp.asarray(x, jnp.float32)
        # A copy, for a donated state must not have one array twice.
        return jnp.array(jnp.broadcast_to(x, (*blocks, *x.shape)), copy=True)

    if n <= max_fan_in:
        eye = np.eye(n, dtype=np.float32)
        return Running(mean, everywhere(eye), everywhere(eye), everywhere(np.ones(n)), numbers)
    rank = min(rank, n)
    # Any subspace will do, but one that symmetric inputs are not orthogonal to.
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((n, rank)))[0]
    return Running(mean, None, everywhere(basis), everywhere(np.ones(rank + 1)), numbers)


def updated(before: Running, stats: LayerStats, decay: ArrayLike, refresh_every: int) -> Running:
    """The running statistics with those of a batch, unless these are not finite or of no input."""
    mean, covariance, vectors, values, numbers = before
    pending, entered, rejected = numbers
    batch_mean, batch = stats.input_mean, stats.total_covariance
    assert batch is not None  # Who calls has seen to it.
    rate = jnp.maximum(1.0 - jnp.asarray(decay, jnp.float32), 1.0 / (entered + 2.0))
    distance = batch_mean if mean is None else batch_mean - mean
    if covariance is None:
        valid = _are_valid(batch, (stats.count, distance**2))
        accept = valid & (stats.count > 0.0)
        pending = jnp.where(accept, (1.0 - rate) * pending, pending)
    else:
        gap = 1.0 if mean is None else 1.0 - rate
        between = gap * distance[..., :, None] * distance[..., None, :]
        new = (1.0 - rate) * covariance + rate * (batch + between)
        valid = _are_valid(batch, (stats.count, distance, new))
        accept = valid & (stats.count > 0.0)
        covariance = jnp.where(accept, new, covariance)
    if mean is not None:
        mean = jnp.where(accept, mean + rate * distance, mean)
    entered, rejected = entered + accept, rejected + (~valid & (stats.count != 0.0))
    due = accept & _is_due(entered, refresh_every)
    if covariance is None:
        gap = 1.0 if mean is None else pending
        values, vectors = jax.lax.cond(
            due,
            refreshed,
            lambda values, vectors, *_: (values, vectors),
            *(values, vectors, pending, batch, jnp.sqrt(gap) * distance),
        )
        pending = jnp.where(due, 1.0, pending)
    else:
        values, vectors = jax.lax.cond(
            due,
            lambda values, vectors, covariance: decomposed(covariance),
            lambda values, vectors, _: (values, vectors),
            *(values, vectors, covariance),
        )
    numbers = jnp.stack([pending, entered, rejected])
    return Running(mean, covariance, vectors, values, numbers)


def _are_valid(batch: Array, arrays: Sequence[Array]) -> Bool[Array, ""]:
    """Whether a batch may enter: all arrays are finite, and no variance is negative."""
    variances = jnp.diagonal(batch, axis1=-2, axis2=-1)
    finite = [jnp.all(jnp.isfinite(x)) for x in (batch, *arrays)]
    return jnp.all(jnp.stack([*finite, jnp.all(variances >= 0.0)]))


def _is_due(entered: Array, refresh_every: int) -> Bool[Array, ""]:
    """Whether to decompose after so many batches: 1, 2, 4, 8, .. and multiples of the period."""
    number = entered.astype(jnp.int32)
    early = (number & (number - 1)) == 0
    return (number % refresh_every == 0) | (early & (number < refresh_every))


def decomposed(covariance: Array) -> tuple[Array, Array]:
    """Eigenvalues, none of them negative, and eigenvectors."""
    vectors, values = jax.lax.linalg.eigh(covariance)
    return jnp.maximum(values, 0.0), vectors


def refreshed(
    values: Array, vectors: Array, kept: Array, batch: Array, distance: Array
) -> tuple[Array, Array]:
    """The leading eigenvectors of kept C + (1 - kept) (batch + distance distance^T).

    C is V diag(s) V^T, and rest I on the complement of V. By subspace iteration from V; the last
    value is again the mean eigenvalue on the complement.
    """
    n, rank = vectors.shape[-2:]
    known, rest = values[..., :-1], values[..., -1:]

    def dot(a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, precision="highest")

    def transposed(x: Array) -> Array:
        return jnp.swapaxes(x, -1, -2)

    def product(q: Array) -> Array:
        inner = (known - rest)[..., :, None] * dot(transposed(vectors), q)
        old = dot(vectors, inner) + rest[..., None] * q
        far = distance[..., :, None]
        new = dot(batch, q) + far * dot(transposed(far), q)
        return kept * old + (1.0 - kept) * new

    basis = vectors
    for _ in range(_N_POWERS):
        basis = jnp.linalg.qr(product(basis))[0]
    small = dot(transposed(basis), product(basis))
    small_values, small_vectors = decomposed(0.5 * (small + transposed(small)))
    old_trace = jnp.sum(known, axis=-1) + (n - rank) * rest[..., 0]
    new_trace = jnp.trace(batch, axis1=-2, axis2=-1) + jnp.sum(distance**2, axis=-1)
    trace = kept * old_trace + (1.0 - kept) * new_trace
    left = jnp.maximum(trace - jnp.sum(small_values, axis=-1), 0.0) / max(n - rank, 1)
    values = jnp.concatenate([small_values, left[..., None]], axis=-1)
    return values, dot(basis, small_vectors)
