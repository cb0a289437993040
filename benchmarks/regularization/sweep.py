"""The two comparisons: every method over its strengths, at the learning rates it validates best."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import numpy as np

from benchmarks.data import Dataset, Split
from benchmarks.regularization.methods import (
    GRADIENT_METHODS,
    L1_METHODS,
    Base,
    Regularized,
)
from benchmarks.regularization.runs import (
    Lane,
    Measured,
    Runs,
    RunSettings,
    arrays,
    initial_params,
    sharpness,
)

Comparison = Literal["gradient", "l1"]

TUNING_SEED = 0
TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What is compared, and how long it is trained.

    Attributes:
      rates: The grid of learning rates, the same for all.
      gradient_strengths: Of gradient regularization, the same for p and z.
      l1_strengths: Of L1, the same for all its forms; 0 is added.
      sparsities: Shares of the kernel entries that pruning sets to 0.
      label_noise: Shares of the training labels that are replaced by a wrong class, for gradient
        regularization; L1 learns from the labels as they are.
      seeds: Number of runs at the chosen rate; the run that chooses it is another one.
      steps: Number of steps.
      warmup: Share of the steps in which gradient regularization gets its strength.
      batch_size: Images in a step.
      hidden: Widths of the hidden layers.
    """

    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    gradient_strengths: tuple[float, ...] = (
        *(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        *(0.1, 0.3, 1.0, 3.0, 10.0),
    )
    l1_strengths: tuple[float, ...] = (
        *(2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 3e-2),
        *(5e-2, 7e-2, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0),
    )
    sparsities: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
    label_noise: tuple[float, ...] = (0.0, 0.2)
    seeds: int = 3
    steps: int = 1000
    warmup: float = 0.25
    batch_size: int = 32
    hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self):
        """Check the ranges.

        Raises:
          ValueError: If a number is out of its range, or there is nothing to compare.
        """
        positive = {"rates", "gradient_strengths", "l1_strengths", "seeds", "steps", "batch_size"}
        shares = {"sparsities", "label_noise", "warmup"}
        for name in (*sorted(positive), *sorted(shares), "hidden"):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if not values and name != "hidden":
                msg = f"`{name}` is empty; name at least one"
                raise ValueError(msg)
            if name in shares and not all(0 <= number < 1 for number in values):
                msg = f"`{name}` must lie in [0, 1); got {value}"
                raise ValueError(msg)
            if name not in shares and not all(0 < number < math.inf for number in values):
                msg = f"`{name}` must be positive and finite; got {value}"
                raise ValueError(msg)


