"""The regret of documented rates, and the defaults against what they replace."""

import dataclasses

import numpy as np
import pytest
from support.report_cells import make_cell, run

from benchmarks.contest import regret
from benchmarks.contest.summary import contests
from benchmarks.training.methods import ADAM, METHODS, SGD
from benchmarks.training.tuning import next_rate


def tuned_at(cell, scores):
    """The cell with tuning runs of these scores, by rate; a score is that of the whole curve."""
    finals = [one for one in cell.runs if one.role == "final"]
    runs = []
    for rate, score in scores.items():
        curve = run("tuning", rate, 0, 1.0, 1.0, score)
        runs.append(dataclasses.replace(curve, score=np.full_like(curve.score, score)))
    return dataclasses.replace(cell, runs=[*runs, *finals])


def test_searches_of_the_ready_made_optimizers_start_at_their_default_rates():
    assert METHODS["ready_sgd"].start == SGD
    assert METHODS["ready_adam"].start == METHODS["ready_adamw"].start == ADAM
    # Also where a search was begun from another one.
    assert next_rate({0.01: 0.9, 0.03: 0.8}, (0.01, 0.03, 0.1), 0.1) == 0.1


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({0.01: 0.25, 0.1: 0.5, 1.0: 0.75}, (75.0, 50.0)),
        ({0.01: 0.25, 0.1: 0.75, 1.0: 0.5}, (75.0, 75.0)),
        ({0.01: 0.25, 0.1: -1300.0}, (25.0, 0.0)),
        ({0.01: 0.25, 0.1: np.nan}, (25.0, 0.0)),
        ({0.01: -2.0, 0.1: -3.0}, (0.0, 0.0)),
    ],
)
def test_regret(scores, expected):
    found = regret.regret(tuned_at(make_cell(method="sgd"), scores))
    assert found == pytest.approx(expected)
    assert found.points == pytest.approx(expected[0] - expected[1])


def test_no_regret_where_the_documented_rate_was_not_tried():
    assert regret.regret(tuned_at(make_cell(method="sgd"), {0.01: 0.5})) is None


def test_tables():
    cells = [
        tuned_at(make_cell(method="sgd", scores=(0.4, 0.5, 0.6)), {0.1: 0.25, 0.01: 0.5}),
        tuned_at(make_cell(method="ready_sgd", scores=(0.7, 0.8, 0.9)), {SGD: 0.75, 0.3: 0.625}),
        tuned_at(make_cell("drift-digits", "ready_sgd", scores=(0.1, 0.1, 0.1)), {SGD: 0.5}),
        tuned_at(make_cell("drift-digits", "bnp_sgd", scores=(0.2, 0.2, 0.2)), {0.1: 0.5}),
    ]
    text = "\n".join(regret.section(contests(cells)))
    development, held_out = (text.split(f"### {half}") for half in regret.HALVES.values())
    assert "| fc-cifar10-b6-raw | 25.0 of 50.0 | 0.0 of 75.0 |" in development[1]
    assert "| **mean** | **25.0** | **0.0** |" in development[1]
    assert "| **worst** | **25.0** | **0.0** |" in development[1]
    duel = "| fc-cifar10-b6-raw | bnp_sgd | 80.0 (70.0 to 90.0) | 50.0 (40.0 to 60.0), won | - |"
    assert duel in development[2]
    duel = "| drift-digits | bnp_sgd | 10.0 (10.0 to 10.0) | - | 20.0 (20.0 to 20.0), lost |"
    assert duel in held_out[2]
    assert "fc-cifar10" not in held_out[2]
