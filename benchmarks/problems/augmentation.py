"""What ResNets are trained with: random crops and flips, and a learning rate that falls."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

WARM_UP_STEPS = 400


@dataclasses.dataclass(frozen=True)
class CropAndFlip:
    """Each image is padded with zeros, cropped at random to its size, and flipped half the time.

    Source: He et al. (2016a), Section 4.2, where the padding is 4. Zeros are the mean of
    standardized images.

    Attributes:
      padding: Pixels on every side.
    """

    padding: int = 4

    def __call__(
        self, x: Float[Array, "n height width c"], key: Key[Array, ""]
    ) -> Float[Array, "n height width c"]:
        """Augment a batch."""
        n, height, width, channels = x.shape
        crop_key, flip_key = jax.random.split(key)
        corners = jax.random.randint(crop_key, (n, 2), 0, 2 * self.padding + 1)
        flips = jax.random.bernoulli(flip_key, 0.5, (n, 1, 1, 1))
        sides = (self.padding, self.padding)
        padded = jnp.pad(x, ((0, 0), sides, sides, (0, 0)))

        def crop(image: Array, corner: Array) -> Array:
            return lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

        x = jax.vmap(crop)(padded, corners)
        return jnp.where(flips, x[:, :, ::-1], x)


@dataclasses.dataclass(frozen=True)
class Falling:
    """A learning rate that is divided by 10 at some epochs, after a linear warm-up.

    At a step t of T, with the warm-up's length w = min(400, T / 10) or 0,

        rate(t) = rate min(1, 0.1 + 0.9 t / w) 10^-#{e in drops: t >= T e / epochs}.

    Attributes:
      drops: Epochs at which it falls.
      epochs: Length of a run in the paper's epochs; shorter runs fall at the same fractions.
      warm_up: Whether it rises from a tenth at first.
    """

    drops: tuple[int, ...]
    epochs: int
    warm_up: bool = True

    def __call__(self, rate: Any, steps: int) -> Callable[[Array], Array]:
        """The learning rate as a function of the step, in a run of `steps`."""
        rising = min(WARM_UP_STEPS, steps // 10) if self.warm_up else 0
        starts = [round(steps * epoch / self.epochs) for epoch in self.drops]

        def at(step: Array) -> Array:
            step = jnp.asarray(step)
            factor = jnp.minimum(1.0, 0.1 + 0.9 * step / rising) if rising else jnp.ones(())
            for start in starts:
                factor = jnp.where(step >= start, 0.1 * factor, factor)
            return rate * factor

        return at
