"""Training runs, their order, and what a kill or a spoiled file does to them."""

import dataclasses
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import bnp_optax
from benchmarks.__main__ import main
from benchmarks.contest import campaign, cells, command, runner
from benchmarks.contest.runner import TRAINERS, Job, SettingsError, run, tuning_scores
from benchmarks.data import Split
from benchmarks.problems import problems
from benchmarks.training.methods import METHODS
from benchmarks.training.parts import batch_indices
from benchmarks.training.trainer import Curves, Trainer

ROOT = Path(__file__).parents[3]
GRID = (0.003, 0.03, 0.3)


def short(name: str, **changes):
    """A problem with few steps."""
    return dataclasses.replace(problems("small")[name], **({"steps": 20, "points": 4} | changes))


@pytest.fixture(scope="module")
def digits():
    return problems("small")["fc-digits-b60-standardized"].load(None)


def job(path: Path, data, name: str = "sgd", **changes) -> Job:
    problem = short("fc-digits-b60-standardized")
    return Job(
        problem,
        name,
        **({"data": data, "scale": "small", "grid": GRID, "seeds": 2, "path": path} | changes),
    )


def curves(cell: cells.Cell):
    """All that must not depend on how often a contest was interrupted."""
    return [
        # As text, in which not-a-number equals itself.
        (r.role, r.rate, r.seed, str([r.train_loss, r.loss, r.score]))
        for r in cell.runs
    ]


# One run.


@pytest.mark.parametrize("name", ["sgd", "bnp_sgd", "adam_z"])
def test_a_run_is_a_plain_training_loop(digits, name):
    problem = short("fc-digits-b60-standardized")
    trainer = Trainer(problem, name, METHODS[name], digits)
    seen = trainer(0.05, 3, digits.test)

    model = problem.network("none", problem.steps)
    x, y = jnp.asarray(digits.train.x), jnp.asarray(digits.train.y)
    params = model.init(jax.random.key(3, impl="rbg"), x[:1])["params"]

    def loss_fn(params, x, y):
        logits = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    tx = {
        "sgd": optax.sgd(0.05),
        "bnp_sgd": optax.chain(bnp_optax.bnp_precondition(), optax.sgd(0.05)),
        "adam_z": bnp_optax.in_zspace(optax.adam(0.05), bnp_optax.bnp()),
    }[name]
    tx, value_and_grad = optax.with_extra_args_support(tx), bnp_optax.value_and_grad(loss_fn)
    state = tx.init(params)

    @jax.jit
    def step(params, state, index):
        loss, grads, stats = value_and_grad(params, x[index], y[index])
        updates, state = tx.update(grads, state, params, layer_stats=stats)
        return optax.apply_updates(params, updates), state, loss

    indices = batch_indices(len(y), 60, problem.steps, problem.points, 3)
    for point, batches in enumerate(indices):
        losses = []
        for index in batches:
            params, state, loss = step(params, state, index)
            losses.append(loss)
        np.testing.assert_allclose(seen.train_loss[point], np.mean(losses), rtol=2e-3)
        logits = model.apply({"params": params}, jnp.asarray(digits.test.x))
        test_loss = optax.softmax_cross_entropy_with_integer_labels(logits, digits.test.y).mean()
        np.testing.assert_allclose(seen.loss[point], test_loss, rtol=2e-3)
        hits = np.mean(np.argmax(logits, -1) == digits.test.y)
        assert abs(seen.score[point] - hits) <= 2 / len(digits.test)


def test_a_run_ends_where_it_diverges(digits):
    trainer = Trainer(short("fc-digits-b60-standardized"), "sgd", METHODS["sgd"], digits)
    seen = trainer(1e9, 0, digits.test)
    assert np.isnan(seen.train_loss).any()
    first = np.flatnonzero(np.isnan(seen.train_loss))[0]
    assert np.isnan(seen.score[first:]).all()


