"""Whole training runs with a regularizer, many learning rates and strengths in one program."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float
from matfree import decomp

import bnp_optax
from benchmarks.data import Dataset
from benchmarks.networks.small import MLP
from benchmarks.regularization.methods import Regularized
from benchmarks.training.methods import Layers
from benchmarks.training.parts import (
    Carry,
    batch_indices,
    compile_many,
    evaluate,
    init_variables,
    make_loss,
)

NEAR_ZERO = 1e-3

_LANCZOS_STEPS = 30


class Lane(NamedTuple):
    """One training run.

    Attributes:
      rate: Learning rate.
      strength: Of the regularizer; the share of entries that is set to 0, where one prunes.
      seed: Of the initial parameters and the order of batches.
    """

    rate: float
    strength: float
    seed: int


class Measured(NamedTuple):
    """What is measured at the end of training.

    Attributes:
      train_loss: Mean cross-entropy of the training images, in nats, without the regularizer.
      gradient_norm: Of that loss, in p.
      validation_loss: That of the validation images.
      validation_accuracy: Share of the validation images classified rightly.
      test_accuracy: That of the test images.
      zeros: Share of kernel entries that are exactly 0.
      near_zeros: Share of kernel entries below `NEAR_ZERO` in size.
      cut_accuracy: Of the test images, with those entries set to 0.
    """

    train_loss: Any
    gradient_norm: Any
    validation_loss: Any
    validation_accuracy: Any
    test_accuracy: Any
    zeros: Any
    near_zeros: Any
    cut_accuracy: Any


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """How every run of a comparison trains.

    Attributes:
      hidden: Widths of the network's hidden layers.
      batch_size: Images in a step.
      steps: Number of steps; the learning rate falls to 0 over them along half a cosine.
      warmup: Steps in which the strength rises linearly from 0; 0 for a constant one.
      lanes: Runs side by side in the compiled program.
    """

    hidden: tuple[int, ...]
    batch_size: int
    steps: int
    warmup: int
    lanes: int


class Runs:
    """Training runs of one method, compiled once."""

    def __init__(self, method: Regularized, training: RunSettings, initial: Mapping[int, Any]):
        """Set up.

        Args:
          method: What trains.
          training: How.
          initial: Initial parameters by seed, from `initial_params`.
        """
        self._model = MLP(training.hidden)
        self._method = method
        self._training = training
        self._initial = initial
        self._layers: Layers | None = None
        self._compiled: Any = None

    def __call__(self, lanes: Sequence[Lane], dataset: Dataset) -> tuple[Any, Measured]:
        """Final parameters, and what was measured, each with a leading axis of lanes."""
        group = self._training.lanes
        padded = [*lanes, *[lanes[-1]] * (-len(lanes) % group)]
        groups = [self._group(padded[i : i + group], dataset) for i in range(0, len(padded), group)]
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(lanes)], *groups)

    def _group(self, lanes: Sequence[Lane], dataset: Dataset) -> tuple[Any, Measured]:
        size, steps = self._training.batch_size, self._training.steps
        n = len(dataset.train)
        args = (
            jnp.asarray([lane.rate for lane in lanes], jnp.float32),
            jnp.asarray([lane.strength for lane in lanes], jnp.float32),
            jax.tree.map(lambda *p: jnp.stack(p), *(self._initial[lane.seed] for lane in lanes)),
            jnp.asarray(
                np.stack([batch_indices(n, size, steps, 1, lane.seed)[0] for lane in lanes])
            ),
            {part: arrays(dataset, part) for part in ("train", "validation", "test")},
        )
        if self._compiled is None:
            if self._method.needs_stats:
                x, y = args[-1]["train"]
                params = self._initial[lanes[0].seed]
                self._layers = bnp_optax.find_layers(self._loss, params, x[:size], y[:size])
            run = jax.vmap(self._train, in_axes=(0, 0, 0, 0, None))
            self._compiled = compile_many(jax.jit(run).lower(*args))
        return self._compiled(*args)

    def _loss(self, params: Any, x: Array, y: Array) -> Array:
        return make_loss(self._model)(params, {}, x, y)[0]

    def _train(
        self, rate: Array, strength: Array, params: Any, indices: Array, data: Any
    ) -> tuple[Any, Measured]:
        x, y = data["train"]
        falling: Any = optax.cosine_decay_schedule(rate, len(indices))  # pyright: ignore[reportArgumentType]
        warmup = self._training.warmup
        rising = optax.linear_schedule(0.0, strength, warmup) if warmup else strength
        tx = optax.with_extra_args_support(self._method.make(falling, rising, self._layers))

        def step(carry: tuple[Any, Any], index: Array) -> tuple[tuple[Any, Any], None]:
            params, state = carry
            batch = x[index], y[index]
            extra: dict[str, Any] = {"grad_fn": lambda p: jax.grad(self._loss)(p, *batch)}
            if self._method.needs_stats:
                with_stats = bnp_optax.value_and_grad(self._loss, layers=self._layers)
                _, grads, extra["layer_stats"] = with_stats(params, *batch)
            else:
                grads = jax.grad(self._loss)(params, *batch)
            updates, state = tx.update(grads, state, params, **extra)
            return (optax.apply_updates(params, updates), state), None

        carry = params, tx.init(params)
        if self._method.prune_after is None:
            params, _ = lax.scan(step, carry, indices)[0]
        else:
            until = round(self._method.prune_after * len(indices))
            params, state = lax.scan(step, carry, indices[:until])[0]
            params, _ = lax.scan(step, (prune(params, strength), state), indices[until:])[0]
        return params, self._measure(params, data)

    def _measure(self, params: Any, data: Any) -> Measured:
        def judged(part: str, params: Any = params) -> tuple[Array, Array]:
            losses, hits = evaluate(self._model, Carry(params, {}, ()), *data[part])
            return jnp.mean(losses), jnp.mean(hits)

        validation_loss, validation_accuracy = judged("validation")
        entries = kernel_entries(params)
        return Measured(
            train_loss=judged("train")[0],
            gradient_norm=optax.tree.norm(jax.grad(self._loss)(params, *data["train"])),
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
            test_accuracy=judged("test")[1],
            zeros=jnp.mean(entries == 0.0),
            near_zeros=jnp.mean(jnp.abs(entries) < NEAR_ZERO),
            cut_accuracy=judged("test", cut(params, NEAR_ZERO))[1],
        )


def initial_params(hidden: tuple[int, ...], dataset: Dataset, seeds: Sequence[int]) -> Any:
    """Initial parameters of the network by seed."""
    variables = init_variables(MLP(hidden), arrays(dataset, "train")[0][:1], seeds)
    return {seed: v["params"] for seed, v in zip(seeds, variables, strict=True)}


def arrays(dataset: Dataset, part: str) -> tuple[Array, Array]:
    """Images and classes of a split."""
    split = getattr(dataset, part)
    return jnp.asarray(split.x), jnp.asarray(split.y)


def kernel_entries(params: Any) -> Float[Array, " n"]:
    """The entries of all kernels in a row."""
    return jnp.concatenate([p.ravel() for p in jax.tree.leaves(params) if p.ndim > 1])


def prune(params: Any, share: Any) -> Any:
    """Set the share of kernel entries to 0 that is smallest in size over all layers."""
    sizes = jnp.sort(jnp.abs(kernel_entries(params)))
    n_zeros = jnp.round(share * len(sizes)).astype(jnp.int32)
    # Where nothing remains to be kept, any threshold above all sizes.
    threshold = jnp.append(sizes, jnp.inf)[n_zeros]
    return cut(params, threshold)


def cut(params: Any, threshold: Any) -> Any:
    """Set the kernel entries to 0 that are smaller than `threshold`."""
    return jax.tree.map(
        lambda p: jnp.where(jnp.abs(p) < threshold, 0.0, p) if p.ndim > 1 else p, params
    )


@functools.partial(jax.jit, static_argnums=0)
def sharpness(
    hidden: tuple[int, ...], params: Any, x: Array, y: Array
) -> tuple[Float[Array, " lanes"], Float[Array, " lanes"]]:
    """Largest eigenvalue of the Hessian of the loss on (x, y), and a bound of its error.

    Args:
      hidden: Widths of the network's hidden layers.
      params: Parameters with a leading axis of lanes, as `Runs` returns them.
      x: Images.
      y: Classes.
    """
    loss_fn = make_loss(MLP(hidden))
    return lax.map(lambda p: largest_eigenvalue(lambda q: loss_fn(q, {}, x, y)[0], p), params)


def largest_eigenvalue(loss_fn: Any, params: Any) -> tuple[Array, Array]:
    """The largest eigenvalue of the Hessian, by Lanczos, and a bound of its error.

    The bound is the residual ||H v - lambda v|| of the unit Ritz vector v: an eigenvalue is within
    it.
    """
    n = sum(p.size for p in jax.tree.leaves(params))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    start = structure.unflatten(
        [jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
    )

    def hessian(vector: Any) -> Any:
        return jax.jvp(jax.grad(loss_fn), (params,), (vector,))[1]

    lanczos = decomp.tridiag_sym(min(_LANCZOS_STEPS, n), custom_vjp=False)(hessian, start)
    values, vectors = jnp.linalg.eigh(lanczos.J_small)
    return values[-1], optax.tree.norm(lanczos.residual) * jnp.abs(vectors[-1, -1])
