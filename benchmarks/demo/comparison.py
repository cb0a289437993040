"""Every method on every setting, each at the learning rate that validation chooses for it."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from benchmarks.data import Dataset, Split
from benchmarks.demo.lanes import Lanes
from benchmarks.demo.plan import DemoPlan, Inputs, Setting
from benchmarks.demo.timing import StepTime, compile_step, interleaved
from benchmarks.networks.small import ModelName, Norm
from benchmarks.training.methods import METHODS, MethodName
from benchmarks.training.parts import batch_indices, init_variables

Datasets = Mapping[tuple[ModelName, Inputs], Dataset]

REFERENCE: MethodName = "sgd"
TUNING_SEED = 0

# Rough seconds a method and batch size, for the progress bar.
_WORK: dict[ModelName, float] = {"mlp": 1.5, "cnn": 2.5}
_WORK_TIMING = 1.2


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a method did in a setting.

    Attributes:
      setting: Where.
      method: Which.
      rate: The learning rate that validation chose.
      at_edge: Whether that is the smallest or the largest of the grid.
      validation_losses: At each rate of the grid, the mean of the validation loss over the run; inf
        if it diverged. The rate chosen is where this is least.
      steps: Steps done at each point.
      train_loss: Loss on a fixed part of the training split.
      test_accuracy: Accuracy on the test split.
      documented_accuracy: The same at the last step, at the method's documented rate.
    """

    setting: Setting
    method: MethodName
    rate: float
    at_edge: bool
    validation_losses: list[float]
    steps: Int[np.ndarray, " points"]
    train_loss: Float[np.ndarray, "seeds points"]
    test_accuracy: Float[np.ndarray, "seeds points"]
    documented_accuracy: Float[np.ndarray, " seeds"]

    @property
    def mean_loss(self) -> Float[np.ndarray, " points"]:
        """Mean training loss over seeds at each point; inf where a seed diverged."""
        return np.mean(np.where(np.isfinite(self.train_loss), self.train_loss, np.inf), axis=0)

    @property
    def mean_accuracy(self) -> Float[np.ndarray, " points"]:
        """Mean test accuracy over seeds at each point."""
        return np.mean(self.test_accuracy, axis=0)

    def steps_to(self, target: float) -> int | None:
        """Steps until the mean training loss is first seen at or below `target`."""
        reached = np.flatnonzero(self.mean_loss <= target)
        return int(self.steps[reached[0]]) if len(reached) else None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Results of a contest.

    Attributes:
      entries: By setting, the entries of all methods.
      step_times: By model and batch size, the step times of all methods; empty if not measured.
    """

    entries: dict[Setting, list[Entry]]
    step_times: dict[tuple[ModelName, int], dict[MethodName, StepTime]]

    def target(self, setting: Setting) -> float | None:
        """The loss to reach: what SGD, at its best rate, has in the end (mean over seeds)."""
        for entry in self.entries[setting]:
            if entry.method == REFERENCE and np.isfinite(entry.mean_loss[-1]):
                return float(entry.mean_loss[-1])
        return None


def amount_of_work(plan: DemoPlan) -> float:
    """What the calls of `advance` will add up to."""
    each = sum(_WORK[model] + (_WORK_TIMING if plan.turns else 0.0) for model in plan.models)
    return each * len(plan.batch_sizes) * len(plan.methods)


def run(
    plan: DemoPlan,
    datasets: Datasets,
    advance: Callable[[float], None],
    says: Callable[[str], None] = lambda doing: None,
) -> Outcome:
    """Run the contest.

    Args:
      plan: What to compare.
      datasets: By model and inputs.
      advance: Called with the amount of work done since the last call.
      says: Called with what begins, a method at a batch size; two of them run at a time.
    """
    jobs = [
        (model, batch_size, method)
        for model in sorted(plan.models, key=_WORK.__getitem__, reverse=True)
        for batch_size in sorted(plan.batch_sizes, reverse=True)
        for method in plan.methods
    ]
    found: dict[Setting, list[Entry]] = {
        Setting(model, inputs, batch_size): []
        for model in plan.models
        for inputs in plan.inputs
        for batch_size in plan.batch_sizes
    }
    step_times = {}
    # Compiling uses one core, and so does a run of a small network.
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        try:
            contest = _Contest(plan, datasets, advance, says, pool)
            for entries in pool.map(lambda job: contest.contend(*job), jobs):
                for entry in entries:
                    found[entry.setting].append(entry)
            if plan.turns and REFERENCE in plan.methods:
                steps = dict(zip(jobs, pool.map(lambda job: contest.step(*job), jobs), strict=True))
                for where in dict.fromkeys(job[:2] for job in jobs):
                    says(f"Timing {where[0].upper()}, batch size {where[1]}")
                    here = {method: steps[*where, method] for method in plan.methods}
                    step_times[where] = interleaved(here, REFERENCE, plan.turns)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Outcome(found, step_times)


class _Contest:
    """What the jobs of a contest share."""

    def __init__(
        self,
        plan: DemoPlan,
        datasets: Datasets,
        advance: Callable[[float], None],
        says: Callable[[str], None],
        pool: ThreadPoolExecutor,
    ):
        self.plan = plan
        self.datasets = datasets
        self.advance = advance
        self.says = says
        self.seeds = range(TUNING_SEED, TUNING_SEED + 1 + plan.seeds)
        # Methods with the same network share its initial values.
        methods: dict[Norm, MethodName] = {METHODS[m].norm: m for m in plan.methods}
        kinds = [(model, norm) for model in plan.models for norm in methods]

        def start(kind: tuple[ModelName, Norm]) -> list[Any]:
            model, norm = kind
            x = datasets[model, plan.inputs[0]].train.x[:1]
            network = plan.network(model, methods[norm], in_lanes=True)
            return init_variables(network, jnp.asarray(x), self.seeds)

        self.starts = dict(zip(kinds, pool.map(start, kinds), strict=True))

    def contend(self, model: ModelName, batch_size: int, method: MethodName) -> list[Entry]:
        """One method at one batch size, on all kinds of inputs: one compilation serves them all."""
        plan = self.plan
        self.says(f"Training {model.upper()}, batch size {batch_size}, {METHODS[method].label}")
        lanes = Lanes(plan.network(model, method, in_lanes=True), METHODS[method])
        variables = self.starts[model, METHODS[method].norm]
        steps, n_lanes = plan.steps_at(batch_size), plan.seeds
        entries = []
        for inputs in plan.inputs:
            data = self.datasets[model, inputs]
            indices = [
                batch_indices(len(data.train), batch_size, steps, plan.points, seed)
                for seed in self.seeds
            ]
            n_eval = len(data.test)
            seen = Split(data.train.x[:n_eval], data.train.y[:n_eval])
            means = []
            for rates in _groups(plan.rates, n_lanes):
                start = [variables[0]] * n_lanes, [indices[0]] * n_lanes
                curves = lanes(rates, *start, data.train, [seen, data.validation])
                means.extend(np.mean(curves.loss[:, :, 1], axis=1))
            losses = np.where(np.isfinite(means), means, np.inf)[: len(plan.rates)]
            rate = plan.rates[int(np.argmin(losses))]
            start = variables[1:], indices[1:]
            curves = lanes([rate] * n_lanes, *start, data.train, [seen, data.test])
            documented = METHODS[method].start
            same = curves
            if documented != rate:
                same = lanes([documented] * n_lanes, *start, data.train, [seen, data.test])
            entry = Entry(
                setting=Setting(model, inputs, batch_size),
                method=method,
                rate=rate,
                at_edge=rate in (min(plan.rates), max(plan.rates)),
                validation_losses=losses.tolist(),
                steps=steps // plan.points * np.arange(1, plan.points + 1),
                train_loss=curves.loss[:, :, 0],
                test_accuracy=curves.accuracy[:, :, 1],
                documented_accuracy=same.accuracy[:, -1, 1],
            )
            entries.append(entry)
            self.advance(_WORK[model] / len(plan.inputs))
        return entries

    def step(self, model: ModelName, batch_size: int, method: MethodName) -> Callable[[], None]:
        """A compiled training step, to be timed."""
        self.says(f"Compiling {model.upper()}, batch size {batch_size}, {METHODS[method].label}")
        train = self.datasets[model, self.plan.inputs[-1]].train
        x, y = jnp.asarray(train.x[:batch_size]), jnp.asarray(train.y[:batch_size])
        variables = self.starts[model, METHODS[method].norm][0]
        step = compile_step(self.plan.network(model, method), METHODS[method], variables, x, y)
        self.advance(_WORK_TIMING)
        return step


def _groups(rates: tuple[float, ...], size: int) -> Iterable[tuple[float, ...]]:
    """The rates in groups of `size`, the last one filled up."""
    for start in range(0, len(rates), size):
        group = rates[start : start + size]
        yield group + group[-1:] * (size - len(group))