def test_regression_is_scored_by_the_variance_explained():
    problem = short("tabular-standardized", steps=400)
    data = problem.load(None)
    seen = Trainer(problem, "adam", METHODS["adam"], data)(0.01, 0, data.test)
    np.testing.assert_allclose(seen.score, 1.0 - seen.loss / np.var(data.test.y), rtol=1e-5)
    assert 0.2 < seen.score[-1] < 1.0


def test_drift_changes_what_is_seen_in_training_and_in_evaluation(digits):
    still = short("fc-digits-b60-standardized", steps=8, points=4)
    zeroed = dataclasses.replace(still, drift=lambda x, step: jnp.where(step < 4, x, 0.0 * x))
    (there, gone) = (
        Trainer(problem, "sgd", METHODS["sgd"], digits)(0.1, 0, digits.test)
        for problem in (still, zeroed)
    )
    # Evaluated after step 4, which is seen by a network that was trained before it as before.
    np.testing.assert_allclose(gone.train_loss[:2], there.train_loss[:2], rtol=1e-6)
    assert gone.score[0] == there.score[0]
    assert len(set(gone.score[2:])) == 1
    assert gone.score[-1] < 0.2 < there.score[-1]


def test_augmentation_decay_and_initial_scale_reach_the_run(digits):
    plain = short("fc-digits-b60-standardized")
    decayed = dataclasses.replace(plain, decay={"momentum": 1.0})
    black = dataclasses.replace(plain, augment=lambda x, key: jnp.zeros_like(x))
    method = METHODS["momentum"]
    results = {
        name: Trainer(problem, "momentum", method, digits)(0.01, 0, digits.test)
        for name, problem in {"plain": plain, "decayed": decayed, "black": black}.items()
    }
    assert results["decayed"].train_loss[-1] > results["plain"].train_loss[-1] + 0.1
    assert results["black"].score[-1] < 0.3 < results["plain"].score[-1]

    scales = []

    def network(norm, steps, init_scale=1.0):
        scales.append(init_scale)
        return plain.network(norm, steps)

    scaled = dataclasses.replace(plain, network=network, init_scale={"momentum": 0.5})
    Trainer(scaled, "momentum", method, digits)
    Trainer(scaled, "sgd", METHODS["sgd"], digits)
    assert scales == [0.5, 1.0]


COMPARED = {name for problem in problems("small").values() for name in problem.methods}


@pytest.mark.parametrize("name", sorted(COMPARED - TRAINERS.keys()))
def test_every_method_learns_the_digits(digits, name):
    problem = short("fc-digits-b60-standardized", steps=120, points=2)
    method = METHODS[name]
    seen = Trainer(problem, name, method, digits)(method.start, 0, digits.test)
    assert seen.score[-1] > 0.5
    assert seen.train_loss[-1] < seen.train_loss[0]


# A cell.


def test_a_cell_is_tuned_and_then_run_with_each_seed(tmp_path, digits):
    advanced = []
    cell = run(job(tmp_path / "c.json", digits), print, lambda: advanced.append(1))
    roles = [r.role for r in cell.runs]
    assert roles == sorted(roles, reverse=True)
    assert [r.seed for r in cell.runs if r.role == "final"] == [1, 2]
    assert {r.seed for r in cell.runs if r.role == "tuning"} == {0}
    scores = tuning_scores(cell, whole=False)
    assert cell.rate == max(scores, key=scores.__getitem__)
    assert {r.rate for r in cell.runs if r.role == "final"} == {cell.rate}
    assert cell.complete
    assert len(advanced) == len(cell.runs)
    assert curves(cells.read(tmp_path / "c.json")) == curves(cell)


def test_a_cell_that_diverges_at_every_rate_is_complete_without_one(tmp_path, digits):
    cell = run(job(tmp_path / "c.json", digits, grid=(1e8, 1e9)), print, lambda: None)
    assert cell.complete
    assert cell.rate is None
    assert all(r.role == "tuning" for r in cell.runs)


