"""Cells whose numbers are known, and the rows of the tables that are made of them."""

import dataclasses
import re

import numpy as np

from benchmarks.contest.cells import Cell, Run
from benchmarks.contest.summary import contests
from benchmarks.training.methods import METHODS

STEPS, POINTS = 200, 20
OURS = ("bnp_sgd", "adam_z")
FC6, FC1 = "fc-cifar10-b6-raw", "fc-cifar10-b1-raw"


def make_cell(
    problem=FC6,
    method="sgd",
    losses=(0.9, 1.0, 1.1),
    scores=(0.4, 0.5, 0.6),
    rate=0.1,
    task="classification",
    seconds=4.0,
):
    """Losses fall to `losses` by equal factors, scores rise to `scores` by equal amounts."""
    runs = [run("tuning", tried, 0, seconds, 1.0, 0.5) for tried in (0.01, 0.1, 1.0)]
    runs += [
        run("final", rate, seed, seconds + seed, loss, score)
        for seed, (loss, score) in enumerate(zip(losses, scores, strict=True))
    ]
    known = METHODS[method].label if method in METHODS else method
    return Cell(
        problem={
            "name": problem,
            "title": f"Title of {problem}",
            "task": task,
            "batch_size": 6,
            "steps": STEPS,
            "points": POINTS,
            "source": "Figure 4",
            "scale": "small",
            "data": {"train": 1000},
        },
        method={"name": method, "label": known, "ours": method in OURS},
        grid=[0.01, 0.1, 1.0],
        seeds=3,
        environments=[
            {
                "versions": {"jax": "0.9.1", "numpy": "2.0"},
                "python": "3.12.1",
                "cpu": "a | b",
                "devices": ["cpu: cpu", "cpu: cpu"],
                "commit": "abc123",
            }
        ],
        runs=runs,
        rate=rate,
        complete=True,
    )


def run(role, rate, seed, seconds, loss, score):
    falling = np.geomspace(2.3, loss, POINTS)
    rising = np.linspace(0.1, score, POINTS)
    # The ends of geomspace are exact only to rounding.
    falling[-1], rising[-1] = loss, score
    return Run(role, rate, seed, seconds, 0, falling, falling + 0.5, rising)


def altered(cell, **changes):
    return dataclasses.replace(cell, **changes)


def with_curve(cell, seed, **values):
    """The cell with other curves in the final run of a seed."""
    runs = [
        dataclasses.replace(r, **values) if (r.role, r.seed) == ("final", seed) else r
        for r in cell.runs
    ]
    return altered(cell, runs=runs)


def only(found):
    (contest,) = contests(found)
    return contest


def rows(markdown):
    """The rows of each table, checked to be as long as its header."""
    found = []
    for block in markdown.split("\n\n"):
        if block.startswith("|"):
            lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
            assert len({len(line) for line in lines}) == 1
            found.append([[cell.strip() for cell in line] for line in lines])
    return found


def paper_cells():
    """Some of the paper's problems; BNP as it says at batches of 6, not at the others."""
    mnist, cnn1 = "fc-mnist-b60-raw", "cnn-cifar10-b1-raw"
    chance = (0.1, 0.1, 0.1)
    return [
        make_cell(mnist, "sgd", scores=(0.90, 0.91, 0.92)),
        make_cell(mnist, "batchnorm", scores=(0.97, 0.97, 0.97), rate=1.0),
        make_cell(mnist, "layernorm", scores=(0.915, 0.93, 0.94)),
        make_cell(mnist, "bnp_sgd", scores=(0.94, 0.94, 0.94), rate=1.0),
        make_cell(FC6, "sgd", scores=(0.40, 0.41, 0.42)),
        make_cell(FC6, "batchnorm", scores=(0.30, 0.31, 0.43)),
        make_cell(FC6, "batchrenorm", scores=(0.45, 0.45, 0.45)),
        make_cell(FC6, "bnp_sgd", scores=(0.43, 0.44, 0.45)),
        make_cell(FC1, "sgd", scores=(0.40, 0.40, 0.40), losses=(1.0, 1.0, 1.0)),
        make_cell(FC1, "batchnorm", scores=chance),
        make_cell(FC1, "bnp_sgd", scores=(0.39, 0.39, 0.39), losses=(0.5, 0.6, 0.7)),
        make_cell(cnn1, "sgd", scores=(0.40, 0.40, 0.40)),
        altered(make_cell(cnn1, "batchnorm"), rate=None, runs=[]),
        make_cell(cnn1, "bnp_sgd", scores=(0.39, 0.39, 0.39)),
    ]
