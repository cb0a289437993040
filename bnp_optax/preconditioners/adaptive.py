"""The diagonal preconditioners of the adaptive optimizers: RMSProp's and Adam's, and AdaGrad's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from bnp_optax._checks import check_flag, check_fraction, check_non_negative
from bnp_optax.preconditioners.base import Operator, Preconditioner


class DiagonalState(NamedTuple):
    """State of `rms` and `adagrad`.

    Attributes:
      count: Number of gradients seen.
      nu: Running mean (`rms`) or sum (`adagrad`) of |g|^2, like the parameters but real, and in
        float32 at least.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    nu: Any


class Diagonal(Operator):
    """P = diag(d).

    Attributes:
      diagonal: d, like the parameters, real; not used where these are integers.
    """

    def __init__(self, diagonal: Any) -> None:
        self.diagonal = diagonal

    def mv(self, z: Any) -> Any:
        """P z."""
        return jax.tree.map(lambda x, d: _scaled(x, lambda x: d * x), z, self.diagonal)

    def transpose(self, g: Any) -> Any:
        """P^T g, which is P g."""
        return self.mv(g)

    def gram(self, g: Any) -> Any:
        """P P^T g, rounded once."""
        return jax.tree.map(lambda x, d: _scaled(x, lambda x: d * d * x), g, self.diagonal)

    def solve(self, p: Any) -> Any:
        """P^-1 p."""
        return jax.tree.map(lambda x, d: _scaled(x, lambda x: x / d), p, self.diagonal)


def rms(
    decay: ArrayLike = 0.999, eps: ArrayLike = 1e-8, bias_correction: bool = True
) -> Preconditioner:
    r"""P = diag((sqrt(v) + eps)^(-1/2)), with v a running mean of the squared gradient.

    M = P P^T = diag(1 / (sqrt(v) + eps)) is the matrix by which Adam and RMSProp multiply: they are
    gradient descent after p = P z. Each entry of sqrt(v) is about proportional to the norm of its
    row of the Hessian, so P equilibrates the Hessian's rows.

    Args:
      decay: beta_2, in [0, 1).
      eps: >= 0.
      bias_correction: True divides the mean, started at 0, by 1 - decay^t, as Adam does. False
        starts it with the first squared gradient, which needs no correction.

    Raises:
      ValueError: If a hyper-parameter is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import bnp_optax
      >>> scaled = bnp_optax.precondition(bnp_optax.rms(0.999), before=optax.ema(0.9))
      >>> tx = optax.chain(scaled, optax.scale(-1e-3))
      >>> p, g = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -4.0])}
      >>> ours, _ = tx.update(g, tx.init(p), p)
      >>> adam = optax.adam(1e-3)
      >>> theirs, _ = adam.update(g, adam.init(p), p)
      >>> bool(jnp.allclose(ours["w"], theirs["w"]))
      True

    Source: Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization", (6) to (8).
    """
    check_fraction("decay", decay)
    check_non_negative("eps", eps)
    check_flag("bias_correction", bias_correction)

    def accumulate(square: Array, nu: Array, count: Array) -> Array:
        rate = jnp.asarray(1.0 - decay, nu.dtype)
        if not bias_correction:
            rate = jnp.where(count == 0, 1.0, rate)
        return (1.0 - rate) * nu + rate * square

    def diagonal(nu: Array, count: Array) -> Array:
        if bias_correction:
            # 1 - decay^t, in which 1 - 0.999 would lose five digits of float32.
            rate = jnp.asarray(1.0 - decay, nu.dtype)
            nu = nu / -jnp.expm1(count * jnp.log1p(-rate))
        return _inverse_root(jnp.sqrt(nu) + eps)

    return _diagonal(0.0, accumulate, diagonal)


def adagrad(eps: ArrayLike = 1e-7, initial_accumulator_value: ArrayLike = 0.1) -> Preconditioner:
    r"""P = diag((r + eps)^(-1/4)), with r the sum of the squared gradients.

    M = P P^T = diag(1 / sqrt(r + eps)), AdaGrad's. The sum grows with the steps, which lowers the
    learning rate like 1 / sqrt(t) beside equilibrating the Hessian's rows; `rms` does the latter
    alone.

    Args:
      eps: >= 0.
      initial_accumulator_value: What the sum starts at, >= 0.

    Raises:
      ValueError: If a hyper-parameter is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import bnp_optax
      >>> tx = optax.chain(bnp_optax.precondition(bnp_optax.adagrad()), optax.scale(-0.1))
      >>> p, g = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -4.0])}
      >>> ours, _ = tx.update(g, tx.init(p), p)
      >>> adagrad = optax.adagrad(0.1)
      >>> theirs, _ = adagrad.update(g, adagrad.init(p), p)
      >>> bool(jnp.allclose(ours["w"], theirs["w"]))
      True

    Source: Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization", the section on adaptive learning rates.
    """
    check_non_negative("eps", eps)
    check_non_negative("initial_accumulator_value", initial_accumulator_value)

    def diagonal(nu: Array, count: Array) -> Array:
        del count
        return _inverse_root(jnp.sqrt(nu + eps))

    return _diagonal(initial_accumulator_value, lambda square, nu, count: nu + square, diagonal)


def _inverse_root(x: Array) -> Array:
    """1 / sqrt(x); 1 where x = 0, a parameter that has had no gradient."""
    return jnp.where(x > 0.0, jax.lax.rsqrt(jnp.where(x > 0.0, x, 1.0)), 1.0)


def _scaled(x: Array, function: Callable[[Array], Array]) -> Array:
    """`function` of a real or complex leaf, in its dtype; other leaves as they are."""
    return function(x).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def _diagonal(
    start: ArrayLike,
    accumulate: Callable[[Array, Array, Array], Array],
    diagonal: Callable[[Array, Array], Array],
) -> Preconditioner:
    """A diagonal P made of accumulated squares |g|^2."""

    def real(leaf: Array) -> Any:
        # In bfloat16, 0.999 is 1: what is accumulated needs float32.
        is_inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return jnp.promote_types(jnp.finfo(leaf.dtype).dtype, jnp.float32) if is_inexact else None

    def init(params: Any) -> DiagonalState:
        nu = jax.tree.map(lambda p: jnp.full_like(p, start, real(p) or jnp.float32), params)
        return DiagonalState(jnp.zeros((), jnp.int32), nu)

    def update(grads: Any, state: DiagonalState, params: Any = None, **extra: Any) -> DiagonalState:
        del params, extra

        def moved(nu: Array, g: Array) -> Array:
            if real(g) is None:
                return nu
            g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
            square = jnp.real(g * jnp.conj(g))
            return accumulate(square, nu, state.count).astype(nu.dtype)

        return DiagonalState(state.count + 1, jax.tree.map(moved, state.nu, grads))

    def operator(state: DiagonalState) -> Diagonal:
        def entries(nu: Array) -> Array:
            # Before the first gradient, P = I.
            count = jnp.maximum(state.count, 1)
            return jnp.where(state.count > 0, diagonal(nu, count), 1.0).astype(nu.dtype)

        return Diagonal(jax.tree.map(entries, state.nu))

    return Preconditioner(init, update, operator)
