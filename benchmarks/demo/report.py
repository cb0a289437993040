"""Tables of a contest, and its numbers as JSON."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.demo.comparison import Entry, Outcome
from benchmarks.demo.plan import DemoPlan, Setting
from benchmarks.environment import environment, plain
from benchmarks.training.methods import METHODS

BEST = "*"
NOTES = (
    "[bold]*[/]  best of the block; the methods of this library are in [cyan]colour[/].",
    "rate  chosen by the validation loss, averaged over a run, from the same grid for all; ! at"
    " the grid's edge.",
    "loss  on a fixed part of the training split, at the last step; mean over {seeds} seeds.",
    "acc   on the test split; mean and standard deviation over seeds.",
    "acc at  the same at a method's documented rate, the same for all problems: no tuning.",
    "steps to the loss in the block's first line, that of SGD, at its best rate, at the last step;"
    " - if never.",
    "time  of a compiled step as a multiple of SGD's, interleaved: median of the ratios and their"
    " middle half; - if that is too wide for the median to say anything.",
)


def print_report(console: Console, plan: DemoPlan, outcome: Outcome) -> None:
    """Print a table per network and inputs, what the columns mean, and who won."""
    for model in plan.models:
        for inputs in plan.inputs:
            settings = [s for s in outcome.entries if (s.model, s.inputs) == (model, inputs)]
            console.print(_table(plan, outcome, settings))
    for note in NOTES:
        console.print(note.format(seeds=plan.seeds), highlight=False)
    if 1 in plan.batch_sizes and "batchnorm" in plan.methods:
        console.print(
            "BatchNorm cannot learn from one example: less its own mean, that is 0.",
            highlight=False,
        )
    verdict = _verdict(outcome)
    if verdict is not None:
        console.print()
        console.print(verdict)


def as_json(plan: DemoPlan, outcome: Outcome, dataset: dict[str, Any]) -> dict[str, Any]:
    """All numbers and the environment they were measured in, as what JSON can hold.

    Numbers that are not finite become None.
    """
    results = []
    for setting, entries in outcome.entries.items():
        target = outcome.target(setting)
        times = outcome.step_times.get((setting.model, setting.batch_size), {})
        for entry in entries:
            time = times.get(entry.method)
            results.append(
                {
                    **setting._asdict(),
                    "method": entry.method,
                    "label": METHODS[entry.method].label,
                    "learning_rate": entry.rate,
                    "learning_rate_at_edge": entry.at_edge,
                    "validation_losses": entry.validation_losses,
                    "final_train_loss": entry.mean_loss[-1],
                    "test_accuracy": entry.mean_accuracy[-1],
                    "test_accuracy_std": np.std(entry.test_accuracy[:, -1]),
                    "documented_rate": METHODS[entry.method].start,
                    "test_accuracy_at_documented_rate": np.mean(entry.documented_accuracy),
                    "target_train_loss": target,
                    "steps_to_target": None if target is None else entry.steps_to(target),
                    "step_time": None if time is None else dataclasses.asdict(time),
                    "curves": {
                        "steps": entry.steps,
                        "train_loss": entry.train_loss,
                        "test_accuracy": entry.test_accuracy,
                    },
                }
            )
    return plain(
        {
            "environment": environment(),
            "dataset": dataset,
            "plan": dataclasses.asdict(plan),
            "results": results,
        },
        digits=6,
    )


def _table(plan: DemoPlan, outcome: Outcome, settings: list[Setting]) -> Table:
    title = f"{settings[0].model.upper()}, {settings[0].inputs} inputs"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("batch size, method", no_wrap=True)
    for name in ("rate", "loss", "acc, %", "acc at", "steps", "time, x SGD"):
        table.add_column(name, justify="right", no_wrap=True)
    for setting in settings:
        target = outcome.target(setting)
        aim = "" if target is None else f", to {target:#.2g}"
        steps = plan.steps_at(setting.batch_size)
        table.add_row(f"[bold]{setting.batch_size}[/], {steps} steps{aim}")
        for row in _rows(outcome, setting, target):
            table.add_row(*row)
        table.add_section()
    return table


def _rows(outcome: Outcome, setting: Setting, target: float | None) -> Iterable[list[Text]]:
    entries = outcome.entries[setting]
    times = outcome.step_times.get((setting.model, setting.batch_size), {})
    losses = [float(entry.mean_loss[-1]) for entry in entries]
    accuracies = [float(entry.mean_accuracy[-1]) for entry in entries]
    reached = [None if target is None else entry.steps_to(target) for entry in entries]
    fastest = min((steps for steps in reached if steps is not None), default=None)
    for entry, loss, accuracy, steps in zip(entries, losses, accuracies, reached, strict=True):
        method = METHODS[entry.method]
        spread = 100 * np.std(entry.test_accuracy[:, -1])
        time = times.get(entry.method)
        yield [
            Text(f"  {method.label}", style="cyan" if method.needs_stats else ""),
            Text(f"{entry.rate:g}{'!' if entry.at_edge else ' '}"),
            _marked(f"{loss:#.2g}" if loss < np.inf else "diverged", loss == min(losses)),
            _marked(f"{100 * accuracy:.1f} ±{spread:.1f}", accuracy == max(accuracies)),
            Text(f"{100 * np.mean(entry.documented_accuracy):.1f}, {method.start:g}"),
            _marked("-" if steps is None else str(steps), steps is not None and steps == fastest),
            Text("-" if time is None else str(time)),
        ]


def _marked(text: str, best: bool) -> Text:
    return Text(text + (BEST if best else " "), style="bold green" if best else "")


def _verdict(outcome: Outcome) -> Table | None:
    """The best with BNP against the best without, setting by setting; None if one is missing."""
    table = Table(
        title="Best with BNP against best without",
        caption="even: closer than the standard error over seeds",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("setting", no_wrap=True)
    for name in ("loss", "acc, %"):
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
    for setting, entries in outcome.entries.items():
        ours = [entry for entry in entries if METHODS[entry.method].needs_stats]
        others = [entry for entry in entries if not METHODS[entry.method].needs_stats]
        if not ours or not others:
            return None
        table.add_row(
            f"{setting.model.upper()}, {setting.inputs}, batch size {setting.batch_size}",
            *_compared(ours, others, _final_losses, "{:#.2g}"),
            *_compared(ours, others, lambda e: -100 * e.test_accuracy[:, -1], "{:.1f}"),
        )
    return table


def _final_losses(entry: Entry) -> np.ndarray:
    return np.where(np.isfinite(entry.train_loss[:, -1]), entry.train_loss[:, -1], np.inf)


def _compared(
    ours: list[Entry],
    others: list[Entry],
    cost: Callable[[Entry], np.ndarray],
    form: str,
) -> tuple[str, Text]:
    """The lowest mean cost of either side, and the outcome."""
    a, b = (min(map(cost, side), key=np.mean) for side in (ours, others))
    text = f"{form.format(abs(np.mean(a)))} : {form.format(abs(np.mean(b)))}"
    finite = np.isfinite(a).all() and np.isfinite(b).all()
    error = np.sqrt((np.var(a) + np.var(b)) / max(len(a) - 1, 1)) if finite else 0.0
    if np.mean(a) == np.mean(b) or abs(np.mean(a) - np.mean(b)) < error:
        return text, Text("even")
    won = np.mean(a) < np.mean(b)
    return text, Text("won", style="green") if won else Text("lost", style="bold red")
