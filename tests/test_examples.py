"""The examples run, small, and what they are to show can be seen."""

import importlib.util
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parent.parent / "examples"


def _pinn(main):
    before, after = main(steps=300)
    assert after < 0.5 * before
    assert after < 0.2


def _streaming_rl(main):
    lengths = main(steps=20_000, parts=4)
    assert len(lengths) == 4
    # A random policy falls after some 22 steps.
    assert max(lengths[2:]) > 50


# For each file what is asked of its `main`.
CHECKS = {"pinn": _pinn, "streaming_rl": _streaming_rl}


def test_every_example_is_checked():
    assert {path.stem for path in _FOLDER.glob("*.py")} == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_example(name):
    path = _FOLDER / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    CHECKS[name](module.main)


@pytest.mark.parametrize("name", CHECKS)
def test_an_example_is_short_and_stands_alone(name):
    text = (_FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) < 150
    assert "import benchmarks" not in text
    assert "from benchmarks" not in text
