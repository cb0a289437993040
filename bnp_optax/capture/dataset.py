"""Statistics of the input layers from a pass over the data, once and for all."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnp_optax._tree import is_concrete
from bnp_optax.capture import covered
from bnp_optax.capture.api import options_of
from bnp_optax.capture.moments import ConvStatistics, Options
from bnp_optax.statistics import LayerStats


def dataset_statistics(
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    conv_statistics: ConvStatistics = "channel",
    embeddings: bool = False,
) -> dict[str, LayerStats]:
    """Input statistics over all of `batches`, of the layers whose inputs are the data's alone.

    Those inputs do not change in training, so neither do their statistics. Give them to
    `value_and_grad` as `fixed`, and these layers, often the widest, are not looked at any more.
    A layer that gets data joined with hidden values, as over a skip connection, is left out.

    Args:
      loss_fn: The loss, `loss_fn(params, *batch)`, in any framework.
      params: The parameters; their values do not matter.
      batches: The data: tuples of arguments of the loss, or single ones.
      conv_statistics: As in `value_and_grad`.
      embeddings: As in `value_and_grad`.

    Returns:
      A dict from kernel name to `LayerStats`: mean and variance over all rows of all batches, with
      the `count` of the largest batch.

    Raises:
      ValueError: If there is no batch, or no layer whose inputs do not depend on parameters; if
        statistics of a batch are not finite; under `jax.jit` and the like.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import bnp_optax
      >>> loss_fn = lambda p, x: jnp.mean((jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]) ** 2)
      >>> params = {"w1": jnp.ones((3, 2)), "b1": jnp.zeros(2), "w2": jnp.ones((2, 1))}
      >>> data = jax.random.normal(jax.random.key(0), (5, 8, 3))  # five batches of eight
      >>> fixed = bnp_optax.dataset_statistics(loss_fn, params, data)
      >>> list(fixed), bool(jnp.allclose(fixed["w1"].var[:, 0], data.var((0, 1)), rtol=1e-4))
      (['w1'], True)
      >>> loss, grads, stats = bnp_optax.value_and_grad(loss_fn, fixed=fixed)(params, data[0])
      >>> sorted(stats)
      ['w1', 'w2']
    """
    options = options_of(conv_statistics, None, embeddings)
    measure = jax.jit(lambda params, batch: _of_batch(loss_fn, params, batch, options))
    parts = []
    for number, batch in enumerate(batches):
        arguments = _arguments(batch)
        _check_concrete((params, arguments))
        part = jax.device_get(measure(params, arguments))
        _check_finite(number, part)
        parts.append(part)
    if not any(stats.count for part in parts for stats in part.values()):
        msg = "`batches` is empty: statistics need data."
        raise ValueError(msg)
    return {name: _of_all([part[name] for part in parts]) for name in parts[0]}


def _check_concrete(tree: Any) -> None:
    if not is_concrete(tree):
        msg = (
            "`params` or `batches` are traced: statistics of a data set are taken once, outside of "
            "`jax.jit`, `jax.vmap` and the like. Call this before, and hand the statistics in."
        )
        raise ValueError(msg)


def _check_finite(number: int, part: dict[str, LayerStats]) -> None:
    """Raise if one bad number would make the statistics of all batches bad."""
    for name, stats in part.items():
        # No rows have no mean, and count for nothing.
        moments = (stats.mean, stats.var, stats.sq_mean) if stats.count else ()
        if not all(np.isfinite(moment).all() for moment in moments):
            msg = (
                f"Batch {number} of `batches`, counted from 0, has inputs of `{name}` that are "
                "not finite, or whose squares are not in float32. Clean the data (NaN, infinity, "
                "numbers above 1e19), or leave that batch out."
            )
            raise ValueError(msg)


def _arguments(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def _of_batch(
    loss_fn: Callable[..., Any], params: Any, batch: tuple[Any, ...], options: Options
) -> dict[str, LayerStats]:
    found = covered.find(loss_fn, params, batch, {}, options)
    names = [
        name
        for name, kernel in found.kernels.items()
        if not any(use.innermost.depends for use in kernel.uses)
    ]
    if not names:
        msg = (
            "No layer's inputs are the data's alone: those of every layer depend on parameters "
            "before it (an embedding or a learned scale, say). Leave out `dataset_statistics`."
        )
        raise ValueError(msg)
    _, measures = covered.measure(found, names, jax.tree.leaves(params), None)
    return covered.statistics(found, measures)


def _of_all(parts: list[LayerStats]) -> LayerStats:
    """The statistics of the union, in float64 until the end."""
    counts = np.array([part.count for part in parts], np.float64)
    shares = counts / counts.sum()

    def mean_of(values: list[Any]) -> np.ndarray:
        return np.tensordot(shares, np.stack([np.asarray(v, np.float64) for v in values]), 1)

    mean = mean_of([part.mean for part in parts])
    within = mean_of([part.total_variance for part in parts])
    between = mean_of([(np.asarray(part.mean, np.float64) - mean) ** 2 for part in parts])
    return LayerStats.of_batch(
        jnp.asarray(mean, jnp.float32),
        jnp.asarray(within + between, jnp.float32),
        jnp.asarray(counts.max(), jnp.float32),
        parts[0].layer,
    )
