"""The figure of a contest: test accuracy by batch size, a panel for each network and inputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from benchmarks.demo.comparison import Entry, Outcome
from benchmarks.demo.plan import DemoPlan, Setting
from benchmarks.training.methods import METHODS

FORMATS = (".png", ".pdf", ".svg")

_TICKS = (0, 50, 80, 90, 95, 98, 99, 99.5)
# Of the distance between two batch sizes, how much of it the methods at one of them take up.
_SPREAD = 0.6


def save_figure(plan: DemoPlan, outcome: Outcome, title: str, path: Path) -> None:
    """Draw the test accuracy at the last step of every method, and write the figure to `path`.

    A panel is a network and a kind of inputs. Points are means over seeds at the rate that
    validation chose, bars reach from the lowest to the highest seed, rings are means at the
    documented rate. Accuracies are spaced by the logarithm of the error.
    """
    figure, axes = plt.subplots(
        len(plan.inputs),
        len(plan.models),
        figsize=(1.0 + 4.2 * len(plan.models), 1.3 + 2.6 * len(plan.inputs)),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, inputs in zip(axes, plan.inputs, strict=True):
        for axis, model in zip(row, plan.models, strict=True):
            for place, batch_size in enumerate(plan.batch_sizes):
                _draw(axis, place, outcome.entries[Setting(model, inputs, batch_size)])
            axis.set_title(f"{model.upper()}, {inputs} inputs", fontsize="medium")
            axis.set_xticks(range(len(plan.batch_sizes)), map(str, plan.batch_sizes))
            axis.tick_params(axis="x", length=0)
            axis.grid(axis="y", alpha=0.25)
        row[0].set_ylabel("test accuracy, %")
        _scale(row[0])
    for axis in axes[-1]:
        axis.set_xlabel("batch size")
    lines = [_handle(METHODS[name].label, METHODS[name].color) for name in plan.methods]
    lines.append(_handle("at the documented rate", "gray", fillstyle="none"))
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize="medium", x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _handle(label: str, color: str, **options: Any) -> Line2D:
    return Line2D([], [], label=label, color=color, marker="o", linestyle="none", **options)


def _draw(axis: Any, place: int, entries: Sequence[Entry]) -> None:
    """The methods at one batch size, side by side."""
    offsets = _SPREAD * (np.arange(len(entries)) + 0.5) / len(entries) - _SPREAD / 2
    for entry, x in zip(entries, place + offsets, strict=True):
        method = METHODS[entry.method]
        accuracies = 100 * entry.test_accuracy[:, -1]
        axis.plot([x, x], [accuracies.min(), accuracies.max()], color=method.color, lw=1.5)
        axis.plot(x, accuracies.mean(), "o", color=method.color, ms=6)
        documented = 100 * np.mean(entry.documented_accuracy)
        axis.plot(x, documented, "o", color=method.color, ms=6, fillstyle="none")


def _scale(axis: Any) -> None:
    """The vertical axis of a row, to the ticks beyond what is drawn."""
    panels = axis.get_shared_y_axes().get_siblings(axis)
    drawn = np.concatenate([line.get_ydata() for panel in panels for line in panel.lines])
    axis.set_yscale(
        "function",
        functions=(
            lambda accuracy: -np.log10(np.maximum(100 - accuracy, 0.1)),
            lambda logarithm: 100 - 10.0**-logarithm,
        ),
    )
    low = max((tick for tick in _TICKS if tick <= drawn.min()), default=_TICKS[0])
    high = min((tick for tick in _TICKS if tick >= drawn.max()), default=99.9)
    axis.set_ylim(low, high)
    axis.set_yticks([tick for tick in _TICKS if low <= tick <= high])
