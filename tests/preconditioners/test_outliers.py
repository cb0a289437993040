"""What one bad batch does to the running statistics, and that changes for good are followed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax import Layer, LayerStats

N_INPUTS, AT = 8, 500
LAYERS = {
    "centered": Layer("kernel", "bias", (-2,), kernel_shape=(N_INPUTS, 2)),
    "bias-free": Layer("kernel", None, (-2,), kernel_shape=(N_INPUTS, 2)),
}
TREES = {
    "centered": {"kernel": jnp.zeros((N_INPUTS, 2)), "bias": jnp.zeros(2)},
    "bias-free": {"kernel": jnp.zeros((N_INPUTS, 2))},
}


def statistics_of(x, kind="centered"):
    mean, var = x.mean(0)[:, None], x.var(0)[:, None]
    return {"kernel": LayerStats.of_batch(mean, var, jnp.float32(len(x)), LAYERS[kind])}


@functools.cache
def trained(kind="centered", **options):
    """A function of batches, (steps, N, inputs), to the running mean and variance at each step."""
    bnp = bnp_optax.bnp(**options)

    def step(state, x):
        state = bnp.update(TREES[kind], state, layer_stats=statistics_of(x, kind))
        return state, (state.mean["kernel"], state.var["kernel"])

    scan = jax.jit(lambda batches: jax.lax.scan(step, bnp.init(TREES[kind]), batches)[1])
    return lambda batches: [np.asarray(a)[..., 0] for a in scan(batches) if hasattr(a, "shape")]


def batches(n_rows, n_steps=1200, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n_steps, n_rows, N_INPUTS)).astype(np.float32)


def last(wrong):
    """Steps from the change to the last one at which an input is `wrong`."""
    at = np.flatnonzero(wrong.any(axis=1))
    return int(at[-1]) + 1 - AT if len(at) else 0


def first(right):
    """Steps from the change to the first one at which every input is `right`."""
    return int(np.flatnonzero(right[AT:].all(axis=1))[0])


@pytest.mark.parametrize("n_rows", [1, 64])
@pytest.mark.parametrize("kind", LAYERS)
def test_an_outlier_of_any_size_is_forgotten_in_some_hundred_steps(kind, n_rows):
    x = batches(n_rows)
    want_mean_and_var = trained(kind, max_ratio=None)(x)
    x[AT, 0] *= 1e8
    (*mean, var) = trained(kind)(x)
    assert last(var > 2 * want_mean_and_var[-1]) <= 500
    if mean:
        assert last(np.abs(mean[0] - want_mean_and_var[0]) > 0.5) <= 100
    unbounded = trained(kind, max_ratio=None)(x)[-1]
    assert (unbounded[-1] > 1e3 * want_mean_and_var[-1][-1]).all()


@pytest.mark.parametrize("n_rows", [1, 64])
def test_inputs_that_grow_a_hundredfold_are_followed_at_once(n_rows):
    x = batches(n_rows)
    x[AT:] *= 100
    reached = [first(trained(max_ratio=c)(x)[-1] > 0.5e4) for c in (1e4, None)]
    assert reached[0] <= reached[1] + 1
    assert reached[1] <= 110


@pytest.mark.parametrize("distance", [-1e4, 1e4])
def test_a_mean_that_jumps_ten_thousand_deviations_is_followed(distance):
    x = batches(64)
    x[AT:] += distance
    reached = [first(np.abs(trained(max_ratio=c)(x)[0] - distance) < 0.5e4) for c in (1e4, None)]
    assert reached[1] <= reached[0] <= reached[1] + 10


ORDINARY = {
    "raw": lambda rng, shape: 1e4 * rng.normal(size=shape) + 3e4,
    "far from zero": lambda rng, shape: rng.normal(size=shape) + 1e4,
    "heavy tails": lambda rng, shape: rng.standard_t(3, size=shape),
    "rare ones": lambda rng, shape: rng.random(shape) < 0.002,
    "columns of all scales": lambda rng, shape: (
        rng.normal(size=shape) * 10.0 ** np.arange(-4, N_INPUTS - 4)
    ),
}


@pytest.mark.parametrize("n_rows", [1, 16])
@pytest.mark.parametrize("data", ORDINARY)
def test_ordinary_inputs_never_meet_the_bound(data, n_rows):
    x = ORDINARY[data](np.random.default_rng(1), (1200, n_rows, N_INPUTS)).astype(np.float32)
    for got, want in zip(trained()(x), trained(max_ratio=None)(x), strict=True):
        # The bound is another program, which XLA may round differently.
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6 * np.abs(want).max())


def test_a_batch_enters_up_to_the_bound():
    x = batches(64, 21, seed=2)
    mean, var = trained(max_ratio=100.0)(x)
    largest = var[-2].max()
    x[-1] = 1e6 * np.sign(np.arange(N_INPUTS) - 3.5)
    x[-1, ::2] *= 3.0
    bounded_mean, bounded_var = trained(max_ratio=100.0)(x)
    np.testing.assert_array_equal(bounded_mean[:-1], mean[:-1])
    np.testing.assert_allclose(bounded_var[-1], 0.99 * var[-2] + largest, rtol=1e-5)
    reach = 10.0 * np.sqrt(largest + mean[-2] ** 2)
    step = 0.01 * reach * np.sign(np.arange(N_INPUTS) - 3.5)
    np.testing.assert_allclose(bounded_mean[-1] - mean[-2], step, rtol=1e-5)


def test_a_dead_layer_that_wakes_is_not_held_back():
    x = batches(4, 40)
    x[:20] = 0.0
    for got, want in zip(trained(decay=0.0)(x), trained(decay=0.0, max_ratio=None)(x), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("value", [1.0, 0.0, -2.0, float("inf")])
def test_a_bound_below_what_comes_is_refused(value):
    with pytest.raises(ValueError, match="`max_ratio` must be finite and > 1, or None, got"):
        bnp_optax.bnp(max_ratio=value)


def test_the_bound_is_a_hyper_parameter():
    tx = optax.inject_hyperparams(bnp_optax.bnp_sgd)(0.1, max_ratio=1e3)
    tree = TREES["centered"]
    state = tx.init(tree)
    assert float(state.hyperparams["max_ratio"]) == 1e3
    stats = statistics_of(batches(8)[0])
    updates, _ = jax.jit(tx.update)(tree, state, tree, layer_stats=stats)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
