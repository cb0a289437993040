"""The runs of a contest: what is still to do, in order, each kept as soon as it is done."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contest import cells
from benchmarks.contest.cells import Cell, Run
from benchmarks.data import Split
from benchmarks.environment import environment
from benchmarks.problems.base import Data, Problem, Scale
from benchmarks.training.kfac import KfacTrainer
from benchmarks.training.methods import METHODS, Method
from benchmarks.training.trainer import Trainer
from benchmarks.training.tuning import best_rate, next_rate

TUNING_SEED = 0
# Methods that are no Optax transformations.
TRAINERS = {"kfac": KfacTrainer}


class SettingsError(Exception):
    """Results that were made with other settings; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One method on one problem.

    Attributes:
      problem: Where.
      name: Name of the method.
      data: What the problem's `load` gave.
      scale: Which size of the problem it is.
      grid: Learning rates, increasing.
      seeds: Number of runs at the chosen rate.
      path: File of the cell.
    """

    problem: Problem
    name: str
    data: Data
    scale: Scale
    grid: tuple[float, ...]
    seeds: int
    path: Path

    @property
    def method(self) -> Method:
        """The method."""
        return METHODS[self.name]

    def empty(self) -> Cell:
        """The cell before any run."""
        problem = {
            name: getattr(self.problem, name)
            for name in ("name", "title", "task", "batch_size", "steps", "points", "source")
        }
        problem |= {"scale": self.scale, "data": self.data.facts}
        return Cell(
            # Through JSON, so that it equals what is read back.
            problem=json.loads(json.dumps(problem)),
            method={"name": self.name, "label": self.method.label, "ours": self.method.needs_stats},
            grid=list(self.grid),
            seeds=self.seeds,
        )


def resume(job: Job, say: Callable[[str], None]) -> Cell:
    """What has been done of a job; a corrupt file is reported, set aside, and begun anew.

    Raises:
      SettingsError: If the file holds runs with other settings.
    """
    empty = job.empty()
    if not job.path.exists():
        return empty
    try:
        found = cells.read(job.path)
    except cells.CellError as error:
        aside = cells.set_aside(job.path)
        say(f"{job.path} is corrupt ({error}); set aside as {aside.name}, its runs are done again")
        return empty
    if found.skipped is not None:
        return empty
    for name in ("problem", "method", "grid"):
        was, now = getattr(found, name), getattr(empty, name)
        if was != now:
            msg = (
                f"{job.path} was made with another {name} ({_difference(was, now)}); choose "
                "another --results, or delete it"
            )
            raise SettingsError(msg)
    return dataclasses.replace(found, seeds=max(found.seeds, job.seeds), complete=False)


def run(job: Job, say: Callable[[str], None], advance: Callable[[], None]) -> Cell:
    """Do what is still to do of a job, and write the cell after each run.

    Args:
      job: What to do.
      say: Called with messages for the user.
      advance: Called after each run.

    Raises:
      SettingsError: If the cell's file holds runs with other settings.
    """
    cell = resume(job, say)
    make_trainer = TRAINERS.get(job.name, Trainer)
    trainer = make_trainer(job.problem, job.name, job.method, job.data)
    here = environment()
    while True:
        scores = tuning_scores(cell, job.problem.drift is not None)
        learned = {rate: _if_learned(score, job) for rate, score in scores.items()}
        rate = next_rate(learned, cell.grid, job.method.start)
        if rate is not None:
            cell = _with(cell, trainer, "tuning", rate, TUNING_SEED, job.data.validation, here)
        else:
            learned = learned if max(learned.values()) > -math.inf else scores
            rate = best_rate(learned, cell.grid, job.method.start)
            usable = scores[rate] > -math.inf
            cell = _at(cell, rate if usable else None)
            done = {run.seed for run in cell.runs if run.role == "final"}
            left = [seed for seed in range(1, cell.seeds + 1) if seed not in done]
            if not usable or not left:
                cell = dataclasses.replace(cell, complete=True)
                cells.write(job.path, cell)
                return cell
            cell = _with(cell, trainer, "final", rate, left[0], job.data.test, here)
        cells.write(job.path, cell)
        advance()


def tuning_scores(cell: Cell, whole: bool) -> dict[float, float]:
    """By rate, what it is chosen by: the mean validation score over the last quarter of the run.

    Args:
      cell: Runs.
      whole: Whether it is the mean over the whole run, as where the world changes on the way.
    """
    last = 0 if whole else -max(1, cell.problem["points"] // 4)
    means = {
        run.rate: float(np.mean(run.score[last:])) for run in cell.runs if run.role == "tuning"
    }
    return {rate: mean if math.isfinite(mean) else -math.inf for rate, mean in means.items()}


def chance(job: Job) -> float:
    """The score that no learning explains: a constant guess, and two standard errors."""
    y = np.asarray(job.data.validation.y)
    if job.problem.task == "regression":
        return 0.0
    share = np.unique(y, return_counts=True)[1].max() / y.size
    return float(share + 2.0 * math.sqrt(share * (1.0 - share) / y.size))


def _if_learned(score: float, job: Job) -> float:
    """-inf for a score by chance: among those, a search would stop anywhere."""
    return score if score > chance(job) else -math.inf


def _at(cell: Cell, rate: float | None) -> Cell:
    """The cell at the chosen rate, without final runs at another that was chosen before."""
    runs = [run for run in cell.runs if run.role == "tuning" or run.rate == rate]
    return dataclasses.replace(cell, rate=rate, runs=runs)


def _with(
    cell: Cell,
    trainer: Trainer,
    role: cells.Role,
    rate: float,
    seed: int,
    split: Split,
    here: dict[str, Any],
) -> Cell:
    """The cell with one more run."""
    curves = trainer(rate, seed, split)
    known = cell.environments if here in cell.environments else [*cell.environments, here]
    run = Run(
        role=role,
        rate=rate,
        seed=seed,
        seconds=float(f"{curves.seconds:.3g}"),
        environment=known.index(here),
        train_loss=curves.train_loss,
        loss=curves.loss,
        score=curves.score,
    )
    # As it will be read back: a choice must not depend on digits that the file has not.
    run = Run.from_json(run.as_json(), cell.problem["points"], len(known))
    return dataclasses.replace(cell, environments=known, runs=[*cell.runs, run])


def _difference(was: Any, now: Any) -> str:
    if isinstance(was, dict) and isinstance(now, dict):
        keys: Sequence[str] = sorted(key for key in was | now if was.get(key) != now.get(key))
        return ", ".join(
            f"{key}: {_short(was.get(key))}, now {_short(now.get(key))}" for key in keys
        )
    return f"{was}, now {now}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
