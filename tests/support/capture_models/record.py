"""What a capture of a model must report: records of inputs, models, and the list of cases."""

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

KEY = jax.random.key(0)

DENSE = "...i,io"
TORCH_DENSE = "...i,oi"
ATTENTION_OUT = "...hd,hdo"


@dataclasses.dataclass(frozen=True)
class Record:
    """The inputs that one kernel multiplies.

    Attributes:
      calls: The inputs of each call.
      axes: The axes of the inputs and of the kernel, as in an einsum: those of the same letter
        meet. In capitals, both keep them (stacked layers, the outputs of grouped convolutions).
        `x`, `y` are the feature map's, and `_` the window's, which meets no axis of the inputs.
      bias: Name of the bias added to the product, or None.
      positions: Output positions of a convolution.
    """

    calls: list[np.ndarray]
    axes: str
    bias: str | None = None
    positions: int = 1

    @property
    def input_axes(self) -> tuple[int, ...]:
        """The axes of the kernel that its product sums over, negative."""
        left, right = self.axes.split(",")
        summed = [label == "_" or (label in left and label.islower()) for label in right]
        return tuple(i - len(right) for i, is_summed in enumerate(summed) if is_summed)

    def _moments(self, call: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """Count, mean and variance of one call, in the kernel's layout."""
        call = np.asarray(call, np.float64)
        left, right = self.axes.split(",")
        spare = iter(label for label in string.ascii_lowercase if label not in self.axes)
        n_more = call.ndim - len(left.replace("...", ""))
        left = left.replace("...", "".join(next(spare) for _ in range(n_more)))
        averaged = tuple(i for i, label in enumerate(left) if label not in right)
        met = [label for label in left if label in right]
        order = [met.index(label) for label in right if label in met]
        new = tuple(i for i, label in enumerate(right) if label not in met)
        mean, var = (
            np.expand_dims(stat.transpose(order), new)
            for stat in (call.mean(averaged), call.var(averaged))
        )
        rows = math.prod(call.shape[i] for i in averaged if left[i] not in "xy")
        return rows * self.positions, mean, var

    def pooled(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Count, mean and variance over all calls, each weighted by its count; zeros if none."""
        if not self.calls:
            return 0, np.zeros(()), np.zeros(())
        counts, means, variances = zip(*map(self._moments, self.calls), strict=True)
        average = functools.partial(np.average, axis=0, weights=counts)
        mean = average(np.stack(means))
        between = average((np.stack(means) - mean) ** 2)
        return sum(counts), mean, average(np.stack(variances)) + between

    @property
    def scale(self) -> float:
        """The largest entry of the inputs."""
        return max((float(np.abs(call).max()) for call in self.calls), default=1.0)


class Model(NamedTuple):
    """A loss, where to evaluate it, and what a correct capture reports.

    `loss` is that of the rerun; `expected` maps the name of each covered kernel to its record.
    """

    loss_fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    expected: dict[str, Record]
    loss: float


@dataclasses.dataclass(frozen=True)
class Case:
    """A model by name.

    Attributes:
      name: Name of the case.
      framework: 'linen', 'nnx', 'equinox', 'haiku' or 'jax'.
      make: Builds the model.
      uncovered: Regular expression for the reason, by name of each kernel that is not covered.
      rounding: Of the network's arithmetic, relative to the largest entry of an array.
    """

    name: str
    framework: str
    make: Callable[[], Model]
    uncovered: Mapping[str, str]
    rounding: float


CASES: list[Case] = []


def case(
    framework: str,
    uncovered: Mapping[str, str] | None = None,
    rounding: float = 1e-6,
) -> Callable[[Callable[[], Model]], Callable[[], Model]]:
    """Add the decorated `make` to `CASES`."""

    def register(make: Callable[[], Model]) -> Callable[[], Model]:
        CASES.append(Case(make.__name__, framework, make, uncovered or {}, rounding))
        return make

    return register


# ---------------------------------------------------------------------------------------------
# Parameters, inputs, and losses.
# ---------------------------------------------------------------------------------------------


def inputs(*shape, seed=1):
    """A float32 batch with another mean and spread in each feature."""
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.5, 2.0, shape[-1])
    return (rng.normal(size=shape) * spread + rng.normal(size=shape[-1])).astype(np.float32)


def filled(tree, seed=0):
    """Random parameters in the shapes of `tree`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape), a.dtype), tree)


def weights(**shapes):
    """A dict of random parameters."""
    return filled({name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()})


def float64(tree):
    """The arrays of `tree` for the rerun."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def score(outputs):
    """What every loss is of the network's outputs."""
    return jnp.mean(jnp.sin(outputs.astype(jnp.float32)))


def hand_score(outputs):
    """`score` in NumPy."""
    return float(np.mean(np.sin(outputs)))
