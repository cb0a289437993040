"""What a contest is about: data, a network, and how long it is trained."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
from jaxtyping import Array

from benchmarks.data import Split

Scale = Literal["small", "paper"]
Task = Literal["classification", "regression"]

# (x, key) -> x, and (x, step) -> x; jittable.
Augment = Callable[[Array, Array], Array]
Drift = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Data:
    """The three splits of a problem; hyper-parameters are chosen on `validation`, never on `test`.

    Attributes:
      train: What the networks learn from.
      validation: What hyper-parameters are chosen by.
      test: What is reported.
      facts: Where the data came from and what was done to them, as what JSON can hold.
    """

    train: Split
    validation: Split
    test: Split
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What every method is given alike.

    Attributes:
      name: In file names and on the command line, such as `'fc-cifar10-b60-raw'`.
      title: In tables and figures.
      load: `load(data_dir)` gives the data; raises `DataError` if they cannot be had.
      network: `network(norm, steps)` is the network with a normalization; `steps` is the length of
        the run, for normalizations that have a schedule. Called with (x, train=...). Where there
        is an `init_scale`, the network takes it too.
      batch_size: Examples in a step.
      steps: Steps of a run.
      points: Number of evaluations in a run, at equal distances; divides `steps`.
      methods: Names of the methods that are compared.
      task: What the loss is: cross-entropy in nats, or the squared error.
      augment: `augment(x, key)` is applied to each training batch; None leaves it as it is.
      drift: `drift(x, step)` is applied to what the network sees at a step, in training and in
        evaluation: how the world has changed until then. None for a world that stays the same.
      schedule: `schedule(rate, steps)` is the learning rate's course; None keeps it constant.
      decay: By method, the strength of the weight decay; 0 where it names none.
      init_scale: By method, a factor of the kernels' initial values; 1 where it names none.
      source: Table or figure of the JMLR paper that it repeats, or None.
    """

    name: str
    title: str
    load: Callable[[Path | None], Data]
    network: Callable[..., nn.Module]
    batch_size: int
    steps: int
    points: int
    methods: tuple[str, ...]
    task: Task = "classification"
    augment: Augment | None = None
    drift: Drift | None = None
    schedule: Callable[[Any, int], Callable[[Array], Array]] | None = None
    decay: dict[str, float] = dataclasses.field(default_factory=dict)
    init_scale: dict[str, float] = dataclasses.field(default_factory=dict)
    source: str | None = None

    def __post_init__(self):
        """Check that the run divides into points.

        Raises:
          ValueError: If it does not.
        """
        if self.steps % self.points:
            msg = (
                f"`points` must divide `steps`, got {self.points} and {self.steps} in {self.name};"
                " choose others"
            )
            raise ValueError(msg)
