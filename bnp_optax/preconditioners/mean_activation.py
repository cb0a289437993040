"""The covariance of a layer's inputs with its largest part alone, the square of their mean."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from bnp_optax._checks import check_fraction, check_positive
from bnp_optax._explicit import replicated
from bnp_optax._tree import mask_leaves, named_leaves, replace_leaves
from bnp_optax.layers import Layers, check_layers
from bnp_optax.preconditioners.base import Preconditioner
from bnp_optax.preconditioners.layout import layers_of
from bnp_optax.preconditioners.matching import LEFT_OUT, check_same_layers, match_statistics
from bnp_optax.preconditioners.whiten_operator import Root, WhitenOperator


class MeanActivationState(NamedTuple):
    """State of `mean_activation`.

    Attributes:
      mean: At kernels, the running mean mu of the inputs, (n,), with leading axes of blocks.
      entered: At kernels, how many batches entered it.
      damping: gamma.
    """

    mean: Any
    entered: Any
    damping: Float[Array, ""]


def mean_activation(
    *, damping: ArrayLike = 1.0, decay: ArrayLike = 0.95, layers: Layers | None = None
) -> Preconditioner:
    r"""P = (mu mu^T + gamma I)^(-1/2): MAC, which preconditions by the mean activation.

    So M = P P^T is (mu mu^T + gamma I)^-1, at the cost of one product with a vector. It needs no
    second moments, and moves no bias. Where `bnp` and `whiten` subtract the mean through the bias,
    it shrinks the gradient along the mean.

    Args:
      damping: gamma > 0.
      decay: Of the running mean, in [0, 1); bias-corrected.
      layers: The layers to precondition, as for `whiten`.

    Returns:
      A `Preconditioner`; P is the identity in a layer until its first statistics have come.

    Raises:
      ValueError: If a hyper-parameter is out of its range, or `layer_stats` does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnp_optax
      >>> x, params = jnp.array([[1.0, 2.0], [3.0, 2.0]]), {"kernel": jnp.ones((2, 2))}
      >>> loss_fn = lambda p: jnp.mean((x @ p["kernel"]) ** 2)
      >>> _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
      >>> mac = bnp_optax.mean_activation(damping=1.0)
      >>> state = mac.update(grads, mac.init(params), params, layer_stats=stats)
      >>> mu = jnp.array([2.0, 2.0])
      >>> want = jnp.linalg.solve(jnp.outer(mu, mu) + jnp.eye(2), grads["kernel"])
      >>> bool(jnp.allclose(mac.operator(state).gram(grads)["kernel"], want, atol=1e-5))
      True

    Source: Seung, Lee, Ko, "MAC: An Efficient Gradient Preconditioning using Mean Activation
    Approximated Curvature", 2025.
    """
    check_positive("damping", damping)
    check_fraction("decay", decay)
    check_layers(layers)

    def init(params: Any) -> MeanActivationState:
        found = layers_of(params, layers)
        masks = mask_leaves(params)
        means = {
            name: jnp.zeros((*layer.block_shape, layer.fan_in), jnp.float32)
            for name, layer in found.items()
        }
        counts = {name: jnp.zeros((), jnp.float32) for name in found}
        return MeanActivationState(
            replace_leaves(masks, means), replace_leaves(masks, counts), _number(damping)
        )

    def update(
        grads: Any,
        state: MeanActivationState,
        params: Any = None,
        *,
        layer_stats: Any = LEFT_OUT,
        **extra: Any,
    ) -> MeanActivationState:
        del params, extra
        matched = match_statistics(grads, layers, layer_stats)
        if not matched:
            return state
        means, counts = named_leaves(state.mean), named_leaves(state.entered)
        check_same_layers("mean_activation", matched, means)
        for name, (_, stats) in matched.items():
            stats = jax.lax.stop_gradient(stats)
            mean = replicated(stats.input_mean)
            accept = jnp.all(jnp.isfinite(mean)) & (stats.count > 0.0)
            # decay (1 - decay^t) / (1 - decay^(t + 1)) weighs a bias-corrected mean of t batches.
            kept = 1.0 - jnp.asarray(decay, jnp.float32)
            rate = kept / -jnp.expm1((counts[name] + 1.0) * jnp.log1p(-kept))
            rate = jnp.where(kept == 1.0, 1.0, rate)
            new = means[name] + rate * (mean - means[name])
            means[name] = jnp.where(accept, new, means[name])
            counts[name] = counts[name] + accept
        return MeanActivationState(
            replace_leaves(state.mean, means),
            replace_leaves(state.entered, counts),
            _number(damping),
        )

    def operator(state: MeanActivationState) -> WhitenOperator:
        means, counts = named_leaves(state.mean), named_leaves(state.entered)
        found = {}
        for name, mean in means.items():
            size = jnp.sum(mean**2, axis=-1, keepdims=True)
            direction = mean / jnp.where(size > 0.0, jnp.sqrt(size), 1.0)
            spectrum = jnp.concatenate([size, jnp.zeros_like(size)], axis=-1) + state.damping
            spectrum = jnp.where(counts[name] > 0, spectrum, 1.0)
            found[name] = Root(None, direction[..., None], spectrum, _number(0.5))
        return WhitenOperator(found, layers)

    return Preconditioner(init, update, operator)


def _number(x: ArrayLike) -> Array:
    return jnp.asarray(x, jnp.float32)
