"""The figure of the regularization benchmark: accuracy over strength, and over sparsity."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.regularization.methods import GRADIENT_METHODS, L1_METHODS
from benchmarks.regularization.report import curve
from benchmarks.regularization.runs import NEAR_ZERO
from benchmarks.regularization.sweep import Compared

FORMATS = (".png", ".pdf", ".svg")

_DEPTH = 0.12
_LEFT = (100, 50, 20, 10, 5, 2)


def save_figure(blocks: Sequence[Compared], seeds: int, path: Path) -> None:
    """Draw a row of two panels for each data set, and write the figure to `path`.

    Lines are means over seeds, bands reach from the lowest to the highest seed. Of the gradient
    regularization, the comparison with the most wrong labels is drawn.
    """
    names = list(dict.fromkeys(block.dataset for block in blocks))
    figure, axes = plt.subplots(
        len(names), 2, figsize=(11.5, 0.4 + 4.5 * len(names)), squeeze=False, layout="constrained"
    )
    for row, name in zip(axes, names, strict=True):
        here = [block for block in blocks if block.dataset == name]
        noisiest = max(
            (block for block in here if block.comparison == "gradient"),
            key=lambda block: block.label_noise,
        )
        _draw_gradient(row[0], noisiest)
        _draw_l1(row[1], next(block for block in here if block.comparison == "l1"))
    figure.suptitle(f"Mean and range of {seeds} seeds", fontsize="small", x=0.995, ha="right")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_gradient(axis: Any, block: Compared) -> None:
    best = 0.0
    for name, sweep in block.sweeps.items():
        method = GRADIENT_METHODS[name]
        accuracy = 100 * np.stack([point.measured.test_accuracy for point in sweep.points])
        best = max(best, accuracy.mean(axis=1).max())
        style = {"color": method.color, "ls": method.dashes, "label": method.label}
        if method.space == "none":
            axis.axhline(accuracy.mean(), lw=1.5, **style)
            axis.axhspan(accuracy.min(), accuracy.max(), color=method.color, alpha=0.1, lw=0)
            continue
        strengths = [point.strength for point in sweep.points]
        _line(axis, strengths, accuracy, method.space == "z", style)
    axis.set_xscale("log")
    axis.set_xlabel("strength")
    noise = f", {100 * block.label_noise:g}% wrong labels" if block.label_noise else ""
    _finish(axis, f"Gradient regularization: {block.dataset}{noise}", best)


def _draw_l1(axis: Any, block: Compared) -> None:
    best = 0.0
    for name, sweep in block.sweeps.items():
        method = L1_METHODS[name]
        # The subgradient gives no zeros, so what is small counts as 0 in all methods.
        sparsity, accuracy = curve(sweep, cut=True)
        remaining = 100 * (1 - sparsity.mean(axis=1))
        shown = remaining > 0.5
        best = max(best, 100 * accuracy.mean(axis=1).max())
        style = {"color": method.color, "ls": method.dashes, "label": method.label}
        _line(axis, remaining[shown], 100 * accuracy[shown], method.space == "z", style)
    axis.set_xscale("log")
    axis.set_xlim(105, 1.5)
    axis.set_xticks(_LEFT)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda left, _: f"{100 - left:g}"))
    axis.set_xlabel(f"kernel entries below {NEAR_ZERO:g}, set to 0, %")
    _finish(axis, f"L1 and pruning: {block.dataset}", best)


def _line(axis: Any, x: Any, accuracy: np.ndarray, in_z: bool, style: dict[str, Any]) -> None:
    """A mean over the seeds in the second axis, and their range."""
    axis.plot(x, accuracy.mean(axis=1), lw=2.2 if in_z else 1.5, marker="o", ms=3, **style)
    low, high = accuracy.min(axis=1), accuracy.max(axis=1)
    axis.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)


def _finish(axis: Any, title: str, best: float) -> None:
    axis.set_ylim(best - 100 * _DEPTH, best + 10 * _DEPTH)
    axis.set_ylabel("test accuracy, %")
    axis.set_title(title, fontsize="medium", loc="left")
    axis.grid(alpha=0.25)
    axis.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=3,
        fontsize="small",
        frameon=False,
    )
