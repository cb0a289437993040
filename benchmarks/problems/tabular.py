"""Tables whose columns have very different scales."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import numpy as np
import sklearn
from jaxtyping import Array, Float
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    make_friedman1,
    make_friedman2,
    make_friedman3,
)
from sklearn.model_selection import train_test_split

from benchmarks import data
from benchmarks.data import Dataset, Split
from benchmarks.networks.small import MLP, Norm
from benchmarks.problems import lineups
from benchmarks.problems.base import Data, Problem, Scale, Task
from benchmarks.problems.record import as_data

Name = Literal["tabular", "friedman", "friedman2", "friedman3", "breast-cancer"]
Inputs = Literal["raw", "standardized"]

BATCH_SIZE: dict[Name, int] = {
    "tabular": 10,
    "friedman": 32,
    "friedman2": 32,
    "friedman3": 32,
    "breast-cancer": 10,
}
STEPS = {"small": 2000, "paper": 20_000}
POINTS = 10
N_FRIEDMAN = 6000

_TITLES: dict[Name, str] = {
    "tabular": "Diabetes",
    "friedman": "Friedman's function",
    "friedman2": "Friedman's second function",
    "friedman3": "Friedman's third function",
    "breast-cancer": "Breast cancer",
}
_SOURCES: dict[Name, str] = {
    "tabular": "scikit-learn's diabetes data in their units",
    "friedman": "scikit-learn's make_friedman1, columns scaled and shifted",
    "friedman2": "scikit-learn's make_friedman2, an impedance in physical units",
    "friedman3": "scikit-learn's make_friedman3, a phase angle in physical units",
    "breast-cancer": "scikit-learn's breast cancer data in their units",
}


class Scalar(nn.Module):
    """A network with one output, without the axis of that output.

    Attributes:
      network: The network.
    """

    network: nn.Module

    def __call__(self, x: Float[Array, "n d"], train: bool = False) -> Float[Array, " n"]:
        """Predictions of `x`."""
        return self.network(x, train=train)[:, 0]


@dataclasses.dataclass(frozen=True)
class Table:
    """Loads a table; the `load` of a problem.

    Attributes:
      name: Which table.
      inputs: In their units, or standardized by the training split.
      seed: Of the table, where it is made, and of its splits, 60:20:20.
    """

    name: Name
    inputs: Inputs
    seed: int = 0

    def __call__(self, data_dir: Path | None = None) -> Data:
        """Load the table; no file is needed. Targets are standardized by the training split."""
        x, y = _columns(self.name, self.seed)
        train, validation, test = _split_rows(len(y), self.seed)
        target: dict[str, Any] = {}
        if task(self.name) == "regression":
            mean, deviation = y[train].mean(), y[train].std()
            y = ((y - mean) / deviation).astype(np.float32)
            target = {
                "target": "standardized by the training split",
                "target_mean": float(mean),
                "target_deviation": float(deviation),
            }

        def part(rows: np.ndarray) -> Split:
            return Split(x[rows].astype(np.float32), y[rows])

        dataset = Dataset(self.name, part(train), part(validation), part(test))
        done = "raw"
        if self.inputs == "standardized":
            dataset = data.standardize(dataset, "feature")
            done = "standardized per feature by the training split"
        return as_data(
            dataset,
            done,
            f"{_SOURCES[self.name]}, version {sklearn.__version__}",
            seed=self.seed,
            **target,
        )


def task(name: Name) -> Task:
    """What is predicted: a class, or a number."""
    return "classification" if name == "breast-cancer" else "regression"


def _columns(name: Name, seed: int) -> tuple[np.ndarray, np.ndarray]:
    match name:
        case "tabular":
            return diabetes()
        case "friedman":
            return friedman(N_FRIEDMAN, seed)
        case "friedman2":
            # About a tenth of the deviation of what is to be learned.
            return make_friedman2(N_FRIEDMAN, noise=40.0, random_state=seed)
        case "friedman3":
            return make_friedman3(N_FRIEDMAN, noise=0.03, random_state=seed)
        case "breast-cancer":
            x, y = load_breast_cancer(return_X_y=True)
            return np.asarray(x), np.asarray(y, np.int32)


def _split_rows(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of three splits, 60:20:20."""
    rest, test = train_test_split(np.arange(n), test_size=0.2, random_state=seed)
    train, validation = train_test_split(rest, test_size=0.25, random_state=seed)
    return np.asarray(train), np.asarray(validation), np.asarray(test)


def diabetes() -> tuple[Float[np.ndarray, "442 10"], Float[np.ndarray, " 442"]]:
    """Ten measurements of 442 patients in their units, and the progress of their disease."""
    x, y = load_diabetes(return_X_y=True, scaled=False)
    return np.asarray(x, np.float64), np.asarray(y, np.float64)


def friedman(n: int, seed: int) -> tuple[Float[np.ndarray, "n 10"], Float[np.ndarray, " n"]]:
    """Friedman's function of five of ten columns, with noise, columns as if in units of their own.

    A column z, uniform in [0, 1], is given as 10^u (z + v), with u uniform in [-2, 2] and v in
    [-3, 3].

    Args:
      n: Number of examples.
      seed: Of all that is random.
    """
    z, y = make_friedman1(n_samples=n, n_features=10, noise=1.0, random_state=seed)
    random = np.random.default_rng(seed)
    scale = 10.0 ** random.uniform(-2.0, 2.0, 10)
    return scale * (z + random.uniform(-3.0, 3.0, 10)), y


def table(name: Name, inputs: Inputs, scale: Scale) -> Problem:
    """A network with two hidden layers of 64 on a table."""
    regression = task(name) == "regression"
    batch_size = BATCH_SIZE[name]
    return Problem(
        name=f"{name}-{inputs}",
        title=f"{_TITLES[name]}, batch size {batch_size}, {inputs} inputs",
        load=Table(name, inputs),
        network=_scalar if regression else functools.partial(_network, classes=2),
        batch_size=batch_size,
        steps=STEPS[scale],
        points=POINTS,
        methods=(
            *(lineups.CORE if name in ("tabular", "friedman") else lineups.HELD_OUT),
            *lineups.FROM_Z,
        ),
        task=task(name),
    )


def _network(norm: Norm, steps: int, classes: int) -> MLP:
    init = nn.initializers.glorot_uniform()
    return MLP(hidden=(64, 64), classes=classes, norm=norm, steps=steps, kernel_init=init)


def _scalar(norm: Norm, steps: int) -> Scalar:
    return Scalar(_network(norm, steps, classes=1))
