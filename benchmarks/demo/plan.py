"""What a contest compares: networks, inputs, batch sizes, methods, and how long it trains them."""

import dataclasses
import math
from typing import Literal, NamedTuple

import flax.linen as nn
import jax

from benchmarks.networks.small import CNN, MLP, ModelName, convolve_patches
from benchmarks.training.methods import METHODS, RATES, MethodName

Inputs = Literal["raw", "standardized"]


class Setting(NamedTuple):
    """Contestants of one setting are compared with each other."""

    model: ModelName
    inputs: Inputs
    batch_size: int


@dataclasses.dataclass(frozen=True)
class DemoPlan:
    """What is compared, and how long it is trained.

    Attributes:
      models: Networks.
      inputs: How images are fed in.
      batch_sizes: Examples in a step.
      methods: Contestants.
      rates: The grid of learning rates, the same for all contestants.
      seeds: Number of runs at the chosen rate; the run that chooses it is another one.
      steps: Steps at batch size 1; at batch size B there are steps / B^0.4.
      points: Number of evaluations in a run.
      hidden: Widths of the hidden layers of the MLP.
      turns: Turns in the timing of steps; 0 leaves it out.
    """

    models: tuple[ModelName, ...] = ("mlp", "cnn")
    inputs: tuple[Inputs, ...] = ("raw", "standardized")
    batch_sizes: tuple[int, ...] = (1, 4, 64)
    methods: tuple[MethodName, ...] = (
        "sgd",
        "adam",
        "batchnorm",
        "layernorm",
        "ready_sgd",
        "ready_adam",
    )
    rates: tuple[float, ...] = RATES
    seeds: int = 5
    steps: int = 1600
    points: int = 20
    hidden: tuple[int, ...] = (64, 64)
    turns: int = 40

    def __post_init__(self):
        """Check the ranges.

        Raises:
          ValueError: If a number is not positive and finite, `turns` is negative, or there is
            nothing to compare.
        """
        for name in ("models", "inputs", "batch_sizes", "methods", "rates"):
            if not getattr(self, name):
                msg = f"`{name}` is empty; name at least one"
                raise ValueError(msg)
        for name in ("batch_sizes", "rates", "hidden", "seeds", "steps", "points"):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if not all(0 < number < math.inf for number in values):
                msg = f"`{name}` must be positive and finite; got {value}"
                raise ValueError(msg)
        if self.turns < 0:
            msg = f"`turns` must be 0 or more; got {self.turns}"
            raise ValueError(msg)

    def steps_at(self, batch_size: int) -> int:
        """Number of steps at a batch size, a multiple of `points`."""
        return self.points * max(1, round(self.steps / batch_size**0.4 / self.points))

    def network(self, name: ModelName, method: MethodName, in_lanes: bool = False) -> nn.Module:
        """The network that `method` trains.

        Args:
          name: Which network.
          method: Which method.
          in_lanes: Whether it is for `Lanes`, where CPUs do better with another convolution.
        """
        norm = METHODS[method].norm
        if name == "mlp":
            return MLP(self.hidden, norm=norm)
        patches = in_lanes and jax.default_backend() == "cpu"
        return CNN(norm=norm, convolution=convolve_patches if patches else None)
