"""Accumulate gradients and statistics over microbatches."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from bnp_optax import sketches
from bnp_optax._checks import check_count, check_flag, check_transformation
from bnp_optax._explicit import fitted
from bnp_optax._tree import named_leaves, replace_leaves
from bnp_optax.preconditioners.bnp_operator import bnp_states
from bnp_optax.preconditioners.matching import LEFT_OUT
from bnp_optax.preconditioners.whiten_operator import whiten_states
from bnp_optax.statistics import LayerStats


class MultiStepsState(NamedTuple):
    """State of `multi_steps`.

    The last three fields have the parameters' structure, with `optax.MaskedNode` where there is no
    kernel that is preconditioned.

    Attributes:
      multi_steps: State of `optax.MultiSteps`.
      mean: Mean of the inputs in the microbatches since the last step.
      var: Variance of the same, that between microbatches included; for `whiten` the covariance,
        and `mean` of the rows that it is of.
      rows: How many rows these are of, a scalar.
    """

    multi_steps: optax.MultiStepsState
    mean: Any
    var: Any
    rows: Any


class _Moments(NamedTuple):
    mean: Array
    var: Array
    rows: Float[Array, ""]

    @property
    def is_matrix(self) -> bool:
        """Whether they are second moments, with a covariance."""
        return self.var.ndim > self.mean.ndim


def multi_steps(
    tx: optax.GradientTransformation,
    every_k_schedule: ArrayLike | Callable[[ArrayLike], ArrayLike],
    use_grad_mean: bool = True,
    should_skip_update_fn: Callable[..., tuple[Bool[Array, ""], Any]] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.MultiSteps` that accumulates the statistics too: one step for k microbatches.

    `optax.MultiSteps` itself hands on the extra arguments of the last microbatch alone. Here the
    preconditioner gets the statistics of all rows since its last step, whose number is N in q. For
    microbatches of one size the step is that of their union, up to rounding.

    `layer_stats=None` adds nothing; with the last microbatch of a step it reuses the running
    statistics, and what the others brought is lost. A microbatch that is skipped adds nothing.

    Args:
      tx: What to run on the averaged gradients, such as `bnp_adam(1e-3)`. For grouped convolutions
        it needs `layers=`.
      every_k_schedule: Number of microbatches of a step, an integer > 0, or a function from the
        number of steps taken to it.
      use_grad_mean: Whether to average the gradients, or to add them.
      should_skip_update_fn: As in `optax.MultiSteps`, such as `optax.skip_not_finite`.

    Returns:
      A transformation with state `MultiStepsState`. Its updates are zero but for every k-th.

    Raises:
      ValueError: If `tx` is no transformation or `every_k_schedule` no integer > 0; at `init`, if
        `tx` preconditions a layer by `bnp` and by `whiten`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jax.random.normal(jax.random.key(1), (8, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p, x: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> def step(tx, batches):
      ...     state = tx.init(params)
      ...     for batch in batches:
      ...         _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, batch)
      ...         updates, state = tx.update(grads, state, params, layer_stats=stats)
      ...     return updates["kernel"]
      >>> tx = bnp_optax.bnp_sgd(0.1)
      >>> parts = step(bnp_optax.multi_steps(tx, 4), jnp.split(x, 4))
      >>> bool(jnp.allclose(parts, step(tx, [x]), rtol=1e-4))
      True
    """
    check_transformation("tx", tx)
    check_flag("use_grad_mean", use_grad_mean)
    if not callable(every_k_schedule):
        check_count("every_k_schedule", every_k_schedule, optional=False, traced=True)

    def n_microbatches(n_steps: ArrayLike) -> ArrayLike:
        # In the type of Optax's counters, which another would promote.
        k = every_k_schedule
        return k(n_steps) if callable(k) else jnp.asarray(k, jnp.int32)

    multi = optax.MultiSteps(tx, n_microbatches, use_grad_mean, should_skip_update_fn)

    def init_fn(params: optax.Params) -> MultiStepsState:
        state = multi.init(params)
        shapes: dict[str, Any] = {}
        for bnp_state in bnp_states(state):
            moments = named_leaves(bnp_state.moments)
            shapes |= {name: jnp.shape(array)[1:] for name, array in moments.items()}
        of_var = {**shapes}
        for whiten_state in whiten_states(state):
            for name, covariance in named_leaves(whiten_state.covariance).items():
                if name in shapes and len(of_var[name]) == len(shapes[name]):
                    msg = (
                        f"`{name}` is preconditioned by `bnp` and by `whiten` in one optimizer: "
                        "`multi_steps` accumulates the statistics of one of them. Leave the layer "
                        "out of the `layers` of the other."
                    )
                    raise ValueError(msg)
                *blocks, _, n = of_var[name] = covariance.shape
                shapes[name] = (*blocks, n)
        masks = jax.tree.map(lambda _: optax.MaskedNode(), params)

        def zeros(shapes: Mapping[str, Any]) -> Any:
            return replace_leaves(masks, {n: jnp.zeros(s, jnp.float32) for n, s in shapes.items()})

        return MultiStepsState(
            state, zeros(shapes), zeros(of_var), zeros(dict.fromkeys(shapes, ()))
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        layer_stats: Any = LEFT_OUT,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MultiStepsState]:
        trees = state[1:]
        old = {
            name: _Moments(*moments)
            for name, *moments in _zipped(*(named_leaves(tree) for tree in trees))
        }
        given = layer_stats if isinstance(layer_stats, Mapping) else {}
        new = {
            name: _union(moments, given[name])
            for name, moments in old.items()
            if _fits(moments, given.get(name))
        }
        if new:
            layer_stats = {**given}
            for name, moments in new.items():
                layer_stats[name] = _as_statistics(moments, given[name])
        if layer_stats is not LEFT_OUT:
            extra_args["layer_stats"] = layer_stats
        before = state.multi_steps
        updates, after = multi.update(updates, before, params, **extra_args)
        stepped = after.gradient_step != before.gradient_step
        skipped = ~stepped & (after.mini_step == before.mini_step)

        def kept(new: Array, old: Array) -> Array:
            return jnp.where(stepped, 0.0, jnp.where(skipped, old, new))

        moments = {
            name: jax.tree.map(kept, new.get(name, moments), moments)
            for name, moments in old.items()
        }
        fields = (
            replace_leaves(tree, {name: each[i] for name, each in moments.items()})
            for i, tree in enumerate(trees)
        )
        return updates, MultiStepsState(after, *fields)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _zipped(*dicts: Mapping[str, Array]) -> list[tuple[Any, ...]]:
    return [(name, *(each[name] for each in dicts)) for name in dicts[0]]


