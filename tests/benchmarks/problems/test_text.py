"""The text of the standard library: its vocabulary, windows and splits."""

import numpy as np
import pytest
from support.benchmark_problem_cases import SPLITS

from benchmarks import data
from benchmarks.problems import text


def test_vocabulary():
    assert len(text.CHARACTERS) == len(set(text.CHARACTERS)) == 96
    whole = "def f(x):\n    return x + 1\n"
    assert "".join(text.CHARACTERS[i] for i in text.encode(whole)) == whole
    assert "".join(text.CHARACTERS[i] for i in text.encode("\ta\x0cé\r\n")) == "    a\n"


def test_targets_are_the_characters_after():
    codes = np.arange(3 * text.CONTEXT + 5, dtype=np.int32)
    x, y = text.windows(codes)
    assert x.shape == y.shape == (3, text.CONTEXT)
    np.testing.assert_array_equal(y, x + 1)
    np.testing.assert_array_equal(x.reshape(-1), codes[: 3 * text.CONTEXT])
    assert len(text.windows(codes[: text.CONTEXT])[0]) == 0
    assert len(text.windows(codes[: text.CONTEXT + 1])[0]) == 1


@pytest.mark.parametrize("source", [text.PYTHON, text.SKLEARN])
def test_splits_of_text_share_no_module(source):
    modules = [module for part in SPLITS for module in source.modules[part]]
    assert len(set(modules)) == len(modules)


@pytest.mark.parametrize("source", [text.PYTHON, text.SKLEARN])
def test_text(source):
    loaded = source()
    for part in SPLITS:
        split = getattr(loaded, part)
        assert split.x.shape == split.y.shape == (len(split), text.CONTEXT)
        assert split.x.dtype == split.y.dtype == np.int32
        np.testing.assert_array_equal(split.x[:, 1:], split.y[:, :-1])
        assert split.x.min() >= 0
        assert split.x.max() < len(text.CHARACTERS)
    assert len(loaded.validation) == len(loaded.test) == text.N_EVAL
    assert loaded.facts["n_files"] == sum(map(len, source.modules.values()))
    assert 7e5 < loaded.facts["n_characters"] < 4e6
    again = source()
    np.testing.assert_array_equal(again.test.x, loaded.test.x)


def test_python_without_its_source(tmp_path, monkeypatch):
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(data.DataError, match=r"cannot read .*argparse\.py .*installed as files"):
        text.PYTHON()
