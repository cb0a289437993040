"""What whitening costs over SGD: FLOPs of a step, decompositions spread over their period.

    python -m benchmarks cost-whiten

XLA's FLOPs of the compiled step, in multiples of those of SGD's, for a fully connected network
3072-100-100-100-10 at a batch of 60, whose first layer is wider than `max_fan_in`, and a small
transformer of characters. XLA counts nothing for a library's eigenvectors and QR factors, and a
branch that is not taken like one that is. So the steps are compiled with the branch of a refresh
emptied; its products are counted by themselves, with 9 n^3 FLOPs for n eigenvectors and 4 n r^2
for a QR factor and both are divided by the period.
"""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax

import bnp_optax
from benchmarks.networks.small import MLP
from benchmarks.networks.transformer import CharTransformer
from bnp_optax.preconditioners import running_covariance

_PERIOD, _RANK, _MAX_FAN_IN = 20, 64, 1024
_EIGH, _QR = 9, 4


class ModelOnBatch(NamedTuple):
    """A network and a batch.

    Attributes:
      model: The network.
      x: Inputs, as shapes.
      y: Classes.
    """

    model: Any
    x: jax.ShapeDtypeStruct
    y: jax.ShapeDtypeStruct


def _shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


PROBLEMS = {
    "3072-100-100-100-10, batch 60": ModelOnBatch(
        MLP((100, 100, 100), 10, "none"), _shape(60, 3072), _shape(60, dtype=jnp.int32)
    ),
    "transformer, 2 blocks of width 64, 16 texts of 64": ModelOnBatch(
        CharTransformer(65),
        _shape(16, 64, dtype=jnp.int32),
        _shape(16, 64, dtype=jnp.int32),
    ),
}


class Variant(NamedTuple):
    """A way to train.

    Attributes:
      tx: The optimizer.
      second_moments: Whether statistics have second moments; None for no statistics.
      every: Statistics are captured in one step of so many.
      refreshes: Whether refreshes count. Without them it is the bound of what a cheaper root saves.
    """

    tx: optax.GradientTransformation
    second_moments: bool | None = None
    every: int = 1
    refreshes: bool = True


VARIANTS = {
    "SGD": Variant(optax.sgd(0.1)),
    "Adam": Variant(optax.adam(1e-3)),
    "Adam in z": Variant(bnp_optax.bnp_adam(1e-3), False),
    "Muon": Variant(optax.contrib.muon(1e-3)),
    "orthogonalize": Variant(
        optax.chain(bnp_optax.orthogonalize(), optax.scale_by_learning_rate(1e-3))
    ),
    "whiten_adam": Variant(bnp_optax.whiten_adam(), True),
    "whiten_adam, refreshes for nothing": Variant(bnp_optax.whiten_adam(), True, refreshes=False),
    "whiten_muon": Variant(bnp_optax.whiten_muon(), True),
    "whiten_muon, captured every 10th": Variant(bnp_optax.whiten_muon(), True, 10),
}


def flops(function: Callable[..., Any], *args: Any) -> float:
    """XLA's FLOPs of a compiled call."""
    cost: Any = jax.jit(function).lower(*args).compile().cost_analysis()
    return cost["flops"]


def _step_flops(problem: ModelOnBatch, variant: Variant, captured: bool) -> float:
    """FLOPs of a step, without those of a refresh."""
    tx = optax.with_extra_args_support(variant.tx)

    def loss_fn(params: Any, x: Any, y: Any) -> Any:
        logits = problem.model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        extra = {}
        if captured:
            _, grads, stats = bnp_optax.value_and_grad(
                loss_fn, second_moments=variant.second_moments
            )(params, x, y)
            extra["layer_stats"] = stats
        else:
            grads = jax.grad(loss_fn)(params, x, y)
            extra |= {} if variant.second_moments is None else {"layer_stats": None}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    params = jax.eval_shape(problem.model.init, jax.random.key(0), problem.x)["params"]
    state = jax.eval_shape(tx.init, params)
    with (
        mock.patch.object(running_covariance, "decomposed", lambda c: (c[..., 0], c)),
        mock.patch.object(running_covariance, "refreshed", lambda s, v, *_: (s, v)),
    ):
        return flops(step, params, state, problem.x, problem.y)


def _refresh_flops(problem: ModelOnBatch) -> float:
    """FLOPs of one refresh of all layers."""
    total = 0.0

    def loss_fn(params: Any, x: Any) -> Any:
        return jnp.mean(problem.model.apply({"params": params}, x) ** 2)

    params = jax.eval_shape(problem.model.init, jax.random.key(0), problem.x)["params"]
    for layer in bnp_optax.find_layers(loss_fn, params, problem.x).values():
        n, rank = layer.fan_in, min(_RANK, layer.fan_in)
        if n <= _MAX_FAN_IN:
            total += _EIGH * n**3
            continue
        shapes = (_shape(rank + 1), _shape(n, rank), _shape(), _shape(n, n), _shape(n))
        total += flops(running_covariance.refreshed, *shapes)
        total += 2 * _QR * n * rank**2 + _EIGH * rank**3
    return total


@functools.cache
def measured(name: str) -> dict[str, float]:
    """FLOPs of a step of each variant over those of SGD, spread over the period of a refresh."""
    problem = PROBLEMS[name]
    refresh = _refresh_flops(problem) / _PERIOD
    found = {}
    for label, variant in VARIANTS.items():
        is_captured = variant.second_moments is not None
        cost = _step_flops(problem, variant, is_captured)
        cost += refresh if variant.second_moments and variant.refreshes else 0.0
        if variant.every > 1:
            stale = _step_flops(problem, variant, False)
            cost = cost / variant.every + stale * (1.0 - 1.0 / variant.every)
        found[label] = cost
    return {label: cost / found["SGD"] for label, cost in found.items()}


def main() -> None:
    """Print what whitening costs over SGD, in FLOPs of a step."""
    print(json.dumps({name: measured(name) for name in PROBLEMS}, indent=1))
