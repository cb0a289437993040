"""The JMLR paper's fully connected network, 3072-100-100-100-10, on CIFAR-10.

    python -m benchmarks cifar10 --data-dir DIR

Batches of 60 for 3000 steps and of 1 for 12,000, on raw pixels / 255 and on standardized ones.
Every method, the one that is known to go wrong included, takes the learning rate of one grid that
is best in validation accuracy after a run with one seed; then it runs with each seed. Train loss is
the mean batch loss over the last tenth of the steps.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import bnp_optax
from benchmarks.data import DataError, Split
from benchmarks.environment import environment
from benchmarks.networks.small import MLP
from benchmarks.problems import Problem
from benchmarks.problems.images import HIDDEN, Images, Sizes
from benchmarks.training import methods
from benchmarks.training.trainer import Trainer

STEPS = {60: 3000, 1: 12_000}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
USUAL = {"adam": 1e-3, "bnp_sgd": 0.1, "adam_z": 1e-3, "bnp_then_adam": 1e-3}
COMPARED = ("sgd", "adam", "batchnorm", "layernorm", "bnp_sgd", "adam_z")
METHODS = {name: methods.METHODS[name] for name in COMPARED} | {
    "bnp_then_adam": methods.Method(
        label="Adam after BNP (wrong)",
        norm="none",
        make=lambda rate, layers: optax.chain(
            bnp_optax.bnp_precondition(layers=layers), optax.adam(rate)
        ),
        needs_stats=True,
        color="#CC79A7",
        dashes=":",
    ),
}


def problem(batch_size: int, inputs: Literal["raw", "standardized"]) -> Problem:
    """The network on CIFAR-10, with Flax's initial values."""
    return Problem(
        name=f"cifar10-b{batch_size}-{inputs}",
        title=f"Batch {batch_size}, {inputs} inputs, {STEPS[batch_size]} steps",
        load=Images("cifar10", Sizes(40_000, 10_000, 10_000), inputs),
        network=lambda norm, steps: MLP(HIDDEN, norm=norm),
        batch_size=batch_size,
        steps=STEPS[batch_size],
        points=10,
        methods=tuple(METHODS),
    )


def run(trainer: Trainer, rate: float, seed: int, split: Split) -> dict[str, Any]:
    """Train once; the loss over the last tenth of the steps, and the accuracy on `split`."""
    curves = trainer(rate, seed, split)
    return {
        "rate": rate,
        "seed": seed,
        "train_loss": float(curves.train_loss[-1]),
        "finite": bool(np.isfinite(curves.train_loss).all()),
        "accuracy": float(curves.score[-1]),
    }


def table(title: str, rows: dict[str, list[dict[str, Any]]]) -> Table:
    """Means over seeds, with the range of the losses."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in ("method", "rate", "train loss", "(range)", "test accuracy"):
        justify = "left" if column == "method" else "right"
        result.add_column(column, justify=justify, no_wrap=True)
    for name, runs in rows.items():
        losses = [run["train_loss"] for run in runs]
        accuracy = float(np.mean([run["test_accuracy"] for run in runs]))
        result.add_row(
            METHODS[name].label,
            f"{runs[0]['rate']:g}",
            f"{np.mean(losses):.3f}" if all(run["finite"] for run in runs) else "not finite",
            f"({min(losses):.3f}-{max(losses):.3f})",
            f"{accuracy:.3f}",
        )
    return result


def tuned_rate(trainer: Trainer, split: Split, advance: Callable[[], None]) -> float:
    """The rate of the grid with the best validation accuracy of those that stay finite."""
    scores = {}
    for rate in RATES:
        result = run(trainer, rate, 0, split)
        scores[rate] = result["accuracy"] if result["finite"] else -1.0
        advance()
    return max(scores, key=lambda rate: scores[rate])


def main(
    data_dir: pathlib.Path | None = None,
    batch_sizes: tuple[Literal[60, 1], ...] = (60, 1),
    inputs: tuple[Literal["raw", "standardized"], ...] = ("raw", "standardized"),
    seeds: int = 3,
    rates: Literal["tuned", "usual"] = "tuned",
    out: pathlib.Path = pathlib.Path("results/cifar10.json"),
) -> int:
    """Train on CIFAR-10, with Adam between P^T and P, and with Adam after P P^T.

    Args:
      data_dir: Folder with `cifar10.npz`; default: the environment variable BNP_DATA_DIR.
      batch_sizes: Which of the two settings.
      inputs: Which of the two inputs.
      seeds: Runs with the chosen rate.
      rates: `usual` skips tuning and runs four methods: Adam at 1e-3, BNP + SGD at 0.1.
      out: Where the numbers go, with their environment.
    """
    console = Console()
    console.width = max(console.width, 100)
    names = list(METHODS) if rates == "tuned" else list(USUAL)
    n_runs = seeds + (len(RATES) if rates == "tuned" else 0)
    results: dict[str, Any] = {}
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        total = n_runs * len(names) * len(batch_sizes) * len(inputs)
        task = progress.add_task("runs", total=total)

        def advance() -> None:
            progress.advance(task)

        for kind in inputs:
            for batch_size in batch_sizes:
                where = problem(batch_size, kind)
                try:
                    data = where.load(data_dir)
                except DataError as error:
                    console.print(f"cifar10: {error}", style="red", highlight=False)
                    return 2
                rows = results[where.title] = {}
                for name in names:
                    trainer = Trainer(where, name, METHODS[name], data)
                    if rates == "tuned":
                        rate = tuned_rate(trainer, data.validation, advance)
                    else:
                        rate = USUAL[name]
                    rows[name] = []
                    for seed in range(seeds):
                        found = run(trainer, rate, seed, data.test)
                        rows[name].append(found | {"test_accuracy": found.pop("accuracy")})
                        advance()
                console.print(table(where.title, rows))
                out.parent.mkdir(parents=True, exist_ok=True)
                report = {"environment": environment(), "results": results}
                out.write_text(json.dumps(report, indent=2))
    console.print(f"Numbers: {out}")
    return 0
