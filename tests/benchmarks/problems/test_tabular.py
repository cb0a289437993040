"""The tables: standardized targets, disjoint splits, and Friedman's columns."""

import numpy as np
import pytest
from support.benchmark_problem_cases import SPLITS

from benchmarks.problems import tabular


@pytest.mark.parametrize("name", ["tabular", "friedman", "friedman2", "friedman3"])
def test_targets_are_standardized_by_the_training_split(name):
    raw, standardized = (tabular.Table(name, inputs)() for inputs in ("raw", "standardized"))
    y = raw.train.y
    assert y.dtype == raw.train.x.dtype == np.float32
    assert abs(y.mean()) < 1e-5
    assert y.std() == pytest.approx(1, rel=1e-5)
    assert abs(raw.test.y.mean()) > 1e-4
    assert raw.facts["target"] == "standardized by the training split"
    for part in SPLITS:
        np.testing.assert_array_equal(getattr(raw, part).y, getattr(standardized, part).y)
    np.testing.assert_allclose(standardized.train.x.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(standardized.train.x.std(0), 1, rtol=1e-4)
    spread = raw.train.x.std(0)
    assert spread.max() > 20 * spread.min()


def test_splits_of_tables_are_disjoint_and_complete():
    loaded = tabular.Table("friedman", "raw")()
    assert [len(getattr(loaded, part)) for part in SPLITS] == [3600, 1200, 1200]
    rows = np.concatenate([getattr(loaded, part).x for part in SPLITS])
    assert len(np.unique(rows, axis=0)) == tabular.N_FRIEDMAN
    loaded = tabular.Table("tabular", "raw")()
    assert [len(getattr(loaded, part)) for part in SPLITS] == [264, 89, 89]
    rows = np.concatenate([getattr(loaded, part).x for part in SPLITS])
    x = tabular.diabetes()[0].astype(np.float32)
    np.testing.assert_array_equal(np.unique(rows, axis=0), np.unique(x, axis=0))


def test_friedmans_columns_are_uniform():
    x, y = tabular.friedman(2000, 3)
    assert x.shape == (2000, 10)
    assert y.shape == (2000,)
    spread = x.max(0) - x.min(0)
    unit = (x - x.min(0)) / spread
    np.testing.assert_allclose(unit.mean(0), 0.5, atol=4 * np.sqrt(1 / 12 / 2000))
    np.testing.assert_array_less(spread, 100)
    np.testing.assert_array_less(0.0099, spread)


def test_breast_cancer_has_classes():
    loaded = tabular.Table("breast-cancer", "raw")()
    assert loaded.train.y.dtype == np.int32
    assert set(loaded.train.y) == {0, 1}
    assert "target" not in loaded.facts
    assert tabular.table("breast-cancer", "raw", "small").task == "classification"
