"""The table and the figure of an application's results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.applications.base import Application
from benchmarks.contest.summary import Range, against
from benchmarks.contest.tables import table


def as_table(application: Application, results: Mapping[str, Any]) -> str:
    """A row for each contestant, in Markdown, and against the best that the setting allows.

    Won or lost where the ranges of the seeds do not overlap.
    """
    found = results["contestants"]
    legal = {n: x for n, x in found.items() if x["legal"] and not x["ours"]}
    best = min(legal, key=lambda name: _cost(application, legal[name]).mean)
    rows = []
    for name, result in found.items():
        verdict = "against it" if name == best else ""
        if result["ours"]:
            verdict = against(_cost(application, result), _cost(application, found[best]))
        elif not result["legal"]:
            verdict = "not allowed here"
        rows.append([result["label"], f"{result['rate']:g}", _range(result), verdict])
    header = ["", "rate", application.measure, f"against {found[best]['label']}"]
    return table(header, rows)


def draw(application: Application, results: Mapping[str, Any], path: Path) -> None:
    """Mean and range of the seeds over the training, one line for each contestant."""
    figure, axis = plt.subplots(figsize=(9.0, 4.2), layout="constrained")
    for contestant in application.contestants:
        result = results["contestants"][contestant.name]
        curves = np.array(
            [[np.nan if x is None else x for x in curve] for curve in result["curves"]]
        )
        steps = results["steps"] / curves.shape[1] * np.arange(1, curves.shape[1] + 1)
        style: dict[str, Any] = {"color": contestant.color, "ls": contestant.dashes}
        average = np.median(curves, axis=0)
        axis.plot(steps, average, lw=1.6, label=contestant.label, **style)
        band = np.min(curves, axis=0), np.max(curves, axis=0)
        axis.fill_between(steps, *band, color=contestant.color, alpha=0.08, lw=0)
    if application.log:
        axis.set_yscale("log")
    axis.set_xlabel(application.progress)
    axis.set_ylabel(application.measure)
    axis.set_title(application.title, fontsize="medium")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if application.top is not None:
        axis.set_ylim(top=application.top)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _scores(result: Mapping[str, Any]) -> list[float]:
    return [np.nan if score is None else score for score in result["scores"]]


def _cost(application: Application, result: Mapping[str, Any]) -> Range:
    """Less is better; a seed that diverged costs without bound."""
    sign = -1.0 if application.higher_is_better else 1.0
    costs = [sign * score if np.isfinite(score) else np.inf for score in _scores(result)]
    return Range(float(np.mean(costs)), min(costs), max(costs))


def _range(result: Mapping[str, Any]) -> str:
    scores = _scores(result)
    if not all(np.isfinite(scores)):
        return f"{sum(not np.isfinite(x) for x in scores)} of {len(scores)} seeds diverged"
    return f"{np.mean(scores):.3g} ({min(scores):.3g} to {max(scores):.3g})"
