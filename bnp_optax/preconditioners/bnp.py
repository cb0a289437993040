"""Batch normalization preconditioning (Lange, Helfrich, Ye, JMLR 2022, Algorithms 2 and 3)."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from bnp_optax._checks import check_choice, check_fraction, check_non_negative, check_positive
from bnp_optax._tree import named_leaves, replace_leaves
from bnp_optax.preconditioners import centering
from bnp_optax.preconditioners.base import Preconditioner
from bnp_optax.preconditioners.layout import Layers, initial_slots, kernels
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


class _Layer(NamedTuple):
    """What is kept for one kernel, and for its bias."""

    mean: Array
    var: Array
    scale: Array
    bias_scale: Array
    seen: Array


def bnp(
    *,
    decay: ArrayLike = 0.99,
    eps_rel: ArrayLike = 1e-2,
    eps_abs: ArrayLike = 1e-4,
    scale: bool = True,
    warm_start: bool = False,
    variance: Variance = "auto",
    batch_size: ArrayLike | None = None,
    layers: Layers | None = None,
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
      eps_rel: epsilon_1 >= 0, floor of the variance relative to the layer's largest. Inputs more
        than 1 / sqrt(eps_rel) times smaller than the largest, 10 times by default, are not scaled
        up any further. Raw features of very different scale need less; 10 leaves hardly more than
        the centering and one scale a layer.
      eps_abs: epsilon_2 >= 0, absolute floor of the variance.
      scale: Whether to divide by q. It balances the layers for a plain gradient step; with an
        adaptive optimizer in z it divides the learning rate, which pays with Adam and not with
        Muon. With SGD, False may do better where n is much larger than N.
      warm_start: Start the running statistics with the first batch's instead of 0 and 1. It pays
        in short runs, of a few times 1 / (1 - decay) steps, on batches large enough to tell.
      variance: `'batch'` takes the variance about the batch's mean, `'running'` about the running
        mean; `'auto'` does so where the layer saw a single row, whose own variance is 0.
      batch_size: N in q, where the statistics do not know it, such as those of one shard. None
        takes it from them.
      layers: The layers to precondition; all others pass through. What `find_layers` returns, or
        a part of it; or names of kernels, or a condition on names, such as
        `lambda name: 'head' not in name`. Names choose among the leaves named `kernel` with at
        least two axes; None takes all of these. What `find_layers` returns also serves parameters
        of other names, and settles the shapes of the state at `init`, which `jax.lax.scan` over
        training steps needs for grouped convolutions.

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
        slots = initial_slots(params, layers)
        stats = {slot.kernel: slot.stats_shape for slot in slots}
        biases = {slot.bias: slot.bias_shape for slot in slots if slot.bias}

        def full(value: float, shapes: Mapping[str, tuple[int, ...]]) -> Any:
            scalars = jax.tree.map(lambda _: jnp.full((), value, jnp.float32), params)
            arrays = {n: jnp.full(shape, value, jnp.float32) for n, shape in shapes.items()}
            return replace_leaves(scalars, arrays)

        return BNPState(
            mean=full(0.0, stats),
            var=full(1.0, stats),
            scale=full(1.0, stats | biases),
            seen=full(0.0, {}),
        )

    def running(old: _Layer, stats: LayerStats, centered: bool) -> tuple[Array, Array]:
        """Steps 1 and 2: the running statistics with those of the batch."""
        mean, var = stats.mean, stats.total_variance
        if not centered:
            mean, var = jnp.zeros_like(mean), var + mean**2
        elif variance != "batch":
            about_running = stats.count <= 1.0 if variance == "auto" else True
            var = var + jnp.where(about_running, (mean - old.mean) ** 2, 0.0)
        rate = jnp.where(warm_start & (old.seen == 0.0), 1.0, 1.0 - decay)
        return (1.0 - rate) * old.mean + rate * mean, (1.0 - rate) * old.var + rate * var

    def refresh(old: _Layer, stats: LayerStats, fan_in: int, centered: bool) -> _Layer:
        mean, var = running(old, stats, centered)
        # Step 3.
        floor = eps_rel * jnp.max(var, axis=stats.input_axes, keepdims=True) + eps_abs
        n = stats.batch_size if batch_size is None else batch_size
        q_squared = jnp.maximum(fan_in / n, stats.positions**0.5) if scale else jnp.ones(())
        new = _Layer(
            mean=mean,
            var=var,
            scale=jax.lax.rsqrt((var + floor) * q_squared),
            bias_scale=jnp.broadcast_to(jax.lax.rsqrt(q_squared), old.bias_scale.shape),
            seen=old.seen + 1.0,
        )
        # 0 x is 0 for finite x and NaN otherwise: one sum instead of a test of each array.
        zero = jnp.sum(0.0 * mean + 0.0 * var + 0.0 * stats.sq_mean) + 0.0 * stats.count
        accept = (zero == 0.0) & (stats.count > 0.0)
        return jax.tree.map(lambda n, o: jnp.where(accept, n, o).astype(jnp.float32), new, old)

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
        leaves = named_leaves(grads)
        mean, var, scales, seen = map(named_leaves, state)
        for slot, stats in matched:
            name = slot.kernel
            shape = jnp.broadcast_shapes(mean[name].shape, slot.stats_shape)
            bias_scale = scales[slot.bias] if slot.bias else jnp.ones((), jnp.float32)
            if slot.bias and bias_scale.shape != slot.bias_shape:
                bias_scale = jnp.broadcast_to(bias_scale.ravel()[0], slot.bias_shape)
            old = _Layer(
                *(jnp.broadcast_to(x[name], shape) for x in (mean, var, scales)),
                bias_scale=bias_scale,
                seen=seen[name],
            )
            fan_in = math.prod(leaves[name].shape[axis] for axis in stats.input_axes)
            new = refresh(old, stats, fan_in, centered=slot.bias is not None)
            mean[name], var[name], scales[name], seen[name] = new.mean, new.var, new.scale, new.seen
            if slot.bias:
                scales[slot.bias] = new.bias_scale
        new_leaves = (mean, var, scales, seen)
        return BNPState(*map(replace_leaves, state, new_leaves)) if matched else state

    def by_layer(transform: Callable[..., tuple[Array, Any]]) -> Callable[[BNPState, Any], Any]:
        """Lift a function of one layer to parameter trees."""

        def lifted(state: BNPState, tree: Any) -> Any:
            leaves = named_leaves(tree)
            mean, scales = named_leaves(state.mean), named_leaves(state.scale)
            new = {}
            for name, bias in kernels(tree, layers).items():
                dtype = jnp.promote_types(leaves[name].dtype, jnp.float32)
                w, mu, s = leaves[name].astype(dtype), mean[name], scales[name]
                # Before the first statistics, the state may not know of a bias yet.
                if bias is None or scales[bias].ndim == 0:
                    w, _ = transform(w, None, mu, s, s)
                else:
                    s_b, old = scales[bias], leaves[bias]
                    w, b = transform(w, old.astype(dtype).reshape(s_b.shape), mu, s, s_b)
                    new[bias] = b.reshape(old.shape).astype(old.dtype)
                new[name] = w.astype(leaves[name].dtype)
            return replace_leaves(tree, new)

        return lifted

    return Preconditioner(
        init=init,
        update=update,
        apply=by_layer(centering.apply),
        apply_transpose=by_layer(centering.apply_transpose),
        solve=by_layer(centering.solve),
        gram=by_layer(centering.gram),
    )
