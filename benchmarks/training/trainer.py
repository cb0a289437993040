"""Training runs of one method on one problem, compiled once for all rates and seeds."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float

import bnp_optax
from benchmarks.data import Split
from benchmarks.problems.base import Data, Problem
from benchmarks.training.methods import Method
from benchmarks.training.parts import (
    Carry,
    batch_indices,
    find_layers,
    init_carry,
    init_variables,
    make_loss,
    make_step,
)

_EVALUATION_CHUNK = 500
# Examples that statistics are taken of where training starts in z.
_N_START = 2000

# Of each example, by task.
LOSSES = {
    "classification": optax.softmax_cross_entropy_with_integer_labels,
    "regression": lambda outputs, y: jnp.square(outputs - y),
}


class Curves(NamedTuple):
    """What a run is judged by, at equal distances over its steps; NaN after it diverged.

    Attributes:
      train_loss: Mean loss of the batches since the last point.
      loss: Of the split that the run is judged by.
      score: Accuracy, or the share of the variance that is explained, on that split.
      seconds: Time of the training steps, without compilation and evaluation.
    """

    train_loss: Float[np.ndarray, " points"]
    loss: Float[np.ndarray, " points"]
    score: Float[np.ndarray, " points"]
    seconds: float


class Trainer:
    """`trainer(rate, seed, split)` trains once and judges by `split`."""

    def __init__(self, problem: Problem, name: str, method: Method, data: Data):
        """Set up; the first run compiles.

        Args:
          problem: What to train on.
          name: The method's name, by which the problem knows its weight decay and initial scale.
          method: How to train.
          data: What `problem.load` gave.
        """
        self._problem = problem
        self._data = data
        init = {"init_scale": problem.init_scale[name]} if name in problem.init_scale else {}
        self._model = problem.network(method.norm, problem.steps, **init)
        self._losses = LOSSES[problem.task]
        decay = {"decay": problem.decay[name]} if name in problem.decay else {}
        schedule = problem.schedule

        def make(rate: Any, layers: Any, **options: Any) -> optax.GradientTransformation:
            course = rate if schedule is None else schedule(rate, problem.steps)
            return method.make(course, layers, **decay, **options)

        self._method = dataclasses.replace(method, make=make)
        self._layers: Any = None
        self._fixed: Any = None
        self._compiled: dict[str, Any] = {}

    def __call__(self, rate: float, seed: int, split: Split) -> Curves:
        """Train with a learning rate and a seed; the run ends early if it diverges."""
        problem, train = self._problem, self._data.train
        x, y = jnp.asarray(train.x), jnp.asarray(train.y)
        args = (x[: problem.batch_size], y[: problem.batch_size], jnp.uint32(seed))
        carry = self._compile("start", self._start, args)(*args)
        if self._method.from_z:
            carry = self._from_z(carry, x[:_N_START], y[:_N_START])
        indices = jnp.asarray(
            batch_indices(len(train), problem.batch_size, problem.steps, problem.points, seed)
        )
        each = problem.steps // problem.points
        key = jax.random.key(seed, impl="rbg")
        curves = np.full((3, problem.points), np.nan)
        seconds = 0.0
        for point in range(problem.points):
            first = jnp.int32(point * each)
            args = (jnp.float32(rate), carry, indices[point], first, key, x, y)
            segment = self._ready(args)
            start = time.perf_counter()
            carry, loss = jax.block_until_ready(segment(*args))
            seconds += time.perf_counter() - start
            if not jnp.isfinite(loss):
                break
            curves[:, point] = (float(loss), *self._judge(carry, split, first + each))
        train_loss, loss, score = np.where(np.isfinite(curves), curves, np.nan)
        return Curves(train_loss, loss, score, seconds)

    def _ready(self, args: Any) -> Callable[..., tuple[Carry, Array]]:
        """`_segment`, compiled for arguments like `args`."""
        return self._compile("segment", self._segment, args, donate=(1,))

    def _compile(self, name: str, function: Any, args: Any, donate: tuple[int, ...] = ()) -> Any:
        if name not in self._compiled:
            self._compiled[name] = jax.jit(function, donate_argnums=donate).lower(*args).compile()
        return self._compiled[name]

    def _start(self, x: Array, y: Array, seed: Array) -> Carry:
        """The start of a run; `x` and `y` are a batch."""
        variables = init_variables(self._model, x[:1], [seed])[0]
        self._layers = find_layers(self._model, self._method, variables, x, y, self._losses)
        return init_carry(self._method, self._layers, variables)

    def _from_z(self, carry: Carry, x: Array, y: Array) -> Carry:
        """The start of a run whose initial values are those of z."""
        loss_fn = make_loss(self._model, self._losses)

        def loss_of(params: Any, x: Array, y: Array) -> Array:
            return loss_fn(params, carry.model_state, x, y)[0]

        params, self._fixed = bnp_optax.start_in_zspace(loss_of, carry.params, [(x, y)])
        tx = self._method.make(1.0, self._layers, fixed=self._fixed)
        return Carry(params, carry.model_state, tx.init(params))

    def _segment(
        self, rate: Array, carry: Carry, indices: Array, first: Array, key: Array, x: Any, y: Any
    ) -> tuple[Carry, Array]:
        """The steps up to the next point; the mean of their losses."""
        step = make_step(self._model, self._method, self._layers, self._losses, self._fixed)

        def one(carry: Carry, at: tuple[Array, Array]) -> tuple[Carry, Array]:
            index, number = at
            return step(rate, carry, *self._batch(index, number, key, x, y))

        numbers = first + jnp.arange(len(indices))
        carry, losses = lax.scan(one, carry, (indices, numbers))
        return carry, jnp.mean(losses)

    def _batch(
        self, index: Array, number: Array, key: Array, x: Array, y: Array
    ) -> tuple[Array, Array]:
        """What a step sees of `x` and `y`."""
        seen = x[index]
        if self._problem.augment is not None:
            seen = self._problem.augment(seen, jax.random.fold_in(key, number))
        if self._problem.drift is not None:
            seen = self._problem.drift(seen, number)
        return seen, y[index]

    def _judge(self, carry: Carry, split: Split, number: Array) -> tuple[float, float]:
        """Loss and score on `split` at a step."""
        total, hits = 0.0, 0.0
        for start in range(0, len(split), _EVALUATION_CHUNK):
            chunk = slice(start, start + _EVALUATION_CHUNK)
            x, y = jnp.asarray(split.x[chunk]), jnp.asarray(split.y[chunk])
            judge = self._compile(f"judge {len(y)}", self._chunk, (carry, x, y, number))
            sums = judge(carry, x, y, number)
            total, hits = total + float(sums[0]), hits + float(sums[1])
        loss = total / np.size(split.y)
        if self._problem.task == "regression":
            return loss, 1.0 - loss / float(np.var(split.y))
        return loss, hits / np.size(split.y)

    def _chunk(self, carry: Carry, x: Array, y: Array, number: Array) -> tuple[Array, Array]:
        if self._problem.drift is not None:
            x = self._problem.drift(x, number)
        outputs: Any = self._model.apply({"params": carry.params, **carry.model_state}, x)
        hits = jnp.sum(jnp.argmax(outputs, axis=-1) == y) if outputs.ndim > y.ndim else 0.0
        return jnp.sum(self._losses(outputs, y)), jnp.float32(hits)