def test_rates_at_which_nothing_is_learned_do_not_stop_the_search(tmp_path, digits, monkeypatch):
    grid = (1e-3, 1e-2, 1e-1, 1.0)

    class Fake:
        def __init__(self, *args):
            pass

        def __call__(self, rate, seed, split):
            score = 0.1 if rate > 1e-3 else 0.11 if learns else 0.1
            return Curves(*np.full((3, 4), score), 0.0)

    monkeypatch.setitem(runner.TRAINERS, "sgd", Fake)
    plenty = dataclasses.replace(
        digits, validation=Split(digits.validation.x, np.arange(10**5) % 10)
    )
    for learns in (True, False):
        path = tmp_path / f"{learns}.json"
        cell = run(job(path, plenty, grid=grid), print, lambda: None)
        tried = [r.rate for r in cell.runs if r.role == "tuning"]
        assert tried == [1e-1, 1e-2, 1e-3, *(() if learns else (1.0,))]
        # Where no rate learns, there is still a result: that of the customary one.
        assert cell.rate == (1e-3 if learns else 1e-1)


def test_a_better_rate_found_later_replaces_the_final_runs(tmp_path, digits):
    path = tmp_path / "c.json"
    cell = run(job(path, digits), print, lambda: None)
    other = next(rate for rate in GRID if rate != cell.rate)
    moved = [dataclasses.replace(r, rate=other) if r.role == "final" else r for r in cell.runs]
    cells.write(path, dataclasses.replace(cell, runs=moved, rate=other))
    again = run(job(path, digits), print, lambda: None)
    assert curves(again) == curves(cell)


def test_chance_is_a_constant_guess_and_its_error(digits):
    n = len(digits.validation.y)
    share = np.bincount(digits.validation.y).max() / n
    expected = share + 2 * np.sqrt(share * (1 - share) / n)
    assert runner.chance(job(Path("c.json"), digits)) == pytest.approx(expected)


def test_more_seeds_continue_and_other_settings_are_refused(tmp_path, digits):
    path = tmp_path / "c.json"
    two = run(job(path, digits), print, lambda: None)
    three = run(job(path, digits, seeds=3), print, lambda: None)
    assert curves(three)[: len(two.runs)] == curves(two)
    assert len(three.runs) == len(two.runs) + 1
    with pytest.raises(
        SettingsError, match=r"another grid .*now \[0.003, 0.03\]\); choose another"
    ):
        run(job(path, digits, grid=GRID[:2]), print, lambda: None)
    other = dataclasses.replace(job(path, digits), problem=short("fc-digits-b60-raw"))
    with pytest.raises(SettingsError, match=r"another problem .*name: fc-digits-b60-standardized"):
        run(other, print, lambda: None)


