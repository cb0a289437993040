"""The examples run as they are, at small size, and do what they say."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def continual(main):
    found = main(steps=800)
    assert {len(accuracies) for accuracies in found.values()} == {4}
    # A tenth is chance.
    assert np.mean(found["AdamW in z"]) > 0.6


def private(main):
    found = main(steps=150)
    assert found["accuracy"] > 0.7
    assert 2.0 < found["epsilon"] < 6.0


CHECKS = {"continual": continual, "private": private}


def test_all_are_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    CHECKS[name](module.main)
