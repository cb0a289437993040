"""The problems of the benchmarks: their data, drift, augmentation, schedules and registry."""

import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import data
from benchmarks.problems import drift, hub, lineups, problems, tabular, text
from benchmarks.problems.augmentation import CropAndFlip, Falling
from benchmarks.problems.base import Problem
from benchmarks.problems.images import Images, Sizes

SPLITS = ("train", "validation", "test")
WITHOUT_FILES = [
    *(f"fc-digits-b{b}-{inputs}" for b in (60, 1) for inputs in ("raw", "standardized")),
    *("drift-digits", "drift-scale-digits", "tabular-raw", "tabular-standardized"),
    *("friedman-raw", "friedman-standardized", "text-transformer"),
]
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


@pytest.fixture
def no_folder(monkeypatch):
    monkeypatch.delenv(data.DATA_DIR_VARIABLE, raising=False)


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)


# Registry


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_registry(scale):
    found = problems(scale)
    for name, problem in found.items():
        assert problem.name == name
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert problem.steps % problem.points == 0
        assert problem.batch_size > 0
        assert len(set(problem.methods)) == len(problem.methods)
        assert set(problem.decay) <= set(problem.methods)
    assert list(found) == list(SMALL)
    titles = [problem.title for problem in found.values()]
    assert len(set(titles)) == len(titles)


def test_the_papers_figures_are_all_there():
    sources = {problem.source for problem in SMALL.values() if problem.source}
    assert {source.split(",")[0] for source in sources} == {f"Figure {i}" for i in (3, 4, 5, 6, 7)}


def test_methods_of_problems():
    assert "kfac" in SMALL["fc-digits-b60-raw"].methods
    assert "kfac" not in SMALL["fc-cifar10-b60-raw"].methods
    assert {"batchrenorm", "four_things"} <= set(SMALL["fc-cifar10-b1-standardized"].methods)
    assert "bnp_gn" in SMALL["cnn-cifar10-b2-raw"].methods
    assert SMALL["drift-digits"].methods == SMALL["tabular-raw"].methods == lineups.CORE
    assert SMALL["text-transformer"].methods == lineups.TRANSFORMER
    assert SMALL["resnet110-cifar10"].decay["bnp_gn_momentum"] == 1.5e-4
    assert SMALL["resnet110-cifar100"].decay["bnp_gn_momentum"] == 2e-4
    assert SMALL["resnet18-imagenet"].decay["bnp_gn_momentum"] == 8.5e-4
    assert SMALL["resnet18-imagenet"].decay["groupnorm_momentum"] == 1e-4


def test_points_must_divide_steps():
    with pytest.raises(ValueError, match="`points` must divide `steps`, got 3 and 10 in p"):
        Problem("p", "P", lambda _: None, lambda *_: None, 1, 10, 3, ("sgd",))


# Loading


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


def norms_of(name):
    if name == "text-transformer":
        return ["none", "layer"]
    if name.startswith("resnet"):
        return ["none", "batch", "group"]
    return ["none", "batch", "layer", "group", "renorm", "four"]


@pytest.mark.parametrize("name", SMALL)
def test_networks_take_their_norms(name):
    problem = SMALL[name]
    shape, dtype = (problem.batch_size, 8, 8, 1), jnp.float32
    if name == "text-transformer":
        shape, dtype = (problem.batch_size, text.CONTEXT), jnp.int32
    elif "cifar" in name or "imagenet" in name:
        shape = (problem.batch_size, 32, 32, 3)
    elif problem.task == "regression":
        shape = (problem.batch_size, 10)
    x, key = jax.ShapeDtypeStruct(shape, dtype), jax.random.key(0)
    for norm in norms_of(name):
        network = problem.network(norm, problem.steps)
        out, variables = jax.eval_shape(network.init_with_output, key, x)
        assert out.shape[0] == problem.batch_size
        assert ("batch_stats" in variables) == (norm in ("batch", "renorm", "four"))


