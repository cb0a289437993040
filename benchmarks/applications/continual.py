"""Continual learning: one task after the other, every example seen once, no end in sight.

Networks that learn the first tasks well may learn later ones worse and worse: they lose plasticity.
The learner is not told where a task ends, and no batch is large enough to normalize by.

Source of the permuted stream: Dohare et al., "Loss of plasticity in deep continual learning",
Nature 2024.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import bnp_optax
from benchmarks.applications import base, tasks
from benchmarks.applications.base import Application, Contestant
from benchmarks.applications.learners import (
    LEARNERS,
    Learner,
    Network,
    normalized,
    perturbed,
    unseen,
)

BATCH = 8
STEPS_A_TASK = tasks.EXAMPLES // BATCH
TASKS = {"permuted": 200, "rescaled": 200}
# Of the last tasks, the mean of whose accuracy is judged.
LAST = 10

_TITLES: tuple[tuple[tasks.Kind, str], ...] = (
    ("permuted", "Online MNIST, batches of 8, pixels permuted anew every 300 steps"),
    ("rescaled", "Online MNIST, batches of 8, pixels' gain and offset anew every 300 steps"),
)

# (params, optimizer's state, inputs of the task as the network gets them) -> numbers.
Measure = Callable[[Any, Any, Array], dict[str, Array]]


def compiled(learner: Learner, measure: Measure | None = None) -> Callable[..., Any]:
    """`run(rate, decay, key, images, labels, tasks)`: accuracy of each task, and the measures."""
    network = Network(learner.layer_norm)

    def loss_fn(params: Any, x: Array, y: Array) -> tuple[Array, Array]:
        logits, _ = network.apply({"params": params}, x)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, jnp.mean(jnp.argmax(logits, axis=1) == y)

    @jax.jit
    def run(
        rate: Array, decay: Array, key: Array, images: Array, labels: Array, stream: tasks.Tasks
    ) -> Any:
        tx = optax.with_extra_args_support(learner.make(rate, decay))

        def fresh(key: Array) -> Any:
            return network.init(key, jnp.zeros((1, tasks.PIXELS)))["params"]

        def step(carry: Any, batch: Any) -> tuple[Any, Array]:
            params, state, seen = carry
            x, y, key = batch
            x, seen = normalized(learner.inputs, x, seen)
            if learner.in_z:
                captured = bnp_optax.value_and_grad(loss_fn, has_aux=True)
                (_, accuracy), grads, stats = captured(params, x, y)
                updates, state = tx.update(grads, state, params, layer_stats=stats)
            else:
                (_, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, y)
                updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            if learner.perturb:
                params = perturbed(params, key, fresh, rate * decay)
            return (params, state, seen), accuracy

        def task(carry: Any, given: tuple[tasks.Tasks, Array]) -> tuple[Any, Any]:
            drawn, key = given
            x = images[drawn.order][:, drawn.pixels] * drawn.gain[None] + drawn.offset[None]
            steps = len(drawn.order) // BATCH
            x = x[: steps * BATCH].reshape(steps, BATCH, -1)
            y = labels[drawn.order[: steps * BATCH]].reshape(steps, BATCH)
            carry, accuracy = jax.lax.scan(step, carry, (x, y, jax.random.split(key, steps)))
            params, state, seen = carry
            last, _ = normalized(learner.inputs, x.reshape(steps * BATCH, -1)[-1000:], seen)
            measured = {} if measure is None else measure(params, state, last)
            return carry, (jnp.mean(accuracy), measured)

        first, *rest = jax.random.split(key, 2)
        params = fresh(first)
        start = params, tx.init(params), unseen(tasks.PIXELS)
        return jax.lax.scan(task, start, (stream, jax.random.split(rest[0], len(stream.order))))[1]

    return run


def judged(curves: Float[np.ndarray, "seeds tasks"]) -> Float[np.ndarray, " seeds"]:
    """Mean accuracy over the last tasks."""
    return curves[:, -LAST:].mean(axis=1)


def applications(data_dir: Path | None) -> list[Application]:
    """The two streams."""
    return [
        Application(
            name=f"continual-{kind}",
            title=title,
            measure="online accuracy in a task, %",
            train=functools.partial(_train, kind, data_dir),
            contestants=CONTESTANTS,
            steps=TASKS[kind],
            progress="tasks",
            higher_is_better=True,
            judged=judged,
            log=False,
        )
        for kind, title in _TITLES
    ]


_compiled = functools.lru_cache(maxsize=1)(lambda name: compiled(LEARNERS[name]))


def _train(
    kind: tasks.Kind,
    data_dir: Path | None,
    name: str,
    rate: float,
    seeds: Sequence[int],
    steps: int,
) -> Float[np.ndarray, "seeds tasks"]:
    pool = _images(data_dir)
    found = []
    for seed in seeds:
        stream = tasks.draw(kind, steps, len(pool.y), seed)
        key, decay = jax.random.key(seed), LEARNERS[name].strength(kind)
        accuracy, _ = _compiled(name)(rate, decay, key, pool.x, pool.y, stream)
        found.append(100.0 * np.asarray(accuracy))
    return np.stack(found)


@functools.lru_cache(maxsize=1)
def _images(data_dir: Path | None) -> Any:
    split = tasks.images(data_dir)
    return type(split)(jnp.asarray(split.x), jnp.asarray(split.y))  # type: ignore[arg-type]


CONTESTANTS = (
    Contestant("sgd", "SGD", 3e-2, color=base.BLACK, dashes=":"),
    Contestant("adam", "Adam", 1e-3, color=base.BLACK),
    Contestant("adamw", "AdamW", 1e-3, color=base.BLACK, dashes="--"),
    Contestant("shrink-perturb", "Adam, shrink and perturb", 1e-3, color=base.PURPLE),
    Contestant("layernorm-adam", "LayerNorm, Adam", 1e-3, color=base.ORANGE),
    Contestant("welford-adam", "Welford, Adam", 1e-3, color=base.SKY),
    Contestant(
        "welford-layernorm-adamw", "Welford, LayerNorm, AdamW", 1e-3, color=base.SKY, dashes="--"
    ),
    Contestant(
        *("running-layernorm-adamw", "running normalization, LayerNorm, AdamW", 1e-3),
        color=base.ORANGE,
        dashes="--",
    ),
    Contestant(
        *("running-adamw", "running normalization, AdamW", 1e-3), color=base.ORANGE, dashes=":"
    ),
    Contestant("bnp-adam", "Adam in z", 3e-3, ours=True, color=base.VERMILION),
    Contestant("bnp-adamw", "AdamW in z", 3e-3, ours=True, color=base.BLUE),
    Contestant("bnp-adamw-eps10", "AdamW in z, eps_rel=10", 3e-3, ours=True, color=base.GREEN),
    Contestant(
        *("bnp-adamw-slow", "AdamW in z, decay=.999", 3e-3),
        ours=True,
        color=base.PURPLE,
        dashes="--",
    ),
    Contestant(
        *("bnp-adamw-layernorm", "LayerNorm, AdamW in z", 3e-3),
        ours=True,
        color=base.BLUE,
        dashes="--",
    ),
    Contestant(
        *("running-bnp-adamw", "running normalization, AdamW in z", 3e-3),
        ours=True,
        color=base.BLUE,
        dashes=":",
    ),
)
