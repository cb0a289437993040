"""Data with the facts that a result needs to be repeated."""

import hashlib
from typing import Any

import numpy as np

from benchmarks.data import Dataset, Split
from benchmarks.problems.base import Data

# Hashing all of a large data set would take longer than some runs.
_HASHED = 1000


def as_data(dataset: Dataset, inputs: str, source: str, **facts: Any) -> Data:
    """The data set, with its facts.

    Besides those given, the facts are its name, the number of examples of each split, and the
    SHA-256 of the first 1000 examples of each, inputs and targets, as the networks get them.

    Args:
      dataset: Its splits.
      inputs: What was done to the inputs.
      source: Name of the file or of the package that it was read from.
      **facts: Others, as what JSON can hold.
    """
    splits = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    return Data(
        **splits,
        facts={
            "name": dataset.name,
            "inputs": inputs,
            "source": source,
            "sizes": {name: len(split) for name, split in splits.items()},
            "sha256_of_first_1000": {name: _digest(split) for name, split in splits.items()},
            **facts,
        },
    )


def _digest(split: Split) -> str:
    digest = hashlib.sha256()
    for array in (split.x, split.y):
        digest.update(np.ascontiguousarray(array[:_HASHED]).tobytes())
    return digest.hexdigest()