@pytest.mark.parametrize("per", ["feature", "channel"])
def test_statistics_are_of_the_training_split(tmp_path, per):
    make_file(tmp_path, "cifar10")
    sizes = Sizes(60, 20, 40)
    raw = Images("cifar10", sizes, "raw")(tmp_path)
    standardized = Images("cifar10", sizes, "standardized", per)(tmp_path)
    axes = 0 if per == "feature" else (0, 1, 2)
    x = raw.train.x.astype(np.float64)
    mean, deviation = x.mean(axes, keepdims=True), x.std(axes, keepdims=True)
    for part in SPLITS:
        expected = (getattr(raw, part).x - mean) / deviation
        np.testing.assert_allclose(getattr(standardized, part).x, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(getattr(standardized, part).y, getattr(raw, part).y)
    assert standardized.facts["inputs"] == f"standardized per {per} by the training split"
    assert raw.facts["inputs"] == "raw, divided by 255"
    assert raw.facts["source"] == "cifar10.npz"
    assert raw.facts["sha256_of_first_1000"] != standardized.facts["sha256_of_first_1000"]


def test_standardization_in_chunks():
    x = np.random.default_rng(0).normal(5, 3, (4100, 2)).astype(np.float32)
    split = data.Split(x, np.zeros(4100, np.int32))
    done = data.standardize(data.Dataset("x", split, split, split), "feature").train.x
    np.testing.assert_allclose(done, (x - x.mean(0)) / x.std(0), rtol=1e-4, atol=1e-5)


def test_pixels_enlarge_to_squares(tmp_path):
    arrays = make_file(tmp_path, "cifar10")
    loaded = Images("cifar10", Sizes(60, 20, 120), "raw", side=64)(tmp_path)
    assert loaded.test.x.shape == (120, 64, 64, 3)
    assert loaded.facts["image_shape"] == [64, 64, 3]
    for i, j in ((0, 0), (1, 0), (1, 1)):
        small = loaded.test.x[:, i::2, j::2]
        np.testing.assert_allclose(small, arrays["x_test"] / 255, rtol=1e-6)


def test_hundred_classes(tmp_path):
    make_file(tmp_path, "cifar100", n=400)
    loaded = Images("cifar100", Sizes(200, 100, 100), "raw")(tmp_path)
    assert set(loaded.train.y) == set(range(100))


def test_a_file_is_read_once_until_it_changes(tmp_path):
    make_file(tmp_path, "mnist")
    first = data.read("mnist", tmp_path)[0]
    assert data.read("mnist", tmp_path)[0] is first
    make_file(tmp_path, "mnist", n=140)
    assert len(data.read("mnist", tmp_path)[0]) == 140


def test_sizes_that_differ_between_validation_and_test(tmp_path):
    make_file(tmp_path, "mnist")
    loaded = Images("mnist", Sizes(40, 20, 60), "raw")(tmp_path)
    assert loaded.facts["sizes"] == {"train": 40, "validation": 20, "test": 60}


# Files and the package


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


# Drift


def expected_drift(moving, x, step):
    share = np.clip((step - moving.start) / (moving.end - moving.start), 0, 1)
    flat = x.reshape(len(x), -1).astype(np.float64)
    return (flat * moving.final_scale**share + share * moving.final_offset).reshape(x.shape)


@pytest.mark.parametrize("name", ["drift-digits", "drift-mnist", "drift-scale-digits"])
@pytest.mark.parametrize("flat", [True, False])
def test_drift_follows_its_formula(name, flat):
    problem, random = SMALL[name], np.random.default_rng(1)
    shape = (5, 28, 28, 1) if "mnist" in name else (5, 8, 8, 1)
    x = random.normal(size=shape).astype(np.float32)
    x = x.reshape(5, -1) if flat else x
    moved = jax.jit(problem.drift)
    for step in (0, 3000, 3001, 4500, 5999, 6000, 9000):
        out = np.asarray(moved(x, jnp.asarray(step)))
        assert out.dtype == np.float32
        expected = expected_drift(problem.drift, x, step)
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)


def test_drift_is_exact_at_both_ends():
    x = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    moving = drift.scattering(64, 900)
    for step in (0, 300):
        np.testing.assert_array_equal(moving(x, jnp.asarray(step)), x)
    scale, offset = (
        np.asarray(a, np.float32)[None] for a in (moving.final_scale, moving.final_offset)
    )
    last = np.asarray(moving(x, jnp.asarray(600)))
    np.testing.assert_array_equal(last, np.asarray(jnp.asarray(scale) * x + jnp.asarray(offset)))
    np.testing.assert_array_equal(moving(x, jnp.asarray(900)), last)
    grown = drift.growing(64, 900)(x, jnp.asarray(700))
    np.testing.assert_array_equal(grown, np.float32(100) * x)


