"""Online learning from inputs whose scales and means move while the network learns."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks.networks.small import MLP, Norm
from benchmarks.problems import lineups
from benchmarks.problems.base import Problem, Scale
from benchmarks.problems.images import DIGITS, PAPER, SMALL, Images, fully_connected_network

STEPS = {"small": 9000, "paper": 30_000}
POINTS = 30
OFFSET = 3.0
COMMON_FACTOR = 100.0


@dataclasses.dataclass(frozen=True, eq=False)
class Drift:
    """Scales that move geometrically and offsets that move linearly, in the middle of a run.

    At a step t the networks see s_j(t) x_j + m_j(t) in place of a feature x_j, where

        s_j(t) = final_scale_j^f(t),   m_j(t) = f(t) final_offset_j,
        f(t) = (t - start) / (end - start), clipped to [0, 1],

    so they see x_j itself until `start`, and final_scale_j x_j + final_offset_j from `end` on, both
    without rounding of the scale.

    Attributes:
      final_scale: By feature.
      final_offset: By feature.
      start: Step at which the drift starts.
      end: Step at which it has ended.
    """

    final_scale: Float[np.ndarray, " features"]
    final_offset: Float[np.ndarray, " features"]
    start: int
    end: int

    def __call__(self, x: Float[Array, "n *d"], step: Int[Array, ""]) -> Float[Array, "n *d"]:
        """Inputs at a step; images are taken as their flattened features."""
        step = jnp.asarray(step)
        passed = (step - self.start) / (self.end - self.start)
        share = jnp.clip(passed.astype(x.dtype), 0.0, 1.0)
        last = jnp.asarray(self.final_scale, x.dtype)[None]
        # A power rounds, so the end is not left to it.
        scale = jnp.where(step >= self.end, last, last**share)
        offset = share * jnp.asarray(self.final_offset, x.dtype)[None]
        return (scale * x.reshape(len(x), -1) + offset).reshape(x.shape)


def scattering(n_features: int, steps: int, seed: int = 0) -> Drift:
    """A drift in the middle third of a run that scatters scales over two orders of magnitude.

    Final scales are 10^u, with u uniform in [-1, 1]; final offsets are 3 of them, up or down.

    Args:
      n_features: Number of features.
      steps: Length of the run.
      seed: Of u and of the signs.
    """
    random = np.random.default_rng(seed)
    scale = 10.0 ** random.uniform(-1.0, 1.0, n_features)
    sign = random.choice([-1.0, 1.0], n_features)
    return Drift(scale, OFFSET * sign * scale, steps // 3, 2 * steps // 3)


def growing(n_features: int, steps: int) -> Drift:
    """A drift in the middle third of a run that multiplies all features by 100."""
    scale = np.full(n_features, COMMON_FACTOR)
    return Drift(scale, np.zeros(n_features), steps // 3, 2 * steps // 3)


def drifting(name: Literal["digits", "mnist"], kind: str, scale: Scale) -> Problem:
    """Batches of one example, standardized once, by statistics from before the drift.

    Args:
      name: Which images.
      kind: `'scattering'` or `'growing'`.
      scale: How large.
    """
    steps = STEPS[scale]
    if name == "digits":
        n_features, sizes, network = 64, DIGITS, _small_network
    else:
        n_features, network = 784, fully_connected_network
        sizes = SMALL if scale == "small" else PAPER[name]
    scatters = kind == "scattering"
    what = "features drift apart" if scatters else "features grow 100-fold"
    return Problem(
        name=f"drift-{name}" if scatters else f"drift-scale-{name}",
        title=f"Online, {what}: {'digits' if name == 'digits' else 'MNIST'}",
        load=Images(name, sizes, "standardized"),
        network=network,
        batch_size=1,
        steps=steps,
        points=POINTS,
        methods=lineups.CORE,
        drift=scattering(n_features, steps) if scatters else growing(n_features, steps),
    )


def _small_network(norm: Norm, steps: int) -> MLP:
    init = nn.initializers.glorot_uniform()
    return MLP(hidden=(64, 64), classes=10, norm=norm, steps=steps, kernel_init=init)
