"""The examples run as they are, at small size, and do what they say."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def continual(main):
    found = main(steps=800)
    assert {len(accuracies) for accuracies in found.values()} == {4}
    # A tenth is chance.
    assert np.mean(found["AdamW in z"]) > 0.6


def pinn(main):
    before, after = main(steps=300)
    assert after < 0.5 * before
    assert after < 0.2


def private(main):
    found = main(steps=150)
    assert found["accuracy"] > 0.7
    assert 2.0 < found["epsilon"] < 6.0


def streaming_rl(main):
    lengths = main(steps=20_000, parts=4)
    assert len(lengths) == 4
    # A random policy falls after some 22 steps.
    assert max(lengths[2:]) > 50


# For each file what is asked of its `main`.
CHECKS = {"continual": continual, "pinn": pinn, "private": private, "streaming_rl": streaming_rl}


def test_all_are_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    CHECKS[name](module.main)


@pytest.mark.parametrize("name", CHECKS)
def test_an_example_is_short_and_stands_alone(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) < 150
    assert "import benchmarks" not in text
    assert "from benchmarks" not in text
