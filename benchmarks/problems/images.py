"""The paper's image classification problems, and some of the same kind on other images."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from benchmarks import data
from benchmarks.data import DataError, Dataset, FileName, Split
from benchmarks.networks.paper_cnn import PaperCNN
from benchmarks.networks.resnet import CifarResNet, ResNet18
from benchmarks.networks.small import MLP, Norm, convolve_patches
from benchmarks.problems import hub, lineups
from benchmarks.problems.augmentation import CropAndFlip, Falling
from benchmarks.problems.base import Data, Problem, Scale
from benchmarks.problems.record import as_data

Name = Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "imagenet"]
Inputs = Literal["raw", "standardized"]
Per = Literal["feature", "channel"]


class Sizes(NamedTuple):
    """Numbers of images."""

    train: int
    validation: int
    test: int


class Length(NamedTuple):
    """How long a run is.

    Attributes:
      steps: At scale 'small'.
      epochs: At scale 'paper'; the paper names those of the ResNets' learning rates only.
    """

    steps: int
    epochs: int


POINTS = 10
POINTS_CONVOLUTIONAL = 5
DIGITS = Sizes(1077, 360, 360)
SMALL = Sizes(40_000, 1_000, 1_000)
SMALL_RESIDUAL = Sizes(8_000, 500, 500)
# The paper trains on all training images; here some of them choose the learning rates.
PAPER: dict[Name, Sizes] = {
    "mnist": Sizes(55_000, 5_000, 10_000),
    "fashion_mnist": Sizes(55_000, 5_000, 10_000),
    "cifar10": Sizes(45_000, 5_000, 10_000),
    "cifar100": Sizes(45_000, 5_000, 10_000),
    # 4 GB of memory as single precision numbers; the paper's has 1,281,167 to train.
    "imagenet": Sizes(5_000, 1_000, 1_000),
}
# By batch size.
FULLY_CONNECTED = {60: Length(1200, 30), 6: Length(2500, 20), 1: Length(4000, 10)}
CONVOLUTIONAL = {128: Length(120, 30), 2: Length(2000, 10), 1: Length(2000, 10)}
DIGITS_STEPS = {60: 1000, 1: 3000}

HIDDEN = (100, 100, 100)
DEPTH = {"small": 8, "paper": 110}
BATCH_RESIDUAL = {"small": 16, "paper": 128}
STEPS_RESIDUAL = 200
WIDTH_18 = {"small": 8, "paper": 64}
SIDE_18 = {"small": 64, "paper": 224}

_TITLES: dict[Name, str] = {
    "digits": "digits",
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "imagenet": "ImageNet",
}


@dataclasses.dataclass(frozen=True)
class Images:
    """Loads images; the `load` of a problem.

    Attributes:
      name: Which data set.
      sizes: Numbers of images.
      inputs: Pixels from 0 to 1 (of the digits to 16), or standardized.
      per: Over what they are standardized, by the training split.
      side: Side that smaller images are enlarged to by repeating pixels; 0 leaves them.
      seed: Of the choice of images.
    """

    name: Name
    sizes: Sizes
    inputs: Inputs
    per: Per = "feature"
    side: int = 0
    seed: int = 0

    def __call__(self, data_dir: Path | None) -> Data:
        """Load the images.

        Raises:
          DataError: If they cannot be had.
        """
        dataset, source = self._raw(data_dir)
        if self.side:
            dataset = _enlarged(dataset, self.side)
        done = "raw, divided by 255" if self.name != "digits" else "raw"
        if self.inputs == "standardized":
            dataset = data.standardize(dataset, self.per)
            done = f"standardized per {self.per} by the training split"
        return as_data(
            dataset, done, source, seed=self.seed, image_shape=list(dataset.train.x.shape[1:])
        )

    def _raw(self, data_dir: Path | None) -> tuple[Dataset, str]:
        if self.name == "digits":
            train, _, n_test = self.sizes
            return data.load("digits", None, train, n_test, self.seed), "scikit-learn's digits"
        n_train, n_validation, n_test = self.sizes
        if self.name == "imagenet":
            raw = hub.read_imagenet(n_train + n_validation, n_test, seed=self.seed)
            return _consecutive(self.name, raw, n_train), raw.source
        name: FileName = self.name
        raw = hub.read(name, data_dir)
        remedy = "use the complete data set"
        return data.divide(name, raw.train, raw.test, *self.sizes, self.seed, remedy), raw.source


def _consecutive(name: str, raw: hub.Raw, n_train: int) -> Dataset:
    """Splits of images that come shuffled, and of too many classes to keep their shares."""

    def part(split: Split, where: slice) -> Split:
        return Split(np.divide(split.x[where], 255, dtype=np.float32), split.y[where])

    return Dataset(
        name,
        part(raw.train, slice(n_train)),
        part(raw.train, slice(n_train, None)),
        part(raw.test, slice(None)),
    )


def _enlarged(dataset: Dataset, side: int) -> Dataset:
    old = dataset.train.x.shape[1]
    if side % old:
        msg = f"images of {old} pixels a side cannot be enlarged to {side} by repeating pixels"
        raise DataError(msg)

    def enlarged(split: Split) -> Split:
        return Split(split.x.repeat(side // old, axis=1).repeat(side // old, axis=2), split.y)

    parts = {name: enlarged(getattr(dataset, name)) for name in ("train", "validation", "test")}
    return dataclasses.replace(dataset, **parts)


def fully_connected(
    name: Name, batch_size: int, inputs: Inputs, scale: Scale, methods: tuple[str, ...]
) -> Problem:
    """The network with three hidden layers of 100 on flattened images."""
    sizes, steps, points = _extent(name, batch_size, scale, FULLY_CONNECTED[batch_size])
    if name == "digits":
        sizes, steps, points = DIGITS, DIGITS_STEPS[batch_size], POINTS
    figures = {
        ("mnist", 60): "Figure 3, left",
        ("cifar10", 60): "Figure 3, right",
        ("cifar10", 6): "Figure 4, left",
        ("cifar10", 1): "Figure 4, right",
    }
    return Problem(
        name=f"fc-{name.replace('_', '-')}-b{batch_size}-{inputs}",
        title=f"Fully connected 3 x 100, {_TITLES[name]}, batch size {batch_size}, {inputs} inputs",
        load=Images(name, sizes, inputs),
        network=fully_connected_network,
        batch_size=batch_size,
        steps=steps,
        points=points,
        methods=(*methods, *lineups.FROM_Z),
        source=figures.get((name, batch_size)),
    )


def fully_connected_network(norm: Norm, steps: int) -> MLP:
    """The paper's: Glorot uniform kernels, zero biases."""
    init = nn.initializers.glorot_uniform()
    return MLP(hidden=HIDDEN, classes=10, norm=norm, steps=steps, kernel_init=init)


