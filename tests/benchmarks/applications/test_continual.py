"""Streams of tasks: what is drawn, in which order it is seen, and what the learners are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.benchmark_problem_cases import make_file

from benchmarks.__main__ import main
from benchmarks.applications import continual, plasticity, tasks
from benchmarks.applications.learners import LEARNERS, Network, normalized, perturbed, unseen


def test_permutations_are_invertible_and_images_seen_once():
    drawn = tasks.draw("permuted", 5, 3000, 0)
    everything = np.tile(np.arange(tasks.PIXELS), (5, 1))
    np.testing.assert_array_equal(np.sort(drawn.pixels, axis=1), everything)
    assert (drawn.pixels[0] != drawn.pixels[1]).any()
    assert {len(set(order)) for order in drawn.order} == {tasks.EXAMPLES}
    assert set(drawn.gain.ravel()) == {1.0}
    assert set(drawn.offset.ravel()) == {0.0}


def test_rescaled_pixels_stay_in_place():
    drawn = tasks.draw("rescaled", 50, 3000, 0)
    assert (drawn.pixels == np.arange(tasks.PIXELS)).all()
    assert 0.1 <= drawn.gain.min() < 0.11 < 9.0 < drawn.gain.max() <= 10.0
    np.testing.assert_allclose(np.std(drawn.offset / drawn.gain), 1.0, rtol=0.05)


def test_streams_differ_by_seed():
    one, two = (tasks.draw("permuted", 1, 3000, seed) for seed in (0, 1))
    assert (one.order != two.order).any()
    assert (one.pixels != two.pixels).any()


def test_images_are_halved():
    x = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1)).astype(np.uint8)
    expected = x[1, 2:4, 4:6].astype(float).mean() / 255.0
    np.testing.assert_allclose(tasks.halved(x)[1, tasks.SIDE + 2], expected, rtol=1e-6)


def after(inputs, batches):
    """The last batch normalized, and what has been seen, after all of them."""

    def step(seen, batch):
        done, seen = normalized(inputs, batch, seen)
        return seen, done

    seen, done = jax.lax.scan(step, unseen(batches.shape[-1]), jnp.asarray(batches, jnp.float32))
    return done[-1], seen


@pytest.mark.parametrize("inputs", ["welford", "running"])
def test_inputs_are_normalized_by_what_came(inputs):
    x = np.random.default_rng(0).normal(5.0, 2.0, (30, 8, 3))
    done, seen = after(inputs, x)
    rows = x.reshape(-1, 3)
    mean, var = rows.mean(0), rows.var(0)
    np.testing.assert_allclose(seen.mean, mean, rtol=1e-4)
    np.testing.assert_allclose(seen.var, var, rtol=1e-4)
    np.testing.assert_allclose(done, (x[-1] - mean) / np.sqrt(var + 1e-2), rtol=1e-3, atol=1e-4)


def test_running_statistics_forget_and_welfords_do_not():
    batches = np.repeat([0.0, 1.0], [1000, 300]).reshape(-1, 1, 1) * np.ones((1, 8, 3))
    means = {inputs: float(after(inputs, batches)[1].mean[0]) for inputs in ("welford", "running")}
    assert means["running"] > 0.9
    np.testing.assert_allclose(means["welford"], 300 / 1300, rtol=1e-3)


def test_perturbation_comes_now_and_then():
    params = {"w": jnp.zeros(1000)}
    keys = jax.random.split(jax.random.key(0), 400)

    def fresh(key):
        return {"w": jax.random.normal(key, (1000,))}

    done = jax.lax.map(lambda key: perturbed(params, key, fresh, 1e-3)["w"], keys)
    deviations = np.std(done, axis=1)
    assert 0.05 < np.mean(deviations > 0) < 0.16
    expected = 0.1 * np.sqrt(2 * 1e-3 * 10)
    np.testing.assert_allclose(deviations[deviations > 0], expected, rtol=0.15)


@pytest.mark.slow
def test_accuracy_is_of_answers_given_before_the_step():
    """At rate 0 it is that of the initial network on the task's own inputs."""
    random = np.random.default_rng(0)
    x = random.uniform(size=(40, tasks.PIXELS)).astype(np.float32)
    y = random.integers(0, 10, 40).astype(np.int32)
    stream, key = tasks.draw("rescaled", 2, 40, 0), jax.random.key(3)
    run = continual.compiled(LEARNERS["sgd"])
    accuracy, _ = run(0.0, 0.0, key, x, y, stream)
    params = Network().init(jax.random.split(key)[0], x[:1])["params"]
    for task in range(2):
        rows = stream.order[task]
        shown = x[rows][:, stream.pixels[task]] * stream.gain[task] + stream.offset[task]
        logits, _ = Network().apply({"params": params}, shown)
        right = np.mean(np.argmax(logits, axis=1) == y[rows])
        np.testing.assert_allclose(accuracy[task], right, atol=1e-6)


def test_last_tasks_are_judged():
    curves = np.concatenate([np.zeros((2, 30)), np.full((2, 10), 7.0)], axis=1)
    np.testing.assert_array_equal(continual.judged(curves), [7.0, 7.0])


def test_effective_rank_counts_directions():
    features = np.zeros((20, 6), np.float32)
    features[:4, :4] = np.eye(4)
    np.testing.assert_allclose(plasticity.effective_rank(jnp.asarray(features)), 4.0, rtol=1e-5)


def test_every_contestant_is_a_learner():
    assert [one.name for one in continual.CONTESTANTS] != []
    assert {one.name for one in continual.CONTESTANTS} == set(LEARNERS)
    for one in continual.CONTESTANTS:
        assert one.ours == LEARNERS[one.name].in_z


@pytest.mark.slow
def test_command(tmp_path, monkeypatch):
    make_file(tmp_path, "mnist")
    two = [one for one in continual.CONTESTANTS if one.name in {"sgd", "running-bnp-adamw"}]
    monkeypatch.setattr(continual, "CONTESTANTS", tuple(two))
    arguments = ["--steps", "3", "--seeds", "2", "--data-dir", str(tmp_path)]
    arguments = [*arguments, "--only", "continual-rescaled", "--results", str(tmp_path)]
    assert main(["applications", *arguments]) == 0
    assert "AdamW in z" in (tmp_path / "continual-rescaled.md").read_text()
    assert (tmp_path / "continual-rescaled.png").stat().st_size > 0


@pytest.mark.slow
def test_plasticity_prints_its_table(tmp_path, monkeypatch, capsys):
    make_file(tmp_path, "mnist")
    monkeypatch.setattr(plasticity, "rows", lambda: [("Adam in z", LEARNERS["bnp-adam"], 1e-3)])
    out = str(tmp_path / "plasticity.json")
    data = ["--data-dir", str(tmp_path)]
    plasticity.main(["--tasks", "2", "--seeds", "1", "--results", out, *data])
    assert "| Adam in z | 0.001 |" in capsys.readouterr().out
