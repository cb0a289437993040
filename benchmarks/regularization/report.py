"""Tables of the regularization benchmark, and its numbers as JSON."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.environment import environment, plain
from benchmarks.regularization.methods import GRADIENT_METHODS, L1_METHODS, Regularized
from benchmarks.regularization.runs import NEAR_ZERO
from benchmarks.regularization.sweep import TOLERANCE, Compared, Point, Sweep, SweepPlan

LEVELS = (0.8, 0.9, 0.95)

_GRADIENT_PAIRS = (
    ("adam_p", "adam"),
    ("adam_z", "adam"),
    ("adam_z", "adam_p"),
    ("bnp_adam_p", "bnp_adam"),
    ("bnp_adam_z", "bnp_adam"),
    ("bnp_adam_z", "bnp_adam_p"),
)
_L1_PAIRS = (
    ("l1_z", "l1_p"),
    ("l1_z", "l1_subgradient"),
    ("l1_z", "pruned_tuned"),
    ("l1_bnp_z", "l1_p"),
    ("l1_bnp_z", "l1_subgradient"),
    ("l1_bnp_z", "pruned_tuned"),
    ("l1_bnp_z", "l1_z"),
)
# Which entries count as zeros: those that are, or those that are small, set to 0.
_COUNTS = (("exact zeros", False), (f"cut at {NEAR_ZERO:g}", True))


def print_report(console: Console, blocks: Iterable[Compared]) -> None:
    """Print, for each block, a table of the methods and one of who won."""
    for block in blocks:
        tables = _gradient_tables if block.comparison == "gradient" else _l1_tables
        for table in tables(block):
            console.print(table)


def as_json(
    plan: SweepPlan, blocks: Iterable[Compared], datasets: list[dict[str, Any]]
) -> dict[str, Any]:
    """All numbers and the environment they were measured in; those not finite become None."""
    return plain(
        {
            "environment": environment(),
            "datasets": datasets,
            "plan": dataclasses.asdict(plan),
            "results": [
                {
                    "dataset": block.dataset,
                    "comparison": block.comparison,
                    "label_noise": block.label_noise,
                    "method": name,
                    "label": _methods(block)[name].label,
                    "space": _methods(block)[name].space,
                    "chosen": sweep.chosen,
                    "sharpness": None if sweep.sharpness is None else sweep.sharpness[0],
                    "sharpness_error": None if sweep.sharpness is None else sweep.sharpness[1],
                    "accuracy_at_sparsity": None
                    if block.comparison == "gradient"
                    else {
                        name: {f"{level:g}": accuracy_at(sweep, level, cut) for level in LEVELS}
                        for name, cut in _COUNTS
                    },
                    "points": [_point(point) for point in sweep.points],
                }
                for block in blocks
                for name, sweep in block.sweeps.items()
            ],
        },
        digits=5,
    )


def curve(sweep: Sweep, cut: bool) -> tuple[np.ndarray, np.ndarray]:
    """Sparsity and test accuracy, points by seeds.

    Args:
      sweep: Of L1 or pruning.
      cut: Whether entries below `NEAR_ZERO` in size are set to 0.
    """
    measured = [point.measured for point in sweep.points]
    return (
        np.stack([m.near_zeros if cut else m.zeros for m in measured]),
        np.stack([m.cut_accuracy if cut else m.test_accuracy for m in measured]),
    )


def accuracy_at(sweep: Sweep, level: float, cut: bool) -> np.ndarray:
    """Test accuracy of each seed at a sparsity, linear between strengths; NaN beyond all."""
    return np.array(
        [
            np.interp(level, s[order := np.argsort(s, stable=True)], a[order], np.nan, np.nan)
            for s, a in np.stack(curve(sweep, cut)).T.swapaxes(1, 2)
        ]
    )


def _methods(block: Compared) -> Mapping[str, Regularized]:
    return GRADIENT_METHODS if block.comparison == "gradient" else L1_METHODS


def _point(point: Point) -> dict[str, Any]:
    kept = {"strength", "rate", "rate_at_edge"}
    return {name: getattr(point, name) for name in sorted(kept)} | point.measured._asdict()


def _gradient_tables(block: Compared) -> Iterable[Table]:
    noise = f", {100 * block.label_noise:g}% wrong labels" if block.label_noise else ""
    table = _table(f"Gradient regularization: {block.dataset}{noise}", "method")
    for name in ("rate", "strength", "test acc., % (range)", "train loss", "‖∇L‖", "λmax(H)"):
        table.add_column(name, justify="right", no_wrap=True)
    accuracies = {name: s.best.measured.test_accuracy for name, s in block.sweeps.items()}
    highest = max(map(np.mean, accuracies.values()))
    for name, sweep in block.sweeps.items():
        method, best = GRADIENT_METHODS[name], sweep.best
        eigenvalue, error = ([np.nan], [np.nan]) if sweep.sharpness is None else sweep.sharpness
        sure = np.max(error) <= 0.01 * np.abs(np.mean(eigenvalue))
        strengths = [point.strength for point in sweep.points]
        at_edge = len(strengths) > 1 and best.strength in (strengths[0], strengths[-1])
        table.add_row(
            Text(method.label, style="cyan" if method.space == "z" else ""),
            f"{best.rate:g}{'!' if best.rate_at_edge else ' '}",
            "-" if method.space == "none" else f"{best.strength:g}{'!' if at_edge else ' '}",
            _marked(
                _accuracy(best.measured.test_accuracy),
                np.mean(accuracies[name]) == highest,
            ),
            f"{np.mean(best.measured.train_loss):.2g}",
            f"{np.mean(best.measured.gradient_norm):.2g}",
            f"{np.mean(eigenvalue):.2g}{' ' if sure else '?'}",
        )
    table.caption = (
        "* best; ! at the edge of the grid; ? the Lanczos bound of the error is above 1%.\n"
        "Rate and strength as validation chose them from one grid for all; means over seeds."
    )
    yield table
    yield _verdict(_GRADIENT_PAIRS, GRADIENT_METHODS, ("test acc., %",), [accuracies])


def _l1_tables(block: Compared) -> Iterable[Table]:
    table = _table(f"L1 and pruning: {block.dataset}; in %", "method")
    for name in ("rate", "strength", "zeros", f"below {NEAR_ZERO:g}", "test acc. (range)"):
        table.add_column(name, justify="right", no_wrap=True)
    zeros = {name: np.mean(s.best.measured.zeros) for name, s in block.sweeps.items()}
    for name, sweep in block.sweeps.items():
        method, best = L1_METHODS[name], sweep.best
        table.add_row(
            Text(method.label, style="cyan" if method.space == "z" else ""),
            f"{best.rate:g}{'!' if best.rate_at_edge else ' '}",
            f"{best.strength:g}",
            _marked(f"{100 * zeros[name]:.1f}", zeros[name] == max(zeros.values())),
            f"{100 * np.mean(best.measured.near_zeros):.1f}",
            _accuracy(best.measured.test_accuracy),
        )
    table.caption = (
        "The strength with the most zeros whose validation accuracy is\n"
        f"within {100 * TOLERANCE:g} point of Adam's. * best. Means over seeds."
    )
    yield table
    headers = [f"{100 * level:g}%" for level in LEVELS]
    for name, cut in _COUNTS:
        reached = [
            {method: accuracy_at(sweep, level, cut) for method, sweep in block.sweeps.items()}
            for level in LEVELS
        ]
        table = _table(f"Test accuracy, {name}: {block.dataset}", "method")
        for header in headers:
            table.add_column(header, justify="right", no_wrap=True)
        for method in block.sweeps:
            cells = [
                _marked(
                    _mean(at[method]),
                    np.mean(at[method]) == max(np.nan_to_num([np.mean(a) for a in at.values()])),
                )
                for at in reached
            ]
            table.add_row(L1_METHODS[method].label, *cells)
        table.caption = "In %. * best; - not reached by all."
        yield table
        yield _verdict(_L1_PAIRS, L1_METHODS, headers, reached)


def _verdict(
    pairs: Iterable[tuple[str, str]],
    methods: Mapping[str, Regularized],
    headers: Iterable[str],
    reached: Iterable[Mapping[str, np.ndarray]],
) -> Table:
    """Pairs of methods, what each reached, and the outcome for the first."""
    table = _table("Who wins", "first")
    table.add_column("against", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
    for pair in pairs:
        cells: list[str | Text] = []
        for at in reached:
            a, b = (at[name] for name in pair)
            cells += [f"{_mean(a)} : {_mean(b)}", verdict(a, b)]
        # The subgradient's exact zeros compare with nothing.
        if any(np.isfinite(at[name]).all() for at in reached for name in pair[1:]):
            table.add_row(*(methods[name].label for name in pair), *cells)
    table.caption = "even: closer than the standard error over seeds"
    return table


def verdict(a: np.ndarray, b: np.ndarray) -> Text:
    """Whether accuracies `a` beat `b` by more than the standard error of the difference."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Text("-")
    difference = np.mean(a) - np.mean(b)
    error = np.sqrt((np.var(a) + np.var(b)) / max(len(a) - 1, 1))
    if abs(difference) <= error:
        return Text("even")
    return Text("won", style="green") if difference > 0 else Text("lost", style="bold red")


def _table(title: str, first: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column(first, no_wrap=True)
    return table


def _accuracy(values: np.ndarray) -> str:
    low, mean, high = (100 * f(values) for f in (np.min, np.mean, np.max))
    return f"{mean:.1f} ({low:.1f}-{high:.1f})"


def _mean(values: Any) -> str:
    return f"{100 * np.mean(values):.1f}" if np.isfinite(values).all() else "-"


def _marked(text: str, best: bool) -> Text:
    return Text(text + ("*" if best else " "), style="bold green" if best else "")
