"""Batch normalization preconditioning (Lange, Helfrich, Ye, JMLR 2022, Algorithms 2 and 3)."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from bnp_optax._checks import (
    check_above_one,
    check_choice,
    check_flag,
    check_fraction,
    check_non_negative,
    check_positive,
)
from bnp_optax._explicit import fitted, spec_of
from bnp_optax._tree import mask_leaves, named_leaves, replace_leaves
from bnp_optax.layers import Layers, check_layers
from bnp_optax.preconditioners.base import Preconditioner
from bnp_optax.preconditioners.bnp_operator import BNPOperator, BNPState
from bnp_optax.preconditioners.fixed import check_fixed, held_statistics
from bnp_optax.preconditioners.layout import layers_of
from bnp_optax.preconditioners.matching import LEFT_OUT, check_same_layers, match_statistics
from bnp_optax.preconditioners.numbers import START, vector
from bnp_optax.preconditioners.running import Batch, Options, Rule, Running, Variance, moved
from bnp_optax.preconditioners.together import in_one_axis, together
from bnp_optax.statistics import Layer, LayerStats

# Of the layers together per example, at which q = 1 where all have one q.
_FAN_IN = 30.0


def bnp(
    *,
    decay: ArrayLike = 0.99,
    eps_rel: ArrayLike = 1e-2,
    eps_abs: ArrayLike = 1e-4,
    scale: bool | Literal["network"] = True,
    warm_start: bool = False,
    variance: Variance = "auto",
    shrinkage: ArrayLike | None = None,
    scale_bias: bool = False,
    scale_others: bool = False,
    batch_size: ArrayLike | None = None,
    max_ratio: ArrayLike | None = 1e4,
    layers: Layers | None = None,
    fixed: Mapping[str, LayerStats] | None = None,
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
    the maximum is over the inputs of the unit. N is the largest batch size that has come, so that
    a short batch at the end of an epoch does not shrink the step. The units of a layer share P but
    in a grouped convolution, where each group has its own. A layer without a bias cannot be
    centered: there sigma^2 is the mean square of the inputs, so that D divides by the column norms.
    Parameters that are no layer's kernel or bias are left as they are, but with `scale_others`.

    With `shrinkage` = k the running statistics are those of the data from the first batch on, and
    count for as much as they have seen. For the batch after t others, and with p positions,

        r = max(1 - decay, 1 / (t + 1)),   d = mu_H - mu,
        sigma^2 <- (1 - r) (sigma^2 + r d^2) + r sigma_H^2,   mu <- mu + r d,
        c <- (1 - r)^2 c + r^2 / (N sqrt(p)),   w = 1 / (1 + k c),
        u = sigma^2 + (1 - w)^2 mu^2,   v = w u + (1 - w) mean(u),
        sigma~^2 = v + eps_rel mean(v) + eps_abs,

    and P is centered about w mu: 1 / c examples are what the running statistics are worth, to which
    k more come with mean 0 and the variance that the unit's inputs have on average.

    Args:
      decay: rho in [0, 1), of the running statistics.
      eps_rel: epsilon_1 >= 0, floor of the variance relative to the layer's largest, or with
        `shrinkage` to its mean. Inputs more than 1 / sqrt(eps_rel) times smaller than that, 10
        times by default, are not scaled up any further. Raw features of very different scale need
        less; 10 leaves hardly more than the centering and one scale a layer.
      eps_abs: epsilon_2 >= 0, absolute floor of the variance.
      scale: Whether to divide by q. It balances the layers for a plain gradient step; with an
        adaptive optimizer in z it divides the learning rate, which pays with Adam and not with
        Muon. `'network'` has one q for all layers that this P has,
        q^2 = max(sum(n) / (30 N), sqrt(positions)), with the sum of n over the layers and the
        geometric mean of their positions: for SGD, so that one learning rate suits networks and
        batches of different sizes.
      warm_start: Start the running statistics with the first batch's instead of 0 and 1. It pays
        in short runs, of a few times 1 / (1 - decay) steps, on batches large enough to tell.
      variance: `'batch'` takes the variance about the batch's mean, `'running'` about the running
        mean; `'auto'` does so where the layer saw a single row, whose own variance is 0.
      shrinkage: k >= 0, as above; None for the paper's running statistics, from mu = 0, sigma = 1.
        At batch size 1 it takes several examples to tell the inputs of a layer apart; k of about
        10 waits for them. `warm_start` and `variance` then say nothing.
      scale_bias: Whether D has beta = sqrt(1 + mean(mu^2)) for the bias instead of 1, the mean over
        the unit's inputs. With the usual initial values, a unit's mean response to raw inputs is
        about beta off: an optimizer whose steps are of one size, such as Adam, then has about
        unit distance to go in z. With a plain gradient step, which grows with beta^2, it diverges.
      scale_others: Whether parameters that are no layer's kernel or bias, such as embeddings and
        scales of a normalization, are multiplied in P by the geometric mean of the layers' gains
        (of 1 / (sigma~ q) at its root mean square), so that one learning rate suits both; bounded
        to 1/10 to 10, since the layers' gains have the units of the data too. Those of `fixed`
        layers do not count.
      batch_size: N in q, where the statistics do not know it, such as those of one shard. None
        takes the largest that they had so far: after a change to smaller batches for good, give
        theirs.
      max_ratio: A bound > 1 on what one batch can do: its sigma_H^2 counts as no more than
        max_ratio max(sigma^2), the maximum over the layer, and mu_H as no further from mu than
        sqrt(max_ratio (max(sigma^2) + mu^2)). So an outlier of any size is forgotten in some
        hundreds of steps, and inputs that change for good are still followed, since the bound
        grows with the running statistics. The first ten batches enter whole. None for no bound.
      layers: The layers to precondition; all others are left as they are, but with `scale_others`,
        to which their kernels and biases are others. What `find_layers` returns, or
        a part of it. None takes all leaves named `kernel` with at least two axes, each with its
        sibling `bias`, where axes are in the order of Flax's layers. What `find_layers` returns
        also serves parameters of other names and layouts, and settles the shapes of the state at
        `init`, which `jax.lax.scan` over training steps needs for grouped convolutions.
      fixed: Statistics by kernel that are known once and for all, from `start_in_zspace` or
        `dataset_statistics`. There P has them from the start and keeps them: sigma~ = sigma, with
        no floor and no shrinkage, and beta = 1. Of what comes in `layer_stats` only N counts.
        Constant inputs are divided by their size. As `layers` it belongs to the optimizer, and is
        to be given again where a state is restored.

    Returns:
      A `Preconditioner`. Its `update` takes `layer_stats`, from `value_and_grad`; with
      `layer_stats=None` the running statistics and P stay as they are. A layer's statistics that
      are not finite, have a negative variance, or are of no input, do not enter: `metrics` counts
      them. P is the identity in a layer until its first statistics have come.

    P mixes a layer's bias with its kernel, so a bias whose gradient is zero moves with the kernel,
    and the other way round. To freeze half a layer use `optax.partition` or `optax.masked` around
    the whole transformation, or leave the layer out of `layers`; zeros in the gradient do not.
    A derivative through an update takes the running statistics for constants.

    Raises:
      ValueError: If a hyper-parameter is out of its range, or `fixed` is not finite; at `init`, if
        a kernel is complex or `layers` or `fixed` does not fit; at `update`, if `layer_stats` does
        not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jax.random.normal(jax.random.key(1), (64, 3)) * 5 + 7
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
      >>> bnp = bnp_optax.bnp(warm_start=True)
      >>> state = bnp.update(grads, bnp.init(params), params, layer_stats=stats)
      >>> P = bnp.operator(state)
      >>> z = P.solve(params)
      >>> bool(jnp.allclose(P.mv(z)["kernel"], params["kernel"], rtol=1e-5))
      True

    Source: Lange, Helfrich, Ye, "Batch Normalization Preconditioning for Neural Network Training",
    JMLR 2022, (12), (15), (23), Algorithms 2 and 3; Ye, "Preconditioning for Accelerated Gradient
    Descent Optimization and Regularization", Theorem 2, for layers without a bias. The bias
    correction is that of Kingma and Ba, "Adam", ICLR 2015, for running means.
    """
    check_fraction("decay", decay)
    check_non_negative("eps_rel", eps_rel)
    check_non_negative("eps_abs", eps_abs)
    check_choice("variance", variance, ("auto", "batch", "running"))
    check_flag("scale", scale, "network")
    for name, flag in (
        ("warm_start", warm_start),
        ("scale_bias", scale_bias),
        ("scale_others", scale_others),
    ):
        check_flag(name, flag)
    check_non_negative("shrinkage", 0.0 if shrinkage is None else shrinkage)
    if batch_size is not None:
        check_positive("batch_size", batch_size)
    check_above_one("max_ratio", max_ratio)
    check_layers(layers)
    held = {name: held_statistics(stats) for name, stats in (fixed or {}).items()}

    def eps() -> Array:
        return vector(eps_rel, eps_abs, *([] if shrinkage is None else [shrinkage]))

    def init(params: Any) -> BNPState:
        found, leaves = layers_of(params, layers), named_leaves(params)

        def moments_of(name: str, mean: Any, var: Any) -> Array:
            layer, kernel = found[name], leaves[name]
            arrays = [mean, var] if layer.bias else [var]
            shape = layer.stats_shape
            arrays = [fitted(jnp.broadcast_to(x, shape), kernel) for x in arrays]
            return jnp.stack(arrays).astype(jnp.float32)

        check_fixed(held, found)
        start = {n: Running(moments_of(n, 0.0, 1.0), START.vector()) for n in found}
        for name, stats in held.items():
            layer = found[name]
            var = stats.total_variance + (0.0 if layer.bias else stats.mean**2)
            held_numbers = START._replace(
                entered=math.inf,
                largest_var=jnp.max(var),
                inv_sample=0.0,
                gram_bias=1.0
                + (layer.fan_in * jnp.mean(stats.mean**2 / var) if layer.bias else 0.0),
                square_gain=jnp.mean(1.0 / var),
            )
            start[name] = Running(moments_of(name, stats.mean, var), held_numbers.vector())
        ambiguous = {name: _may_vary_elsewhere(layer, layers) for name, layer in found.items()}
        return BNPState(
            moments=_at(params, {n: of.moments for n, of in start.items()}),
            numbers=_at(params, {n: of.numbers for n, of in start.items()}),
            inputs=_at(params, {n: _bits(layer) for n, layer in found.items() if ambiguous[n]}),
            eps=eps(),
        )

    def rules_of(matched: Mapping[str, tuple[Layer, LayerStats]]) -> dict[str, Rule]:
        sizes = {n: (layer.fan_in, stats.layer.positions) for n, (layer, stats) in matched.items()}
        options = (variance, warm_start, shrinkage is not None, scale_bias)
        q_of = _whole_network(matched) if scale == "network" else None
        # c is of the layer's own positions in any case.
        return {
            n: Rule(q_of or (size if scale else None), *size, *options, n in held)
            for n, size in sizes.items()
        }

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
        old = BNPState._make([*map(named_leaves, state[:-1]), state.eps])
        check_same_layers("bnp", matched, old.moments)
        # Both are needed, or a donated state would not be donated whole.
        new_eps, _ = jax.lax.optimization_barrier((eps(), old.eps))
        new = BNPState({}, {}, {}, new_eps)
        options = Options(decay, 1.0 - decay, eps_rel, eps_abs, shrinkage, max_ratio, batch_size)
        came, shapes = {}, {}
        for name, (_, stats) in matched.items():
            moments = _widened(old.moments[name], stats)
            batch = Batch.of(stats)
            of_batch = fitted(batch.moments, moments)
            shapes[name] = moments.shape
            # In one axis more layers have one shape.
            moments, of_batch = (in_one_axis(x, moments) for x in (moments, of_batch))
            came[name] = (Running(moments, old.numbers[name]), Batch(of_batch, batch.n_rows))

        def in_a_row(rule: Rule, *args: Any) -> Running:
            moments, numbers = moved(*args, options, rule=rule)
            # Rows of a matrix, put in a kernel's shape, would be copied once more.
            return Running(moments.ravel() if spec_of(moments) is None else moments, numbers)

        found = together(in_a_row, came, rules_of(matched))
        for name, (layer, _) in matched.items():
            moments, new.numbers[name] = found[name]
            new.moments[name] = moments.reshape(shapes[name])
            if name in old.inputs or shapes[name] != old.moments[name].shape:
                # As the others that entered; nothing did where the layer has not been seen.
                seen = new.numbers[name][1] > old.numbers[name][1]
                bits = _bits(layer)
                new.inputs[name] = jnp.where(seen, bits, old.inputs.get(name, bits))
        return BNPState._make([*map(replace_leaves, state[:-1], new[:-1]), new.eps])

    return Preconditioner(
        init, update, lambda state: BNPOperator(state, layers, scale_bias, scale_others)
    )


