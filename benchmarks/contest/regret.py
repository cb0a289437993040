"""What documented learning rates cost beside tuned ones, and defaults beside what they replace."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.contest.cells import Cell
from benchmarks.contest.runner import tuning_scores
from benchmarks.contest.summary import Contest, Range, Summary, against
from benchmarks.contest.tables import points, table
from benchmarks.problems.halves import is_held_out
from benchmarks.training.methods import METHODS

# A ready-made optimizer, what it replaces, and the same with the paper's options.
REPLACES = {
    "ready_sgd": ("sgd", "bnp_sgd"),
    "ready_adam": ("adam", "adam_z"),
    "ready_adamw": ("adamw", "adamw_z"),
}
NOTE = """\
Every search starts at the method's documented rate, so that it is among those that were tried; the
searches of the whitened optimizers began at 0.03 and 0.003, their defaults at that time. The regret
is the best validation score of the search less the one there, in points of a hundred; a score below
that of a constant guess, 0, counts as 0. Nothing was chosen on the held-out half but learning
rates, by the same search for every method; and the defaults of the whitened optimizers, which do as
well on the development half at three times the rate, and on the deep transformer not at all."""

HALVES = {False: "Development half", True: "Held-out half"}
_DRIFTING = "drift-"


class Regret(NamedTuple):
    """Of a method on a problem, validation scores in points of a hundred."""

    tuned: float
    documented: float

    @property
    def points(self) -> float:
        """What the documented rate costs."""
        return self.tuned - self.documented


def regret(cell: Cell) -> Regret | None:
    """None if the documented rate was not tried."""
    name = cell.problem["name"]
    scores = tuning_scores(cell, name.startswith(_DRIFTING))
    start = METHODS[cell.method["name"]].start
    if start not in scores:
        return None
    return Regret(100 * max(0.0, *scores.values()), 100 * max(0.0, scores[start]))


def section(compared: Sequence[Contest]) -> list[str]:
    """The tables: regrets, and defaults against what they replace."""
    if not any(name in contest.summaries for contest in compared for name in REPLACES):
        return []
    return [
        "## At the documented learning rates",
        NOTE,
        *(text for half in HALVES for text in _regrets(compared, half)),
        "## The defaults against what they replace",
        "Test scores at the tuned rates, in points of a hundred: mean (lowest to highest) over the "
        "seeds. Won or lost where the ranges of the seeds do not overlap.",
        *(text for half in HALVES for text in _duels(compared, half)),
    ]


def _regrets(compared: Sequence[Contest], held_out: bool) -> list[str]:
    names = [name for ready, (old, _) in REPLACES.items() for name in (old, ready)]
    names += [name for name, method in METHODS.items() if method.from_z]
    names += ["whiten_adam", "whiten_muon"]
    rows, columns = [], {name: [] for name in names}
    for contest in compared:
        problem = contest.problem["name"]
        if is_held_out(problem) != held_out:
            continue
        row = []
        for name in names:
            summary = contest.summaries.get(name)
            found = None if summary is None else regret(summary.cell)
            row.append("-" if found is None else f"{found.points:.1f} of {found.tuned:.1f}")
            if found is not None:
                columns[name].append(found.points)
        if any(cell != "-" for cell in row):
            rows.append([problem, *row])
    if not rows:
        return []
    for label, reduce in (("mean", np.mean), ("worst", np.max)):
        values = [f"**{reduce(c):.1f}**" if c else "-" for c in columns.values()]
        rows.append([f"**{label}**", *values])
    header = [f"{METHODS[name].label}, {METHODS[name].start:g}" for name in names]
    return [f"### {HALVES[held_out]}", table(["regret", *header], rows)]


def _duels(compared: Sequence[Contest], held_out: bool) -> list[str]:
    rows = []
    for contest in compared:
        problem = contest.problem["name"]
        if is_held_out(problem) != held_out:
            continue
        for ready, rivals in REPLACES.items():
            ours = contest.summaries.get(ready)
            if ours is None or not ours.final:
                continue
            row = [problem, METHODS[ready].label, points(ours)]
            for rival in rivals:
                theirs = contest.summaries.get(rival)
                if theirs is None or not theirs.final:
                    row.append("-")
                    continue
                verdict = against(_cost(ours), _cost(theirs))
                row.append(f"{points(theirs)}, {verdict}")
            rows.append(row)
    header = ["problem", "default", "score", "against what it replaces", "against the paper's"]
    return [f"### {HALVES[held_out]}", table(header, rows, words=2)] if rows else []


def _cost(summary: Summary) -> Range:
    score = summary.final["score"]
    return Range(-score.mean, -score.high, -score.low)
