"""The second moments of a layer's extended inputs, whose conditioning P is there to improve."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnp_optax import sketches
from bnp_optax.capture.api import value_and_stats
from bnp_optax.diagnostics.conditioning import condition_number
from bnp_optax.diagnostics.displacement import promoted, unit_coordinates
from bnp_optax.layers import Layers
from bnp_optax.preconditioners.base import Operator
from bnp_optax.statistics import Layer, LayerStats


def extended_second_moment(stats: LayerStats) -> Float[Array, "*blocks n_or_more n_or_more"]:
    r"""E[h^ h^^T] of the extended inputs h^ = [1, h], or E[h h^T] of a layer without a bias.

    The Hessian of a unit of a dense layer is E[s h^ h^^T], with s the loss's second derivative by
    the unit's output, so its conditioning is that of E[h^ h^^T] where s is alike for all examples.

    Args:
      stats: Of `value_and_grad(loss_fn, second_moments=True)`.

    Returns:
      A matrix (n + 1, n + 1), or (n, n) without a bias, of which a grouped convolution or stacked
      layers have one each.

    Raises:
      ValueError: If `stats` has no second moment, or a sketch of it.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnp_optax
      >>> from bnp_optax import diagnostics
      >>> x = jnp.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
      >>> loss_fn = lambda p: jnp.mean((x @ p["kernel"] + p["bias"]) ** 2)
      >>> params = {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}
      >>> _, _, stats = bnp_optax.value_and_grad(loss_fn, second_moments=True)(params)
      >>> diagnostics.extended_second_moment(stats["kernel"]).diagonal().tolist()
      [1.0, 4.5, 0.5]

    Source: Lange, Helfrich, Ye, JMLR 2022, (9) and (11).
    """
    moment, covariance = stats.second_moment, stats.total_covariance
    if moment is None or covariance is None:
        msg = (
            f"`stats` of `{stats.layer.kernel}` has no second moment. Capture it: "
            "`bnp_optax.value_and_grad(loss_fn, second_moments=True)(params, ...)`."
        )
        raise ValueError(msg)
    if sketches.is_sketch(moment):
        msg = (
            f"`stats` of `{stats.layer.kernel}` has a sketch of its second moment. Capture the "
            f"matrix: `bnp_optax.value_and_grad(loss_fn, second_moments=True, "
            f"second_moment_fan_in={moment.shape[-1]})(params, ...)`."
        )
        raise ValueError(msg)
    if stats.layer.bias is None:
        return moment
    # From the covariance, which has its digits where the mean is large.
    mean = stats.input_mean
    extended = jnp.concatenate([jnp.ones_like(mean[..., :1]), mean], axis=-1)
    zero = [(0, 0)] * (covariance.ndim - 2) + [(1, 0), (1, 0)]
    return jnp.pad(covariance, zero) + extended[..., :, None] * extended[..., None, :]


class InputConditioning(NamedTuple):
    """Condition numbers of the second moment of a layer's extended inputs.

    Attributes:
      kappa: Of E[h^ h^^T].
      kappa_preconditioned: Of P^T E[h^ h^^T] P; NaN without P.
    """

    kappa: float
    kappa_preconditioned: float


def input_conditioning(
    loss_fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    chosen: Layers,
    layers: Layers | None,
    P: Operator | None,
) -> dict[str, InputConditioning]:
    """The condition numbers of the layers `chosen`, those of blocks with their own P left out.

    In float64, from moments in float32: what is below their rounding counts as zero.
    """
    with_moments = value_and_stats(
        loss_fn,
        layers=layers,
        second_moments=list(chosen),
        second_moment_rows=2**20,
        second_moment_fan_in=2**20,
    )
    _, stats = jax.jit(lambda params, args: with_moments(params, *args))(params, args)
    result = {}
    for name, layer in chosen.items():
        moment = np.asarray(extended_second_moment(stats[name]), np.float64)
        if moment.ndim > 2:
            continue
        kappas = [_kappa(moment)]
        if P is not None:
            matrix = np.asarray(_unit_matrix(P, params, layer), np.float64)
            kappas.append(_kappa(matrix.T @ moment @ matrix))
        result[name] = InputConditioning(*kappas, *[float("nan")] * (2 - len(kappas)))
    return result


def _kappa(matrix: Float[np.ndarray, "n n"]) -> float:
    """Of a moment of float32, whose digits say what counts as zero; NaN of inputs that are zero."""
    symmetric = (0.5 * (matrix + matrix.T)).astype(np.float32)
    return float(condition_number(symmetric, symmetric=True)) if symmetric.any() else float("nan")


def _unit_matrix(P: Operator, params: Any, layer: Layer) -> Float[Array, "n n"]:
    """P as a matrix on [b, w] of the layer's first unit, whose P is that of the others."""
    unit = unit_coordinates(jax.tree.map(promoted, params), layer)

    def column(v: Array) -> Array:
        return unit.extract(P.mv(unit.embed(v, 0)), 0)

    return jax.lax.map(jax.jit(column), jnp.eye(unit.size)).T
