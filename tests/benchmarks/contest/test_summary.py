"""Summaries of cells whose numbers are known: ranges, targets, verdicts, and the best."""

import numpy as np
import pytest
from support.report_cells import STEPS, altered, make_cell, only, rows, run, with_curve

from benchmarks.contest import summary, tables
from benchmarks.contest.cells import Cell
from benchmarks.contest.summary import Range


def test_numbers_of_a_summary():
    result = only([make_cell(losses=(0.5, 1.0, 1.5), scores=(0.2, 0.3, 0.7))]).summaries["sgd"]
    assert result.final["train_loss"] == pytest.approx(Range(1.0, 0.5, 1.5))
    assert result.final["loss"] == pytest.approx(Range(1.5, 1.0, 2.0))
    assert result.final["score"] == pytest.approx(Range(0.4, 0.2, 0.7))
    assert (result.note, result.diverged, result.at_edge) == (None, 0, False)
    assert result.name == "sgd"
    assert result.label == "SGD"
    assert not result.ours


def test_steps_and_time_to_the_loss_of_sgd():
    # 2.3 to 0.023 in 19 equal factors: 0.23 is passed halfway, between points 10 and 11.
    fast = make_cell(method="adam", losses=(0.023,) * 3, seconds=8.0)
    # One that diverges ends early, and tells nothing of the time of a step.
    fast = altered(fast, runs=[*fast.runs, run("tuning", 3.0, 0, 0.1, np.nan, np.nan)])
    slow = make_cell(method="layernorm", losses=(0.3,) * 3)
    contest = only([make_cell(losses=(0.23,) * 3), fast, slow])
    assert contest.target == pytest.approx(0.23)
    assert contest.summaries["sgd"].steps_to_target == STEPS
    assert contest.summaries["adam"].steps_to_target == 110
    # Its fastest whole run took 8 s for 200 steps.
    assert contest.summaries["adam"].time_to_target == pytest.approx(110 * 8.0 / 200)
    assert contest.summaries["layernorm"].steps_to_target is None
    assert contest.summaries["layernorm"].time_to_target is None


def test_without_sgd_there_is_no_target():
    assert only([make_cell(method="adam")]).target is None
    diverged = make_cell(losses=(0.5, 0.5, np.nan))
    contest = only([diverged, make_cell(method="adam")])
    assert contest.target is None
    assert contest.summaries["adam"].steps_to_target is None
    assert contest.summaries["sgd"].diverged == 1
    assert contest.summaries["sgd"].final["train_loss"].mean == np.inf


def test_an_edge_is_that_of_the_rates_tried():
    assert only([make_cell(rate=1.0)]).summaries["sgd"].at_edge
    assert only([make_cell(rate=0.01)]).summaries["sgd"].at_edge
    beyond = make_cell(rate=1.0)
    beyond = altered(beyond, runs=[*beyond.runs, run("tuning", 3.0, 0, 1.0, 1.0, 0.5)])
    assert not only([beyond]).summaries["sgd"].at_edge
    alone = make_cell(rate=0.1)
    alone = altered(alone, grid=[0.1], runs=[r for r in alone.runs if r.role == "final"])
    assert not only([alone]).summaries["sgd"].at_edge


@pytest.mark.parametrize(
    ("ours", "baseline", "verdict"),
    [
        ((0.61, 0.65, 0.7), (0.4, 0.5, 0.6), "won"),
        ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "lost"),
        ((0.6, 0.7, 0.8), (0.4, 0.5, 0.6), "even"),
        ((0.3, 0.9, 0.9), (0.4, 0.5, 0.6), "even"),
        ((np.nan, 0.5, 0.9), (0.4, 0.5, 0.6), "lost"),
        ((0.1, 0.1, 0.1), (0.4, 0.5, np.nan), "won"),
        ((np.nan,) * 3, (np.nan,) * 3, "even"),
    ],
)
def test_verdicts(ours, baseline, verdict):
    found = [make_cell(scores=baseline), make_cell(method="bnp_sgd", scores=ours)]
    assert only(found).verdicts("score") == {"bnp_sgd": verdict}
    # The same as losses, less is better.
    opposite = {"won": "lost", "lost": "won", "even": "even"}
    if np.isfinite([*ours, *baseline]).all():
        found = [make_cell(losses=baseline), make_cell(method="bnp_sgd", losses=ours)]
        assert only(found).verdicts("train_loss") == {"bnp_sgd": opposite[verdict]}


def test_the_best_of_each_side_and_the_order():
    contest = only(
        [
            make_cell(method="adam_z", scores=(0.7, 0.7, 0.7)),
            make_cell(method="bnp_sgd", scores=(0.9, 0.9, 0.9)),
            make_cell(method="of_tomorrow", scores=(0.2, 0.2, 0.2)),
            make_cell(method="adam", scores=(0.8, 0.8, 0.8)),
            make_cell(method="sgd"),
        ]
    )
    assert list(contest.summaries) == ["sgd", "adam", "of_tomorrow", "bnp_sgd", "adam_z"]
    best = [contest.best("score", ours) for ours in (False, True, None)]
    assert [b.name for b in best if b is not None] == ["adam", "bnp_sgd", "bnp_sgd"]
    assert contest.verdicts("score") == {"bnp_sgd": "won", "adam_z": "lost"}


def test_what_cannot_be_compared_takes_no_part():
    cell = make_cell(method="bnp_sgd", scores=(0.9, 0.9, 0.9))
    other = cell.problem | {"steps": 400, "data": {"train": 7}}
    cases = {
        "skipped: no memory": Cell(cell.problem, cell.method, skipped="no memory"),
        "diverged at every rate": altered(cell, rate=None, runs=cell.runs[:3]),
        "incomplete: 0 of 3 final runs": altered(
            cell, rate=None, runs=cell.runs[:3], complete=False
        ),
        "incomplete: 2 of 3 final runs": altered(cell, runs=cell.runs[:-1], complete=False),
        "another setting than the others': steps, data": altered(cell, problem=other),
    }
    for note, case in cases.items():
        contest = only([make_cell(), case])
        assert contest.summaries["bnp_sgd"].note == note
        assert contest.best("score", ours=True) is None
        assert contest.verdicts("score") == {}
        assert contest.summaries["bnp_sgd"].steps_to_target is None
        text = tables.problem_section(contest)
        assert f"BNP + SGD (ours); {note}" in text
        assert "**40.0" not in text
        rows(text)
    assert only([cases["skipped: no memory"]]).summaries["bnp_sgd"].final == {}


def test_a_curve_with_holes_is_infinite_there():
    cell = make_cell()
    broken = np.array(cell.runs[3].train_loss)
    broken[5:] = np.nan
    cell = with_curve(cell, 0, train_loss=broken, score=np.where(broken > 0, 0.1, np.nan))
    loss, score = summary.curve(cell, "train_loss"), summary.curve(cell, "score")
    assert loss is not None
    assert score is not None
    assert np.isfinite(loss.mean[:5]).all()
    assert (loss.mean[5:] == np.inf).all()
    assert np.isfinite(loss.low).all()
    assert (score.low[5:] == -np.inf).all()
