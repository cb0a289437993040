"""A symmetric matrix by its products with a few fixed vectors, and its leading eigenvectors.

The second moment of n = 3,072 inputs has n^2 = 9.4 million entries, of which a batch of 60 fills 60
dimensions and `whiten` wants the largest few. So of a wide layer its sketch is kept,

    [Omega M; diag(M)],   of shape (k + 1, n),

where Omega (k, n) are random signs, always the same ones. It is linear in M, so that averages of
sketches are sketches of averages, and so are running ones; and with rows H (N, n) it is made of
Omega H^T H, in O(N n k) and without M. From it comes the Nystrom approximation

    M ~ Y (Omega Y)^-1 Y^T,   Y = M Omega^T

which is exact where the rank of M is at most k, and near the best one of a somewhat lower rank.
The diagonal tells the trace, and so the mean of the eigenvalues that it has not.

Below, a *matrix* is a square array (.., n, n), or a sketch (.., k + 1, n) with k + 1 < n.

Source: Tropp, Yurtsever, Udell, Cevher, "Fixed-rank approximation of a positive-semidefinite matrix
from streaming data", NeurIPS 2017, Algorithm 3.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnp_optax import decompositions

# Rows of Omega in a captured sketch, which with the diagonal has 32.
N_PRODUCTS = 31
# The shift, in multiples of the rounding of Omega Y.
_SHIFT = 16 * float(jnp.finfo(jnp.float32).eps)


def is_sketch(matrix: Array) -> bool:
    """Whether it is no square matrix."""
    return matrix.shape[-2] != matrix.shape[-1]


def n_products(fan_in: int, at_least: int = 0) -> int | None:
    """The k of a sketch of `fan_in` inputs; None if that is no smaller than the matrix."""
    k = max(N_PRODUCTS, at_least)
    return k if k + 1 < fan_in else None


def signs(k: int, n: int) -> Float[Array, "k n"]:
    """Omega. The raw bits of a generator never change, so a sketch can be read by any version."""
    words = np.random.PCG64(0).random_raw(-(-k * n // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=k * n).reshape(k, n)
    return jnp.asarray(2 * bits.astype(np.int8) - 1).astype(jnp.float32)


def of_rows(rows: Float[Array, "N *blocks n"], k: int | None) -> Float[Array, "*blocks n_or_k n"]:
    """sum_r h_r h_r^T, a square matrix if `k` is None."""
    if k is None:
        return jnp.einsum("r...i,r...j->...ij", rows, rows, precision="highest")
    met = jnp.einsum("ki,r...i->k...r", signs(k, rows.shape[-1]), rows, precision="highest")
    met = jnp.pad(met, [(0, 1)] + [(0, 0)] * (met.ndim - 1))
    products = jnp.einsum("k...r,r...i->...ki", met, rows, precision="highest")
    return _with_last(products, jnp.sum(rows**2, axis=0)[..., None, :])


def of_identity(k: int, n: int) -> Float[Array, "k+1 n"]:
    """The sketch of the identity."""
    return jnp.concatenate([signs(k, n), jnp.ones((1, n))])


def can_fit(matrix: Array, like: Array) -> bool:
    """Whether `fitted` can: a sketch has no more than its own products."""
    return not is_sketch(matrix) or (is_sketch(like) and matrix.shape[-2] >= like.shape[-2])


def fitted(
    matrix: Float[Array, "*blocks n_or_k n"], like: Array
) -> Float[Array, "*blocks n_or_k n"]:
    """A matrix as a sketch of as many products as `like`, or square as `like`."""
    k = like.shape[-2] - 1
    if matrix.shape[-2] == like.shape[-2]:
        return matrix
    if is_sketch(matrix):
        # The first signs are the same ones.
        return jnp.concatenate([matrix[..., :k, :], matrix[..., -1:, :]], axis=-2)
    products = jnp.matmul(signs(k, matrix.shape[-1]), matrix, precision="highest")
    return jnp.concatenate([products, diagonal(matrix)[..., None, :]], axis=-2)


def outer(a: Float[Array, "*blocks n"], like: Array) -> Float[Array, "*blocks n_or_k n"]:
    """A a^T, a square matrix or a sketch as `like` is one."""
    if not is_sketch(like):
        return a[..., :, None] * a[..., None, :]
    met = jnp.matmul(a, signs(like.shape[-2] - 1, a.shape[-1]).T, precision="highest")
    return _with_square(met, a)


def outer_size(a: Float[Array, "*blocks n"], like: Array) -> Float[Array, "*blocks n_or_k n"]:
    """About the size of the numbers that entries of a a^T, or its sketch, are sums of."""
    if not is_sketch(like):
        return jnp.abs(a[..., :, None] * a[..., None, :])
    # n numbers with random signs.
    met = jnp.linalg.norm(a, axis=-1, keepdims=True)
    return _with_square(jnp.broadcast_to(met, (*met.shape[:-1], like.shape[-2] - 1)), jnp.abs(a))


def _with_square(met: Float[Array, "*blocks k"], a: Float[Array, "*blocks n"]) -> Array:
    """Rows met_j a^T, and a^2 for the last."""
    met = jnp.pad(met, [(0, 0)] * (met.ndim - 1) + [(0, 1)])
    return _with_last(met[..., :, None], a[..., None, :]) * a[..., None, :]


def _with_last(rows: Array, last: Array) -> Array:
    """`rows` with `last` for its last one; by a choice, which the compiler fuses, for no copy."""
    is_last = jnp.arange(rows.shape[-2]) == rows.shape[-2] - 1
    is_last = jnp.expand_dims(is_last, (*range(rows.ndim - 2), rows.ndim - 1))
    return jnp.where(is_last, last, rows)


def diagonal(matrix: Float[Array, "*blocks n_or_k n"]) -> Float[Array, "*blocks n"]:
    """The diagonal."""
    if is_sketch(matrix):
        return matrix[..., -1, :]
    return jnp.diagonal(matrix, axis1=-2, axis2=-1)


def leading(
    matrix: Float[Array, "*blocks n_or_k n"], rank: int
) -> tuple[Float[Array, "*blocks r+1"], Float[Array, "*blocks n r"]]:
    """The largest eigenvalues with the mean of all others after them, and their eigenvectors."""
    if is_sketch(matrix):
        values, vectors = _nystrom(matrix, rank)
    else:
        values, vectors = eigh(matrix)
        values, vectors = values[..., -rank:], vectors[..., -rank:]
    trace = jnp.sum(diagonal(matrix), axis=-1, keepdims=True)
    rest = jnp.maximum(trace - jnp.sum(values, axis=-1, keepdims=True), 0.0)
    rest = rest / max(matrix.shape[-1] - rank, 1)
    return jnp.concatenate([values, rest], axis=-1), vectors


def eigh(matrix: Float[Array, "*blocks n n"]) -> tuple[Array, Array]:
    """Eigenvalues in rising order, none of them negative, and eigenvectors."""
    values, vectors = decompositions.eigh(matrix)
    return jnp.maximum(values, 0.0), vectors


def _nystrom(sketch: Float[Array, "*blocks k+1 n"], rank: int) -> tuple[Array, Array]:
    """The largest eigenvalues of the approximation, and orthonormal eigenvectors.

    Of M + nu I, so that Omega Y, which may be singular, can be inverted, and less nu.
    """

    def dot(a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, precision="highest")

    def t(x: Array) -> Array:
        return jnp.swapaxes(x, -1, -2)

    # Of a trace of 1, so that no square overflows.
    trace = jnp.sum(diagonal(sketch), axis=-1)[..., None, None]
    size = jnp.maximum(trace, jnp.finfo(sketch.dtype).tiny)
    products, n = sketch[..., :-1, :] / size, sketch.shape[-1]
    omega = jnp.expand_dims(signs(products.shape[-2], n), range(sketch.ndim - 2))
    # Omega Omega^T is about n I.
    shift = _SHIFT * jnp.linalg.norm(dot(products, t(omega)), axis=(-2, -1), keepdims=True) / n
    products = products + shift * omega
    core = dot(products, t(omega))
    core_values, core_vectors = eigh(0.5 * (core + t(core)))
    least = jnp.finfo(core.dtype).tiny + 0.25 * n * shift[..., 0]
    factor = core_vectors / jnp.sqrt(jnp.maximum(core_values, least))[..., None, :]
    # Singular vectors by the Gram matrix, which loses the smallest: these are not orthogonal. So
    # the largest ones are found by it, and are decomposed once more, by QR.
    root = dot(t(products), factor)
    _, vectors = eigh(dot(t(root), root))
    basis, small = decompositions.qr(dot(root, vectors[..., :, -rank:]))
    values, vectors = eigh(dot(small, t(small)))
    return size[..., 0] * jnp.maximum(values - shift[..., 0], 0.0), dot(basis, vectors)
