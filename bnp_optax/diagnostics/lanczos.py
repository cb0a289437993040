"""The largest and smallest eigenvalues of the whole Hessian, from its products with vectors."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from bnp_optax._tree import is_concrete, split_arrays
from bnp_optax.diagnostics.checks import operator_of
from bnp_optax.diagnostics.displacement import Coordinates, coordinates, displaced
from bnp_optax.preconditioners.base import Operator, Preconditioner

Matvec = Callable[[Array], Array]


class HessianExtremes(NamedTuple):
    """The ends of a spectrum, and how sure they are.

    Attributes:
      min: Smallest eigenvalue found; never below the true one but for rounding.
      max: Largest eigenvalue found; never above the true one but for rounding.
      min_residual: There is an eigenvalue this close to `min`.
      max_residual: There is an eigenvalue this close to `max`.
    """

    min: Float[Array, ""]
    max: Float[Array, ""]
    min_residual: Float[Array, ""]
    max_residual: Float[Array, ""]


class Tridiagonal(NamedTuple):
    """Q^T A Q of Lanczos' basis Q.

    Attributes:
      diagonal: alpha_1, ..., alpha_k.
      betas: beta_1, ..., beta_k: the off-diagonal, and the length of the last residual.
    """

    diagonal: Float[Array, " k"]
    betas: Float[Array, " k"]


def hessian_extremes(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    preconditioner: Preconditioner | Operator | None = None,
    state: Any = None,
    num_lanczos: int = 100,
    key: Array | None = None,
) -> HessianExtremes:
    r"""The smallest and the largest eigenvalue of the Hessian H, or of P^T H P.

    Lanczos' method on products with vectors, H v by forward- over reverse-mode differentiation;
    the Hessian itself is never formed. With full reorthogonalization, by `matfree`. The
    residual of an eigenvalue theta of the tridiagonal matrix T, with eigenvector s, is

        ||A Q s - theta Q s|| = |beta_k s_k|

    Ends of the spectrum that stand apart, such as the largest eigenvalues of most networks,
    converge within 20 products. The smallest often take 50. Look at the residuals, and ask for
    more products where they are not small.

    Args:
      loss_fn: `loss_fn(params, *args)`, a scalar; it is compiled.
      params: Parameters; leaves that are not floating-point are constants.
      *args: Further arguments of the loss.
      preconditioner: Such as `bnp()`, or P itself, an `Operator`; None for H.
      state: State of the preconditioner.
      num_lanczos: Number of products, and of vectors like `params` that are kept at a time, >= 1.
        More than there are parameters is as many as there are.
      key: Of the random vector that it starts from. None takes `jax.random.key(0)`.

    Returns:
      `HessianExtremes`, in the precision of the parameters.

    Raises:
      ValueError: If `params` has no floating-point leaf, the Hessian is not finite, `num_lanczos`
        is below 1, or of `preconditioner` and `state` only one is given.
      ImportError: If `matfree` is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> from bnp_optax.diagnostics import hessian_extremes
      >>> loss_fn = lambda w, s: 0.5 * jnp.sum(s * w**2)
      >>> ends = hessian_extremes(loss_fn, jnp.ones(3), jnp.array([-1.0, 3.0, 7.0]))
      >>> bool(jnp.allclose(ends.min, -1.0) & jnp.allclose(ends.max, 7.0))
      True

    Source: Lange, Helfrich, Ye, JMLR 2022, (5) to (8), for what the eigenvalues say; C. Lanczos,
    "An iteration method for the solution of the eigenvalue problem", 1950.
    """
    P = operator_of(preconditioner, state)
    return extremes(loss_fn, params, args, P, None, num_lanczos, key)


def extremes(
    loss_fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    P: Operator | None,
    only: Collection[str] | None,
    num_lanczos: int,
    key: Array | None,
) -> HessianExtremes:
    """`hessian_extremes` of the diagonal block of the leaves named in `only`."""
    decompose = _matfree()
    if num_lanczos < 1:
        msg = f"`num_lanczos` must be at least 1, got {num_lanczos}."
        raise ValueError(msg)
    flat = coordinates(params, only)
    dynamic, rebuild = split_arrays((params, args))

    @jax.jit
    def linearized(dynamic: list[Array]) -> Any:
        params, args = rebuild(dynamic)
        gradient = jax.grad(lambda v: displaced(loss_fn, params, args, flat.embed(v)))
        return jax.linearize(gradient, flat.zero)[1]

    product = linearized(dynamic)
    if P is not None:
        product = Partial(partial(_between, P, flat), product)
    key = jax.random.key(0) if key is None else key
    start = jax.random.normal(key, flat.zero.shape, flat.zero.dtype)
    size = min(num_lanczos, flat.zero.size)
    if _is_slow_in_a_loop(product, flat.zero):
        tridiagonal = _step_by_step(product, start, size)
    else:
        tridiagonal = _in_a_loop(decompose, size, product, start)
    result = _ends(tridiagonal)
    if is_concrete(result) and not all(map(jnp.isfinite, result)):
        msg = (
            "The Hessian of the loss is not finite at `params`. Check that the parameters, the "
            "loss and its gradient are: `jax.config.update('jax_debug_nans', True)` says where."
        )
        raise ValueError(msg)
    return result


def _matfree() -> Any:
    try:
        from matfree import decomp
    except ImportError as error:
        msg = (
            "`hessian_extremes` needs matfree, which is not installed: "
            "pip install 'bnp-optax[diagnostics]'"
        )
        raise ImportError(msg) from error
    return decomp.tridiag_sym


def _between(P: Operator, flat: Coordinates, product: Matvec, z: Array) -> Array:
    """P^T H P z."""
    h_p = product(flat.extract(P.mv(flat.embed(z))))
    return flat.extract(P.transpose(flat.embed(h_p)))


def _is_slow_in_a_loop(product: Matvec, zero: Array) -> bool:
    """Whether XLA compiles the product to slow code in a loop: gradients of convolutions on CPUs.

    Outside of loops it brings their axes into an order for which it has fast code; inside, a
    product of a network with a million parameters took 15 times as long.
    """
    if jax.default_backend() != "cpu" or not is_concrete(zero, product):
        return False
    return "conv_general_dilated" in str(jax.make_jaxpr(product)(zero))


def _in_a_loop(decompose: Any, size: int, product: Matvec, start: Array) -> Tridiagonal:
    lanczos = decompose(size, materialize=False, reortho="full")

    @jax.jit
    def run(product: Matvec, start: Array) -> Tridiagonal:
        result = lanczos(product, start)
        diagonal, off_diagonal = result.J_small
        last = jnp.linalg.norm(result.residual)
        return Tridiagonal(diagonal, jnp.concatenate([off_diagonal, last[None]]))

    return run(product, start)


def _step_by_step(product: Matvec, start: Array, size: int) -> Tridiagonal:
    """What `_in_a_loop` does, with one step compiled and the loop in Python."""

    @partial(jax.jit, donate_argnums=(1, 2))
    def step(product: Matvec, basis: Array, v: Array, i: Array) -> tuple[Array, ...]:
        basis = basis.at[i].set(v)
        image = product(v)
        alpha = image @ v
        for _ in range(2):
            image = image - (basis @ image) @ basis
        beta = jnp.linalg.norm(image)
        return basis, image / beta, alpha, beta

    basis = jnp.zeros((size, start.size), start.dtype)
    v = start / jnp.linalg.norm(start)
    alphas, betas = [], []
    for i in range(size):
        basis, v, alpha, beta = step(product, basis, v, jnp.asarray(i))
        alphas.append(alpha)
        betas.append(beta)
    return Tridiagonal(jnp.stack(alphas), jnp.stack(betas))


def _ends(t: Tridiagonal) -> HessianExtremes:
    """The extreme eigenvalues of T, cut where the basis spans an invariant subspace.

    From there on residuals are rounding, or 0 / 0, and so is what they would add to T. What is cut
    is replaced by alpha_1, a number between the extremes of the rest.
    """
    size = t.diagonal.size
    scale = jax.lax.cummax(jnp.maximum(jnp.abs(t.diagonal), t.betas))
    goes_on = t.betas > 10 * jnp.finfo(t.diagonal.dtype).eps * scale
    reached = jnp.cumprod(jnp.concatenate([jnp.ones(1, bool), goes_on[:-1]])).astype(bool)
    diagonal = jnp.where(reached, t.diagonal, t.diagonal[0])
    off_diagonal = jnp.where(reached[1:], t.betas[:-1], 0.0)
    matrix = jnp.diag(diagonal) + jnp.diag(off_diagonal, 1) + jnp.diag(off_diagonal, -1)
    values, vectors = jnp.linalg.eigh(matrix)
    last = jnp.sum(reached) - 1
    beta = jnp.where(jnp.isfinite(t.betas), t.betas, 0.0)[last]
    residuals = jnp.abs(beta * vectors[jnp.minimum(last, size - 1)])
    return HessianExtremes(values[0], values[-1], residuals[0], residuals[-1])
