"""`python -m benchmarks applications`: the problems that normalization cannot go to."""

import json
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.applications import continual, pinn, private, search, streaming
from benchmarks.applications.base import Application
from benchmarks.applications.report import as_table, draw
from benchmarks.arguments import Count, CountOrNone
from benchmarks.contest.campaign import matching
from benchmarks.environment import environment

RESULTS = Path("results/applications")


def registry(data_dir: Path | None) -> dict[str, Application]:
    """All applications, by name."""
    found: list[Application] = [
        *pinn.applications(),
        *streaming.applications(),
        *continual.applications(data_dir),
        *private.applications(data_dir),
    ]
    return {application.name: application for application in found}


def main(
    only: tuple[str, ...] = ("*",),
    seeds: Count = 3,
    tuning_seeds: Count = 1,
    steps: CountOrNone = None,
    data_dir: Path | None = None,
    results: Path = RESULTS,
    workers: Count = 1,
) -> int:
    """Tune and train every contestant of each application; table, figure and numbers.

    What has been done with the same settings is kept: the same command goes on from there.

    Args:
      only: Names or patterns.
      seeds: Trainings at the rate that is chosen.
      tuning_seeds: Trainings at each rate of the search.
      steps: Length of a training; the application's own if not given.
      data_dir: Folder of the .npz files; the environment variable BNP_DATA_DIR if not given.
      results: Folder of the results.
      workers: Contestants at a time, each in a process of its own if more than one.
    """
    console = Console() if sys.stdout.isatty() else Console(width=100)
    known = registry(data_dir)
    try:
        names = matching(known, only, "application")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results.mkdir(parents=True, exist_ok=True)
    for name in names:
        application, path = known[name], results / f"{name}.json"
        before = json.loads(path.read_text()) if path.exists() else None
        length = application.steps if steps is None else steps
        about = {
            "title": application.title,
            "measure": application.measure,
            "environment": environment(),
        }
        found = {}
        done = search.conduct(application, seeds, tuning_seeds, length, before, workers)
        for found in done:
            if before is not None and found["contestants"] == before["contestants"]:
                continue  # Nothing is new, not the environment either.
            path.write_text(json.dumps(about | found, indent=1))
        draw(application, found, results / f"{name}.png")
        text = f"# {application.title}\n\n{as_table(application, found)}\n"
        (results / f"{name}.md").write_text(text)
        console.print(text, soft_wrap=True)
    return 0
