"""The running mean and covariance of a layer's inputs, and its eigenvectors now and then.

With the mean m and covariance B of a batch, M2 <- (1 - r) M2 + r (B + m m^T) and mu <- (1 - r) mu +
r m are the same as, for C = M2 - mu mu^T,

    C <- (1 - r) (C + r d d^T) + r B,   mu <- mu + r d,   d = m - mu

in which no two large numbers are subtracted. Without a bias mu stays 0, and C is M2. All of it is
linear in C, B and d d^T, so that in a wide layer their sketches take their places.

When a layer is due, layers of one shape are decomposed at once, and all of it is one branch of the
program: a GPU decomposes a stack of small matrices in little more time than one of them, and waits
for the host at each branch.
"""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from bnp_optax import sketches
from bnp_optax.preconditioners.together import together
from bnp_optax.statistics import Layer, LayerStats

# Numbers in the matrices that are decomposed at once, 64 MB, which bounds the memory for it.
_AT_ONCE = 2**24


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
        # A sum has the type of an update's in an explicit mesh, and is a copy: a donated state must
        # not have one array twice.
        x = jnp.asarray(x, jnp.float32)
        shape = (*blocks, *x.shape)
        return jnp.zeros(shape, jnp.float32) + jnp.broadcast_to(x, shape)

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


def moved(
    before: Running, stats: LayerStats, decay: ArrayLike, refresh_every: ArrayLike
) -> tuple[Running, Bool[Array, ""]]:
    """The running statistics with those of a batch, and whether to decompose the covariance now.

    A batch whose statistics are not finite, or are of no input, does not enter.
    """
    mean, covariance, vectors, values, numbers = before
    refreshed, entered, rejected = numbers
    batch_mean, batch = stats.input_mean, stats.total_covariance
    assert batch is not None  # Who calls has seen to it.
    batch = sketches.fitted(batch, covariance)
    rate = jnp.maximum(1.0 - jnp.asarray(decay, jnp.float32), 1.0 / (entered + 2.0))
    distance = batch_mean if mean is None else batch_mean - mean
    gap = 1.0 if mean is None else 1.0 - rate

    def mixed(old: Array, batch: Array, square: Array) -> Array:
        return (1.0 - rate) * old + rate * (batch + gap * square)

    # The diagonal by itself, so that the matrix is read and written once.
    variances = sketches.diagonal(batch)
    valid = _are_valid(
        batch, mixed(sketches.diagonal(covariance), variances, distance**2), stats.count
    )
    accept = valid & (stats.count > 0.0)
    new = mixed(covariance, batch, sketches.outer(distance, covariance))
    covariance = jnp.where(accept, new, covariance)
    if mean is not None:
        mean = jnp.where(accept, mean + rate * distance, mean)
    entered, rejected = entered + accept, rejected + (~valid & (stats.count != 0.0))
    due = accept & _is_due(entered, refresh_every)
    numbers = jnp.stack([jnp.where(due, entered, refreshed), entered, rejected])
    return Running(mean, covariance, vectors, values, numbers), due


def decomposed(
    parts: Mapping[str, Running], due: Mapping[str, Bool[Array, ""]]
) -> dict[str, Running]:
    """The statistics of all layers, those that are due with eigenvalues and eigenvectors anew."""
    alike = collections.defaultdict(list)
    for name in parts:
        alike[jax.typeof(due[name])].append(name)  # They may vary over other axes of a mesh.
    result = dict(parts)
    for names in alike.values():
        is_due = {name: due[name] for name in names}
        found = jax.lax.cond(
            jnp.any(jnp.stack(list(is_due.values()))),
            _decomposed,
            _as_before,
            *({name: parts[name] for name in names}, is_due),
        )
        for name, (values, vectors) in found.items():
            result[name] = parts[name]._replace(values=values, vectors=vectors)
    return result


def _as_before(parts: Mapping[str, Running], due: Mapping[str, Array]) -> dict[str, Any]:
    """Eigenvalues and eigenvectors as they are; no lambda, which JAX would compile anew each time.

    That is in an update that is not in a `jit`.
    """
    del due
    return {name: (part.values, part.vectors) for name, part in parts.items()}


def _decomposed(parts: Mapping[str, Running], due: Mapping[str, Array]) -> dict[str, Any]:
    """Eigenvalues and eigenvectors of each layer, anew where it is due."""
    covariances, kinds = {}, {}
    number = collections.Counter()
    for name, part in parts.items():
        rank = part.vectors.shape[-1]
        kind = rank, part.values.shape[-1] > rank, part.covariance.shape
        covariances[name] = (part.covariance,)
        kinds[name] = *kind, number[kind] // max(_AT_ONCE // part.covariance.size, 1)
        number[kind] += 1

    def eigen(kind: Any, covariance: Array) -> tuple[Array, Array]:
        rank, is_of_low_rank, *_ = kind
        if is_of_low_rank:
            return sketches.leading(covariance, rank)
        return sketches.eigh(covariance)

    found = together(eigen, covariances, kinds)
    return {
        name: jax.tree.map(
            lambda new, old, due=due[name]: jnp.where(due, new, old),
            *(found[name], (part.values, part.vectors)),
        )
        for name, part in parts.items()
    }


def _are_valid(batch: Array, new_variances: Array, count: Array) -> Bool[Array, ""]:
    """Whether a batch may enter: all numbers are finite, and no variance is negative.

    A sum of numbers is finite only if all of them are. The new variances are finite only if the
    distance of the means is, and no entry of a covariance is larger than they are.
    """
    variances = sketches.diagonal(batch)
    sums = jnp.stack([jnp.sum(batch), jnp.sum(new_variances), count])
    return jnp.all(jnp.isfinite(sums)) & jnp.all(variances >= 0.0)


def _is_due(entered: Array, refresh_every: ArrayLike) -> Bool[Array, ""]:
    """Whether to decompose after so many batches: 1, 2, 4, 8, .. and multiples of the period."""
    number = entered.astype(jnp.int32)
    early = (number & (number - 1)) == 0
    return (number % refresh_every == 0) | (early & (number < refresh_every))
