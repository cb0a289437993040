"""The commands of the contest: `python -m benchmarks run` and `python -m benchmarks report`.

A run that was stopped, or killed, goes on with the same command: each training is kept as soon as
it is done.
"""

import math
import sys
from pathlib import Path

from rich.console import Console

from benchmarks import problems as registry
from benchmarks.arguments import Count
from benchmarks.contest import campaign
from benchmarks.contest.campaign import Choice, matching
from benchmarks.contest.report import write
from benchmarks.contest.runner import SettingsError
from benchmarks.problems import Scale
from benchmarks.training.methods import METHODS, RATES

RESULTS = Path("results/contest")


def run(
    problems: tuple[str, ...] = ("*digits*", "tabular-*", "friedman-*", "text-*"),
    methods: tuple[str, ...] = (),
    scale: Scale = "small",
    seeds: Count = 3,
    rates: tuple[float, ...] = RATES,
    data_dir: Path | None = None,
    results: Path = RESULTS,
    workers: Count = 2,
    show: bool = False,
) -> int:
    """Tune and train each method on each problem, and keep every result.

    Args:
      problems: Names or patterns, such as 'fc-cifar10-*'.
      methods: Names or patterns; if not given, those that the problem names.
      scale: 'small' is for CPUs; 'paper' has the paper's networks, data sizes and lengths.
      seeds: Runs at the rate that is chosen.
      rates: Grid of learning rates, the same for all.
      data_dir: Folder of the .npz files; the environment variable BNP_DATA_DIR if not given.
      results: Folder of the results, a file for each problem and method.
      workers: Trainings at a time.
      show: Only list the problems, their methods, and what has been done.
    """
    # A pipe has no width of its own.
    console = Console() if sys.stdout.isatty() else Console(width=100)
    known = registry.problems(scale)
    try:
        names = matching(known, problems, "problem")
        chosen = matching(METHODS, methods, "method") if methods else None
        if not rates or not all(0.0 < rate < math.inf for rate in rates):
            msg = f"`rates` must be positive and finite, at least one, got {rates}"
            raise ValueError(msg)
        choice = Choice(
            problems=[known[name] for name in names],
            methods={name: tuple(chosen or known[name].methods) for name in names},
            scale=scale,
            grid=tuple(sorted(set(rates))),
            seeds=seeds,
            results=results,
        )
        if show:
            campaign.show(choice, console)
            return 0
        return 0 if campaign.conduct(choice, data_dir, workers, console) else 2
    except (ValueError, SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def report(results: Path = RESULTS, output: Path | None = None) -> int:
    """Write the tables and figures of the results that are there.

    Args:
      results: Folder of the results.
      output: Folder of report.md and its figures; that of the results if not given.
    """
    folder = output or results
    print(write(results, folder))
    return 0
