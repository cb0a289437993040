"""The tables of the report, on cells whose numbers are known."""

import re

import numpy as np
from support.report_cells import FC6, altered, make_cell, only, rows

from benchmarks.contest import tables
from benchmarks.contest.summary import contests
from benchmarks.training.methods import METHODS


def test_the_table_of_a_problem():
    contest = only(
        [
            make_cell(losses=(0.5, 0.5, 0.5)),
            make_cell(method="adam", losses=(1.0, 1.0, np.nan), scores=(0.3, 0.3, np.nan), rate=1),
            make_cell(method="bnp_sgd", losses=(0.1, 0.2, 0.3), scores=(0.61, 0.62, 0.63)),
        ]
    )
    text = tables.problem_section(contest)
    ((header, _, sgd, adam, bnp),) = rows(text)
    assert header[4] == "test accuracy, %"
    assert sgd[:2] == ["SGD", "0.1"]
    assert sgd[2] == "0.500 (0.500 to 0.500)"
    assert adam[:3] == ["Adam; 1 of 3 seeds diverged", "1 at the edge", "diverged"]
    assert adam[4:] == ["diverged", "-", "-"]
    assert bnp[0] == "BNP + SGD (ours)"
    assert bnp[2:5] == [
        "**0.200 (0.100 to 0.300)**",
        "**0.700 (0.600 to 0.800)**",
        "**62.0 (61.0 to 63.0)**",
    ]
    assert re.fullmatch(r"\*\*\d+\*\*", bnp[5])
    assert re.fullmatch(r"\*\*[\d.]+ s\*\*", bnp[6])
    assert "target: a training loss of 0.500" in text
    assert "batches of 6; 200 steps; scale: small; repeats Figure 4" in text
    assert "Python 3.12.1, jax 0.9.1, a | b, cpu: cpu, commit abc123" in text
    assert "different" not in text


def test_unequal_tuning_is_said():
    base, other = make_cell(), make_cell(method="bnp_sgd")
    places = [other.environments[0] | {"cpu": "another"}]
    text = tables.problem_section(
        only([base, altered(other, grid=[0.1], seeds=2, environments=places)])
    )
    assert "different grids" in text
    assert "different numbers of seeds" in text
    assert "not comparable" in text
    commits = [other.environments[0] | {"commit": "def456"}]
    assert "comparable" not in tables.problem_section(
        only([base, altered(other, environments=commits)])
    )


def test_the_overview_of_a_regression_and_of_a_missing_side():
    found = [
        make_cell("drift-x", "sgd", scores=(0.5, 0.5, 0.5), task="regression"),
        make_cell("drift-x", "bnp_sgd", scores=(0.9, 0.91, 0.92), task="regression"),
        make_cell("alone", "sgd"),
    ]
    scores, losses, counts = rows(tables.overview(contests(found)))
    assert scores[2] == [
        "`drift-x`",
        "SGD",
        "0.500 (0.500 to 0.500)",
        "BNP + SGD",
        "0.910 (0.900 to 0.920)",
        "won",
    ]
    assert scores[3] == ["`alone`", "SGD", "50.0 (40.0 to 60.0)", "-", "-", "-"]
    assert losses[2][-1] == "even"
    assert counts[2] == ["BNP + SGD", "1", "0", "0", "0", "1", "0"]


def test_rates_beside_the_papers():
    found = [make_cell(), make_cell(method="bnp_sgd"), make_cell("cnn-cifar10-b128-raw")]
    (table,) = rows(tables.rates(contests(found)))
    assert [f"`{FC6}`", "SGD", "0.1", "0.005", "20"] in table
    assert [f"`{FC6}`", "BNP + SGD", "0.1", "0.05", "2"] in table
    assert [f"`{FC6}`", METHODS["batchrenorm"].label, "-", "0.05", "-"] in table
    assert ["`cnn-cifar10-b128-raw`", "SGD", "0.1", "0.1 (Adam)", "-"] in table
    assert tables.ratio(0.1 / 0.0005) == "200"


def test_a_bar_in_a_cell_is_no_column():
    ((_, _, row),) = rows(tables.table(["a", "b"], [["x | y", "1"]]))
    assert row == [r"x \| y", "1"]
