"""The figures of the benchmark: training loss and test score over the steps."""

import dataclasses
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from benchmarks.contest.cells import Cell
from benchmarks.contest.summary import Contest, Quantity, Summary, contests, curve, steps
from benchmarks.contest.tables import score_name
from benchmarks.training.methods import METHODS

LIMIT = 7
# More problems in a figure are too small at the width of a page.
_COLUMNS = 2
# Width of an entry of the legend, in inches.
_ENTRY = 2.3
_ROWS: tuple[Quantity, ...] = ("train_loss", "score")
# For methods that share a color with another in the same figure.
_MARKERS = ("", "o", "s", "^", "D")
_UNKNOWN = ("#999999", "#882255", "#44AA99", "#332288")


@dataclasses.dataclass(frozen=True)
class Group:
    """Problems that share a figure.

    Attributes:
      name: Of the file.
      title: Above the figure.
      problems: Patterns of their names.
      methods: Those that the paper's figure shows.
    """

    name: str
    title: str
    problems: tuple[str, ...]
    methods: tuple[str, ...]


# A problem belongs to the first group that it fits.
GROUPS = (
    Group(
        "figure-3",
        "Fully connected network, batches of 60 (the paper's Figure 3)",
        ("fc-mnist-b60-*", "fc-cifar10-b60-*"),
        ("sgd", "batchnorm", "layernorm", "bnp_sgd"),
    ),
    Group(
        "figure-4",
        "Small batches (the paper's Figure 4)",
        ("fc-cifar10-b6-*", "fc-cifar10-b1-*", "cnn-cifar10-b1-*"),
        ("sgd", "batchnorm", "batchrenorm", "layernorm", "four_things", "bnp_sgd"),
    ),
    Group(
        "figure-5",
        "Convolutional network (the paper's Figure 5)",
        ("cnn-cifar10-*",),
        ("sgd", "batchnorm", "batchrenorm", "four_things", "bnp_sgd"),
    ),
    Group(
        "figures-6-7",
        "Residual networks (the paper's Figures 6 and 7)",
        ("resnet*",),
        ("batchnorm_momentum", "groupnorm_momentum", "bnp_momentum", "bnp_gn_momentum"),
    ),
    Group(
        "drift",
        "Inputs that drift in the middle third (shaded)",
        ("drift-*",),
        ("sgd", "adam", "batchnorm", "layernorm", "bnp_sgd", "adam_z"),
    ),
    Group(
        "further-images",
        "Fully connected network, other images",
        ("fc-*",),
        ("sgd", "batchnorm", "layernorm", "bnp_sgd", "adam_z"),
    ),
    Group("others", "Other data", ("*",), ("sgd", "adam", "layernorm", "bnp_sgd", "adam_z")),
)


def save_figures(cells: Iterable[Cell], folder: Path) -> dict[str, Path]:
    """Draw the problems of each group, two to a figure, and write `<folder>/<group>-1.png`, ...

    Returns:
      The figures, by the name of the problem that is the first in each.
    """
    by_group: dict[str, list[Contest]] = {}
    for contest in sorted(contests(cells), key=place):
        by_group.setdefault(group_of(contest.problem["name"]).name, []).append(contest)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for group in GROUPS:
        drawn = [c for c in by_group.get(group.name, []) if chosen(c, group.methods)]
        for start in range(0, len(drawn), _COLUMNS):
            path = folder / f"{group.name}-{1 + start // _COLUMNS}.png"
            draw(drawn[start : start + _COLUMNS], group).savefig(path, dpi=110)
            paths[drawn[start].problem["name"]] = path
    return paths


def group_of(problem: str) -> Group:
    """The figure that a problem belongs to."""
    return next(g for g in GROUPS if any(fnmatch(problem, pattern) for pattern in g.problems))


def place(contest: Contest) -> tuple[int, int, str]:
    """What problems are sorted by: the figure, then from large to small batches."""
    name = contest.problem["name"]
    return GROUPS.index(group_of(name)), -contest.problem["batch_size"], name


def chosen(contest: Contest, methods: Sequence[str], limit: int = LIMIT) -> list[Summary]:
    """What is drawn: the best baseline, the best of ours, and then as many of `methods` as fit."""
    best = [contest.best("score", ours) for ours in (False, True)]
    names = [s.name for s in best if s is not None]
    names += [m for m in methods if m not in names and _drawable(contest.summaries.get(m))]
    return [s for name, s in contest.summaries.items() if name in names[:limit]]


