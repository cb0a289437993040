"""How long a training step takes, relative to that of SGD."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array

from benchmarks.training.methods import Method
from benchmarks.training.parts import find_layers, init_carry, make_step

_CALLS_PER_TURN = 5
_WARM_UP_TURNS = 2
# The quartiles of ratios that are worth a number are no further apart than by this factor.
_MAX_SPREAD = 1.5


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Time of a training step.

    Attributes:
      seconds: Median time of a step.
      ratio: Median, over the turns, of the ratio to the reference's step of the same turn.
      quartiles: First and third quartile of that ratio.
    """

    seconds: float
    ratio: float
    quartiles: tuple[float, float]

    def __str__(self) -> str:
        """Ratio and quartiles; nothing where these are so far apart that the ratio says nothing."""
        low, high = self.quartiles
        return f"{self.ratio:.1f} ({low:.1f}-{high:.1f})" if high <= _MAX_SPREAD * low else "-"


def compile_step(
    model: nn.Module, method: Method, variables: Any, x: Array, y: Array
) -> Callable[[], None]:
    """A function that takes one more training step on (x, y) and waits for its end.

    The step is called as a training loop would call it, so for a small network much of its time
    is that of starting it.
    """
    layers = find_layers(model, method, variables, x, y)
    carry = init_carry(method, layers, variables)
    step = jax.jit(make_step(model, method, layers))
    jax.block_until_ready(step(1e-3, carry, x, y))

    def call() -> None:
        nonlocal carry
        carry, loss = step(1e-3, carry, x, y)
        loss.block_until_ready()

    return call


def interleaved(
    steps: Mapping[str, Callable[[], None]], reference: str, turns: int
) -> dict[str, StepTime]:
    """Time all `steps` in turns, so that what disturbs the machine disturbs all of them.

    Args:
      steps: Functions to time.
      reference: Which of them the ratios are to.
      turns: How often each gets its turn of a few calls.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_WARM_UP_TURNS + turns):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(_CALLS_PER_TURN):
                step()
            times[name].append((time.perf_counter() - start) / _CALLS_PER_TURN)
    seconds = {name: np.array(values[_WARM_UP_TURNS:]) for name, values in times.items()}
    ratios = {name: values / seconds[reference] for name, values in seconds.items()}
    return {
        name: StepTime(
            seconds=float(np.median(values)),
            ratio=float(np.median(ratios[name])),
            quartiles=(
                float(np.quantile(ratios[name], 0.25)),
                float(np.quantile(ratios[name], 0.75)),
            ),
        )
        for name, values in seconds.items()
    }
