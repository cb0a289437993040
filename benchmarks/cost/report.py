"""Tables of what training costs, and the JMLR paper's Table 1 and Figure 9 beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from benchmarks.cost.methods import BATCH_NORM, BNP, BNP_METHODS, SGD, Workload

Rows = Mapping[str, Mapping[str, Any]]

_EPOCH = 50_000  # Examples of the paper's epoch, CIFAR-10's training set.
_PASSES = 20
_STYLES = {
    # name: color of Okabe and Ito's palette, line style
    BATCH_NORM: ("#56B4E9", "-."),
    BNP: ("#D55E00", "-"),
    "BNP, fixed, 64 rows": ("#0072B2", "--"),
}


def cost_table(problem: Workload, rows: Rows) -> Table:
    """What is known without running, one row a method: multiples of SGD's and of BatchNorm's."""
    result = _table(str(problem), "method", ["FLOPs", "bytes", "bytes / BN", "memory", "compile"])
    sgd, batch_norm = rows[SGD], rows[BATCH_NORM]
    for method, row in rows.items():
        memory = "" if row["memory"] is None else f"{row['memory'] / sgd['memory']:.2f}"
        result.add_row(
            method,
            f"{row['flops'] / sgd['flops']:.3f}",
            f"{row['bytes'] / sgd['bytes']:.3f}",
            f"{row['bytes'] / batch_norm['bytes']:.3f}",
            memory,
            f"{row['compile_seconds'] / sgd['compile_seconds']:.1f}",
        )
    return result


def time_table(problem: Workload, rows: Rows) -> Table:
    """Time ratios of a step and of a pass, one row a method."""
    half = "(mid half)"
    columns = ["step", half, "/ BN", half, "ms", "pass", half, "/ BN", half]
    result = _table(f"{problem}: time", "method", columns)
    for method, row in rows.items():
        cells = []
        for key in ("time_ratio", "pass_ratio"):
            for name in (key, f"{key}_to_batch_norm"):
                low, high = row[f"{name}_quartiles"]
                cells += [f"{row[name]:.2f}", f"({low:.2f}-{high:.2f})"]
        result.add_row(method, *cells[:4], f"{1e3 * row['seconds']:.2f}", *cells[4:])
    return result


def paper_table(results: Mapping[Workload, Rows]) -> Table:
    """The paper's Table 1, as time ratios to BatchNorm, and ours: a single step and a pass."""
    paper = [problem for problem in results if problem.paper is not None]
    title = "BNP / BatchNorm, and the epochs of Table 1 of the JMLR paper (Tesla V100)"
    columns = [
        column for problem in paper for column in (f"{problem.batch_size}: bytes", "step", "pass")
    ]
    result = _table(title, "batch size", columns)
    cells: dict[str, list[str]] = {"paper": [], **{name: [] for name in BNP_METHODS}}
    for problem in paper:
        seconds = problem.paper or (1.0, 1.0)
        cells["paper"] += ["", "", f"{seconds[1] / seconds[0]:.2f}"]
        rows = results[problem]
        for name in BNP_METHODS:
            row = rows[name]
            cells[name] += [
                f"{row['bytes'] / rows[BATCH_NORM]['bytes']:.2f}",
                f"{row['time_ratio_to_batch_norm']:.2f}",
                f"{row['pass_ratio_to_batch_norm']:.2f}",
            ]
    for name, values in cells.items():
        result.add_row(name, *values)
    return result


def save_figure(results: Mapping[Workload, Rows], path: Path) -> None:
    """Draw the paper's Figure 9, time over passes with BN and with BNP, and write it to `path`.

    A pass is shorter than the paper's epoch, and the axis says so.
    """
    paper = [problem for problem in results if problem.paper is not None]
    figure = Figure(figsize=(0.6 + 3.4 * max(len(paper), 2), 3.6), layout="constrained")
    axes = figure.subplots(1, len(paper), squeeze=False)[0]
    for axis, problem in zip(axes, paper, strict=True):
        rows = results[problem]
        examples = rows[BNP]["pass_steps"] * problem.batch_size
        for name, (color, dashes) in _STYLES.items():
            seconds = np.cumsum(rows[name]["pass_seconds"][:_PASSES])
            axis.plot(
                range(len(seconds) + 1), [0, *seconds], dashes, color=color, lw=1.8, label=name
            )
        ratio = rows[BNP]["pass_ratio_to_batch_norm"]
        axis.set_title(f"batch {problem.batch_size}: BNP / BN {ratio:.2f}", fontsize="medium")
        axis.set_xlabel(f"passes of {examples:,} examples\n({examples / _EPOCH:.2g} of an epoch)")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("cumulative time [s]")
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    sizes = "-".join(map(str, paper[0].sizes))
    figure.suptitle(f"Training time of {sizes} (the paper's Figure 9)")
    figure.savefig(path, dpi=120)


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    result.add_column(first, no_wrap=True)
    for column in columns:
        result.add_column(column, justify="right", no_wrap=True)
    return result
