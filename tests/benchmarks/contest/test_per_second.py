"""The table of scores after equal time."""

import json

import pytest
from support.report_cells import make_cell

from benchmarks.contest import per_second
from benchmarks.contest.summary import contests

WORKLOAD = per_second.WORKLOADS["text-transformer"]
TIMES = {WORKLOAD: {"Adam": {"ratio": 1.2}, "Muon": {"ratio": 2.4}, "whiten_adam": {"ratio": 36.0}}}


def test_the_table(tmp_path):
    cells = [
        make_cell("text-transformer", "adamw", scores=(0.3, 0.4, 0.5)),
        make_cell("text-transformer", "muon", scores=(0.5, 0.6, 0.7)),
        make_cell("text-transformer", "whiten_adam", scores=(0.8, 0.8, 0.8)),
        make_cell("text-transformer", "sgd", scores=(0.9, 0.9, 0.9)),
        make_cell("drift-mnist", "adamw", scores=(0.3, 0.4, 0.5)),
    ]
    path = tmp_path / "whiten_cost.json"
    assert per_second.read_costs(path) == {}
    path.write_text(json.dumps({"results": {"time": TIMES}}))
    text = "\n".join(per_second.section(contests(cells), per_second.read_costs(path)))
    # Muon's steps take twice Adam's time, so it gets half of them, where half of its score is.
    half = per_second.after(contests(cells)[0].summaries["muon"], 0.5)
    # Scores rise from 0.1, at the first of 20 points, to 0.6.
    assert half == pytest.approx(0.1 + 0.5 * 9 / 19)
    assert "| text-transformer | AdamW | 1.20 | 40.0 | **40.0** |" in text
    assert f"| text-transformer | Muon | 2.40 | 60.0 | {100 * half:.1f} |" in text
    assert "| text-transformer | Adam in z (whitened) | 36.00 | **80.0** | - |" in text
    assert "SGD |" not in text
    assert "drift" not in text


def test_a_fast_method_gets_no_more_than_its_steps():
    (contest,) = contests([make_cell("text-transformer", "sgd", scores=(0.4, 0.5, 0.6))])
    assert per_second.after(contest.summaries["sgd"], 3.0) == pytest.approx(0.5)


def test_nothing_was_timed():
    cells = contests([make_cell("text-transformer", "adamw")])
    assert per_second.section(cells, {}) == []