def draw(group: Sequence[Contest], about: Group) -> Figure:
    """A figure with a column for each problem: training loss above, test score below.

    Lines are means over the seeds, bands reach from the lowest to the highest. What diverged is
    drawn at the panel's edge.
    """
    size = (max(1.0 + 3.6 * len(group), 7.5), 1.3 + 2.6 * len(_ROWS))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(_ROWS), len(group), squeeze=False)
    styles = _styles(s for contest in group for s in chosen(contest, about.methods))
    for contest, pair in zip(group, axes.T, strict=True):
        for axis, quantity in zip(pair, _ROWS, strict=True):
            _panel(axis, contest, chosen(contest, about.methods), quantity, styles)
        pair[0].set_title(fill(contest.problem["title"], 36), fontsize="medium")
        pair[-1].set_xlabel("step")
    # One entry a method, whichever panels it is in; the lines below are the solid ones.
    handles = {line.get_label(): line for axis in axes[-1] for line in axis.get_lines()[::-1]}
    entries = [(handles[label], label) for label in styles if label in handles]
    figure.legend(
        *zip(*entries, strict=True),
        loc="outside lower center",
        ncols=min(len(entries), int(size[0] / _ENTRY)),
        frameon=False,
    )
    figure.suptitle(about.title)
    return figure


def _panel(
    axis: Any,
    contest: Contest,
    summaries: Sequence[Summary],
    quantity: Quantity,
    styles: dict[str, dict[str, Any]],
) -> None:
    problem = contest.problem
    percent = 100 if quantity == "score" and problem["task"] == "classification" else 1
    ranges = {s.label: curve(s.cell, quantity) for s in summaries}
    curves = {label: [percent * x for x in r] for label, r in ranges.items() if r is not None}
    low, high = _limits([c[0] for c in curves.values()], quantity, percent)
    at = steps(problem)
    for summary in summaries:
        mean, bottom, top = (np.clip(x, low, high) for x in curves[summary.label])
        style = styles[summary.label]
        axis.plot(
            at,
            mean,
            "-" if quantity == "score" else "--",
            lw=2.2 if summary.ours else 1.5,
            markevery=max(1, len(at) // 8),
            markersize=4,
            label=summary.label,
            **style,
        )
        axis.fill_between(at, bottom, top, color=style["color"], alpha=0.15, lw=0)
    if "drift" in problem["name"]:
        axis.axvspan(problem["steps"] / 3, 2 * problem["steps"] / 3, color="0.9", zorder=0)
    if quantity == "train_loss":
        axis.set_yscale("log")
        # A power of ten alone may be the only one in a panel.
        bottom, top = axis.get_ylim()
        subs = (1.0, 2.0, 5.0) if top < 100 * bottom else (1.0,)
        axis.yaxis.set_major_locator(LogLocator(subs=subs))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylabel("training loss" + (", nats" if problem["task"] == "classification" else ""))
    else:
        axis.set_ylabel(score_name(problem))
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.grid(alpha=0.25)


def _limits(means: Sequence[np.ndarray], quantity: Quantity, percent: int) -> tuple[float, float]:
    """The values beyond which lines are cut, for what diverged to stay in the picture."""
    if quantity == "score":
        return (0.0, 100.0) if percent == 100 else (-0.2, 1.0)
    finite = np.concatenate([mean[np.isfinite(mean)] for mean in means])
    positive = finite[finite > 0]
    # A run that is about to diverge must not stretch the axis of all others.
    starts = [mean[0] for mean in means if np.isfinite(mean[0])]
    high = 3 * np.median(starts) if starts else 1.0
    return max(float(np.min(positive, initial=high)) / 3, 1e-6), float(high)


def _styles(summaries: Iterable[Summary]) -> dict[str, dict[str, Any]]:
    """Color and marker by label, in the order of `METHODS`; no two alike."""
    names = list(METHODS)
    unknown = cycle(_UNKNOWN)
    found = {s.name: s for s in summaries}
    styles: dict[str, dict[str, Any]] = {}
    used: dict[str, int] = {}
    for name in sorted(found, key=lambda n: (names.index(n) if n in names else len(names), n)):
        color = METHODS[name].color if name in METHODS else next(unknown)
        marker = _MARKERS[used.setdefault(color, 0) % len(_MARKERS)]
        used[color] += 1
        styles[found[name].label] = {"color": color, "marker": marker}
    return styles


def _drawable(summary: Summary | None) -> bool:
    """Whether it has curves; those of an unfinished method would mislead."""
    return summary is not None and summary.note is None
