"""What the cells of a problem say: final numbers over the seeds, steps to a target, who won."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks.contest.cells import Cell, Run
from benchmarks.training.methods import METHODS

Quantity = Literal["train_loss", "loss", "score"]
Verdict = Literal["won", "lost", "even"]

# What must agree for two cells to be comparable.
_SETTING = ("task", "batch_size", "steps", "points", "scale", "data")


class Range(NamedTuple):
    """Over the seeds; a seed that diverged has an infinite loss and a score of minus infinity."""

    mean: Any
    low: Any
    high: Any


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a method reached on a problem.

    Attributes:
      cell: The runs.
      note: Why it takes no part in comparisons: skipped, incomplete, diverged at every rate, or
        measured in another setting. None if it takes part.
      at_edge: Whether the chosen rate is the lowest or highest of those tried.
      final: Range of each quantity at the last step; empty if there are no final runs.
      diverged: Number of final runs that ended in a number that is not finite.
      steps_to_target: First point at which the mean training loss was no larger than the problem's
        target; None if there was none.
      time_to_target: Seconds for as many steps, by the cell's fastest run.
    """

    cell: Cell
    note: str | None
    at_edge: bool
    final: dict[Quantity, Range]
    diverged: int
    steps_to_target: int | None
    time_to_target: float | None

    @property
    def name(self) -> str:
        """Of the method."""
        return self.cell.method["name"]

    @property
    def label(self) -> str:
        """Of the method, in tables and figures."""
        return self.cell.method["label"]

    @property
    def ours(self) -> bool:
        """Whether the method is this library's."""
        return self.cell.method["ours"]


@dataclasses.dataclass(frozen=True)
class Contest:
    """A problem and all methods that were run on it.

    Attributes:
      problem: As in the cells.
      summaries: By the method's name; those of others first.
      target: Final mean training loss of SGD at its tuned rate; None if it has none.
    """

    problem: dict[str, Any]
    summaries: dict[str, Summary]
    target: float | None

    def best(self, quantity: Quantity, ours: bool | None = None) -> Summary | None:
        """Of the methods that take part, or of a side, the one with the best mean, if any."""
        sides = (False, True) if ours is None else (ours,)
        side = [s for s in self.summaries.values() if s.ours in sides and s.note is None]
        return min(side, key=lambda s: _cost(s, quantity).mean, default=None)

    def verdicts(self, quantity: Quantity) -> dict[str, Verdict]:
        """Of each of our methods against the best of the others; empty if there is none."""
        rival = self.best(quantity, ours=False)
        if rival is None:
            return {}
        return {
            name: compare(s, rival, quantity)
            for name, s in self.summaries.items()
            if s.ours and s.note is None
        }


def contests(cells: Iterable[Cell]) -> list[Contest]:
    """The cells by problem, in the order of their first cell."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.problem["name"], []).append(cell)
    return [_contest(sorted(group, key=_place)) for group in groups.values()]


def compare(a: Summary, b: Summary, quantity: Quantity) -> Verdict:
    """Whether `a` won against `b`, by what they ended with."""
    return against(_cost(a, quantity), _cost(b, quantity))


def against(cost: Range, rival: Range) -> Verdict:
    """Whether a cost won against another; even if the ranges of their seeds overlap.

    A side of which a seed diverged loses to one of which none did.
    """
    both = np.isfinite(cost.mean) == np.isfinite(rival.mean)
    if both and cost.low <= rival.high and rival.low <= cost.high:
        return "even"
    return "won" if cost.mean < rival.mean else "lost"


def final_runs(cell: Cell) -> list[Run]:
    """The runs at the chosen rate that are measured on the test split."""
    return [run for run in cell.runs if run.role == "final" and run.rate == cell.rate]


def steps(problem: dict[str, Any]) -> np.ndarray:
    """At which the points of a problem's curves lie."""
    return np.arange(1, problem["points"] + 1) * (problem["steps"] // problem["points"])


def curve(cell: Cell, quantity: Quantity) -> Range | None:
    """A quantity at each point over the final runs; None if there are none."""
    runs = final_runs(cell)
    if not runs:
        return None
    worst = -np.inf if quantity == "score" else np.inf
    values = np.stack([getattr(run, quantity) for run in runs])
    values = np.where(np.isfinite(values), values, worst)
    return Range(values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def _contest(cells: list[Cell]) -> Contest:
    reference = next((cell for cell in cells if cell.skipped is None), cells[0]).problem
    notes = {cell.method["name"]: _note(cell, reference) for cell in cells}
    target = None
    for cell in cells:
        if cell.method["name"] == "sgd" and notes["sgd"] is None:
            loss = curve(cell, "train_loss")
            if loss is not None and np.isfinite(loss.mean[-1]):
                target = float(loss.mean[-1])
    summaries = {
        cell.method["name"]: _summary(cell, notes[cell.method["name"]], target) for cell in cells
    }
    return Contest(reference, summaries, target)


def _note(cell: Cell, reference: dict[str, Any]) -> str | None:
    if cell.skipped is not None:
        return f"skipped: {cell.skipped}"
    other = [key for key in _SETTING if cell.problem[key] != reference[key]]
    if other:
        return f"another setting than the others': {', '.join(other)}"
    done = len(final_runs(cell))
    if cell.complete and cell.rate is None:
        return "diverged at every rate"
    if not cell.complete or done < cell.seeds or not done:
        return f"incomplete: {done} of {cell.seeds} final runs"
    return None


def _summary(cell: Cell, note: str | None, target: float | None) -> Summary:
    runs = final_runs(cell)
    final: dict[Quantity, Range] = {}
    quantities: tuple[Quantity, ...] = ("train_loss", "loss", "score")
    for quantity in quantities:
        values = curve(cell, quantity)
        if values is not None:
            final[quantity] = Range(*(float(value[-1]) for value in values))
    reached = None if target is None or note is not None else _steps_to(cell, target)
    return Summary(
        cell=cell,
        note=note,
        at_edge=_at_edge(cell),
        final=final,
        diverged=sum(not all(np.isfinite(getattr(r, q)[-1]) for q in quantities) for r in runs),
        steps_to_target=reached,
        time_to_target=None if reached is None else reached * _seconds_per_step(cell),
    )


def _seconds_per_step(cell: Cell) -> float:
    """Of the cell's fastest run that went to the end; NaN if all diverged, and so ended early."""
    whole = [run.seconds for run in cell.runs if np.isfinite(run.train_loss[-1])]
    return min(whole, default=np.nan) / cell.problem["steps"]


def _steps_to(cell: Cell, target: float) -> int | None:
    loss = curve(cell, "train_loss")
    if loss is None:
        return None
    reached = np.flatnonzero(loss.mean <= target)
    return int(steps(cell.problem)[reached[0]]) if reached.size else None


def _at_edge(cell: Cell) -> bool:
    # The runner may have gone on beyond the grid.
    tried = {*cell.grid, *(run.rate for run in cell.runs if run.role == "tuning")}
    return len(tried) > 1 and cell.rate in (min(tried), max(tried))


def _cost(summary: Summary, quantity: Quantity) -> Range:
    """The quantity as one of which less is better."""
    value = summary.final[quantity]
    return Range(-value.mean, -value.high, -value.low) if quantity == "score" else value


def _place(cell: Cell) -> tuple[bool, int, str]:
    names: list[str] = list(METHODS)
    name = cell.method["name"]
    return cell.method["ours"], names.index(name) if name in names else len(names), name
