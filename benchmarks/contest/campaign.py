"""All jobs of a contest: problems one after the other, two methods at a time, progress shown."""

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from benchmarks.contest import cells
from benchmarks.contest.cells import Cell
from benchmarks.contest.runner import Job, run
from benchmarks.data import DataError, Split
from benchmarks.problems import Data, Problem, Scale
from benchmarks.training import kfac
from benchmarks.training.methods import METHODS

# A search brackets its best rate with about so many runs.
_TUNING_RUNS = 6


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is compared.

    Attributes:
      problems: Where.
      methods: By problem, which methods.
      scale: Size of the problems.
      grid: Learning rates, increasing.
      seeds: Number of runs at the rate that is chosen.
      results: Folder of the cells.
    """

    problems: Sequence[Problem]
    methods: dict[str, tuple[str, ...]]
    scale: Scale
    grid: tuple[float, ...]
    seeds: int
    results: Path

    def path(self, problem: str, method: str) -> Path:
        """File of a cell."""
        return self.results / problem / f"{method}.json"


def matching(names: Iterable[str], patterns: Sequence[str], what: str) -> list[str]:
    """Those of `names` that match one of the patterns, in their order.

    Raises:
      ValueError: If a pattern matches none.
    """
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            msg = f"no {what} matches {pattern!r}; there are {', '.join(names)}"
            raise ValueError(msg)
    return [name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)]


def conduct(choice: Choice, data_dir: Path | None, workers: int, console: Console) -> bool:
    """Do everything that is still to do; returns whether all of it could be done.

    What a problem's methods share, the data, is loaded once, and kept on the device.

    Args:
      choice: What to do.
      data_dir: Folder of the data's files.
      workers: Jobs at a time.
      console: Where progress is shown.

    Raises:
      SettingsError: If there are results that were made with other settings.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    ok = True
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("runs", total=_amount(choice))
        for problem in choice.problems:
            progress.update(task, description=problem.name)
            try:
                data = problem.load(data_dir)
            except DataError as error:
                progress.console.print(f"{problem.name}: {error}", style="red", highlight=False)
                ok = False
                continue
            _compare(choice, problem, _on_device(data), workers, progress, task)
    return ok


def show(choice: Choice, console: Console) -> None:
    """Print the problems, their methods, and which of those are done."""
    for problem in choice.problems:
        console.print(
            f"[bold]{problem.name}[/]: {problem.title}; batch {problem.batch_size}, "
            f"{problem.steps} steps",
            highlight=False,
        )
        for name in choice.methods[problem.name]:
            path = choice.path(problem.name, name)
            try:
                text = _result(cells.read(path)) if path.exists() else "-"
            except cells.CellError as error:
                text = f"corrupt: {error}"
            console.print(f"  {name:20} {text}", highlight=False)


def _compare(
    choice: Choice, problem: Problem, data: Data, workers: int, progress: Progress, task: TaskID
) -> None:
    """All methods on one problem."""

    def say(message: str) -> None:
        progress.console.print(message, highlight=False, soft_wrap=True)

    def job(name: str) -> None:
        path = choice.path(problem.name, name)
        spec = Job(problem, name, data, choice.scale, choice.grid, choice.seeds, path)
        reason = kfac.unavailable() if name == "kfac" else None
        if reason is not None:
            say(f"{problem.name}: {METHODS[name].label} skipped, {reason}")
            cells.write(path, dataclasses.replace(spec.empty(), skipped=reason))
            return
        cell = run(spec, say, lambda: progress.advance(task))
        say(f"{problem.name}: {METHODS[name].label}: {_result(cell)}")

    with ThreadPoolExecutor(workers) as pool:
        try:
            for _ in pool.map(job, choice.methods[problem.name]):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _amount(choice: Choice) -> int:
    """About how many runs are still to do."""
    total = 0
    for problem, names in choice.methods.items():
        for name in names:
            try:
                cell = cells.read(choice.path(problem, name))
            except (cells.CellError, OSError):
                total += _TUNING_RUNS + choice.seeds
                continue
            finals = sum(run.role == "final" for run in cell.runs)
            tuned = finals > 0 or cell.complete
            missing = 0 if cell.complete else choice.seeds - finals
            total += max(0, missing) + (0 if tuned else _TUNING_RUNS)
    return total


def _on_device(data: Data) -> Data:
    train = Split(*jax.device_put((data.train.x, data.train.y)))
    return dataclasses.replace(data, train=train)


def _result(cell: Cell) -> str:
    """One line of what came out."""
    if cell.skipped is not None:
        return f"skipped, {cell.skipped}"
    if not cell.complete:
        return f"{len(cell.runs)} runs done"
    finals = [run for run in cell.runs if run.role == "final"]
    if cell.rate is None:
        return "diverged at every rate"
    loss = np.mean([run.train_loss[-1] for run in finals])
    score = np.mean([run.score[-1] for run in finals])
    seconds = sum(run.seconds for run in cell.runs)
    return (
        f"rate {cell.rate:g}, train loss {loss:.4g}, score {score:.4f}, {len(cell.runs)} runs in "
        f"{seconds:.0f} s"
    )