def test_drift_scatters_over_two_orders_of_magnitude():
    moving = drift.scattering(10_000, 900)
    assert moving.final_scale.min() >= 0.1
    assert moving.final_scale.max() <= 10
    # u is uniform in [-1, 1]: mean 0, variance 1/3, each within 4 standard errors.
    u = np.log10(moving.final_scale)
    assert abs(u.mean()) < 4 * np.sqrt(1 / 3 / 10_000)
    assert abs(u.var() - 1 / 3) < 4 * np.sqrt((1 / 5 - 1 / 9) / 10_000)
    np.testing.assert_allclose(np.abs(moving.final_offset), 3 * moving.final_scale)
    assert abs(np.sign(moving.final_offset).mean()) < 0.04
    again = drift.scattering(10_000, 900)
    np.testing.assert_array_equal(again.final_offset, moving.final_offset)


# Augmentation and schedules


def test_crops_are_windows_of_the_padded_images():
    x = jax.random.normal(jax.random.key(0), (64, 8, 6, 3))
    out = np.asarray(jax.jit(CropAndFlip(2))(x, jax.random.key(1)))
    assert out.shape == x.shape
    padded = np.pad(np.asarray(x), ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for before, after in zip(padded, out, strict=True):
        matches = [
            (i, j, flip)
            for i in range(5)
            for j in range(5)
            for flip in (1, -1)
            if np.array_equal(before[i : i + 8, j : j + 6][:, ::flip], after)
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {i for i, _, _ in seen} == {j for _, j, _ in seen} == set(range(5))


def test_half_of_the_images_are_flipped():
    n = 4000
    x = jnp.broadcast_to(jnp.arange(4.0)[None, None, :, None], (n, 4, 4, 1))
    out = CropAndFlip(0)(x, jax.random.key(2))
    flipped = np.asarray(out[:, 0, 0, 0] == 3)
    assert abs(flipped.mean() - 0.5) < 4 * np.sqrt(0.25 / n)
    np.testing.assert_array_equal(out[~flipped], x[~flipped])
    np.testing.assert_array_equal(out[flipped], x[flipped][:, :, ::-1])
    other = CropAndFlip(0)(x, jax.random.key(3))
    assert not np.array_equal(out, other)


def test_learning_rates_of_the_paper():
    found = problems("paper")
    ten, hundred, imagenet = (
        found[name] for name in ("resnet110-cifar10", "resnet110-cifar100", "resnet18-imagenet")
    )

    def at(problem, epoch, epochs):
        steps = problem.steps
        return float(problem.schedule(0.1, steps)(jnp.asarray(round(steps * epoch / epochs))))

    warm = ten.schedule(0.1, ten.steps)
    assert float(warm(jnp.asarray(0))) == pytest.approx(0.01)
    assert float(warm(jnp.asarray(200))) == pytest.approx(0.055)
    assert float(warm(jnp.asarray(400))) == pytest.approx(0.1)
    for problem, epochs, drops in (
        (ten, 160, (80, 120)),
        (hundred, 300, (150, 220)),
        (imagenet, 100, (30, 60, 90)),
    ):
        for i, epoch in enumerate(drops):
            assert at(problem, epoch - 1, epochs) == pytest.approx(0.1 * 10**-i)
            assert at(problem, epoch, epochs) == pytest.approx(0.01 * 10**-i)
    assert at(imagenet, 0, 100) == pytest.approx(0.1)


def test_schedules_take_traced_rates_in_short_runs():
    falling = Falling((80, 120), 160)
    rates = jnp.array([0.1, 1.0])
    found = jax.vmap(lambda rate: falling(rate, 100)(jnp.asarray(60)))(rates)
    np.testing.assert_allclose(found, 0.1 * rates, rtol=1e-6)
    # A tenth of a short run warms up.
    assert float(falling(1.0, 100)(jnp.asarray(5))) == pytest.approx(0.55)
    assert float(falling(1.0, 100)(jnp.asarray(10))) == pytest.approx(1.0)
    assert float(falling(1.0, 5)(jnp.asarray(0))) == pytest.approx(1.0)


# Tables


@pytest.mark.parametrize("name", ["tabular", "friedman"])
def test_targets_are_standardized_by_the_training_split(name):
    raw, standardized = (tabular.Table(name, inputs)() for inputs in ("raw", "standardized"))
    y = raw.train.y
    assert y.dtype == raw.train.x.dtype == np.float32
    assert abs(y.mean()) < 1e-5
    assert y.std() == pytest.approx(1, rel=1e-5)
    assert abs(raw.test.y.mean()) > 1e-4
    assert raw.facts["target"] == "standardized by the training split"
    for part in SPLITS:
        np.testing.assert_array_equal(getattr(raw, part).y, getattr(standardized, part).y)
    np.testing.assert_allclose(standardized.train.x.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(standardized.train.x.std(0), 1, rtol=1e-4)
    spread = raw.train.x.std(0)
    assert spread.max() > 20 * spread.min()


def test_splits_of_tables_are_disjoint_and_complete():
    loaded = tabular.Table("friedman", "raw")()
    assert [len(getattr(loaded, part)) for part in SPLITS] == [3600, 1200, 1200]
    rows = np.concatenate([getattr(loaded, part).x for part in SPLITS])
    assert len(np.unique(rows, axis=0)) == tabular.N_FRIEDMAN
    loaded = tabular.Table("tabular", "raw")()
    assert [len(getattr(loaded, part)) for part in SPLITS] == [264, 89, 89]
    rows = np.concatenate([getattr(loaded, part).x for part in SPLITS])
    x = tabular.diabetes()[0].astype(np.float32)
    np.testing.assert_array_equal(np.unique(rows, axis=0), np.unique(x, axis=0))


def test_friedmans_columns_are_uniform():
    x, y = tabular.friedman(2000, 3)
    assert x.shape == (2000, 10)
    assert y.shape == (2000,)
    spread = x.max(0) - x.min(0)
    unit = (x - x.min(0)) / spread
    np.testing.assert_allclose(unit.mean(0), 0.5, atol=4 * np.sqrt(1 / 12 / 2000))
    np.testing.assert_array_less(spread, 100)
    np.testing.assert_array_less(0.0099, spread)


# Text


def test_vocabulary():
    assert len(text.CHARACTERS) == len(set(text.CHARACTERS)) == 96
    whole = "def f(x):\n    return x + 1\n"
    assert "".join(text.CHARACTERS[i] for i in text.encode(whole)) == whole
    assert "".join(text.CHARACTERS[i] for i in text.encode("\ta\x0cé\r\n")) == "    a\n"


def test_targets_are_the_characters_after():
    codes = np.arange(3 * text.CONTEXT + 5, dtype=np.int32)
    x, y = text.windows(codes)
    assert x.shape == y.shape == (3, text.CONTEXT)
    np.testing.assert_array_equal(y, x + 1)
    np.testing.assert_array_equal(x.reshape(-1), codes[: 3 * text.CONTEXT])
    assert len(text.windows(codes[: text.CONTEXT])[0]) == 0
    assert len(text.windows(codes[: text.CONTEXT + 1])[0]) == 1


def test_splits_of_text_share_no_module():
    modules = [module for part in SPLITS for module in text.MODULES[part]]
    assert len(set(modules)) == len(modules)


def test_text_of_the_standard_library():
    loaded = text.load()
    for part in SPLITS:
        split = getattr(loaded, part)
        assert split.x.shape == split.y.shape == (len(split), text.CONTEXT)
        assert split.x.dtype == split.y.dtype == np.int32
        np.testing.assert_array_equal(split.x[:, 1:], split.y[:, :-1])
        assert split.x.min() >= 0
        assert split.x.max() < len(text.CHARACTERS)
    assert len(loaded.validation) == len(loaded.test) == text.N_EVAL
    assert loaded.facts["n_files"] == sum(map(len, text.MODULES.values()))
    assert 1e6 < loaded.facts["n_characters"] < 4e6
    again = text.load()
    np.testing.assert_array_equal(again.test.x, loaded.test.x)


def test_python_without_its_source(tmp_path, monkeypatch):
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(data.DataError, match=r"cannot read .*argparse\.py .*installed as files"):
        text.load()
