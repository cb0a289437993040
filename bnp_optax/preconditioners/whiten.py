"""Whitening of the inputs of layers, by a power of their covariance."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from bnp_optax import sketches
from bnp_optax._checks import check_count, check_fraction, check_non_negative, count_of
from bnp_optax._tree import mask_leaves, named_leaves, replace_leaves
from bnp_optax.layers import Layers, check_layers
from bnp_optax.preconditioners.base import Preconditioner
from bnp_optax.preconditioners.layout import layers_of
from bnp_optax.preconditioners.matching import LEFT_OUT, check_same_layers, match_statistics
from bnp_optax.preconditioners.running_covariance import Running, decomposed, moved, start
from bnp_optax.preconditioners.whiten_operator import (
    WhitenOperator,
    WhitenState,
    roots,
)
from bnp_optax.statistics import Layer, LayerStats


def whiten(
    *,
    exponent: ArrayLike = 0.25,
    damping: ArrayLike = 0.1,
    decay: ArrayLike = 0.99,
    refresh_every: int = 20,
    rank: int = 16,
    max_fan_in: int = 1024,
    layers: Layers | None = None,
) -> Preconditioner:
    r"""Precondition each layer by a power of the covariance of its inputs.

    For one unit with bias b and weights w, p = P z with

        P = U diag(1, S),   U = [[1, -mu^T], [0, I]],   S = (C + lambda I)^(-exponent),
        lambda = damping tr(C) / n

    so that the unit sees, in z, inputs of mean 0, and with exponent 1/2 and no damping of
    covariance I: its Hessian in z has the conditioning of the loss alone. `bnp` is the same of the
    diagonal of C. With the batch's mean m and second moment M,

        mu <- rho mu + (1 - rho) m,   M2 <- rho M2 + (1 - rho) M,   C = M2 - mu mu^T,
        rho = min(decay, 1 - 1 / (t + 2))

    from mu = 0, M2 = I, which counts as one batch, where t counts the batches so far. C itself is
    carried, which is the same and keeps its digits where the mean is large. The units of a layer
    share P but in a grouped convolution, where each group has its own. A layer without a bias
    cannot be centered: there mu = 0. Parameters that are no layer's kernel or bias are left as
    they are.

    For a kernel (n, m) a step costs about 2 N n^2 FLOPs for the second moment of N rows and 4 to 8
    n^2 m for P^T and P, and the state has two (n, n) matrices; in a wide layer 130 N n, 8 n rank m,
    and 32 + rank rows of n numbers.

    Args:
      exponent: >= 0: 1/2 is full whitening, 0 centers only. 1/4, the default, amplifies less of
        the gradient's noise in directions in which the inputs hardly vary.
      damping: >= 0, relative to the mean eigenvalue of C.
      decay: rho in [0, 1), of the running statistics.
      refresh_every: C is decomposed in every so many steps, and after the first, second, fourth,
        eighth, and so on; in between P stays, but for mu. A decomposition costs O(n^3). Layers of
        one shape are decomposed together, those of 64 MB of matrices at a time.
      rank: Number of eigenvectors that are kept in layers of a fan-in above `max_fan_in`; on their
        complement C counts as a multiple of the identity. At most 31, or capture whole matrices
        there: `value_and_grad(..., second_moment_fan_in=n)`.
      max_fan_in: The largest fan-in whose whole covariance is kept and decomposed. Of a wider layer
        a sketch of C is kept, 32 rows of n numbers, as it is captured above a fan-in of 1,024; its
        eigenvectors are those of the Nystrom approximation, exact where C has no higher rank.
      layers: The layers to precondition, as for `bnp`. What `find_layers` returns also tells what
        names do not: layers stacked without a bias, and other layouts.

    Returns:
      A `Preconditioner`. Its `update` takes `layer_stats`, from `value_and_grad(loss_fn,
      second_moments=True)`; with `layer_stats=None` the running statistics and P stay as they are.
      A layer's statistics that are not finite, or are of no input, do not enter. P is the identity
      in a layer until its first statistics have come.

    Raises:
      ValueError: If a hyper-parameter is out of its range; at `init`, if a kernel is complex,
        `layers` does not fit, or `rank` or `max_fan_in` is traced; at `update`, if `layer_stats`
        does not fit or has no second moments.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import bnp_optax
      >>> mix = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.5]])
      >>> x = jax.random.normal(jax.random.key(0), (64, 3)) @ mix + 7.0
      >>> loss_fn = lambda p: jnp.mean((x @ p["kernel"] + p["bias"]) ** 2)
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> _, grads, stats = bnp_optax.value_and_grad(loss_fn, second_moments=True)(params)
      >>> whiten = bnp_optax.whiten(exponent=0.5, damping=0.0)
      >>> state = whiten.update(grads, whiten.init(params), params, layer_stats=stats)
      >>> P = whiten.operator(state)
      >>> z = P.solve(params)
      >>> bool(jnp.allclose(P.mv(z)["kernel"], params["kernel"], rtol=1e-4))
      True

    Source: Lange, Helfrich, Ye, JMLR 2022, (12), with the full covariance in the place of its
    diagonal; Benzing, "Gradient Descent on Neurons and its Link to Approximate Second-Order
    Optimization", ICML 2022 (FOOF), for exponent 1/2.
    """
    check_non_negative("exponent", exponent)
    check_non_negative("damping", damping)
    check_fraction("decay", decay)
    for name, count in (
        ("refresh_every", refresh_every),
        ("rank", rank),
        ("max_fan_in", max_fan_in),
    ):
        check_count(name, count, optional=False, traced=True)
    check_layers(layers)

    def hyper() -> Array:
        return jnp.stack([jnp.asarray(x, jnp.float32) for x in (exponent, damping)])

    def init(params: Any) -> WhitenState:
        found = layers_of(params, layers)
        sizes = count_of("rank", rank), count_of("max_fan_in", max_fan_in)
        parts = {name: start(layer, *sizes) for name, layer in found.items()}
        return WhitenState._make([*_fields(mask_leaves(params), parts), hyper()])

    def update(
        grads: Any,
        state: WhitenState,
        params: Any = None,
        *,
        layer_stats: Any = LEFT_OUT,
        **extra: Any,
    ) -> WhitenState:
        del params, extra
        matched = match_statistics(grads, layers, layer_stats)
        if not matched:
            return state
        old = [named_leaves(field) for field in state[:-1]]
        check_same_layers("whiten", matched, old[-1])
        # Both are needed, or a donated state would not be donated whole.
        new_hyper, _ = jax.lax.optimization_barrier((hyper(), state.hyper))
        parts, due = {}, {}
        for name, (layer, stats) in matched.items():
            stats = jax.lax.stop_gradient(stats)
            before = _widened(layer, Running._make(field.get(name) for field in old))
            _check_second_moment(name, layer, stats, before.covariance)
            parts[name], due[name] = moved(before, stats, decay, refresh_every)
        parts = decomposed(parts, due)
        return WhitenState._make([*_fields(state[:-1], parts), new_hyper])

    return Preconditioner(init, update, lambda state: WhitenOperator(roots(state), layers))


def _fields(trees: Any, parts: dict[str, Running]) -> list[Any]:
    """Trees, one for each field, with the fields of `parts` at their names."""
    n_fields = len(Running._fields)
    trees = trees if isinstance(trees, tuple) and len(trees) == n_fields else (trees,) * n_fields
    return [
        replace_leaves(tree, {n: part[i] for n, part in parts.items() if part[i] is not None})
        for i, tree in enumerate(trees)
    ]


def _widened(layer: Layer, before: Running) -> Running:
    """Statistics with the leading axis of groups, which names had not told."""
    blocks, old = layer.block_shape, before.vectors.shape[:-2]
    if before.vectors.shape[-2] != layer.fan_in or len(blocks) - len(old) not in (0, 1):
        msg = (
            f"The state of `whiten` has statistics of {before.vectors.shape[-2]} inputs in blocks "
            f"{old} for `{layer.kernel}`, but those of the batch are of {layer.fan_in} inputs in "
            f"blocks {blocks}: names and shapes do not tell how this layer sums. Pass "
            "`layers=bnp_optax.find_layers(loss_fn, params, ...)` to the preconditioner, and call "
            "`init` anew."
        )
        raise ValueError(msg)
    if old == blocks:
        return before

    def widened(array: Any) -> Any:
        if array is None:
            return None
        inserted = jnp.expand_dims(array, len(old))
        return jnp.broadcast_to(inserted, (*blocks, *inserted.shape[len(blocks) :]))

    return Running._make([*map(widened, before[:-1]), before.numbers])


def _check_second_moment(name: str, layer: Layer, stats: LayerStats, running: Array) -> None:
    if stats.second_moment is None:
        msg = (
            f"`whiten` needs the second moment of the inputs of `{name}`, which `layer_stats` has "
            "not. Capture it: `bnp_optax.value_and_grad(loss_fn, second_moments=True)(params, ...)`"
            "; or leave the layer out of `layers`."
        )
        raise ValueError(msg)
    shape, n = tuple(stats.second_moment.shape), layer.fan_in
    if (*shape[:-2], *shape[-1:]) != (*layer.block_shape, n) or shape[-2] > n:
        msg = (
            f"The second moment of `{name}` has shape {shape}; expected "
            f"{(*layer.block_shape, n, n)}, for a kernel of shape {layer.kernel_shape} that is "
            f"summed over its axes {layer.block_layout[0]}. Capture it with the parameters that "
            "are optimized, and pass `layers=bnp_optax.find_layers(loss_fn, params, ...)` to the "
            "preconditioner."
        )
        raise ValueError(msg)
    if not sketches.can_fit(stats.second_moment, running):
        kept = "whole" if running.shape[-2] == n else f"in {running.shape[-2] - 1} products"
        msg = (
            f"The second moment of `{name}` is a sketch of {shape[-2] - 1} products, but `whiten` "
            f"keeps it {kept}. Capture the matrix: `bnp_optax.value_and_grad(loss_fn, "
            f"second_moments=True, second_moment_fan_in={n})`; or lower `max_fan_in` below {n}, "
            f"and `rank` to {shape[-2] - 1} at most."
        )
        raise ValueError(msg)
