"""What regularization in z-space does, beside regularization in p, on real data.

    python -m benchmarks regularization
    python -m benchmarks regularization --dataset fashion_mnist --data-dir DIR

Two comparisons, with a small MLP and few training images, which it learns by heart:

- gradient regularization with Adam, none, of p, and of z (Ye's (11) and (12)), with right labels
  and with some wrong ones; learning rate and strength are tuned on validation data;
- L1: accuracy over sparsity, in z and in p, by proximal step and by subgradient, and beside
  magnitude pruning; at the learning rate that is best without it.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.data import DataError, Dataset, DatasetName, load, standardize
from benchmarks.regularization import report
from benchmarks.regularization.figure import FORMATS, save_figure
from benchmarks.regularization.sweep import Compared, SweepPlan, amount_of_work, compare


@dataclasses.dataclass(frozen=True)
class RegularizationOptions:
    """Compare regularization in z-space with regularization in p.

    Attributes:
      dataset: Data to learn, one or more. All but the digits are read from `<dataset>.npz`.
      data_dir: Folder of the .npz files; the environment variable BNP_DATA_DIR if not given.
      train_size: Training images; 1000 if not given, or 500 of the digits.
      eval_size: Images in each of validation and test; 2000 if not given, or 600 of the digits.
      inputs: Pixels as they are, or each shifted and scaled to mean 0 and variance 1.
      output: Folder of the figure and the numbers, regularization.png and .json.
      plan: What is compared.
    """

    dataset: tuple[DatasetName, ...] = ("digits",)
    data_dir: Path | None = None
    train_size: int | None = None
    eval_size: int | None = None
    inputs: Literal["standardized", "raw"] = "standardized"
    output: Path = Path("results/regularization")
    plan: Annotated[SweepPlan, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SweepPlan
    )


def main(argv: Sequence[str]) -> int:
    """Run from the command line; returns the exit code."""
    try:
        options = tyro.cli(
            RegularizationOptions, args=argv, prog="python -m benchmarks regularization"
        )
        datasets = [_load(options, name) for name in dict.fromkeys(options.dataset)]
        if not datasets:
            msg = "`dataset` is empty; name at least one"
            raise ValueError(msg)
        _check_batch(options.plan, datasets)
        out = _output(options.output)
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # A pipe has no width of its own, and the tables are at most this wide.
    console = Console() if sys.stdout.isatty() else Console(width=100)
    blocks: list[Compared] = []
    for block in _run(options.plan, datasets, console):
        report.print_report(console, [block])
        blocks.append(block)
    described = [_described(data, options.inputs) for data in datasets]
    numbers = report.as_json(options.plan, blocks, described)
    text = json.dumps(numbers, allow_nan=False)
    out.with_suffix(".json").write_text(text, encoding="utf-8")
    save_figure(blocks, options.plan.seeds, out)
    console.print(f"\nFigure:  {out}\nNumbers: {out.with_suffix('.json')}", soft_wrap=True)
    return 0


def _load(options: RegularizationOptions, name: DatasetName) -> Dataset:
    n_train, n_eval = (500, 600) if name == "digits" else (1000, 2000)
    n_train = n_train if options.train_size is None else options.train_size
    n_eval = n_eval if options.eval_size is None else options.eval_size
    data = load(name, options.data_dir, n_train, n_eval)
    return data if options.inputs == "raw" else standardize(data, "feature")


def _check_batch(plan: SweepPlan, datasets: Sequence[Dataset]) -> None:
    smallest = min(len(data.train) for data in datasets)
    if plan.batch_size > smallest:
        msg = (
            f"`batch_size` must be at most the {smallest} training images, got {plan.batch_size}; "
            "choose a smaller --batch-size or a larger --train-size"
        )
        raise ValueError(msg)


def _output(folder: Path) -> Path:
    """Where the figure goes; its folder is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"cannot make the folder {folder} ({error.strerror}); choose another --output"
        raise ValueError(msg) from error
    out = folder / f"regularization{FORMATS[0]}"
    if not os.access(folder, os.W_OK) or out.is_dir() or out.with_suffix(".json").is_dir():
        msg = f"cannot write to {folder}; choose another --output"
        raise ValueError(msg)
    return out


def _described(data: Dataset, inputs: str) -> dict[str, Any]:
    sizes = {part: len(getattr(data, part)) for part in ("train", "validation", "test")}
    return {"name": data.name, "inputs": inputs, **sizes}


def _run(plan: SweepPlan, datasets: Sequence[Dataset], console: Console) -> list[Compared]:
    columns = TextColumn("Tuning and training"), BarColumn(), TimeElapsedColumn()
    blocks: list[Compared] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=amount_of_work(plan) * len(datasets))
        for data in datasets:
            blocks += compare(plan, data, lambda: progress.advance(task))
    return blocks
