"""An application of which other processes can train a contestant."""

import os

import numpy as np

from benchmarks.applications.base import Application, Contestant

CONTESTANTS = tuple(Contestant(name, name.title(), 1e-2) for name in ("good", "bad", "ugly"))


def train(name, rate, seeds, steps):
    """Curves that end best at a rate of 0.03, and begin with the number of the process."""
    last = len(name) * (1 + abs(np.log(rate / 0.03))) + 0.01 * np.arange(len(seeds))
    return np.stack([np.full(len(seeds), os.getpid()), last], axis=1)


APPLICATION = Application("toy", "Toy", "error", train, CONTESTANTS, steps=4)