@pytest.mark.parametrize("spoiled", ['{"version": 1}', "half"])
def test_a_corrupt_cell_is_reported_set_aside_and_done_again(tmp_path, digits, spoiled):
    path = tmp_path / "c.json"
    before = run(job(path, digits), print, lambda: None)
    text = path.read_text()
    path.write_text(text[: len(text) // 2] if spoiled == "half" else spoiled)
    kept, said = path.read_text(), []
    after = run(job(path, digits), said.append, lambda: None)
    assert curves(after) == curves(before)
    assert (tmp_path / "c.json.corrupt").read_text() == kept
    assert len(said) == 1
    assert "corrupt" in said[0]
    assert "c.json.corrupt" in said[0]


# The command.

COMMAND = [
    sys.executable,
    *(
        "-m",
        "benchmarks",
        "run",
        "--problems",
        "tabular-standardized",
        "--methods",
        "sgd",
        "bnp_sgd",
    ),
    *("--rates", "0.0001", "0.001", "0.01", "--seeds", "2", "--results"),
]


@pytest.mark.slow
def test_a_contest_killed_again_and_again_ends_with_the_same_numbers(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*COMMAND, str(whole)], cwd=ROOT, check=True, capture_output=True)
    names = ["tabular-standardized/sgd.json", "tabular-standardized/bnp_sgd.json"]
    kills = 0
    for patience in [2, 7]:
        process = subprocess.Popen([*COMMAND, str(killed)], cwd=ROOT, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            done = 0
            for name in names:
                if (killed / name).exists():
                    done += len(cells.read(killed / name).runs)
            if done >= patience:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    subprocess.run([*COMMAND, str(killed)], cwd=ROOT, check=True, capture_output=True)
    for name in names:
        first, second = cells.read(whole / name), cells.read(killed / name)
        assert second.complete
        assert curves(first) == curves(second)
        assert first.rate == second.rate


def test_progress_results_and_report(tmp_path, capsys, monkeypatch):
    quick = {"fc-digits-b60-raw": short("fc-digits-b60-raw", methods=("sgd", "bnp_sgd"))}
    monkeypatch.setattr(command.registry, "problems", lambda scale: quick)
    folder = tmp_path / "results"
    arguments = ["--results", str(folder)]
    words = ["run", "--problems", "fc-*", "--seeds", "2", "--rates", "0.01", "0.1", *arguments]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "fc-digits-b60-raw: BNP + SGD: rate 0." in out
    assert main([*words, "--show"]) == 0
    assert "bnp_sgd              rate 0." in capsys.readouterr().out
    assert main(["report", *arguments]) == 0
    printed = capsys.readouterr().out
    assert (folder / "report.md").read_text().strip() == printed.strip()
    assert "| BNP + SGD" in printed
    environment = json.loads((folder / "fc-digits-b60-raw/sgd.json").read_text())["environments"][0]
    assert {"versions", "python", "cpu", "devices", "commit"} <= set(environment)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problems", "fc-cifar99"], "no problem matches 'fc-cifar99'; there are fc-digits"),
        (["--methods", "adagard"], "no method matches 'adagard'; there are sgd"),
        (["--rates", "0.1", "-1"], "`rates` must be positive and finite"),
    ],
)
def test_bad_options_are_named(capsys, arguments, message):
    assert main(["run", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_peer_that_does_not_work_is_skipped_with_the_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(campaign.kfac, "unavailable", lambda: "it is not here")
    quick = {"fc-digits-b60-raw": short("fc-digits-b60-raw", methods=("kfac",))}
    monkeypatch.setattr(command.registry, "problems", lambda scale: quick)
    assert main(["run", "--problems", "fc-*", "--results", str(tmp_path)]) == 0
    assert "K-FAC (kfac_jax) skipped, it is not here" in capsys.readouterr().out
    assert cells.read(tmp_path / "fc-digits-b60-raw/kfac.json").skipped == "it is not here"
    assert main(["report", "--results", str(tmp_path)]) == 0
    assert "it is not here" in capsys.readouterr().out


def test_data_that_are_not_there_are_named_and_the_rest_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("BNP_DATA_DIR", raising=False)
    quick = {
        "fc-mnist-b60-raw": short("fc-mnist-b60-raw", methods=("sgd",)),
        "fc-digits-b60-raw": short("fc-digits-b60-raw", methods=("sgd",)),
    }
    monkeypatch.setattr(command.registry, "problems", lambda scale: quick)
    arguments = ["--problems", "fc-*", "--results", str(tmp_path), "--rates", "0.1"]
    assert main(["run", *arguments]) == 2
    out = capsys.readouterr().out
    assert "fc-mnist-b60-raw: " in out
    assert "--data-dir" in out
    assert "fc-digits-b60-raw: SGD: rate 0.1" in out
    assert not (tmp_path / "fc-mnist-b60-raw").exists()


def test_a_console_shows_what_a_problem_still_lacks(tmp_path):
    choice = campaign.Choice(
        problems=[short("fc-digits-b60-raw")],
        methods={"fc-digits-b60-raw": ("sgd",)},
        scale="small",
        grid=GRID,
        seeds=1,
        results=tmp_path,
    )
    path = choice.path("fc-digits-b60-raw", "sgd")
    path.parent.mkdir()
    path.write_text("nonsense")
    out = io.StringIO()
    campaign.show(choice, Console(width=100, file=out))
    assert "corrupt: no JSON" in out.getvalue()
