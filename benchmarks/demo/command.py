"""What batch normalization preconditioning does, and what it costs, in three minutes on a laptop.

    python -m benchmarks demo
    python -m benchmarks demo --dataset cifar10 --data-dir DIR

Trains a small MLP and a small CNN on handwritten digits, with raw and with standardized inputs, at
batch sizes 1, 4 and 64, by SGD and Adam, by SGD with batch and with layer normalization in the
network, and by BNP: as a preconditioner of SGD, and as the space that Adam works in. Learning rates
are tuned on validation data, on the same grid for all.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from benchmarks.data import DataError, Dataset, DatasetName, load, standardize
from benchmarks.demo import comparison, figure, report
from benchmarks.demo.plan import DemoPlan

PROGRAM = "python -m benchmarks demo"
QUICK = DemoPlan(
    models=("mlp",),
    batch_sizes=(4,),
    rates=(1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0),
    seeds=2,
    steps=800,
    points=5,
    hidden=(16,),
    turns=5,
)


# Larger images: fewer steps, to end within a few minutes all the same.
IMAGES = DemoPlan(steps=1000)


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """Compare optimizers with and without batch normalization preconditioning (BNP).

    Attributes:
      dataset: Data to learn. All but the digits are read from `<dataset>.npz`.
      data_dir: Folder of the .npz file; the environment variable BNP_DATA_DIR if not given.
      train_size: Training images; 5000 if not given, or 1077 of the digits.
      eval_size: Images in each of validation and test; 500 if not given, or 360 of the digits.
      out: The figure (.png, .pdf or .svg), the numbers go beside it as .json;
        results/demo/<dataset>.png if not given.
      quick: A smaller comparison, of a few seconds. Other options still change it.
      plan: What is compared.
    """

    dataset: DatasetName = "digits"
    data_dir: Path | None = None
    train_size: int | None = None
    eval_size: int | None = None
    out: Path | None = None
    quick: bool = False
    plan: Annotated[DemoPlan, tyro.conf.arg(name="")] = dataclasses.field(default_factory=DemoPlan)


def main(argv: Sequence[str]) -> int:
    """Run from the command line; returns the exit code."""
    try:
        options = _options(argv)
        data = load(options.dataset, options.data_dir, options.train_size, options.eval_size)
        _check_batches(options.plan, data)
        out = _output(options)
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # A pipe has no width of its own, and the tables are at most this wide.
    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(
        f"{data.name}: {len(data.train)} images to train, {len(data.validation)} to tune, "
        f"{len(data.test)} to test.",
        highlight=False,
    )
    outcome = _run(options.plan, data, console)
    report.print_report(console, options.plan, outcome)
    described = {"name": data.name, "train": len(data.train), "test": len(data.test)}
    numbers = report.as_json(options.plan, outcome, described)
    out.with_suffix(".json").write_text(json.dumps(numbers, allow_nan=False), encoding="utf-8")
    title = f"{data.name}: mean and range of {options.plan.seeds} seeds at the tuned rates"
    figure.save_figure(options.plan, outcome, title, out)
    console.print(f"\nFigure:  {out}\nNumbers: {out.with_suffix('.json')}", soft_wrap=True)
    return 0


def _options(args: Sequence[str]) -> DemoOptions:
    """What the command line says, over the defaults that fit what it says."""
    first = tyro.cli(DemoOptions, args=args, prog=PROGRAM)
    plan = QUICK if first.quick else IMAGES if first.dataset != "digits" else DemoPlan()
    return tyro.cli(DemoOptions, args=args, prog=PROGRAM, default=DemoOptions(plan=plan))


def _check_batches(plan: DemoPlan, data: Dataset) -> None:
    largest, available = max(plan.batch_sizes), len(data.train)
    if largest > available:
        msg = f"--batch-sizes has {largest}, but {data.name} has {available} images to train"
        raise ValueError(msg)


def _output(options: DemoOptions) -> Path:
    """Where the figure goes; its folder is made."""
    name = f"{options.dataset}-quick.png" if options.quick else f"{options.dataset}.png"
    out = options.out or Path("results/demo") / name
    if out.suffix not in figure.FORMATS:
        msg = f"--out must end in {', '.join(figure.FORMATS)}; got {out}"
        raise ValueError(msg)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"cannot make the folder of {out} ({error.strerror}); choose another --out"
        raise ValueError(msg) from error
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        msg = f"cannot write {out}; choose another --out"
        raise ValueError(msg)
    return out


def _run(plan: DemoPlan, data: Dataset, console: Console) -> comparison.Outcome:
    per: dict[Any, Any] = {"mlp": "feature", "cnn": "channel"}
    datasets: dict[Any, Dataset] = {
        (model, inputs): data if inputs == "raw" else standardize(data, per[model])
        for model in plan.models
        for inputs in plan.inputs
    }
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=comparison.amount_of_work(plan))
        outcome = comparison.run(
            plan,
            datasets,
            lambda amount: progress.advance(task, amount),
            lambda doing: progress.update(task, description=doing),
        )
        done = comparison.amount_of_work(plan)
        progress.update(task, completed=done, description="Tuned, trained, timed")
    return outcome