def _at(tree: Any, arrays: dict[str, Any]) -> Any:
    """A tree of the structure of `tree`, unboxed, with `arrays` at their names, else masks."""
    return replace_leaves(mask_leaves(tree), arrays)


def _bits(layer: Layer) -> Float[Array, ""]:
    """The input axes, as `BNPState.inputs` has them."""
    axes = {axis % len(layer.kernel_shape) for axis in layer.input_axes}
    return jnp.asarray(sum(1 << axis for axis in axes), jnp.float32)


def _may_vary_elsewhere(layer: Layer, layers: Layers | None) -> bool:
    """Whether the statistics vary along an axis that is no input axis, for all that is known."""
    ndim = len(layer.kernel_shape)
    if layers is None and layer.bias is None and ndim > 2:
        return True
    inputs = {axis % ndim for axis in layer.input_axes}
    return any(size > 1 for axis, size in enumerate(layer.stats_shape) if axis not in inputs)


def _widened(moments: Array, stats: LayerStats) -> Array:
    """Running moments in a shape that has room for the statistics, such as a grouped layer's."""
    (n_moments, *old), new = moments.shape, stats.mean.shape
    if len(old) != len(new) or any(1 != a != b != 1 for a, b in zip(old, new, strict=True)):
        msg = (
            f"The state of `bnp` has running statistics of shape {tuple(old)} for "
            f"`{stats.layer.kernel}`, but those of the batch have shape {new}: it is the state of "
            "another network. Call `init` on these parameters, or restore the state that belongs "
            "to them."
        )
        raise ValueError(msg)
    return jnp.broadcast_to(moments, (n_moments, *jnp.broadcast_shapes(tuple(old), new)))


def _whole_network(matched: Mapping[str, tuple[Layer, LayerStats]]) -> tuple[float, float]:
    """The fan-in of all layers together, and the geometric mean of their positions."""
    counts = {name: _n_stacked(layer, stats) for name, (layer, stats) in matched.items()}
    fan_in = sum(layer.fan_in * counts[name] for name, (layer, _) in matched.items())
    logs = sum(
        math.log(stats.layer.positions) * counts[name] for name, (_, stats) in matched.items()
    )
    return fan_in / _FAN_IN, math.exp(logs / sum(counts.values()))


def _n_stacked(layer: Layer, stats: LayerStats) -> int:
    """How many layers are stacked in one kernel; the groups of a convolution are one."""
    ndim, n_inputs = len(layer.kernel_shape), len(layer.input_axes)
    inputs = {axis % ndim for axis in layer.input_axes}
    varying = {axis for axis, size in enumerate(stats.mean.shape) if size > 1}
    others = sorted(varying - inputs)
    if stats.layer.kind == "Conv":
        others = others[: ndim - n_inputs - 1]
    return math.prod(layer.kernel_shape[axis] for axis in others)
