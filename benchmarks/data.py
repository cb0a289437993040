"""Data in three splits: scikit-learn's digits, or `.npz` files in the layout of Keras."""

import dataclasses
import functools
import lzma
import os
import zipfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Num
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

DatasetName = Literal["digits", "mnist", "fashion_mnist", "cifar10"]
FileName = Literal["mnist", "fashion_mnist", "cifar10", "cifar100"]
DATA_DIR_VARIABLE = "BNP_DATA_DIR"
IMAGE_SHAPES: dict[str, tuple[int, ...]] = {
    "mnist": (28, 28),
    "fashion_mnist": (28, 28),
    "cifar10": (32, 32, 3),
    "cifar100": (32, 32, 3),
}
CLASSES = {"mnist": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100}
SMALLER = "choose smaller --train-size and --eval-size"

_KEYS = ("x_train", "y_train", "x_test", "y_test")
_LAYOUT = "a .npz archive with the arrays x_train, y_train, x_test and y_test, as Keras has them"
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


class DataError(Exception):
    """Data that cannot be had; the message is one line and says what to do."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples and what is to be predicted of them.

    Attributes:
      x: Inputs; of images, channels last.
      y: Classes from 0 on, or numbers; with one entry for each position where texts are predicted.
    """

    x: Num[np.ndarray, "n *d"]
    y: Num[np.ndarray, "n *k"]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.y)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The three splits of a data set; learning rates are chosen on `validation`, never on `test`.

    Attributes:
      name: What it is called.
      train: What the networks learn from.
      validation: What hyper-parameters are chosen by.
      test: What is reported.
    """

    name: str
    train: Split
    validation: Split
    test: Split


def load(
    name: DatasetName,
    data_dir: Path | None = None,
    train_size: int | None = None,
    eval_size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load raw images: pixels 0..16 for the digits, 0..255 divided by 255 for the others.

    The digits come with scikit-learn and are split here, 60:20:20 unless sizes are given. The
    others are read from `<name>.npz`; their test split is theirs, and validation is taken from
    their training split.

    Args:
      name: Which data set.
      data_dir: Folder of the `.npz` file; None takes the environment variable `BNP_DATA_DIR`.
      train_size: Number of training images; None takes 5000, or 1077 of the digits.
      eval_size: Number of images in each of validation and test; None takes 500, or 360.
      seed: Of the random choice of images, which keeps the shares of the classes.

    Raises:
      DataError: If there is no such file, it is not as expected, or it has too few images.
    """
    n_train, n_eval = _sizes(
        train_size, eval_size, (1077, 360) if name == "digits" else (5000, 500)
    )
    if name != "digits":
        return divide(name, *read(name, data_dir), n_train, n_eval, n_eval, seed)
    x, y = map(np.asarray, load_digits(return_X_y=True))
    x, y = x.reshape(-1, 8, 8, 1).astype(np.float32), y.astype(np.int32)
    _check_available(name, n_train, 2 * n_eval, len(y), SMALLER)
    rest, test = _split(Split(x, y), n_eval, seed)
    train, validation = _split_to(rest, n_train, n_eval, seed)
    return Dataset(name, train, validation, test)


def divide(
    name: str,
    train: Split,
    test: Split,
    n_train: int,
    n_validation: int,
    n_test: int,
    seed: int = 0,
    remedy: str = SMALLER,
) -> Dataset:
    """Choose images of what `read` gives and divide their pixels by 255.

    Args:
      name: Of the data set.
      train: Its training split, which the validation split is taken from.
      test: Its test split.
      n_train: Number of training images.
      n_validation: Number of images to choose hyper-parameters by.
      n_test: Number of images to report.
      seed: Of the random choice of images, which keeps the shares of the classes.
      remedy: What the message tells to do if there are too few images.

    Raises:
      DataError: If there are too few images.
    """
    _check_available(name, n_train, n_validation, len(train), remedy)
    _check_available(name, 0, n_test, len(test), remedy)
    if n_test < len(test):
        _, test = _split(test, n_test, seed)
    rest, validation = _split_to(train, n_train, n_validation, seed)
    return Dataset(name, *map(_to_unit_range, (rest, validation, test)))


def standardize(dataset: Dataset, per: Literal["feature", "channel"]) -> Dataset:
    """Shift and scale inputs to mean 0 and variance 1 over the training split.

    Args:
      dataset: Raw images.
      per: `'feature'` takes the statistics of each pixel and channel, `'channel'` those of each
        channel over all pixels. A constant one is only shifted.
    """
    width = dataset.train.x[0].size if per == "feature" else dataset.train.x.shape[-1]
    scaler = StandardScaler()
    for chunk in _chunks(dataset.train.x):
        scaler.partial_fit(chunk.reshape(-1, width).astype(np.float64))

    def scaled(split: Split) -> Split:
        x = np.empty(split.x.shape, np.float32)
        for chunk, out in zip(_chunks(split.x), _chunks(x), strict=True):
            values = np.asarray(scaler.transform(chunk.reshape(-1, width).astype(np.float64)))
            out[:] = values.reshape(chunk.shape)
        return Split(x, split.y)

    return dataclasses.replace(
        dataset,
        train=scaled(dataset.train),
        validation=scaled(dataset.validation),
        test=scaled(dataset.test),
    )


