"""A cell with few points and any number of runs, some of whose numbers are not finite."""

import numpy as np

from benchmarks.contest.cells import Cell, Run

POINTS = 3


def make_cell(count: int = 2, problem: str = "digits", method: str = "sgd") -> Cell:
    return Cell(
        problem={
            "name": problem,
            "title": "Digits",
            "task": "classification",
            "batch_size": 6,
            "steps": 30,
            "points": POINTS,
            "source": None,
            "scale": "small",
            "data": {"train": 100},
        },
        method={"name": method, "label": "SGD", "ours": False},
        grid=[0.1, 1],
        seeds=1,
        environments=[{"python": "3.12"}],
        runs=[
            Run(
                role="tuning" if i % 2 else "final",
                rate=0.1,
                seed=i,
                seconds=1.5,
                environment=0,
                train_loss=np.array([1.0, np.nan, np.inf]),
                loss=np.array([0.5, -np.inf, 1 / 3]),
                score=np.array([0.25, 0.5, 1]),
            )
            for i in range(count)
        ],
        rate=0.1,
        complete=True,
    )
