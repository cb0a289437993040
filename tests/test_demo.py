"""The demonstration, from the command line to the picture."""

import io
import json
import pathlib
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest

from benchmarks import data, demo

mpl.use("Agg")
METHODS = ("SGD", "Adam", "BatchNorm + SGD", "LayerNorm + SGD", "BNP + SGD", "Adam in z (BNP)")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What `python -m benchmarks.demo --quick` prints, and where it writes."""
    out = tmp_path_factory.mktemp("demo") / "figure.png"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.demo", "--quick", "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent.parent,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, out


def test_table_has_every_method_with_its_numbers(quick):
    printed, out = quick
    rows = {m: [row for row in printed.splitlines() if row.strip().startswith(m)] for m in METHODS}
    assert all(rows.values())
    for row in rows["LayerNorm + SGD"]:
        rate, loss = row.replace("LayerNorm + SGD", "").split()[:2]
        assert float(rate.rstrip("!")) > 0
        assert float(loss.rstrip("*")) > 0
    assert str(out) in printed.replace("\n", "")
    assert "steps to the target" in printed


def test_figure_shows_curves(quick):
    import matplotlib.image

    _, out = quick
    assert out.read_bytes().startswith(b"\x89PNG")
    pixels = matplotlib.image.imread(out)[..., :3]
    assert min(pixels.shape[:2]) > 300
    # Lines in six colours and their bands, and not a blank page.
    assert 0.005 < (pixels.min(-1) < 0.9).mean() < 0.5
    assert len(np.unique((pixels * 15).round().reshape(-1, 3), axis=0)) > 30


def test_numbers_come_with_their_environment(quick):
    _, out = quick
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert numbers["environment"]["versions"]["jax"]
    assert numbers["environment"]["cpu_count"] >= 1
    text = json.dumps(numbers)
    assert all(name in text for name in ("sgd", "adam_z", "validation_losses", "test_accuracy"))


GOOD = {
    "x_train": np.arange(64 * 28 * 28, dtype=np.uint8).reshape(64, 28, 28),
    "y_train": (np.arange(64) % 10).astype(np.uint8),
    "x_test": np.zeros((32, 28, 28), np.uint8),
    "y_test": (np.arange(32) % 10).astype(np.uint8),
}


def test_npz_in_the_keras_layout(tmp_path):
    np.savez(tmp_path / "mnist.npz", **GOOD)
    dataset = data.load("mnist", tmp_path, train_size=30, eval_size=15)
    assert dataset.train.x.shape == (30, 28, 28, 1)
    assert len(dataset.validation) == len(dataset.test) == 15
    assert 0 <= dataset.train.x.min() < dataset.train.x.max() <= 1
    assert dataset.train.y.dtype == np.int32


def without(key):
    return {name: array for name, array in GOOD.items() if name != key}


MALFORMED = {
    "a key is missing": (without("y_test"), "y_test"),
    "images of another shape": (GOOD | {"x_train": GOOD["x_train"][:, :27]}, "x_train in"),
    "images that are no bytes": (GOOD | {"x_test": np.zeros((32, 28, 28))}, "x_test in"),
    "labels that are no integers": (GOOD | {"y_train": np.zeros(64)}, "y_train in"),
    "classes that do not exist": (GOOD | {"y_test": np.full(32, 11)}, "classes 11..11"),
    "pickled objects": (GOOD | {"x_train": np.array([{}], dtype=object)}, "allow_pickle=False"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_archive_gets_one_line(tmp_path, capsys, name):
    arrays, expected = MALFORMED[name]
    np.savez(tmp_path / "mnist.npz", **arrays)
    assert_one_line(capsys, tmp_path, expected, "mnist.npz")


def test_file_that_is_no_archive_gets_one_line(tmp_path, capsys):
    (tmp_path / "mnist.npz").write_bytes(b"not a zip file")
    assert_one_line(capsys, tmp_path, "cannot read", "mnist.npz")


def test_truncated_archive_gets_one_line(tmp_path, capsys):
    whole = io.BytesIO()
    np.savez(whole, **GOOD)
    (tmp_path / "mnist.npz").write_bytes(whole.getvalue()[:20_000])
    assert_one_line(capsys, tmp_path, "cannot read", "mnist.npz")


def test_missing_file_gets_one_line(tmp_path, capsys):
    assert_one_line(capsys, tmp_path, "no file", "mnist.npz", "--data-dir")


def test_data_dir_left_out_gets_one_line(capsys, monkeypatch):
    monkeypatch.delenv(data.DATA_DIR_VARIABLE, raising=False)
    assert demo.main(["--dataset", "mnist", "--quick"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "--data-dir" in error
    assert data.DATA_DIR_VARIABLE in error


def assert_one_line(capsys, folder, *expected):
    out = str(folder / "figure.png")
    code = demo.main(["--dataset", "mnist", "--data-dir", str(folder), "--quick", "--out", out])
    error = capsys.readouterr().err
    assert code == 2
    assert len(error.splitlines()) == 1
    assert all(text in error for text in (str(folder), *expected)), error
