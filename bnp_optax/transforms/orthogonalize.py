"""Orthogonalized momentum, as in Muon, at the cost of the kernel's small side."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from bnp_optax._checks import (
    check_count,
    check_flag,
    check_fraction,
    check_non_negative,
    check_positive,
    count_of,
)
from bnp_optax._explicit import fitted, replicated
from bnp_optax._tree import named_leaves, replace_leaves
from bnp_optax.layers import Layers, check_layers
from bnp_optax.preconditioners.layout import from_matrix, layers_of, to_matrix
from bnp_optax.transforms.integers import is_integer

# Jordan's: they raise small singular values as fast as they can, and end between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class OrthogonalizeState(NamedTuple):
    """State of `orthogonalize`.

    Attributes:
      count: Number of gradients seen.
      mu: At kernels, the momentum; a mask elsewhere.
      adam: State of Adam, for the other parameters; a mask at integers.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    adam: Any


def orthogonalize(
    *,
    momentum: ArrayLike = 0.95,
    nesterov: bool = True,
    n_steps: int = 5,
    coefficients: Sequence[float] = _COEFFICIENTS,
    rms: float | None = 0.2,
    eps: ArrayLike = 1e-8,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    layers: Layers | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace the momentum of each kernel by the nearest semi-orthogonal matrix, about.

    A kernel is a matrix X of n inputs by m outputs. With X = U S V^T, `U V^T` is found by

        A = X X^T,   X <- (a I + b A + c A^2) X

    a few times, from X / ||X||_F. All these factors are polynomials of the first A, so they are
    multiplied up on the small side, where A <- A (a I + b A + c A^2)^2, and X is multiplied once at
    the end; singular values below 3e-4 of the largest lose digits there. For kernels that are about
    square, X itself is iterated, which then costs about as much. In float32, whatever the dtype.

    It is a direction uphill: `optax.scale_by_learning_rate` follows. Alone it is Muon; in z, where
    the inputs have mean 0 and, with `whiten`, about covariance I, `whiten_muon` runs it.

    Args:
      momentum: Decay of the momentum, in [0, 1).
      nesterov: Whether to use Nesterov momentum, also of Adam.
      n_steps: Number of iterations.
      coefficients: a, b, c.
      rms: The root mean square of an entry of the result times sqrt(max(n, m)) is that of an
        orthogonal matrix times this, whatever the shape; 0.2 is about that of Adam's updates, so
        that Adam's learning rates and weight decay carry over. None scales by sqrt(max(1, m / n)),
        as the first Muon did.
      eps: Added to the norm that X is divided by, and Adam's, >= 0.
      b1: Adam's, for the parameters that are no layer's kernel.
      b2: Adam's.
      layers: The layers whose kernels are orthogonalized, from `find_layers`: their input axes are
        the rows, and all others the columns, but for those of stacked layers or of groups, each of
        which is a matrix of its own. None takes leaves named `kernel`, as `bnp` does.

    Returns:
      A transformation with state `OrthogonalizeState`.

    Raises:
      ValueError: If a hyper-parameter is out of its range, or `layers` does not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax
      >>> import bnp_optax
      >>> params = {"kernel": jnp.zeros((8, 3)), "bias": jnp.zeros(3)}
      >>> grads = {"kernel": jax.random.normal(jax.random.key(0), (8, 3)), "bias": jnp.ones(3)}
      >>> tx = optax.chain(bnp_optax.orthogonalize(rms=None), optax.scale_by_learning_rate(0.1))
      >>> ours, _ = tx.update(grads, tx.init(params), params)
      >>> muon = optax.contrib.muon(0.1)
      >>> theirs, _ = muon.update(grads, muon.init(params), params)
      >>> bool(jnp.allclose(ours["kernel"], theirs["kernel"], rtol=1e-3, atol=1e-5))
      True

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; Liu et
    al., "Muon is Scalable for LLM Training", 2025, for `rms`.
    """
    check_fraction("momentum", momentum)
    check_flag("nesterov", nesterov)
    check_count("n_steps", n_steps, optional=False, traced=True)
    if rms is not None:
        check_positive("rms", rms)
    check_non_negative("eps", eps)
    check_fraction("b1", b1)
    check_fraction("b2", b2)
    check_layers(layers)
    if len(coefficients) != 3:
        msg = f"`coefficients` must be the three numbers a, b, c; got {coefficients!r}."
        raise ValueError(msg)
    adam = optax.scale_by_adam(b1, b2, eps, nesterov=nesterov)

    def parted(tree: Any) -> tuple[Any, Any]:
        """The kernels of a tree, and all else."""
        kernels = layers_of(tree, layers)
        others = [name for name in named_leaves(tree) if name not in kernels]
        return _masked(tree, others), _masked(tree, kernels)

    def init_fn(params: optax.Params) -> OrthogonalizeState:
        kernels, others = parted(_without_integers(params, params))
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, _at_least_float32(p)), kernels)
        return OrthogonalizeState(jnp.zeros((), jnp.int32), mu, adam.init(others))

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, OrthogonalizeState]:
        del extra_args
        real = _without_integers(updates, updates if params is None else params)
        kernels, others = parted(real)
        grads = jax.tree.map(lambda g: g.astype(_at_least_float32(g)), kernels)
        mu = jax.tree.map(lambda m, g: momentum * m + (1.0 - momentum) * g, state.mu, grads)
        count: Any = optax.safe_increment(state.count)

        def corrected(x: Array, n_gradients: Any) -> Array:
            return x / (1.0 - jnp.asarray(momentum, x.dtype) ** n_gradients)

        def direction(m: Array, g: Array) -> Any:
            if not nesterov:
                return corrected(m, count)
            # As Optax has it: the momentum of the next step, with this gradient for its.
            ahead = corrected(m, optax.safe_increment(count))
            return momentum * ahead + (1.0 - momentum) * corrected(g, count)

        directions = named_leaves(jax.tree.map(direction, mu, grads))
        given, new = named_leaves(kernels), {}
        for name, layer in layers_of(real, layers).items():
            # In a mesh of explicit axes each device sees, and orthogonalizes, the whole matrix.
            x = to_matrix(layer, replicated(directions[name]))
            fan_in, fan_out = x.shape[-2:]
            size = max(1.0, fan_out / fan_in) ** 0.5
            if rms is not None:
                size = rms * max(fan_in, fan_out) ** 0.5
            x = size * _orthogonal(x, count_of("n_steps", n_steps), tuple(coefficients), eps)
            new[name] = fitted(from_matrix(layer, x).astype(given[name].dtype), given[name])
        other_updates, adam_state = adam.update(others, state.adam)
        new |= named_leaves(other_updates)
        return replace_leaves(updates, new), OrthogonalizeState(count, mu, adam_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _without_integers(tree: Any, params: Any) -> Any:
    """`tree` without the leaves that are integers in `params`, which no step moves."""
    return _masked(tree, [name for name, p in named_leaves(params).items() if is_integer(p)])


def _masked(tree: Any, names: Iterable[str]) -> Any:
    """`tree` without the leaves of these names."""
    return replace_leaves(tree, {name: optax.MaskedNode() for name in names})


def _at_least_float32(x: Any) -> Any:
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def _orthogonal(
    x: Float[Array, "*blocks n m"], n_steps: int, coefficients: tuple[float, ...], eps: ArrayLike
) -> Float[Array, "*blocks n m"]:
    """What the iteration makes of X."""
    n, m = x.shape[-2:]
    if n > m:
        return _t(_orthogonal(_t(x), n_steps, coefficients, eps))
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + eps)
    # Products: on the small side 3 or 4 n^3 a step and 2 n^2 m in all, else n^3 + 2 n^2 m a step.
    # A Gram matrix has the squares of the singular values, so that those below 3e-4 of the largest
    # are lost in float32: only where much is gained.
    small = (4 * n_steps - 3) * n + 2 * m
    if small < 0.75 * n_steps * (n + 2 * m):
        return _dot(_polynomials(_dot(x, _t(x)), n_steps, coefficients), x)
    for _ in range(n_steps):
        x = _dot(_polynomial(_dot(x, _t(x)), coefficients), x)
    return x


def _polynomials(a: Array, n_steps: int, coefficients: tuple[float, ...]) -> Array:
    """The product of the factors of all steps."""
    product = p = _polynomial(a, coefficients)
    for _ in range(n_steps - 1):
        a = _dot(_dot(p, a), p)
        p = _polynomial(a, coefficients)
        product = _dot(p, product)
    return product


def _polynomial(a: Array, coefficients: tuple[float, ...]) -> Array:
    first, second, third = coefficients
    eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    return first * eye + second * a + third * _dot(a, a)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b)


def _t(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)