@dataclasses.dataclass(frozen=True)
class Point:
    """A method at one strength.

    Attributes:
      strength: Of the regularizer, or the share that is pruned.
      rate: The learning rate that validation chose.
      rate_at_edge: Whether that is the smallest or the largest of the grid.
      measured: Each with an axis of seeds.
    """

    strength: float
    rate: float
    rate_at_edge: bool
    measured: Measured

    @property
    def score(self) -> float:
        """Mean validation accuracy; -1 if a run diverged."""
        if not np.isfinite(self.measured.train_loss).all():
            return -1.0
        return float(np.mean(self.measured.validation_accuracy))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A method over its strengths.

    Attributes:
      method: Its key.
      points: In order of strength.
      chosen: Index of the point that validation chose: for gradient regularization the most
        accurate, for L1 the one with most zeros that is at most `TOLERANCE` less accurate than
        Adam, or the first if none is.
      sharpness: At the chosen point, the largest eigenvalue of the Hessian of the training loss at
        each seed, and the bounds of its error; None for L1.
    """

    method: str
    points: list[Point]
    chosen: int
    sharpness: np.ndarray | None = None

    @property
    def best(self) -> Point:
        """The chosen point."""
        return self.points[self.chosen]


@dataclasses.dataclass(frozen=True)
class Compared:
    """One comparison on one data set.

    Attributes:
      comparison: Which.
      dataset: Its name.
      label_noise: Share of wrong labels in the training images.
      sweeps: One a method.
    """

    comparison: Comparison
    dataset: str
    label_noise: float
    sweeps: dict[str, Sweep]


def amount_of_work(plan: SweepPlan) -> int:
    """How often `compare` calls `advance` on one data set."""
    return len(plan.label_noise) * len(GRADIENT_METHODS) + len(L1_METHODS)


def compare(plan: SweepPlan, dataset: Dataset, advance: Callable[[], None]) -> list[Compared]:
    """Make both comparisons on `dataset`; gradient regularization once for each label noise."""
    sweeps = _Sweeps(plan, dataset)
    blocks = []
    # Compiling uses one core, and so does a run of a small network.
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:

        def done(name: str, job: Callable[[str], Any]) -> tuple[str, Any]:
            result = job(name)
            advance()
            return name, result

        for noise in plan.label_noise:
            job = functools.partial(sweeps.gradient, dataset=with_wrong_labels(dataset, noise))
            found = dict(pool.map(functools.partial(done, job=job), GRADIENT_METHODS))
            blocks.append(Compared("gradient", dataset.name, noise, found))
        bases: tuple[Base, ...] = ("adam", "bnp_adam")
        rates = dict(zip(bases, pool.map(sweeps.tuned, bases), strict=True))
        job = functools.partial(sweeps.l1, rates=rates)
        found = dict(pool.map(functools.partial(done, job=job), L1_METHODS))
    floor = found["l1_p"][0].score - TOLERANCE
    l1 = {name: Sweep(name, points, _sparsest(points, floor)) for name, points in found.items()}
    return [*blocks, Compared("l1", dataset.name, 0.0, l1)]


def with_wrong_labels(dataset: Dataset, share: float, seed: int = 0) -> Dataset:
    """`dataset` with a share of the training labels replaced by another class at random."""
    rng = np.random.default_rng(seed)
    y = dataset.train.y.copy()
    wrong = rng.choice(len(y), round(share * len(y)), replace=False)
    y[wrong] = (y[wrong] + rng.integers(1, 10, len(wrong))) % 10
    return dataclasses.replace(dataset, train=Split(dataset.train.x, y))


class _Sweeps:
    """What the sweeps on one data set share."""

    def __init__(self, plan: SweepPlan, dataset: Dataset):
        self.plan = plan
        self.dataset = dataset
        self.seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + plan.seeds)
        self.initial = initial_params(plan.hidden, dataset, (TUNING_SEED, *self.seeds))
        self.gradient_runs = {
            name: self._runs(method, self._strengths(name), plan.warmup)
            for name, method in GRADIENT_METHODS.items()
        }

    def gradient(self, name: str, dataset: Dataset) -> Sweep:
        """Gradient regularization by one method on `dataset`, each strength at its best rate."""
        run, strengths = self.gradient_runs[name], self._strengths(name)
        rates = self._best_rates(run, strengths, dataset)
        params, points = self._points(run, strengths, rates, dataset)
        chosen = max(range(len(points)), key=lambda i: points[i].score)
        lanes = slice(chosen * len(self.seeds), (chosen + 1) * len(self.seeds))
        of_chosen = jax.tree.map(lambda p: p[lanes], params)
        eigenvalues = sharpness(self.plan.hidden, of_chosen, *arrays(dataset, "train"))
        return Sweep(name, points, chosen, np.stack(eigenvalues))

    def tuned(self, base: Base) -> float:
        """The best learning rate of `base` without regularization."""
        return self._best_rates(self.gradient_runs[base], (0.0,), self.dataset)[0]

    def l1(self, name: str, rates: dict[Base, float]) -> list[Point]:
        """L1 or pruning by one method, at the rate of its base."""
        method = L1_METHODS[name]
        pruned = method.prune_after is not None
        strengths = (0.0, *(self.plan.sparsities if pruned else self.plan.l1_strengths))
        run = self._runs(method, strengths)
        return self._points(run, strengths, [rates[method.base]] * len(strengths), self.dataset)[1]

    def _strengths(self, name: str) -> tuple[float, ...]:
        return (0.0,) if GRADIENT_METHODS[name].space == "none" else self.plan.gradient_strengths

    def _runs(self, method: Regularized, strengths: Sequence[float], warmup: float = 0.0) -> Runs:
        plan, lanes = self.plan, len(strengths) * len(self.seeds)
        steps = round(warmup * plan.steps)
        training = RunSettings(plan.hidden, plan.batch_size, plan.steps, steps, lanes)
        return Runs(method, training, self.initial)

    def _best_rates(self, run: Runs, strengths: Sequence[float], dataset: Dataset) -> list[float]:
        """Each strength's rate of the best validation accuracy; ties go to the lower loss."""
        rates = self.plan.rates
        _, m = run([Lane(rate, s, TUNING_SEED) for s in strengths for rate in rates], dataset)
        accuracy = np.where(np.isfinite(m.train_loss), m.validation_accuracy, -1.0)
        scores = list(zip(accuracy, -np.nan_to_num(m.validation_loss, nan=np.inf), strict=True))
        rows = [scores[i : i + len(rates)] for i in range(0, len(scores), len(rates))]
        return [rates[max(range(len(rates)), key=row.__getitem__)] for row in rows]

    def _points(
        self, run: Runs, strengths: Sequence[float], rates: Sequence[float], dataset: Dataset
    ) -> tuple[Any, list[Point]]:
        """Final parameters, by strength and seed, and what was measured at each strength."""
        pairs = list(zip(strengths, rates, strict=True))
        lanes = [Lane(rate, s, seed) for s, rate in pairs for seed in self.seeds]
        params, measured = run(lanes, dataset)
        n, edges = len(self.seeds), (min(self.plan.rates), max(self.plan.rates))
        return params, [
            Point(s, rate, rate in edges, Measured(*(m[k * n : (k + 1) * n] for m in measured)))
            for k, (s, rate) in enumerate(pairs)
        ]


def _sparsest(points: list[Point], floor: float) -> int:
    def sparsity(i: int) -> tuple[float, float]:
        measured = points[i].measured
        return float(np.mean(measured.zeros)), float(np.mean(measured.near_zeros))

    return max((i for i in range(len(points)) if points[i].score >= floor), key=sparsity, default=0)
