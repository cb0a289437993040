"""The regularization benchmark from end to end at a tiny size, its parts, and its errors."""

import json

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.image
import numpy as np
import optax
import pytest

from benchmarks.regularization import command, report, runs
from benchmarks.regularization.methods import (
    GRADIENT_METHODS,
    L1_METHODS,
    adam_with_gradient_penalty_in_z,
    keep_zeros,
    subgradient_l1,
)
from benchmarks.regularization.runs import Measured, cut, kernel_entries, largest_eigenvalue, prune
from benchmarks.regularization.sweep import Point, Sweep, SweepPlan, with_wrong_labels

pytestmark = pytest.mark.slow

STRENGTHS = [0.001, 10.0]
SPARSITIES = [0.5, 0.9]
TINY = {
    "train-size": [100],
    "eval-size": [100],
    "steps": [40],
    "seeds": [2],
    "hidden": [8],
    "warmup": [0],
    "batch-size": [20],
    "rates": [0.01],
    "label-noise": [0.1],
    "gradient-strengths": STRENGTHS,
    "l1-strengths": [0.3, 1.0],
    "sparsities": SPARSITIES,
}
N_ENTRIES = 64 * 8 + 8 * 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder, output and numbers of a tiny run."""
    mpl.use("Agg")
    folder = tmp_path_factory.mktemp("out") / "sub"
    with pytest.MonkeyPatch.context() as patch:
        # These programs take a second each to compile, and milliseconds to run.
        fast = {"xla_backend_optimization_level": 0}
        patch.setattr(runs, "compile_many", lambda lowered: lowered.compile(compiler_options=fast))
        lines = []
        patch.setattr(report.Console, "print", lambda self, *a, **k: lines.extend(a))
        args = [text for name, values in TINY.items() for text in (f"--{name}", *map(str, values))]
        assert command.main([*args, "--output", str(folder)]) == 0
    numbers = json.loads((folder / "regularization.json").read_text())
    return folder, lines, numbers


def results(tiny, comparison):
    found = [r for r in tiny[2]["results"] if r["comparison"] == comparison]
    return {r["method"]: r for r in found}


def test_numbers_have_every_method_strength_and_seed(tiny):
    numbers = tiny[2]
    assert {"versions", "cpu", "commit"} <= set(numbers["environment"])
    assert numbers["plan"]["gradient_strengths"] == STRENGTHS
    assert numbers["datasets"] == [
        {"name": "digits", "inputs": "standardized", "train": 100, "validation": 100, "test": 100}
    ]
    gradient, l1 = results(tiny, "gradient"), results(tiny, "l1")
    assert set(gradient) == set(GRADIENT_METHODS)
    assert set(l1) == set(L1_METHODS)
    for name, result in gradient.items():
        strengths = [0.0] if GRADIENT_METHODS[name].space == "none" else STRENGTHS
        assert [point["strength"] for point in result["points"]] == strengths
        assert result["label_noise"] == 0.1
        assert np.shape(result["sharpness"]) == (2,)
    for name, result in l1.items():
        swept = SPARSITIES if L1_METHODS[name].prune_after else [0.3, 1.0]
        assert [point["strength"] for point in result["points"]] == [0.0, *swept]
        assert all(np.shape(point["test_accuracy"]) == (2,) for point in result["points"])


def test_zeros_are_counted_exactly(tiny):
    l1 = results(tiny, "l1")
    zeros = {name: np.array([p["zeros"] for p in r["points"]]) for name, r in l1.items()}
    for name, shares in zeros.items():
        np.testing.assert_allclose(shares * N_ENTRIES, np.round(shares * N_ENTRIES), atol=0.01)
        assert (shares[0] == 0.0).all(), name
    for name in ("l1_z", "l1_bnp_z", "l1_p"):
        assert (zeros[name][2] > zeros[name][1]).all(), name
    for name in ("pruned", "pruned_tuned"):
        np.testing.assert_allclose(zeros[name][1:].T, [SPARSITIES] * 2, atol=1 / N_ENTRIES)
    assert (zeros["l1_subgradient"] == 0.0).all()
    for result in l1.values():
        for point in result["points"]:
            assert (np.array(point["near_zeros"]) >= point["zeros"]).all()


def test_without_strength_all_forms_of_one_base_train_alike(tiny):
    l1 = results(tiny, "l1")
    losses = {name: r["points"][0]["train_loss"] for name, r in l1.items()}
    for name in ("l1_z", "l1_subgradient", "pruned", "pruned_tuned"):
        np.testing.assert_allclose(losses[name], losses["l1_p"], rtol=1e-2, err_msg=name)


def test_penalty_lowers_the_gradient(tiny):
    norms = {
        name: np.mean([point["gradient_norm"] for point in result["points"]], axis=1)
        for name, result in results(tiny, "gradient").items()
    }
    for name in ("adam_p", "bnp_adam_p", "bnp_adam_z"):
        plain = norms[GRADIENT_METHODS[name].base][0]
        np.testing.assert_allclose(norms[name][0], plain, rtol=0.02, err_msg=name)
        assert norms[name][1] < 0.95 * plain, name
    # The strength is in other units in Adam's z.
    assert norms["adam_z"][0] < 0.995 * norms["adam"][0]


def test_figure_and_tables_show_every_method(tiny):
    folder, lines, _ = tiny
    image = matplotlib.image.imread(folder / "regularization.png")
    assert min(image.shape[:2]) > 300
    assert image[..., :3].std() > 0.02
    tables = [line for line in lines if isinstance(line, report.Table)]
    assert len(tables) == 7
    shown = (GRADIENT_METHODS, L1_METHODS, L1_METHODS, L1_METHODS)
    for table, methods in zip((tables[i] for i in (0, 2, 3, 5)), shown, strict=True):
        labels = [str(cell) for cell in table.columns[0].cells]
        assert labels == [method.label for method in methods.values()]
    for table in (tables[i] for i in (1, 4, 6)):
        for column in table.columns[3::2]:
            assert {str(cell) for cell in column.cells} <= {"won", "lost", "even", "-"}


def test_largest_eigenvalue_is_that_of_the_dense_hessian():
    with jax.enable_x64(True):
        matrix = jax.random.normal(jax.random.key(0), (12, 12))
        matrix = matrix @ matrix.T

        def loss_fn(params):
            p = jnp.concatenate([params["a"].ravel(), params["b"]])
            return 0.5 * p @ matrix @ p + jnp.sum(jnp.cos(p))

        params = {"a": jnp.ones((4, 2)), "b": jnp.zeros(4)}
        dense = matrix - jnp.diag(jnp.cos(jnp.concatenate([jnp.ones(8), jnp.zeros(4)])))
        value, error = jax.jit(lambda p: largest_eigenvalue(loss_fn, p))(params)
        np.testing.assert_allclose(value, jnp.linalg.eigvalsh(dense)[-1], rtol=1e-10)
        assert error < 1e-6


def test_penalty_in_adams_z_is_yes_equation_12():
    scales = jnp.array([1.0, 3.0])
    grad_fn = lambda p: scales * p  # noqa: E731
    p = jnp.array([2.0, -0.5])
    g = grad_fn(p)
    tx = adam_with_gradient_penalty_in_z(0.1, 0.2)
    updates, _ = tx.update(g, tx.init(p), p, grad_fn=grad_fn)
    m = 1.0 / jnp.abs(g)  # After one step, v = g^2 and the mean of the gradient is itself.
    np.testing.assert_allclose(updates, -0.1 * m * (g + 2 * 0.2 * scales * (m * g)), rtol=1e-5)
    tx, adam = adam_with_gradient_penalty_in_z(0.1, 0.0), optax.adam(0.1)
    ours, theirs = tx.init(p), adam.init(p)
    for g in ([1.0, 2.0], [-0.3, 5.0], [0.2, 0.1]):
        updates, ours = tx.update(jnp.array(g), ours, p, grad_fn=grad_fn)
        expected, theirs = adam.update(jnp.array(g), theirs, p)
        np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_pruning_is_global_and_leaves_biases():
    params = {"a": jnp.array([[1.0, -0.1], [0.2, 4.0]]), "b": jnp.array([[0.3], [-5.0]])}
    params["bias"] = jnp.array([0.01])
    pruned = prune(params, 0.5)
    assert pruned["a"].tolist() == [[1.0, 0.0], [0.0, 4.0]]
    assert pruned["b"].tolist() == [[0.0], [-5.0]]
    assert pruned["bias"] == params["bias"]
    jax.tree.map(np.testing.assert_array_equal, prune(params, 0.0), params)
    assert not kernel_entries(prune(params, 1.0)).any()
    assert kernel_entries(cut(params, 0.3)).tolist().count(0.0) == 2
    tx = keep_zeros()
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(pruned), pruned)
    assert updates["a"].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert updates["bias"] == 1.0


def test_subgradient_adds_signs_to_kernels():
    params = {"kernel": jnp.array([[2.0, -3.0, 0.0]]), "bias": jnp.array([1.0])}
    tx = subgradient_l1(0.1)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [[0.1, -0.1, 0.0]])
    assert updates["bias"] == 0.0


def test_wrong_labels_are_wrong_and_as_many_as_asked():
    options = command.RegularizationOptions(train_size=200)
    data = command._load(options, "digits")
    noisy = with_wrong_labels(data, 0.2)
    assert np.sum(noisy.train.y != data.train.y) == 40
    assert set(noisy.train.y) <= set(range(10))
    np.testing.assert_array_equal(noisy.test.y, data.test.y)
    np.testing.assert_array_equal(with_wrong_labels(data, 0.0).train.y, data.train.y)


def point(zeros, accuracy):
    values = dict.fromkeys(Measured._fields, np.ones(2))
    values |= {"zeros": np.full(2, zeros), "near_zeros": np.full(2, zeros + 0.5)}
    values |= {"test_accuracy": np.array(accuracy), "cut_accuracy": np.array(accuracy) / 2}
    return Point(0.1, 0.1, False, Measured(**values))


def test_accuracy_at_a_sparsity_is_between_strengths():
    sweep = Sweep("l1_z", [point(0.0, [0.9, 0.8]), point(0.5, [0.7, 0.6])], 0)
    np.testing.assert_allclose(report.accuracy_at(sweep, 0.25, cut=False), [0.8, 0.7])
    np.testing.assert_allclose(report.accuracy_at(sweep, 0.75, cut=True), [0.4, 0.35])
    assert np.isnan(report.accuracy_at(sweep, 0.6, cut=False)).all()


def test_verdict_needs_more_than_the_standard_error():
    a = np.array([0.9, 0.92])
    assert str(report.verdict(a, a - 0.005)) == "even"
    assert str(report.verdict(a, a - 0.1)) == "won"
    assert str(report.verdict(a - 0.1, a)) == "lost"
    assert str(report.verdict(a, a * np.nan)) == "-"


def test_compiled_program_is_the_function():
    program = runs.compile_many(jax.jit(lambda x: 2 * x).lower(jnp.ones(3)))
    assert program(jnp.ones(3)).tolist() == [2.0, 2.0, 2.0]


def assert_one_line(capsys, *parts):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--train-size", "0"], "--train-size"),
        (["--train-size", "20"], "--batch-size"),
        (["--dataset"], "dataset"),
        (["--rates"], "rates"),
        (["--l1-strengths", "-1"], "l1_strengths"),
        (["--sparsities", "1.5"], "sparsities"),
        (["--label-noise", "nan"], "label_noise"),
        (["--seeds", "0"], "seeds"),
    ],
)
def test_bad_options_get_one_line(capsys, tmp_path, args, part):
    assert command.main([*args, "--output", str(tmp_path)]) == 2
    assert_one_line(capsys, part)


def test_missing_data_and_unwritable_output_get_one_line(capsys, tmp_path):
    assert command.main(["--dataset", "mnist", "--data-dir", str(tmp_path)]) == 2
    assert_one_line(capsys, str(tmp_path / "mnist.npz"), "--data-dir")
    (tmp_path / "file").write_text("")
    assert command.main(["--output", str(tmp_path / "file" / "sub")]) == 2
    assert_one_line(capsys, "--output")


def test_defaults_can_be_built():
    assert SweepPlan() == command.RegularizationOptions().plan
