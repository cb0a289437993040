"""Where a problem's data come from: no file, a file or the package, and what goes wrong."""

import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.benchmark_problem_cases import SMALL, SPLITS, make_file

from benchmarks import data
from benchmarks.problems import hub, problems
from benchmarks.problems.images import Images, Sizes

WITHOUT_FILES = [
    *(f"fc-digits-b{b}-{inputs}" for b in (60, 1) for inputs in ("raw", "standardized")),
    *("drift-digits", "drift-scale-digits", "tabular-raw", "tabular-standardized"),
    *("friedman-raw", "friedman-standardized", "text-transformer"),
]


@pytest.fixture
def no_folder(monkeypatch):
    monkeypatch.delenv(data.DATA_DIR_VARIABLE, raising=False)


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)


# No file


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_problems_that_need_no_file(name, no_folder):
    problem = SMALL[name]
    loaded = problem.load(None)
    json.dumps(loaded.facts, allow_nan=False)
    assert loaded.facts["sizes"] == {part: len(getattr(loaded, part)) for part in SPLITS}
    x, y = (jnp.asarray(a[: problem.batch_size]) for a in (loaded.train.x, loaded.train.y))
    if problem.drift is not None:
        x = problem.drift(x, jnp.asarray(problem.steps))
    out, _ = jax.eval_shape(
        lambda: problem.network("none", problem.steps).init_with_output(jax.random.key(0), x)
    )
    assert out.shape == (y.shape if problem.task == "regression" else (*y.shape, out.shape[-1]))
    if problem.task == "classification":
        assert loaded.train.y.dtype == np.int32
        assert max(getattr(loaded, part).y.max() for part in SPLITS) < out.shape[-1]


# Files, or neither file nor package


def test_neither_folder_nor_package(no_folder, no_package):
    with pytest.raises(data.DataError) as error:
        SMALL["fc-cifar10-b60-raw"].load(None)
    for part in ("cifar10.npz", "--data-dir", "BNP_DATA_DIR", "pip install datasets", "network"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_neither_file_nor_package(tmp_path, no_package):
    with pytest.raises(data.DataError) as error:
        SMALL["resnet110-cifar100"].load(tmp_path)
    for part in (str(tmp_path / "cifar100.npz"), "pip install datasets"):
        assert part in str(error.value)


def test_imagenet_without_the_package(no_package):
    with pytest.raises(data.DataError, match=r"imagenet is only to be had by .* `pip install"):
        problems("paper")["resnet18-imagenet"].load(None)


@pytest.mark.parametrize(("name", "too_many"), [("cifar10", 10), ("cifar100", 100)])
def test_wrong_number_of_classes(tmp_path, name, too_many):
    make_file(tmp_path, name, y_train=np.full(120, too_many, np.uint8))
    with pytest.raises(data.DataError, match=rf"classes {too_many}\.\.{too_many}, expected 0\.\."):
        SMALL[f"resnet110-{name}"].load(tmp_path)


def test_incomplete_file(tmp_path):
    make_file(tmp_path, "mnist")
    with pytest.raises(data.DataError, match=r"too few for 40000 .* use the complete data set"):
        SMALL["fc-mnist-b60-raw"].load(tmp_path)


# The package


class Picture:
    """As much as is needed of an image of Pillow."""

    def __init__(self, x):
        self.x = np.asarray(x)
        self.size = self.x.shape[1], self.x.shape[0]

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.x, dtype)

    def convert(self, mode):
        assert mode == "RGB"
        return self

    def resize(self, size):
        rows = np.arange(size[1]) * self.size[1] // size[1]
        columns = np.arange(size[0]) * self.size[0] // size[0]
        return Picture(self.x[rows][:, columns])

    def crop(self, box):
        left, upper, right, lower = box
        return Picture(self.x[upper:lower, left:right])


class Stream(list):
    def shuffle(self, seed, buffer_size):
        assert buffer_size > 0
        return Stream(self[i] for i in np.random.default_rng(seed).permutation(len(self)))

    def take(self, n):
        return Stream(self[:n])


def fake_package(monkeypatch, load_dataset):
    package = types.ModuleType("datasets")
    package.__version__ = "0.0"
    package.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", package)


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("mnist", ("image", "label")),
        ("fashion_mnist", ("image", "label")),
        ("cifar10", ("img", "label")),
        ("cifar100", ("img", "fine_label")),
    ],
)
def test_the_package_in_place_of_a_file(tmp_path, monkeypatch, no_folder, name, columns):
    arrays = make_file(tmp_path, name)

    def load_dataset(path, split):
        assert path.endswith(f"/{name}")
        pictures = [Picture(x) for x in arrays[f"x_{split}"]]
        return dict(zip(columns, (pictures, arrays[f"y_{split}"].tolist()), strict=True))

    fake_package(monkeypatch, load_dataset)
    found = hub.read(name)
    expected = hub.read(name, tmp_path)
    assert expected.source == f"{name}.npz"
    assert re.fullmatch(rf".*/{name} by datasets 0\.0", found.source)
    for one, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(one.x, other.x)
        np.testing.assert_array_equal(one.y, other.y)


def test_what_the_package_raises_gets_one_line(monkeypatch, no_folder):
    def load_dataset(path, split):
        msg = "no\nroute"
        raise ConnectionError(msg)

    fake_package(monkeypatch, load_dataset)
    with pytest.raises(data.DataError, match=r"ConnectionError: no route\); check the network"):
        hub.read("mnist")


def test_what_the_package_gives_is_checked(monkeypatch, no_folder):
    fake_package(
        monkeypatch,
        lambda path, split: {"image": [Picture(np.zeros((3, 3), np.uint8))], "label": [0]},
    )
    with pytest.raises(data.DataError, match=r"x_train in ylecun/mnist by datasets .*\(1, 3, 3\)"):
        hub.read("mnist")


def test_a_subset_of_imagenet(monkeypatch):
    def load_dataset(path, split, streaming):
        assert streaming
        n = 12 if split == "train" else 6
        wide, high = np.zeros((20, 40, 3), np.uint8), np.zeros((32, 16, 3), np.uint8)
        wide[:, 10:30] = 255
        pictures = [Picture(wide if i % 2 else high) for i in range(n)]
        return Stream({"image": p, "label": 500 * (i % 2)} for i, p in enumerate(pictures))

    fake_package(monkeypatch, load_dataset)
    hub.read_imagenet.cache_clear()
    raw = hub.read_imagenet(10, 4, side=8)
    assert raw.train.x.shape == (10, 8, 8, 3)
    assert raw.test.y.shape == (4,)
    # What is cropped of the wide images is their bright center.
    np.testing.assert_array_equal(raw.train.x.min((1, 2, 3)), 255 * (raw.train.y == 500))
    monkeypatch.setattr(hub, "read_imagenet", lambda *_, **__: raw)
    loaded = Images("imagenet", Sizes(7, 3, 4), "raw")(None)
    assert [len(getattr(loaded, part)) for part in SPLITS] == [7, 3, 4]
    assert loaded.train.x.max() == 1
    np.testing.assert_array_equal(loaded.validation.y, raw.train.y[7:])


def test_too_short_a_stream(monkeypatch):
    fake_package(monkeypatch, lambda path, split, streaming: Stream())
    hub.read_imagenet.cache_clear()
    with pytest.raises(data.DataError, match="gave 0 images of its train split, too few for 3"):
        hub.read_imagenet(3, 1, side=8)
