"""Images from an `.npz` file, or by the optional package `datasets` (Hugging Face)."""

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from benchmarks import data
from benchmarks.data import DataError, FileName, Split


class _Columns(NamedTuple):
    """Where the package keeps a data set."""

    path: str
    image: str
    label: str


_HUB: dict[str, _Columns] = {
    "mnist": _Columns("ylecun/mnist", "image", "label"),
    "fashion_mnist": _Columns("zalandoresearch/fashion_mnist", "image", "label"),
    "cifar10": _Columns("uoft-cs/cifar10", "img", "label"),
    "cifar100": _Columns("uoft-cs/cifar100", "img", "fine_label"),
    "imagenet": _Columns("ILSVRC/imagenet-1k", "image", "label"),
}
_REMEDY = "check the network and the package, or use an .npz file (--data-dir or BNP_DATA_DIR)"
_BUFFER = 1000


class Raw(NamedTuple):
    """Images as they are stored.

    Attributes:
      train: Training split, pixels 0..255.
      test: Test split.
      source: Name of the file, or of the package and its version.
    """

    train: Split
    test: Split
    source: str


def read(name: FileName, data_dir: Path | None = None) -> Raw:
    """Images from `<name>.npz`; if there is none, from the package `datasets` if installed.

    Args:
      name: Which data set.
      data_dir: Folder of the file; None takes the environment variable `BNP_DATA_DIR`.

    Raises:
      DataError: If there is neither the file nor the package, or what is there cannot be read.
    """
    try:
        path = data.archive(name, data_dir)
    except DataError as error:
        package = _package()
        if package is None:
            msg = f"{error}; or `pip install datasets`, with a network to download it by"
            raise DataError(msg) from error
        return _download(name, package)
    return Raw(*data.read(name, data_dir), path.name)


@functools.lru_cache(maxsize=1)
def read_imagenet(n_train: int, n_test: int, side: int = 224, seed: int = 0) -> Raw:
    """Some of ImageNet's images, in memory: a subset to try the network on, not the benchmark.

    The package streams the training split, and the validation split in place of the test split,
    which has no public labels; from each, the first images of a shuffle through a buffer are
    taken. They are scaled so that the shorter side is `side`, and cropped to the center. The
    results on so few images do not compare with those of the paper, which trains on all.

    Args:
      n_train: Number of images to train and validate.
      n_test: Number of images to test.
      side: Of the square images, in pixels.
      seed: Of the shuffle.

    Raises:
      DataError: If the package is missing, or cannot get the images.
    """
    package = _package()
    if package is None:
        msg = (
            "imagenet is only to be had by the package datasets; `pip install datasets pillow`, "
            "with a network and an account that has accepted the data's terms"
        )
        raise DataError(msg)
    train = _stream(package, "train", n_train, side, seed)
    test = _stream(package, "validation", n_test, side, seed)
    return Raw(train, test, _source(package, "imagenet"))


def _package() -> ModuleType | None:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        return None


def _source(package: ModuleType, name: str) -> str:
    version = getattr(package, "__version__", "of unknown version")
    return f"{_HUB[name].path} by datasets {version}"


@functools.lru_cache(maxsize=4)
def _download(name: FileName, package: ModuleType) -> Raw:
    path, image, label = _HUB[name]
    source = _source(package, name)

    def split(part: str) -> Split:
        try:
            table = package.load_dataset(path, split=part)
            x = np.stack([np.asarray(picture) for picture in table[image]])
            y = np.asarray(list(table[label]))
        except Exception as error:  # The package passes on those of the network and of files.
            raise _failure(source, error) from error
        return data.checked(name, part, x, y, source, _REMEDY)

    return Raw(split("train"), split("test"), source)


def _stream(package: ModuleType, part: str, n: int, side: int, seed: int) -> Split:
    path, image, label = _HUB["imagenet"]
    source = _source(package, "imagenet")
    x, y = [], []
    try:
        rows = package.load_dataset(path, split=part, streaming=True)
        for row in rows.shuffle(seed=seed, buffer_size=_BUFFER).take(n):
            x.append(_cropped(row[image], side))
            y.append(row[label])
    except Exception as error:  # The package passes on those of the network and of files.
        raise _failure(source, error) from error
    if len(x) < n:
        msg = f"{source} gave {len(x)} images of its {part} split, too few for {n}"
        raise DataError(msg)
    return Split(np.stack(x), np.asarray(y, np.int32))


def _cropped(picture: Any, side: int) -> np.ndarray:
    """The center of a picture of the package Pillow, in color."""
    width, height = picture.size
    scale = side / min(width, height)
    width, height = max(side, round(width * scale)), max(side, round(height * scale))
    left, upper = (width - side) // 2, (height - side) // 2
    picture = picture.convert("RGB").resize((width, height))
    return np.asarray(picture.crop((left, upper, left + side, upper + side)), np.uint8)


def _failure(source: str, error: Exception) -> DataError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return DataError(f"cannot get {source} ({reason}); {_REMEDY}")
