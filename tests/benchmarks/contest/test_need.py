"""What one batch says of a problem, and whether that agrees with who won."""

import numpy as np
import pytest
from support.report_cells import make_cell

from benchmarks.contest import cells, need
from benchmarks.contest.need import Case
from benchmarks.data import DataError


def test_the_threshold_is_chosen_on_the_development_half():
    found = [
        Case("friedman-raw", 3.0, 1.0, "won", 10.0),
        Case("tabular-raw", 2.0, 1.0, "won", 5.0),
        Case("fc-digits-b1-raw", 1.5, 1.0, "even", 0.0),
        Case("fc-mnist-b60-raw", 0.1, 1.0, "lost", -1.0),
        Case("friedman2-raw", 1.7, 1.0, "won", 1.0),
        Case("friedman3-raw", 1.2, 1.0, "even", 1.0),
    ]
    assert need.best_threshold(found[:4]) == 1.5
    text = need.report(found)
    assert "Threshold of the offset: 1.50." in text
    assert "On the development half right in 4 of 4, of which 2 were won." in text
    assert "On the held-out half right in 2 of 2, of which 1 were won." in text
    assert "| friedman-raw | development | 3.00 | 1.0 | gain | +10.0, won |" in text


def test_offsets_are_those_of_the_inputs():
    known = need.problems.problems("small")
    raw, standardized = (known[f"tabular-{inputs}"] for inputs in ("raw", "standardized"))
    x = np.asarray(raw.load(None).train.x[:256], np.float64)
    expected = np.sqrt(np.mean(x.mean(0) ** 2) / np.mean(x.var(0)))
    offset, spread = need.measured(raw, None)
    assert offset == pytest.approx(expected, rel=1e-4)
    sizes = np.sqrt(x.var(0) + 0.01 * x.var(0).max())
    assert spread == pytest.approx(sizes.max() / sizes.min(), rel=1e-4)
    assert need.measured(standardized, None)[0] < 0.1


def test_outcomes_prefer_the_start_in_z(tmp_path, capsys):
    for method, scores in {
        "adam": (0.1, 0.2, 0.3),
        "ready_adam": (0.1, 0.2, 0.3),
        "from_z_adam": (0.7, 0.8, 0.9),
    }.items():
        cell = make_cell("tabular-raw", method, scores=scores)
        cells.write(tmp_path / "tabular-raw" / f"{method}.json", cell)
    need.main(results=tmp_path)
    assert "gain | +60.0, won |" in capsys.readouterr().out


def test_data_that_are_not_there(monkeypatch):
    monkeypatch.delenv("BNP_DATA_DIR", raising=False)
    problem = need.problems.problems("small")["fc-cifar10-b60-raw"]
    with pytest.raises(DataError):
        need.measured(problem, None)
