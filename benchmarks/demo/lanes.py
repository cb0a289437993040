"""Many whole training runs in one compiled program."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from benchmarks.data import Split
from benchmarks.training.methods import Layers, Method
from benchmarks.training.parts import (
    Carry,
    compile_many,
    evaluate,
    find_layers,
    init_carry,
    make_step,
)


class LaneCurves(NamedTuple):
    """What training runs are judged by, at equal distances over their steps.

    Attributes:
      loss: Mean cross-entropy in nats of each evaluation set, with the network in evaluation mode.
      accuracy: Share of the images whose class has the largest logit.
    """

    loss: Float[np.ndarray, "lanes points sets"]
    accuracy: Float[np.ndarray, "lanes points sets"]


class Lanes:
    """Training runs side by side ("lanes"), compiled at the first call.

    Every lane has its own learning rate, initial variables and order of batches; all share the
    data. A later call with other values of the same shapes, standardized inputs after raw ones,
    say, needs no compilation.
    """

    def __init__(self, model: nn.Module, method: Method):
        """Set up.

        Args:
          model: The network.
          method: How to train it.
        """
        self._model = model
        self._method = method
        self._compiled: Any = None

    def __call__(
        self,
        rates: Sequence[float],
        variables: Sequence[Any],
        indices: Sequence[Int[np.ndarray, "points steps_per_point batch_size"]],
        train: Split,
        evaluation: Sequence[Split],
    ) -> LaneCurves:
        """Train.

        Args:
          rates: Learning rate of each lane.
          variables: Initial variables of each lane, such as `train.init_variables` gives.
          indices: Batches of each lane, from `train.batch_indices`.
          train: What is learned.
          evaluation: What the runs are judged by: sets of equal size.
        """
        args = (
            jnp.asarray(rates, jnp.float32),
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *variables),
            jnp.asarray(np.stack(indices)),
            jnp.asarray(train.x),
            jnp.asarray(train.y),
            jnp.asarray(np.concatenate([split.x for split in evaluation])),
            jnp.asarray(np.concatenate([split.y for split in evaluation])),
        )
        if self._compiled is None:
            batch = args[3][indices[0][0, 0]], args[4][indices[0][0, 0]]
            layers = find_layers(self._model, self._method, variables[0], *batch)
            self._compiled = self._compile(layers, len(evaluation), args)
        return LaneCurves(*map(np.asarray, self._compiled(*args)))

    def _compile(self, layers: Layers | None, n_sets: int, args: tuple[Any, ...]) -> Any:
        step = make_step(self._model, self._method, layers)

        def run(
            rate: Array, variables: Any, indices: Array, x: Array, y: Array, *evaluation: Array
        ) -> tuple[Array, Array]:
            def one(carry: Carry, index: Array) -> tuple[Carry, None]:
                carry, _ = step(rate, carry, x[index], y[index])
                return carry, None

            def to_point(carry: Carry, indices: Array) -> tuple[Carry, tuple[Array, Array]]:
                carry, _ = lax.scan(one, carry, indices)
                losses, hits = evaluate(self._model, carry, *evaluation)
                by_set = losses.reshape(n_sets, -1), hits.reshape(n_sets, -1)
                return carry, (jnp.mean(by_set[0], axis=-1), jnp.mean(by_set[1], axis=-1))

            return lax.scan(to_point, init_carry(self._method, layers, variables), indices)[1]

        shared = (None,) * (len(args) - 3)
        return compile_many(jax.jit(jax.vmap(run, in_axes=(0, 0, 0, *shared))).lower(*args))
