"""A stream of tasks over MNIST: pixels permuted anew, or gained and offset anew, in each."""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from benchmarks import data

Kind = Literal["permuted", "rescaled"]
SIDE = 14
PIXELS = SIDE * SIDE
EXAMPLES = 2400


class Tasks(NamedTuple):
    """What is drawn for each task; an example is x[order][:, pixels] * gain + offset.

    Attributes:
      order: The images of each task, each at most once in it.
      pixels: Where each pixel is taken from.
      gain: Of each pixel.
      offset: Of each pixel, after the gain.
    """

    order: Int[np.ndarray, "tasks examples"]
    pixels: Int[np.ndarray, "tasks pixels"]
    gain: Float[np.ndarray, "tasks pixels"]
    offset: Float[np.ndarray, "tasks pixels"]


def draw(kind: Kind, n_tasks: int, n_images: int, seed: int) -> Tasks:
    """The tasks of one training.

    Args:
      kind: `'permuted'` permutes the pixels and leaves their values; `'rescaled'` leaves their
        places and draws for each a gain, log-uniform between 0.1 and 10, and an offset, normal with
        the gain for deviation: detectors that are calibrated anew.
      n_tasks: How many.
      n_images: To choose from; tasks of so many at most.
      seed: Of all that is drawn.
    """
    random = np.random.default_rng(seed)
    n = min(EXAMPLES, n_images)
    order = np.stack([random.choice(n_images, n, replace=False) for _ in range(n_tasks)])
    pixels = np.tile(np.arange(PIXELS), (n_tasks, 1))
    gain, offset = np.ones(pixels.shape, np.float32), np.zeros(pixels.shape, np.float32)
    if kind == "permuted":
        pixels = random.permuted(pixels, axis=1)
    else:
        gain = (10.0 ** random.uniform(-1.0, 1.0, pixels.shape)).astype(np.float32)
        offset = (gain * random.normal(size=pixels.shape)).astype(np.float32)
    return Tasks(order.astype(np.int32), pixels.astype(np.int32), gain, offset)


def images(data_dir: Path | None) -> data.Split:
    """MNIST's training images, 14 by 14 pixels from 0 to 1, flat."""
    train, _ = data.read("mnist", data_dir)
    return data.Split(halved(train.x), train.y)


def halved(x: np.ndarray) -> Float[np.ndarray, "n pixels"]:
    """Images of 28 by 28 bytes as the means of squares of four, from 0 to 1."""
    squares = x.reshape(-1, SIDE, 2, SIDE, 2).astype(np.float32)
    return squares.mean((2, 4)).reshape(-1, PIXELS) / 255.0
