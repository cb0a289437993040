"""Batch normalization preconditioning (Lange, Helfrich, Ye, JMLR 2022, Algorithms 2 and 3)."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnp_optax._checks import check_choice, check_fraction, check_non_negative, check_positive
from bnp_optax._tree import named_leaves, replace_leaves
from bnp_optax.capture.layer import Layer
from bnp_optax.preconditioners.base import Preconditioner
from bnp_optax.preconditioners.layout import Slot, slots
from bnp_optax.preconditioners.matching import LEFT_OUT, match_statistics
from bnp_optax.statistics import LayerStats

Variance = Literal["auto", "batch", "running"]


class BNPState(NamedTuple):
    """State of `bnp`: trees of the parameters' structure, float32, with small arrays at kernels.

    Attributes:
      mean: At kernels with a bias, the running mean mu; 0 elsewhere.
      var: At kernels, the running variance sigma^2 (mean square, where there is no bias).
      scale: At kernels 1 / (sigma~ q); at their biases 1 / q, broadcast against the kernel; 1
        elsewhere. With it, P = U diag(scale).
      seen: At kernels, the number of batches that the running statistics hold.
    """

    mean: Any
    var: Any
    scale: Any
    seen: Any


class BNPOptions(TypedDict, total=False):
    """The options of `bnp`, which see."""

    decay: float
    eps_rel: float
    eps_abs: float
    scale: bool
    warm_start: bool
    variance: Variance
    batch_size: float | None
    layers: Mapping[str, Layer] | None


def bnp(
    *,
    decay: float = 0.99,
    eps_rel: float = 1e-2,
    eps_abs: float = 1e-4,
    scale: bool = True,
    warm_start: bool = False,
    variance: Variance = "auto",
    batch_size: float | None = None,
    layers: Mapping[str, Layer] | None = None,
) -> Preconditioner:
    r"""Precondition each layer by the running mean and variance of its inputs.

    For one unit with bias b and weights w, p = P z with

        P = (1/q) U D,   U = [[1, -mu^T], [0, I]],   D = diag(1, 1/sigma~)

    so that the unit sees, in z, inputs of mean 0 and variance 1. With the batch's mean mu_H and
    variance sigma_H^2,

        mu <- decay mu + (1 - decay) mu_H,   sigma^2 <- decay sigma^2 + (1 - decay) sigma_H^2,
        sigma~^2 = sigma^2 + eps_rel max(sigma^2) + eps_abs,
        q^2 = max(n / N, sqrt(positions))

    from mu = 0, sigma = 1, where n is the fan-in (k^2 c of a convolution), N the batch size and
    the maximum is over the inputs of the unit. The units of a layer share P but in a grouped
    convolution, where each group has its own. A layer without a bias cannot be centered: there
    sigma^2 is the mean square of the inputs, so that D divides by the column norms. Parameters
    that are no layer's kernel or bias are left as they are.

    Args:
      decay: rho in [0, 1), of the running statistics.
      eps_rel: epsilon_1 >= 0, floor of the variance relative to the layer's largest.
      eps_abs: epsilon_2 >= 0, absolute floor of the variance.
      scale: Whether to divide by q. It balances the layers for a plain gradient step; with an
        adaptive optimizer in z it divides the learning rate, which pays with Adam and not with
        Muon.
      warm_start: Start the running statistics with the first batch's instead of 0 and 1.
      variance: `'batch'` takes the variance about the batch's mean, `'running'` about the running
        mean; `'auto'` does so where the layer saw a single row, whose own variance is 0.
      batch_size: N in q, where the statistics do not know it, such as those of one shard. None
        takes it from them.
      layers: From `find_layers`: the layers to precondition; all others pass through. None takes
        every leaf named `kernel` with at least two axes. Passing `layers` also settles the shapes
        of the state at `init`, which `jax.lax.scan` over training steps needs for grouped
        convolutions.

    Returns:
      A `Preconditioner`. Its `update` takes `layer_stats`, from `value_and_grad`; with
      `layer_stats=None` the running statistics and P stay as they are. A layer's statistics that
      are not finite, or of no input, do not enter.

    Raises:
      ValueError: If a hyper-parameter is out of its range; at `init`, if a kernel is complex or
        `layers` does not fit; at `update`, if `layer_stats` does not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jax.random.normal(jax.random.key(1), (64, 3)) * 5 + 7
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
      >>> P = bnp_optax.bnp(warm_start=True)
      >>> state = P.update(grads, P.init(params), params, layer_stats=stats)
      >>> z = P.solve(state, params)
      >>> bool(jnp.allclose(P.apply(state, z)["kernel"], params["kernel"], rtol=1e-5))
      True

    Source: Lange, Helfrich, Ye, "Batch Normalization Preconditioning for Neural Network Training",
    JMLR 2022, (12), (15), (23), Algorithms 2 and 3; Ye, "Preconditioning for Accelerated Gradient
    Descent Optimization and Regularization", Theorem 2, for layers without a bias.
    """
    check_fraction("decay", decay)
    check_non_negative("eps_rel", eps_rel)
    check_non_negative("eps_abs", eps_abs)
    check_choice("variance", variance, ("auto", "batch", "running"))
    check_positive("batch_size", batch_size)

    def init(params: Any) -> BNPState:
        found = slots(params, layers)
        kernels = {slot.kernel: slot.stats_shape for slot in found}
        biases = {slot.bias: slot.bias_shape for slot in found if slot.bias}

        def full(value: float, shapes: Mapping[Any, Any]) -> Any:
            scalars = jax.tree.map(lambda _: jnp.full((), value, jnp.float32), params)
            return replace_leaves(
                scalars, {n: jnp.full(shape, value, jnp.float32) for n, shape in shapes.items()}
            )

        return BNPState(
            mean=full(0.0, kernels),
            var=full(1.0, kernels),
            scale=full(1.0, kernels | biases),
            seen=full(0.0, {}),
        )

    def refresh(
        slot: Slot, stats: LayerStats, fan_in: int, old: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        mean, var, kernel_scale, bias_scale, seen = old
        if slot.bias:
            drift = (stats.mean - mean) ** 2
            about_running = {"auto": stats.count <= 1.0, "batch": False, "running": True}[variance]
            batch_mean = stats.mean
            batch_var = stats.total_variance + jnp.where(about_running, drift, 0.0)
        else:
            batch_mean = jnp.zeros_like(stats.mean)
            batch_var = stats.total_variance + stats.mean**2
        weight = jnp.where(warm_start & (seen == 0.0), 1.0, 1.0 - decay)
        new_mean = (1.0 - weight) * mean + weight * batch_mean
        new_var = (1.0 - weight) * var + weight * batch_var
        floor = eps_rel * jnp.max(new_var, axis=stats.input_axes, keepdims=True) + eps_abs
        n = stats.batch_size if batch_size is None else batch_size
        q_squared = jnp.maximum(fan_in / n, stats.positions**0.5) if scale else jnp.ones(())
        new = (
            new_mean,
            new_var,
            jax.lax.rsqrt((new_var + floor) * q_squared),
            jnp.broadcast_to(jax.lax.rsqrt(q_squared), bias_scale.shape),
            seen + 1.0,
        )
        accept = (stats.count > 0.0) & jnp.isfinite(new_mean).all() & jnp.isfinite(new_var).all()
        return tuple(
            jnp.where(accept, n, o).astype(jnp.float32) for n, o in zip(new, old, strict=True)
        )

    def update(
        grads: Any,
        state: BNPState,
        params: Any = None,
        *,
        layer_stats: Any = LEFT_OUT,
        **extra: Any,
    ) -> BNPState:
        del params, extra
        matched = match_statistics(grads, layers, layer_stats)
        if not matched:
            return state
        leaves = named_leaves(grads)
        old = BNPState(*map(named_leaves, state))
        new = BNPState({}, {}, {}, {})
        for slot, stats in matched:
            kernel = leaves[slot.kernel].shape
            shape = jnp.broadcast_shapes(old.mean[slot.kernel].shape, slot.stats_shape)
            fan_in = 1
            for axis in stats.input_axes:
                fan_in *= kernel[axis]
            bias_scale = old.scale[slot.bias] if slot.bias else jnp.ones(())
            mean, var, kernel_scale, bias_scale, seen = refresh(
                slot,
                stats,
                fan_in,
                (
                    jnp.broadcast_to(old.mean[slot.kernel], shape),
                    jnp.broadcast_to(old.var[slot.kernel], shape),
                    jnp.broadcast_to(old.scale[slot.kernel], shape),
                    jnp.reshape(bias_scale, slot.bias_shape) if slot.bias else bias_scale,
                    old.seen[slot.kernel],
                ),
            )
            new.mean[slot.kernel], new.var[slot.kernel] = mean, var
            new.scale[slot.kernel], new.seen[slot.kernel] = kernel_scale, seen
            if slot.bias:
                new.scale[slot.bias] = bias_scale
        return BNPState(*map(replace_leaves, state, new))

    def by_layer(transform: Any) -> Any:
        """Lift a function of one layer's arrays to parameter trees."""

        def lifted(state: BNPState, tree: Any) -> Any:
            leaves = named_leaves(tree)
            mean, scale = named_leaves(state.mean), named_leaves(state.scale)
            new = {}
            for slot in slots(tree, layers):
                kernel = leaves[slot.kernel]
                bias = leaves[slot.bias] if slot.bias else None
                mu, s = mean[slot.kernel], scale[slot.kernel]
                s_b = scale[slot.bias] if slot.bias else None
                dtype = jnp.promote_types(kernel.dtype, jnp.float32)
                w = kernel.astype(dtype)
                b = None if bias is None else bias.astype(dtype).reshape(s_b.shape)
                w, b = transform(w, b, mu, s, s_b)
                new[slot.kernel] = w.astype(kernel.dtype)
                if bias is not None:
                    new[slot.bias] = b.reshape(bias.shape).astype(bias.dtype)
            return replace_leaves(tree, new)

        return lifted

    def apply(w: Array, b: Any, mu: Array, s: Array, s_b: Any) -> tuple[Array, Any]:
        return s * w, None if b is None else s_b * b - _contract(mu * s, w, b.shape)

    def apply_transpose(w: Array, b: Any, mu: Array, s: Array, s_b: Any) -> tuple[Array, Any]:
        return (s * w, None) if b is None else (s * (w - mu * b), s_b * b)

    def solve(w: Array, b: Any, mu: Array, s: Array, s_b: Any) -> tuple[Array, Any]:
        return w / s, None if b is None else (b + _contract(mu, w, b.shape)) / s_b

    def gram(w: Array, b: Any, mu: Array, s: Array, s_b: Any) -> tuple[Array, Any]:
        # Step 5 of Algorithm 2 sums the updated G_w against mu. Taken from the raw G_w instead,
        # sum mu s^2 (G_w - mu G_b), the updated one need not be written and read again.
        if b is None:
            return s**2 * w, None
        c = mu * s**2
        inputs = tuple(axis for axis, size in enumerate(b.shape) if size == 1)
        c_mu = jnp.sum(jnp.broadcast_to(c * mu, w.shape), axis=inputs, keepdims=True)
        return s**2 * (w - mu * b), s_b**2 * b - (_contract(c, w, b.shape) - c_mu * b)

    return Preconditioner(
        init, update, by_layer(apply), by_layer(apply_transpose), by_layer(solve), by_layer(gram)
    )


def _contract(
    c: Float[Array, "..."], w: Float[Array, "..."], bias_shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """Sum of c * w over the axes on which the bias does not extend; c broadcasts against w."""
    axes = list(range(w.ndim))
    varying = [axis for axis in axes if c.shape[axis] > 1]
    kept = [axis for axis in axes if bias_shape[axis] > 1]
    flat = jnp.squeeze(c, tuple(axis for axis in axes if c.shape[axis] == 1))
    return jnp.einsum(flat, varying, w, axes, kept).reshape(bias_shape)