def convolutional(name: Name, batch_size: int, inputs: Inputs, scale: Scale) -> Problem:
    """The network of three convolutions and two dense layers."""
    sizes, steps, points = _extent(name, batch_size, scale, CONVOLUTIONAL[batch_size])
    points = POINTS_CONVOLUTIONAL if scale == "small" else points
    figures = {
        ("cifar10", 128): "Figure 5, left",
        ("cifar10", 2): "Figure 5, right",
        ("cifar10", 1): "Figure 4, right",
    }
    return Problem(
        name=f"cnn-{name.replace('_', '-')}-b{batch_size}-{inputs}",
        title=f"5-layer CNN, {_TITLES[name]}, batch size {batch_size}, {inputs} inputs",
        load=Images(name, sizes, inputs, per="channel"),
        network=lambda norm, steps: PaperCNN(norm=norm, steps=steps, convolution=_convolution()),
        batch_size=batch_size,
        steps=steps,
        points=points,
        methods=(
            *(lineups.CONVOLUTIONAL if name == "cifar10" else lineups.HELD_OUT),
            *lineups.FROM_Z,
        ),
        source=figures.get((name, batch_size)),
    )


def residual_cifar(name: Literal["cifar10", "cifar100"], scale: Scale) -> Problem:
    """ResNet-110 on CIFAR-10, or with preactivation on CIFAR-100; at scale 'small' ResNet-8."""
    ten = name == "cifar10"
    falling = Falling((80, 120), 160) if ten else Falling((150, 220), 300)
    batch_size = BATCH_RESIDUAL[scale]
    length = Length(STEPS_RESIDUAL, falling.epochs)
    sizes, steps, points = _extent(name, batch_size, scale, length)
    if scale == "small":
        sizes, points = SMALL_RESIDUAL, POINTS_CONVOLUTIONAL
    depth = DEPTH[scale]

    def network(norm: Norm, steps: int, init_scale: float = 1.0) -> CifarResNet:
        return CifarResNet(
            depth=depth,
            init_scale=init_scale,
            classes=10 if ten else 100,
            norm=norm,
            steps=steps,
            preactivation=not ten,
            convolution=_convolution(),
        )

    kind = "ResNet" if ten else "Preactivation ResNet"
    return Problem(
        name=f"resnet110-{name}",
        title=f"{kind}-{depth}, {_TITLES[name]}, batch size {batch_size}",
        load=Images(name, sizes, "standardized", per="channel"),
        network=network,
        batch_size=batch_size,
        steps=steps,
        points=points,
        methods=lineups.RESIDUAL,
        augment=CropAndFlip(4),
        schedule=falling,
        decay=_decay(1.5e-4 if ten else 2e-4),
        init_scale={"bnp_gn_momentum": 0.1 if ten else 0.4},
        source="Figure 6, left" if ten else "Figure 6, right",
    )


