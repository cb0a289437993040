"""Scores after equal time rather than equal steps, where steps were timed."""

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contest.summary import Contest, Summary, curve, steps
from benchmarks.contest.tables import table

NOTE = """\
Test scores in points of a hundred, mean of the seeds, when as many seconds are over as a whole run
of Adam, or of AdamW, takes; the curves are read between their points, and a `-` stands where a
method is not at its first point by then. What a step takes, in multiples of SGD's, is from `python
-m benchmarks cost-whiten --turns 5`, on networks of the same shapes. Rates are those that were
chosen for whole runs: a method that is stopped early could have had a better one."""

# Problems, and the networks on which their steps were timed.
WORKLOADS = {
    **{f"fc-cifar10-b{n}-*": f"3072-100-100-100-10, batch {n}" for n in (60, 6, 1)},
    **{f"cnn-cifar10-b{n}-*": f"CNN of 5 layers, batch {n}" for n in (128, 2, 1)},
    "text-transformer": "transformer, 2 blocks of width 64, 16 texts of 64",
}
# Methods, and what they are called where steps were timed.
TIMED = {
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "Adam",
    "ready_adam": "Adam in z",
    "ready_adamw": "Adam in z",
    "muon": "Muon",
    "whiten_adam": "whiten_adam",
    "whiten_muon": "whiten_muon",
}
_REFERENCE = "Adam"


def read_costs(path: Path) -> dict[str, Any]:
    """What `cost-whiten` has timed; nothing if there is no such file."""
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))["results"].get("time", {})


def section(compared: Sequence[Contest], costs: Mapping[str, Any]) -> list[str]:
    """The table, if anything that was compared was timed."""
    rows = []
    for contest in compared:
        name = contest.problem["name"]
        for pattern, workload in WORKLOADS.items():
            if fnmatch.fnmatch(name, pattern) and workload in costs:
                rows += _rows(contest, costs[workload])
    if not rows:
        return []
    header = ["problem", "method", "a step / SGD's", "in whole steps", "in Adam's time"]
    return ["## After equal time", NOTE, table(header, rows, words=2)]


def _rows(contest: Contest, times: Mapping[str, Any]) -> list[list[str]]:
    found: list[tuple[Summary, float]] = [
        (contest.summaries[name], times[label]["ratio"])
        for name, label in TIMED.items()
        if name in contest.summaries and contest.summaries[name].note is None and label in times
    ]
    scores = [
        (at_end(summary), after(summary, times[_REFERENCE]["ratio"] / ratio))
        for summary, ratio in found
    ]
    columns = zip(*scores, strict=True)
    bests = [max((x for x in column if x is not None), default=None) for column in columns]

    def shown(value: float | None, best: float | None) -> str:
        if value is None:
            return "-"
        return f"**{100 * value:.1f}**" if value == best else f"{100 * value:.1f}"

    return [
        [contest.problem["name"], summary.label, f"{ratio:.2f}", *map(shown, pair, bests)]
        for (summary, ratio), pair in zip(found, scores, strict=True)
    ]


def at_end(summary: Summary) -> float:
    """Mean score after all steps."""
    return summary.final["score"].mean


def after(summary: Summary, share: float) -> float | None:
    """Mean score after a share of the steps, at most all; None before the first point."""
    scores = curve(summary.cell, "score")
    assert scores is not None  # It takes part, so it has final runs.
    points = steps(summary.cell.problem)
    at = min(share, 1.0) * points[-1]
    return None if at < points[0] else float(np.interp(at, points, scores.mean))
