"""The problems of the benchmarks at their small scale, and files of images for them."""

import numpy as np

from benchmarks import data
from benchmarks.problems import problems

SPLITS = ("train", "validation", "test")
SMALL = problems("small")


def make_file(folder, name, n=120, **changes):
    """Random images, in files as small as they may be."""
    random = np.random.default_rng(0)
    shape = (n, *data.IMAGE_SHAPES[name])
    y = np.arange(n, dtype=np.uint8) % min(data.CLASSES[name], n // 2)
    arrays = {"x_train": random.integers(0, 256, shape).astype(np.uint8), "y_train": y}
    arrays |= {"x_test": arrays["x_train"][::-1], "y_test": y[::-1]} | changes
    np.savez(folder / f"{name}.npz", **arrays)
    return arrays
