"""The demonstration from end to end, its parts against plain loops, and its errors."""

import dataclasses
import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from rich.console import Console

import bnp_optax
from benchmarks import data
from benchmarks.demo import command, comparison, figure, report
from benchmarks.demo.lanes import Lanes
from benchmarks.demo.plan import DemoPlan, Setting
from benchmarks.demo.timing import StepTime, interleaved
from benchmarks.networks.small import CNN, MLP, convolve_patches
from benchmarks.training import parts
from benchmarks.training.methods import METHODS

ROOT = Path(__file__).parents[2]
RATES = [0.01, 0.1, 1e6]
CONTESTANTS = DemoPlan().methods


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Output, figure and numbers of a quick run; its largest learning rate is hopeless."""
    out = tmp_path_factory.mktemp("demo") / "sub" / "figure.png"
    rates = map(str, RATES)
    command = [sys.executable, "-m", "benchmarks", "demo", "--quick", "--out", str(out), "--rates"]
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    run = subprocess.run(
        [*command, *rates], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout, out, json.loads(out.with_suffix(".json").read_text())


def test_tables_show_every_contestant_and_verdict(quick):
    stdout, out, numbers = quick
    tables, _, verdict = stdout.partition("Best with BNP against best without")
    _, raw, standardized = re.split("MLP, (?:raw|standardized) inputs", tables)
    for inputs, table in (("raw", raw), ("standardized", standardized)):
        for result in numbers["results"]:
            if result["inputs"] == inputs:
                (row,) = re.findall(rf"^ +{re.escape(result['label'])}  .*$", table, re.MULTILINE)
                assert f" {result['learning_rate']:g}" in row
                documented = 100 * result["test_accuracy_at_documented_rate"]
                assert f" {documented:.1f}, {result['documented_rate']:g} " in row
                assert result["documented_rate"] == METHODS[result["method"]].start
                assert f" {result['final_train_loss']:#.2g}" in row
                assert f" {100 * result['test_accuracy']:.1f} " in row
                assert f" {result['steps_to_target'] or '-'}" in row
                assert row.rstrip().endswith(f" {StepTime(**result['step_time'])}")
        best = min(r["final_train_loss"] for r in numbers["results"] if r["inputs"] == inputs)
        assert f" {best:#.2g}{report.BEST} " in table
    assert verdict.count("won") + verdict.count("lost") + verdict.count("even") >= 4
    assert str(out) in stdout
    assert str(out.with_suffix(".json")) in stdout


def test_numbers_have_environment_and_all_results(quick):
    _, _, numbers = quick
    assert set(numbers) == {"environment", "dataset", "plan", "results"}
    assert {"versions", "python", "cpu", "cpu_count", "commit"} <= set(numbers["environment"])
    assert numbers["environment"]["versions"]["bnp-optax"] == bnp_optax.__version__
    assert numbers["plan"]["rates"] == RATES
    expected = {(inputs, method) for inputs in DemoPlan().inputs for method in CONTESTANTS}
    assert {(r["inputs"], r["method"]) for r in numbers["results"]} == expected
    points, seeds = numbers["plan"]["points"], numbers["plan"]["seeds"]
    for result in numbers["results"]:
        assert result["model"] == "mlp"
        assert np.shape(result["curves"]["train_loss"]) == (seeds, points)
        assert np.shape(result["curves"]["test_accuracy"]) == (seeds, points)
        assert len(result["curves"]["steps"]) == points
        assert len(result["validation_losses"]) == len(RATES)
        assert result["step_time"]["ratio"] > 0
        last = np.array(result["curves"]["train_loss"])[:, -1]
        np.testing.assert_allclose(result["final_train_loss"], last.mean(), rtol=1e-4)
        assert result["steps_to_target"] in [None, *result["curves"]["steps"]]


def test_every_method_gets_the_rate_that_validates_best(quick):
    for result in quick[2]["results"]:
        losses = [np.inf if v is None else v for v in result["validation_losses"]]
        assert result["learning_rate"] == RATES[int(np.argmin(losses))]
        assert result["learning_rate"] != max(RATES)
        assert result["learning_rate_at_edge"] == (result["learning_rate"] == min(RATES))


def test_target_is_the_last_loss_of_sgd(quick):
    results = quick[2]["results"]
    for inputs in DemoPlan().inputs:
        here = {r["method"]: r for r in results if r["inputs"] == inputs}
        assert len({r["target_train_loss"] for r in here.values()}) == 1
        assert here["sgd"]["target_train_loss"] == here["sgd"]["final_train_loss"]
        assert here["sgd"]["steps_to_target"] is not None
        assert here["sgd"]["step_time"]["ratio"] == 1.0


def test_networks_learn(quick):
    for result in quick[2]["results"]:
        if result["method"] != "batchnorm":
            assert result["test_accuracy"] > 0.5, result["label"]


def test_figure_shows_every_method(quick):
    image = matplotlib.image.imread(quick[1])
    assert quick[1].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert min(image.shape[:2]) > 300
    assert image[..., :3].std() > 0.02
    for method in CONTESTANTS:
        distance = np.abs(image[..., :3] - to_rgb(METHODS[method].color)).max(axis=-1)
        assert np.sum(distance < 0.02) > 50, method


def entry(method, train_loss, accuracy=0.5):
    train_loss = np.asarray(train_loss, float)
    return comparison.Entry(
        setting=Setting("mlp", "raw", 4),
        method=method,
        rate=0.1,
        at_edge=False,
        validation_losses=[np.inf, 1.0],
        steps=10 * np.arange(1, train_loss.shape[1] + 1),
        train_loss=train_loss,
        test_accuracy=np.full(train_loss.shape, accuracy),
        documented_accuracy=np.full(len(train_loss), accuracy),
    )


def test_steps_to_target_is_where_the_mean_first_gets_there():
    sgd = entry("sgd", [[3.0, 1.0, 0.5], [1.0, 1.0, 0.5]])
    assert sgd.steps_to(1.0) == 20
    assert sgd.steps_to(2.0) == 10
    assert sgd.steps_to(0.4) is None
    assert comparison.Outcome({sgd.setting: [sgd]}, {}).target(sgd.setting) == 0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_divergence_is_worst_and_breaks_nothing(tmp_path, bad):
    plan = DemoPlan(models=("mlp",), inputs=("raw",), batch_sizes=(4,), seeds=2)
    entries = [
        entry("sgd", [[1.0, bad], [1.0, 0.5]], accuracy=0.1),
        entry("adam", [[1.0, 0.6], [1.0, 0.6]], accuracy=0.7),
        entry("bnp_sgd", [[bad, bad], [bad, bad]], accuracy=0.1),
    ]
    outcome = comparison.Outcome({entries[0].setting: entries}, {})
    text = io.StringIO()
    report.print_report(Console(file=text, width=100), plan, outcome)
    lines = text.getvalue().splitlines()
    assert report.BEST in next(line for line in lines if "Adam" in line)
    assert report.BEST not in next(line for line in lines if "BNP + SGD" in line)
    assert ("diverged" in text.getvalue()) == (bad != 1e30)
    assert "lost" in text.getvalue()
    assert entries[2].steps_to(1.0) is None
    json.dumps(report.as_json(plan, outcome, {}), allow_nan=False)
    figure.save_figure(plan, outcome, "title", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert not plt.get_fignums()


def test_learning_rates_are_grouped_without_loss():
    groups = list(comparison._groups((1.0, 2.0, 3.0), 2))
    assert groups == [(1.0, 2.0), (3.0, 3.0)]


def test_interleaved_reports_ratios_to_the_reference():
    times = interleaved({"a": lambda: None, "b": lambda: sum(range(20_000))}, "a", turns=5)
    assert times["a"].ratio == 1.0
    assert times["a"].quartiles == (1.0, 1.0)
    assert times["b"].ratio > 2.0


def test_times_whose_spread_says_nothing_are_blank():
    assert str(StepTime(1e-3, 1.25, (1.0, 1.4))) == "1.2 (1.0-1.4)"
    assert str(StepTime(1e-3, 3.0, (1.0, 8.5))) == "-"


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 3)])
def test_patches_are_a_convolution(strides, padding):
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    settings = {"features": 5, "kernel_size": (3, 3), "strides": strides, "padding": padding}
    xla = nn.Conv(**settings)
    patches = nn.Conv(**settings, conv_general_dilated=convolve_patches)
    variables = xla.init(jax.random.key(1), x)
    np.testing.assert_allclose(
        patches.apply(variables, x), xla.apply(variables, x), rtol=1e-4, atol=1e-5
    )


def test_patches_refuse_groups():
    conv = nn.Conv(4, (3, 3), feature_group_count=2, conv_general_dilated=convolve_patches)
    with pytest.raises(ValueError, match="groups"):
        conv.init(jax.random.key(0), jnp.ones((1, 5, 5, 2)))


def test_preconditioner_sees_through_patches():
    x, y = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.arange(4)
    xla, patches = CNN(), CNN(convolution=convolve_patches)
    params = parts.init_variables(xla, x, [1])[0]["params"]
    outputs = [
        jax.jit(bnp_optax.value_and_grad(parts.make_loss(model), has_aux=True))(params, {}, x, y)[
            1:
        ]
        for model in (xla, patches)
    ]
    assert len(outputs[0][1]) == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *outputs)


@pytest.mark.parametrize("method", ["batchnorm", "adam_z"])
def test_lanes_are_plain_training_loops(method):
    images = np.random.default_rng(0).normal(size=(12, 4, 4, 1)).astype(np.float32)
    split = data.Split(images, np.arange(12, dtype=np.int32) % 10)
    model, contestant = MLP((8,), norm=METHODS[method].norm), METHODS[method]
    variables = parts.init_variables(model, jnp.asarray(images[:1]), [0, 1])
    indices = [parts.batch_indices(12, 3, 6, 2, seed) for seed in (0, 1)]
    rates = [0.1, 0.01]
    curves = Lanes(model, contestant)(rates, variables, indices, split, [split, split])
    assert curves.loss.shape == (2, 2, 2)
    for lane in range(2):
        batch = images[:3], split.y[:3]
        layers = parts.find_layers(model, contestant, variables[lane], *map(jnp.asarray, batch))
        step = jax.jit(parts.make_step(model, contestant, layers))
        carry = parts.init_carry(contestant, layers, variables[lane])
        for point in range(2):
            for index in indices[lane][point]:
                carry, _ = step(rates[lane], carry, split.x[index], split.y[index])
            losses, hits = parts.evaluate(model, carry, jnp.asarray(split.x), jnp.asarray(split.y))
            np.testing.assert_allclose(curves.loss[lane, point], np.mean(losses), rtol=1e-3)
            np.testing.assert_allclose(curves.accuracy[lane, point], np.mean(hits), atol=1e-6)


def test_batches_are_whole_epochs():
    indices = parts.batch_indices(n=10, batch_size=5, steps=8, points=4, seed=0)
    assert indices.shape == (4, 2, 5)
    for epoch in indices:
        assert sorted(epoch.ravel()) == list(range(10))


def test_digits_are_raw_and_split_apart():
    digits = data.load("digits")
    assert (digits.train.x.min(), digits.train.x.max()) == (0.0, 16.0)
    assert [len(digits.train), len(digits.validation), len(digits.test)] == [1077, 360, 360]
    images = [s.x.reshape(len(s), -1) for s in (digits.train, digits.validation, digits.test)]
    assert len(np.unique(np.concatenate(images), axis=0)) == 1797
    np.testing.assert_allclose(np.bincount(digits.test.y), 36, atol=2)


@pytest.mark.parametrize(("per", "axes"), [("feature", 0), ("channel", (0, 1, 2))])
def test_standardized_by_training_statistics(per, axes):
    digits = data.load("digits")
    x = digits.train.x
    scaled = data.standardize(digits, per)
    np.testing.assert_allclose(scaled.train.x.mean(axis=axes), 0.0, atol=1e-5)
    constant = x.std(axis=axes) == 0
    np.testing.assert_allclose(scaled.train.x.std(axis=axes)[~constant], 1.0, rtol=1e-4)
    scale = np.where(constant, 1.0, x.std(axis=axes))
    expected = (digits.test.x - x.mean(axis=axes)) / scale
    np.testing.assert_allclose(scaled.test.x, expected, rtol=1e-4, atol=1e-4)
    assert constant.any() == (per == "feature")


def arrays(n=60, **changes):
    """A small MNIST, whose images are their class."""
    y = np.arange(n) % 10
    x = np.broadcast_to(25 * y[:, None, None], (n, 28, 28)).astype(np.uint8)
    y = y.astype(np.uint8)
    return {"x_train": x, "y_train": y, "x_test": x[:30], "y_test": y[:30]} | changes


def test_files_in_the_layout_of_keras(tmp_path, monkeypatch):
    np.savez(tmp_path / "mnist.npz", **arrays(y_train=(np.arange(60) % 10)[:, None]))
    monkeypatch.setenv(data.DATA_DIR_VARIABLE, str(tmp_path))
    mnist = data.load("mnist", train_size=30, eval_size=20)
    assert [len(mnist.train), len(mnist.validation), len(mnist.test)] == [30, 20, 20]
    assert mnist.train.x.shape == (30, 28, 28, 1)
    for split in (mnist.train, mnist.validation, mnist.test):
        np.testing.assert_allclose(split.x[:, 0, 0, 0], split.y * 25 / 255, rtol=1e-6)


def without(key):
    kept = arrays()
    del kept[key]
    return kept


MALFORMED = {
    "missing key": (without("y_test"), "y_test"),
    "shape": (arrays(x_train=np.zeros((60, 28, 27), np.uint8)), "x_train"),
    "dtype": (arrays(x_test=np.zeros((30, 28, 28), np.float32)), "float32"),
    "no images": (arrays(x_test=np.zeros((0, 28, 28), np.uint8)), "x_test"),
    "scalar": (arrays(x_test=np.uint8(3)), "x_test"),
    "label count": (arrays(y_train=np.zeros(59, np.uint8)), "y_train"),
    "label dtype": (arrays(y_train=np.zeros(60)), "y_train"),
    "label range": (arrays(y_train=np.full(60, 10)), "classes"),
    "object array": (arrays(x_train=np.array([{}, 1], object)), "cannot read"),
    "too few": (arrays(), "60 images"),
}


def assert_one_line(capsys, *parts):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_get_one_line(tmp_path, capsys, case):
    contents, part = MALFORMED[case]
    np.savez(tmp_path / "mnist.npz", **contents)
    assert command.main(["--dataset", "mnist", "--data-dir", str(tmp_path)]) == 2
    assert_one_line(capsys, part)


def garbage():
    stream = io.BytesIO()
    np.savez(stream, **arrays())
    whole = stream.getvalue()
    text = io.BytesIO()
    with zipfile.ZipFile(text, "w") as archive:
        for key in arrays():
            archive.writestr(f"{key}.npy", "no array")
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    return {
        "empty": b"",
        "text": b"<html>404</html>",
        "pickle": pickle.dumps(arrays()),
        "truncated": whole[: len(whole) // 2],
        "corrupt": whole[:5000] + bytes(100) + whole[5100:],
        "zip of text": text.getvalue(),
        "bare array": array.getvalue(),
    }


@pytest.mark.parametrize("case", garbage())
def test_what_is_no_archive_gets_one_line(tmp_path, capsys, case):
    path = tmp_path / "mnist.npz"
    path.write_bytes(garbage()[case])
    assert command.main(["--dataset", "mnist", "--data-dir", str(tmp_path)]) == 2
    assert_one_line(capsys, str(path), "x_train")


def test_missing_file_gets_one_line(tmp_path, capsys):
    assert command.main(["--dataset", "cifar10", "--data-dir", str(tmp_path)]) == 2
    assert_one_line(capsys, str(tmp_path / "cifar10.npz"), "--data-dir", data.DATA_DIR_VARIABLE)


def test_missing_folder_gets_one_line(capsys, monkeypatch):
    monkeypatch.delenv(data.DATA_DIR_VARIABLE, raising=False)
    assert command.main(["--dataset", "fashion_mnist"]) == 2
    assert_one_line(capsys, "fashion_mnist.npz", "--data-dir", data.DATA_DIR_VARIABLE)


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--train-size", "0"], "--train-size"),
        (["--train-size", "1700"], "1797"),
        (["--eval-size", "3"], "3 of"),
        (["--seeds", "0"], "seeds"),
        (["--batch-sizes", "4", "-1"], "batch_sizes"),
        (["--batch-sizes", "4", "2000"], "1077 images"),
        (["--turns", "-1"], "`turns` must be 0 or more; got -1"),
        (["--rates", "nan"], "rates"),
        (["--models"], "models"),
        (["--out", "figure.gif"], ".png"),
    ],
)
def test_bad_options_get_one_line(capsys, args, part):
    assert command.main(args) == 2
    assert_one_line(capsys, part)


def test_unwritable_output_gets_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command.main(["--out", str(tmp_path / "file" / "figure.png")]) == 2
    assert_one_line(capsys, "--out")


def test_quick_defaults_can_be_changed():
    options = command._options(["--quick", "--seeds", "7"])
    assert options.plan == dataclasses.replace(command.QUICK, seeds=7)
    assert command._options(["--dataset=mnist"]).plan == command.IMAGES
    assert command._options([]).plan == DemoPlan()
