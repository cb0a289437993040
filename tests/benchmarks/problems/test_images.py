"""Images as the problems take them: split, standardized, enlarged, and read once."""

import numpy as np
import pytest
from support.benchmark_problem_cases import SPLITS, make_file

from benchmarks import data
from benchmarks.problems.images import Images, Sizes


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