def _fits(moments: _Moments, stats: Any) -> bool:
    """Whether there are statistics to add; the preconditioner refuses those that do not fit."""
    if not isinstance(stats, LayerStats):
        return False
    if moments.is_matrix:
        moment, var = stats.second_moment, moments.var
        if moment is None or moment.ndim != var.ndim:
            return False
        same = moment.shape[:-2] == var.shape[:-2] and moment.shape[-1] == var.shape[-1]
        return same and sketches.can_fit(moment, var)
    old, new = moments.mean.shape, jnp.shape(stats.mean)
    return len(old) == len(new) and all(
        a == b or 1 in (a, b) for a, b in zip(old, new, strict=True)
    )


def _union(moments: _Moments, stats: LayerStats) -> _Moments:
    """Moments of the rows of both; accurate at any mean, unlike the mean square less the square."""
    mean, var, rows = moments
    total = rows + stats.count
    share = jnp.where(stats.count == 0.0, 0.0, stats.count / total)
    if moments.is_matrix:
        distance = stats.input_mean - mean
        spread = sketches.fitted(cast("Array", stats.total_covariance), var)
        square = sketches.outer(distance, var)
    else:
        distance = fitted(stats.mean, mean) - mean
        spread = fitted(stats.total_variance, mean)
        square = distance**2
    between = share * (1.0 - share) * square
    return _Moments(mean + share * distance, (1.0 - share) * var + share * spread + between, total)


def _as_statistics(moments: _Moments, last: LayerStats) -> LayerStats:
    """Statistics of all microbatches, where `last` are those of the last one.

    With second moments all else is that of the last one, which `whiten` does not look at.
    """
    mean, var, rows = moments
    if not moments.is_matrix:
        return LayerStats.of_batch(mean, var, rows, last.layer)
    moment = var + sketches.outer(mean, var)
    return dataclasses.replace(
        last, count=rows, second_moment=moment, covariance=var, rows_mean=mean
    )
