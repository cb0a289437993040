"""K-FAC as the package kfac_jax has it: an optional peer, for it is no Optax transformation.

kfac-jax 0.0.8 works under jax 0.9.1, and not under 0.10.2. It inverts matrices as large as the
inputs of the layers: on images of 3072 numbers, a step takes hundreds of SGD's.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from benchmarks.networks.small import MLP
from benchmarks.problems.base import Data, Problem, Task
from benchmarks.training.methods import Method
from benchmarks.training.parts import Carry, Losses, init_variables, make_loss
from benchmarks.training.trainer import LOSSES, Trainer

# FermiNet's, K-FAC's best known use with a constant damping. The last bounds the squared length of
# a step in the metric of the curvature: without it, this damping diverges at most learning rates.
DAMPING = 1e-3
MOMENTUM = 0.0
NORM_CONSTRAINT = 1e-3

_REMEDY = "it may need an older jax"


def unavailable() -> str | None:
    """Why K-FAC cannot be compared here, in one line; None if it can.

    Besides the import it tries one step of a tiny network, once in a process: kfac_jax relies on
    what jax keeps to itself, and may import under a jax that it cannot train with.
    """
    try:
        kfac_jax = importlib.import_module("kfac_jax")
    except ImportError as error:
        return f"kfac_jax does not import ({_in_a_line(error)}); pip install kfac-jax"
    except Exception as error:
        return f"kfac_jax does not import ({_in_a_line(error)}); {_REMEDY}"
    return _failure(kfac_jax)


class KfacTrainer(Trainer):
    """A `Trainer` that leaves the steps to `kfac_jax.Optimizer`, in a loop in Python."""

    def __init__(self, problem: Problem, name: str, method: Method, data: Data):
        """Set up; the first run compiles.

        Args:
          problem: What to train on. Its weight decay is not applied.
          name: The method's name.
          method: Names the network's normalization, which must keep no state.
          data: What `problem.load` gave.
        """
        nothing = dataclasses.replace(method, make=lambda rate, layers, **_: optax.identity())
        super().__init__(problem, name, nothing, data)
        kfac_jax = importlib.import_module("kfac_jax")
        self._optimizer = _make_optimizer(kfac_jax, self._model, problem.task)
        self._prepare = jax.jit(self._prepared)
        self._warm = False

    def _ready(self, args: Any) -> Callable[..., tuple[Carry, Array]]:
        if not self._warm:
            rate, carry, indices, *others = args
            # The optimizer compiles on its first step, and donates what it is given.
            jax.block_until_ready(
                self._segment(rate, jax.tree.map(jnp.copy, carry), indices[:1], *others)
            )
            self._warm = True
        return self._segment

    def _segment(
        self, rate: Array, carry: Carry, indices: Array, first: Array, key: Array, x: Any, y: Any
    ) -> tuple[Carry, Array]:
        params, model_state, state = carry
        losses = []
        for number, index in enumerate(np.asarray(indices), int(first)):
            batch, step_key, step_rate = self._prepare(rate, np.int32(number), index, key, x, y)
            if number == 0:
                state = self._optimizer.init(params, step_key, batch)
            params, state, loss = _step(
                self._optimizer, params, state, step_key, batch, step_rate, number
            )
            losses.append(loss)
        # In NumPy, which compiles nothing for a new number of losses.
        return Carry(params, model_state, state), jnp.float32(np.mean(jax.device_get(losses)))

    def _prepared(
        self, rate: Array, number: Array, index: Array, key: Array, x: Array, y: Array
    ) -> tuple[tuple[Array, Array], Array, Array]:
        """The batch of a step, its key, and its learning rate."""
        schedule = self._problem.schedule
        if schedule is not None:
            rate = schedule(rate, self._problem.steps)(number)
        step_key = jax.random.fold_in(jax.random.fold_in(key, number), 1)
        return self._batch(index, number, key, x, y), step_key, rate


def _make_optimizer(kfac_jax: ModuleType, model: nn.Module, task: Task) -> Any:
    """K-FAC for a network without state.

    By default the curvature is updated in each step, and inverted in each fifth.
    """
    loss_fn = make_loss(model, _registered(kfac_jax, task))
    return kfac_jax.Optimizer(
        jax.value_and_grad(lambda params, batch: loss_fn(params, {}, *batch)[0]),
        l2_reg=0.0,
        num_burnin_steps=0,
        norm_constraint=NORM_CONSTRAINT,
    )


def _registered(kfac_jax: ModuleType, task: Task) -> Losses:
    """The losses of examples; on the way, kfac_jax is told what they are."""
    register = {
        "classification": kfac_jax.register_softmax_cross_entropy_loss,
        "regression": kfac_jax.register_squared_error_loss,
    }[task]

    def losses(outputs: Array, y: Array) -> Array:
        # kfac_jax divides by the batch size, `make_loss` by the number of targets.
        register(outputs, targets=y, weight=len(y) / y.size)
        return LOSSES[task](outputs, y)

    return losses


def _step(
    optimizer: Any, params: Any, state: Any, key: Array, batch: Any, rate: Array, number: int
) -> tuple[Any, Any, Array]:
    """New parameters and state, and the loss of the batch; donates the old ones."""
    params, state, seen = optimizer.step(
        params,
        state,
        key,
        batch=batch,
        learning_rate=rate,
        momentum=jnp.float32(MOMENTUM),
        damping=jnp.float32(DAMPING),
        global_step_int=number,
    )
    return params, state, seen["loss"]


@functools.cache
def _failure(kfac_jax: ModuleType) -> str | None:
    """Why a step of a tiny network fails, or None."""
    model = MLP(hidden=(2,), classes=2)
    batch = (jnp.ones((2, 2)), jnp.zeros(2, jnp.int32))
    key = jax.random.key(0, impl="rbg")
    try:
        params = init_variables(model, batch[0], [0])[0]["params"]
        optimizer = _make_optimizer(kfac_jax, model, "classification")
        state = optimizer.init(params, key, batch)
        jax.block_until_ready(
            _step(optimizer, params, state, key, batch, jnp.float32(1e-2), number=0)
        )
    except Exception as error:
        return f"kfac_jax fails under jax {jax.__version__} ({_in_a_line(error)}); {_REMEDY}"
    return None


def _in_a_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
