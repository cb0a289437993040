"""The figure of a contest: loss and accuracy over the steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from benchmarks.demo.comparison import Entry, Outcome
from benchmarks.demo.plan import DemoPlan, Inputs, Setting
from benchmarks.networks.small import ModelName
from benchmarks.training.methods import METHODS

FORMATS = (".png", ".pdf", ".svg")

_LOSS_LIMITS = (1e-4, 10.0)
_ACCURACY_TICKS = (0, 50, 80, 90, 95, 98, 99)


def save_figure(plan: DemoPlan, outcome: Outcome, title: str, path: Path) -> None:
    """Draw every setting's training loss and test accuracy, and write the figure to `path`.

    Lines are means over seeds, bands reach from the lowest to the highest seed. A column is a
    network and batch size, a pair of rows the kind of inputs. Accuracies are spaced by the
    logarithm of the error.
    """
    columns: list[tuple[ModelName, int]] = [
        (model, size) for model in plan.models for size in plan.batch_sizes
    ]
    rows: list[tuple[Inputs, str]] = [
        (inputs, what) for inputs in plan.inputs for what in ("loss", "accuracy")
    ]
    figure, axes = plt.subplots(
        len(rows),
        len(columns),
        figsize=(1.5 + 3.1 * len(columns), 1.3 + 2.5 * len(rows)),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for i, (inputs, what) in enumerate(rows):
        for axis, (model, batch_size) in zip(axes[i], columns, strict=True):
            _draw(axis, outcome.entries[Setting(model, inputs, batch_size)], what)
        unit = "train loss, nats" if what == "loss" else "test accuracy, %"
        axes[i, 0].set_ylabel(f"{inputs} inputs\n{unit}")
        _scale(axes[i, 0], what, outcome)
    for j, (model, batch_size) in enumerate(columns):
        axes[0, j].set_title(f"{model.upper()}, batch size {batch_size}")
        axes[-1, j].set_xlabel("step")
        axes[-1, j].xaxis.set_major_locator(MaxNLocator(4))
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    title = f"{title}; losses above {_LOSS_LIMITS[1]:g} are drawn there"
    figure.suptitle(title, fontsize="medium", x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axis: Any, entries: Sequence[Entry], what: str) -> None:
    for entry in entries:
        method = METHODS[entry.method]
        if what == "loss":
            curves = np.clip(np.nan_to_num(entry.train_loss, nan=np.inf), *_LOSS_LIMITS)
        else:
            curves = 100 * entry.test_accuracy
        width = 2.0 if method.needs_stats else 1.5
        axis.plot(
            entry.steps,
            curves.mean(axis=0),
            method.dashes,
            color=method.color,
            lw=width,
            label=method.label,
        )
        band = curves.min(axis=0), curves.max(axis=0)
        axis.fill_between(entry.steps, *band, color=method.color, alpha=0.12, lw=0)
    axis.grid(alpha=0.25)


def _scale(axis: Any, what: str, outcome: Outcome) -> None:
    """The vertical axis of a row."""
    if what == "loss":
        losses = [e.mean_loss for entries in outcome.entries.values() for e in entries]
        lowest = np.clip(np.min(losses, where=np.isfinite(losses), initial=1.0), *_LOSS_LIMITS)
        axis.set_yscale("log")
        axis.set_ylim(lowest / 1.5, 1.5 * _LOSS_LIMITS[1])
    else:
        axis.set_yscale(
            "function",
            functions=(
                lambda accuracy: -np.log10(np.maximum(100 - accuracy, 0.1)),
                lambda logarithm: 100 - 10.0**-logarithm,
            ),
        )
        axis.set_ylim(0, _ACCURACY_TICKS[-1])
        axis.set_yticks(_ACCURACY_TICKS)