def _chunks(x: Num[np.ndarray, "n *d"], size: int = 2000) -> list[np.ndarray]:
    """Views of consecutive examples, so that no copy in double precision is made of all."""
    return [x[start : start + size] for start in range(0, len(x), size)]


def _split(split: Split, n: int, seed: int) -> tuple[Split, Split]:
    """All but `n` images, and `n` images."""
    try:
        rest, chosen = train_test_split(
            np.arange(len(split)), test_size=n, random_state=seed, stratify=split.y
        )
    except ValueError as error:
        msg = f"cannot take {n} of {len(split)} images and keep the shares of the classes: {error}"
        raise DataError(" ".join(msg.split())) from error
    return Split(split.x[rest], split.y[rest]), Split(split.x[chosen], split.y[chosen])


def _split_to(split: Split, n_train: int, n_validation: int, seed: int) -> tuple[Split, Split]:
    """As many images to train and to validate."""
    rest, validation = _split(split, n_validation, seed)
    if n_train < len(rest):
        _, rest = _split(rest, n_train, seed)
    return rest, validation


def _to_unit_range(split: Split) -> Split:
    return Split(np.divide(split.x, 255, dtype=np.float32), split.y)


def _sizes(
    train_size: int | None, eval_size: int | None, default: tuple[int, int]
) -> tuple[int, int]:
    n_train = default[0] if train_size is None else train_size
    n_eval = default[1] if eval_size is None else eval_size
    if n_train <= 0 or n_eval <= 0:
        msg = f"--train-size and --eval-size must be positive; got {n_train} and {n_eval}"
        raise DataError(msg)
    return n_train, n_eval


def _check_available(name: str, n_train: int, n_eval: int, available: int, remedy: str) -> None:
    if n_train + n_eval > available:
        msg = (
            f"{name} has {available} images to choose from, too few for {n_train} to train and "
            f"{n_eval} to evaluate; {remedy}"
        )
        raise DataError(msg)


def archive(name: FileName, data_dir: Path | None = None) -> Path:
    """The path of `<name>.npz`.

    Args:
      name: Which data set.
      data_dir: Its folder; None takes the environment variable `BNP_DATA_DIR`.

    Raises:
      DataError: If no folder is given, or there is no such file.
    """
    folder = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if not folder:
        msg = (
            f"{name} needs the folder that holds {name}.npz ({_LAYOUT}); pass --data-dir DIR or "
            f"set {DATA_DIR_VARIABLE}"
        )
        raise DataError(msg)
    path = Path(folder) / f"{name}.npz"
    if not path.is_file():
        msg = (
            f"no file {path}; put {name}.npz there ({_LAYOUT}), or point --data-dir or "
            f"{DATA_DIR_VARIABLE} to its folder"
        )
        raise DataError(msg)
    return path


def read(name: FileName, data_dir: Path | None = None) -> tuple[Split, Split]:
    """The training and the test split of an `.npz` file, pixels 0..255, read once in a process.

    Args:
      name: Which data set.
      data_dir: As in `archive`.

    Raises:
      DataError: If there is no such file, or it is not as expected.
    """
    path = archive(name, data_dir)
    status = path.stat()
    return _read(name, path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4)
def _read(name: FileName, path: Path, *_version: int) -> tuple[Split, Split]:
    try:
        if not zipfile.is_zipfile(path):
            msg = "not a complete zip archive"
            raise zipfile.BadZipFile(msg)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: np.asanyarray(archive[key]) for key in _KEYS}
    except _UNREADABLE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        msg = f"cannot read {path} as {_LAYOUT} ({reason}); replace the file"
        raise DataError(msg) from error
    remedy = f"replace the file by {_LAYOUT}"
    train, test = (
        checked(name, part, arrays[f"x_{part}"], arrays[f"y_{part}"], str(path), remedy)
        for part in ("train", "test")
    )
    return train, test


def checked(name: str, part: str, x: np.ndarray, y: np.ndarray, source: str, remedy: str) -> Split:
    """A split of bytes and classes, after a check of types, shapes and classes.

    Args:
      name: Of a data set in `IMAGE_SHAPES`.
      part: `'train'` or `'test'`.
      x: Images; a last axis for one channel may be missing.
      y: Classes.
      source: Where they are from, for the message.
      remedy: What the message tells to do.

    Raises:
      DataError: If they are not what the data set has.
    """
    image_shape, last_class = IMAGE_SHAPES[name], CLASSES[name] - 1
    n = len(x) if x.ndim else 0
    if x.dtype != np.uint8 or x.shape[1:] != image_shape or n == 0:
        shape = ", ".join(map(str, ("n", *image_shape)))
        msg = f"x_{part} in {source} is {x.dtype}{x.shape}, expected uint8({shape}); {remedy}"
        raise DataError(msg)
    if not np.issubdtype(y.dtype, np.integer) or y.shape not in {(n,), (n, 1)}:
        msg = f"y_{part} in {source} is {y.dtype}{y.shape}, expected integers({n},); {remedy}"
        raise DataError(msg)
    y = y.reshape(n)
    if y.min() < 0 or y.max() > last_class:
        msg = (
            f"y_{part} in {source} has classes {y.min()}..{y.max()}, expected 0..{last_class}; "
            f"{remedy}"
        )
        raise DataError(msg)
    return Split(x if x.ndim == 4 else x[..., None], y.astype(np.int32))