def residual_imagenet(scale: Scale) -> Problem:
    """ResNet-18 with ImageNet's layout; see `hub.read_imagenet` for how little of it is ImageNet.

    At scale 'small' it is an eighth as wide, on CIFAR-10 enlarged to 64 x 64. The padding before
    crops is in proportion to the images, 1/8 at the small scale and at the paper's the 16 pixels
    that give crops of 224 out of 256 as many positions.
    """
    small = scale == "small"
    name: Name = "cifar10" if small else "imagenet"
    falling = Falling((30, 60, 90), 100, warm_up=False)
    batch_size = BATCH_RESIDUAL["small"] if small else 256
    length = Length(STEPS_RESIDUAL, falling.epochs)
    sizes, steps, points = _extent(name, batch_size, scale, length)
    if small:
        sizes, points = SMALL_RESIDUAL, POINTS_CONVOLUTIONAL
    side = SIDE_18[scale]

    def network(norm: Norm, steps: int) -> ResNet18:
        return ResNet18(
            width=WIDTH_18[scale],
            classes=10 if small else 1000,
            norm=norm,
            steps=steps,
            group_size=4 if small else 32,
            convolution=_convolution(),
        )

    kind = "Narrow ResNet-18" if small else "ResNet-18"
    subset = "enlarged CIFAR-10" if small else "a subset of ImageNet"
    return Problem(
        name="resnet18-imagenet",
        title=f"{kind}, {subset}, {side} x {side}, batch size {batch_size}",
        load=Images(name, sizes, "standardized", per="channel", side=side if small else 0),
        network=network,
        batch_size=batch_size,
        steps=steps,
        points=points,
        methods=lineups.RESIDUAL,
        augment=CropAndFlip(8 if small else 16),
        schedule=falling,
        decay=_decay(8.5e-4),
        source="Figure 7",
    )


def image_problems(scale: Scale) -> Iterator[Problem]:
    """All problems of this module."""
    both: tuple[Inputs, Inputs] = ("raw", "standardized")
    connected = functools.partial(fully_connected, scale=scale)
    for batch_size in (60, 1):
        methods = lineups.WITH_KFAC if batch_size == 60 else lineups.SMALL_BATCH
        for inputs in both:
            yield connected("digits", batch_size, inputs, methods=methods)
    for name in ("mnist", "fashion_mnist"):
        for inputs in both:
            yield connected(name, 60, inputs, methods=lineups.CORE)
    for batch_size in FULLY_CONNECTED:
        methods = lineups.CORE if batch_size == 60 else lineups.WIDE_SMALL_BATCH
        for inputs in both:
            yield connected("cifar10", batch_size, inputs, methods=methods)
    for batch_size in CONVOLUTIONAL:
        for inputs in both:
            yield convolutional("cifar10", batch_size, inputs, scale)
    for inputs in both:
        yield connected("fashion_mnist", 6, inputs, methods=lineups.HELD_OUT)
        yield convolutional("fashion_mnist", 128, inputs, scale)
        yield convolutional("mnist", 2, inputs, scale)
    yield residual_cifar("cifar10", scale)
    yield residual_cifar("cifar100", scale)
    yield residual_imagenet(scale)


def _extent(name: Name, batch_size: int, scale: Scale, length: Length) -> tuple[Sizes, int, int]:
    """Sizes, steps and points; at scale 'paper' a point an epoch."""
    if scale == "small" or name == "digits":
        return SMALL, length.steps, POINTS
    sizes = PAPER[name]
    return sizes, length.epochs * (sizes.train // batch_size), length.epochs


def _decay(with_groups: float) -> dict[str, float]:
    """The paper's, which is larger for BNP with group normalization."""
    return dict.fromkeys(lineups.RESIDUAL, 1e-4) | {"bnp_gn_momentum": with_groups}


def _convolution():
    """What is fast on this device."""
    return convolve_patches if jax.default_backend() == "cpu" else None
