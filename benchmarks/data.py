"""Image classification data: scikit-learn's digits, or `.npz` files in the layout of Keras."""

import dataclasses
import lzma
import os
import zipfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

DatasetName = Literal["digits", "mnist", "fashion_mnist", "cifar10"]
DATA_DIR_VARIABLE = "BNP_DATA_DIR"
IMAGE_SHAPES: dict[str, tuple[int, ...]] = {
    "mnist": (28, 28),
    "fashion_mnist": (28, 28),
    "cifar10": (32, 32, 3),
}
N_CLASSES = 10

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
    """Images and their classes.

    Attributes:
      x: Images, channels last.
      y: Classes, 0..9.
    """

    x: Float[np.ndarray, "n height width channels"]
    y: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.y)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The three splits of a data set; learning rates are chosen on `validation`, never on `test`.

    Attributes:
      name: As in `DatasetName`.
      train: What the networks learn from.
      validation: What hyper-parameters are chosen by. As large as `test`.
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
    if name == "digits":
        x, y = map(np.asarray, load_digits(return_X_y=True))
        x, y = x.reshape(-1, 8, 8, 1).astype(np.float32), y.astype(np.int32)
        _check_available(name, n_train, n_eval, available=len(y), parts=2)
        rest, test = _split(Split(x, y), n_eval, seed)
    else:
        train, test = _read(name, data_dir)
        _check_available(name, n_train, n_eval, available=len(train), parts=1)
        _check_available(name, 0, n_eval, available=len(test), parts=1)
        rest = train
        if n_eval < len(test):
            _, test = _split(test, n_eval, seed)
    rest, validation = _split(rest, n_eval, seed)
    if n_train < len(rest):
        _, rest = _split(rest, n_train, seed)
    return Dataset(name, rest, validation, test)


def standardize(dataset: Dataset, per: Literal["feature", "channel"]) -> Dataset:
    """Shift and scale inputs to mean 0 and variance 1 over the training split.

    Args:
      dataset: Raw images.
      per: `'feature'` takes the statistics of each pixel and channel, `'channel'` those of each
        channel over all pixels. A constant one is only shifted.
    """
    width = dataset.train.x[0].size if per == "feature" else dataset.train.x.shape[-1]
    scaler = StandardScaler().fit(dataset.train.x.reshape(-1, width).astype(np.float64))

    def scaled(split: Split) -> Split:
        x = np.asarray(scaler.transform(split.x.reshape(-1, width).astype(np.float64)))
        return Split(x.reshape(split.x.shape).astype(np.float32), split.y)

    return dataclasses.replace(
        dataset,
        train=scaled(dataset.train),
        validation=scaled(dataset.validation),
        test=scaled(dataset.test),
    )


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


def _sizes(
    train_size: int | None, eval_size: int | None, default: tuple[int, int]
) -> tuple[int, int]:
    n_train = default[0] if train_size is None else train_size
    n_eval = default[1] if eval_size is None else eval_size
    if n_train <= 0 or n_eval <= 0:
        msg = f"--train-size and --eval-size must be positive; got {n_train} and {n_eval}"
        raise DataError(msg)
    return n_train, n_eval


def _check_available(name: str, n_train: int, n_eval: int, available: int, parts: int) -> None:
    if n_train + parts * n_eval > available:
        msg = (
            f"{name} has {available} images to choose from, too few for {n_train} to train and "
            f"{parts} x {n_eval} to evaluate; choose smaller --train-size and --eval-size"
        )
        raise DataError(msg)


def _read(name: str, data_dir: Path | None) -> tuple[Split, Split]:
    """The training and the test split of an `.npz` file, pixels divided by 255."""
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
    shape = IMAGE_SHAPES[name]
    return (
        _checked(path, "train", arrays["x_train"], arrays["y_train"], shape),
        _checked(path, "test", arrays["x_test"], arrays["y_test"], shape),
    )


def _checked(
    path: Path, part: str, x: np.ndarray, y: np.ndarray, image_shape: tuple[int, ...]
) -> Split:
    n = len(x) if x.ndim else 0
    expected = f"replace the file by {_LAYOUT}"
    if x.dtype != np.uint8 or x.shape[1:] != image_shape or n == 0:
        shape = ", ".join(map(str, ("n", *image_shape)))
        msg = f"x_{part} in {path} is {x.dtype}{x.shape}, expected uint8({shape}); {expected}"
        raise DataError(msg)
    if not np.issubdtype(y.dtype, np.integer) or y.shape not in {(n,), (n, 1)}:
        msg = f"y_{part} in {path} is {y.dtype}{y.shape}, expected integers({n},); {expected}"
        raise DataError(msg)
    y = y.reshape(n)
    if y.min() < 0 or y.max() >= N_CLASSES:
        msg = f"y_{part} in {path} has classes {y.min()}..{y.max()}, expected 0..9; {expected}"
        raise DataError(msg)
    x = x if x.ndim == 4 else x[..., None]
    return Split(x.astype(np.float32) / 255.0, y.astype(np.int32))
