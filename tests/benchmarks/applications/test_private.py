"""Private training: what it reveals, what is clipped, and that it runs from the command line."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.benchmark_problem_cases import make_file

import bnp_optax
from benchmarks.__main__ import main
from benchmarks.applications import private
from benchmarks.applications.accountant import (
    ORDERS,
    noise_for,
    spent,
    subsampled_gaussian,
)
from bnp_optax import Layer, LayerStats


@pytest.mark.parametrize(
    ("rate", "noise", "order"), [(0.01, 1.0, 8), (0.1, 2.0, 16), (1.0, 3.0, 4)]
)
def test_divergence_is_the_integral(rate, noise, order):
    x = np.linspace(-60.0, 100.0, 400_001)
    stays = math.log1p(-rate) if rate < 1.0 else -math.inf
    log_ratio = np.logaddexp(stays, math.log(rate) + (2.0 * x - 1.0) / (2.0 * noise**2))
    log_density = -(x**2) / (2.0 * noise**2) - math.log(noise * math.sqrt(2.0 * math.pi))
    expected = math.log(np.trapezoid(np.exp(log_density + order * log_ratio), x)) / (order - 1)
    np.testing.assert_allclose(subsampled_gaussian(rate, noise, order), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("noise", "epochs", "published"), [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)]
)
def test_divergences_give_published_epsilons(noise, epochs, published):
    # MNIST in batches of 256 at delta 1e-5, from the tutorial of TensorFlow Privacy, by Mironov's
    # conversion, than which ours is tighter.
    rate = 256 / 60_000
    steps = epochs * 60_000 // 256
    converted = min(
        steps * subsampled_gaussian(rate, noise, order) + math.log(1e5) / (order - 1)
        for order in ORDERS
    )
    np.testing.assert_allclose(converted, published, rtol=0.02)
    assert 0.7 * published < spent(rate, noise, steps, 1e-5) < converted


def test_noise_spends_the_budget_and_a_release_takes_more_of_it():
    alone, beside = noise_for(2.0, 0.01, 500, 1e-5), noise_for(2.0, 0.01, 500, 1e-5, once=8.0)
    assert alone < beside
    np.testing.assert_allclose(spent(0.01, alone, 500, 1e-5), 2.0, rtol=1e-3)
    np.testing.assert_allclose(spent(0.01, beside, 500, 1e-5, once=8.0), 2.0, rtol=1e-3)
    with pytest.raises(ValueError, match="no noise keeps epsilon below"):
        noise_for(0.1, 0.01, 500, 1e-5, once=1.0)


def layers_and_gradients(n_examples):
    """Two dense layers, their statistics, and gradients of each example."""
    random = np.random.default_rng(0)
    stats, gradients, params = {}, {}, {}
    for name, (n_in, n_out) in {"a": (3, 4), "b": (4, 2)}.items():
        layer = Layer(f"{name}/kernel", f"{name}/bias", (-2,), kernel_shape=(n_in, n_out))
        mean, var = random.normal(size=(n_in, 1)) * 3, random.uniform(0.1, 9.0, (n_in, 1))
        stats[layer.kernel] = LayerStats.of_batch(
            jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32), jnp.float32(50.0), layer
        )
        shapes = {"kernel": (n_in, n_out), "bias": (n_out,)}
        params[name] = {part: jnp.zeros(shape) for part, shape in shapes.items()}
        gradients[name] = {
            part: random.normal(size=(n_examples, *shape))
            * np.geomspace(0.01, 10.0, n_examples).reshape(-1, *[1] * len(shape))
            for part, shape in shapes.items()
        }
    return params, stats, gradients


def test_gradients_are_clipped_in_z():
    params, stats, gradients = layers_and_gradients(6)
    eps_rel, eps_abs, clip = 0.1, 0.01, 1.5
    bnp = bnp_optax.bnp(eps_rel=eps_rel, eps_abs=eps_abs, warm_start=True)
    operator = bnp.operator(bnp.update(params, bnp.init(params), params, layer_stats=stats))
    aggregate = optax.contrib.differentially_private_aggregate(clip, 0.0, jax.random.key(0))
    given = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients)
    updates, _ = private.clipped_and_noised(given, operator, aggregate, aggregate.init(params))

    matrices, in_z = {}, {}
    for name in gradients:
        found = stats[f"{name}/kernel"]
        mean, var = (np.asarray(x, np.float64)[:, 0] for x in (found.mean, found.var))
        deviation = np.sqrt(var + eps_rel * var.max() + eps_abs)
        n = len(mean)
        # q is 1: the fan-in is less than the 50 rows.
        P = np.block(
            [
                [np.ones((1, 1)), -(mean / deviation)[None]],
                [np.zeros((n, 1)), np.diag(1 / deviation)],
            ]
        )
        matrices[name] = P
        extended = np.concatenate([gradients[name]["bias"][:, None], gradients[name]["kernel"]], 1)
        in_z[name] = np.einsum("ij,eio->ejo", P, extended)
    norms = np.sqrt(sum((g**2).sum((1, 2)) for g in in_z.values()))
    assert (norms < clip).any()
    assert (norms > clip).any()
    factors = np.minimum(1.0, clip / norms)
    for name, P in matrices.items():
        expected = P @ np.einsum("e,ejo->jo", factors, in_z[name]) / 6
        np.testing.assert_allclose(updates[name]["bias"], expected[0], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(updates[name]["kernel"], expected[1:], rtol=2e-5, atol=1e-6)


def test_noise_is_of_one_size_in_z():
    params, stats, gradients = layers_and_gradients(4)
    bnp = bnp_optax.bnp(warm_start=True)
    operator = bnp.operator(bnp.update(params, bnp.init(params), params, layer_stats=stats))
    nothing = jax.tree.map(jnp.zeros_like, jax.tree.map(jnp.asarray, gradients))

    @jax.vmap
    def noise_in_z(key):
        aggregate = optax.contrib.differentially_private_aggregate(2.0, 3.0, key)
        updates, _ = private.clipped_and_noised(
            nothing, operator, aggregate, aggregate.init(params)
        )
        return operator.solve(updates)

    for leaf in jax.tree.leaves(noise_in_z(jax.random.split(jax.random.key(0), 4000))):
        deviations = np.std(leaf, axis=0)
        np.testing.assert_allclose(deviations, 2.0 * 3.0 / 4, rtol=6 / math.sqrt(2 * 4000))


def test_released_moments_are_the_images(monkeypatch):
    x = np.random.default_rng(0).uniform(0.0, 0.9, (3000, 5)).astype(np.float32)
    noisy = [private.released_moments(x, seed).mean for seed in range(300)]
    expected = private.ROW_CLIP * private.ROW_NOISE / len(x)
    np.testing.assert_allclose(np.std(noisy, axis=0), expected, rtol=6 / math.sqrt(600))
    monkeypatch.setattr(private, "ROW_NOISE", 0.0)
    released = private.released_moments(x, 0)
    np.testing.assert_allclose(released.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(released.var, x.var(0), rtol=1e-4)
    monkeypatch.setattr(private, "ROW_CLIP", 0.1)
    assert np.linalg.norm(private.released_moments(x, 0).mean) <= 0.1


def test_only_a_release_costs_noise():
    noises = {name: private.noise_of(one, 10_000, 100) for name, one in private.LEARNERS.items()}
    released = {name for name, one in private.LEARNERS.items() if one.releases}
    assert released == {name for name in private.LEARNERS if "private" in name}
    assert len(released) == 5
    assert {noises[name] > noises["sgd"] for name in released} == {True}
    assert len({noises[name] for name in set(noises) - released}) == 1


@pytest.mark.slow
def test_command(tmp_path, monkeypatch):
    make_file(tmp_path, "fashion_mnist")
    two = [one for one in private.CONTESTANTS if one.name in {"adam-public", "bnp-adam-private"}]
    monkeypatch.setattr(private, "CONTESTANTS", tuple(two))
    arguments = ["--only", "private-*", "--steps", "4", "--seeds", "2", "--results", str(tmp_path)]
    assert main(["applications", *arguments, "--data-dir", str(tmp_path)]) == 0
    assert "in z, private: DP-Adam" in (tmp_path / "private-fashion.md").read_text()
    assert (tmp_path / "private-fashion.png").stat().st_size > 0
