"""Streams: their dynamics and exact values, and that all learners start alike."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.applications import cartpole, command, plant, streaming
from benchmarks.applications.stream_methods import METHODS, Moments, Network, obgd, sparse_init


def _published(state, action):
    """Barto, Sutton and Anderson's equations in Gymnasium's form, with Python's numbers."""
    x, x_dot, theta, theta_dot = state
    masspole, length = 0.1, 0.5
    total_mass, polemass_length = 1.0 + masspole, masspole * length
    force = 10.0 if action == 1 else -10.0
    costheta, sintheta = math.cos(theta), math.sin(theta)
    temp = (force + polemass_length * theta_dot**2 * sintheta) / total_mass
    thetaacc = (9.8 * sintheta - costheta * temp) / (
        length * (4.0 / 3.0 - masspole * costheta**2 / total_mass)
    )
    xacc = temp - polemass_length * thetaacc * costheta / total_mass
    return (
        x + 0.02 * x_dot,
        x_dot + 0.02 * xacc,
        theta + 0.02 * theta_dot,
        theta_dot + 0.02 * thetaacc,
    )


def test_the_cart_moves_as_published():
    random = np.random.default_rng(0)
    for action in (0, 1):
        for state in random.normal(0, [1.0, 1.0, 0.1, 1.0], (20, 4)):
            found = cartpole.move(jnp.asarray(state, jnp.float32), jnp.asarray(action))
            np.testing.assert_allclose(found, _published(state, action), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ((2.39, 9, 0.2, 9), False),
        ((2.41, 0, 0, 0), True),
        ((-2.41, 0, 0, 0), True),
        ((0, 0, 0.21, 0), True),
        ((0, 0, -0.21, 0), True),
    ],
)
def test_the_limits_of_an_episode(state, expected):
    assert bool(cartpole.failed(jnp.asarray(state, jnp.float32))) is expected


def test_the_plants_value_is_the_mean_of_its_rewards_to_come():
    """By simulation in NumPy, within four standard errors."""
    random = np.random.default_rng(0)
    start = np.array([1.0, -0.5, 1.5, 0.7])
    states, total = np.tile(start, (20_000, 1)), np.zeros(20_000)
    factor = np.linalg.cholesky(plant.NOISE)
    for step in range(200):
        quadratic = np.einsum("ni,ij,nj->n", states, plant.REWARD, states)
        total += plant.DISCOUNT**step * (quadratic - np.trace(plant.REWARD))
        states = states @ plant.DYNAMICS.T + random.normal(size=states.shape) @ factor.T
    found = plant.value(jnp.asarray(start, jnp.float32))
    assert abs(found - total.mean()) < 4 * total.std() / np.sqrt(len(total)) + 1e-3


def test_the_plants_states_are_standard_and_its_values_have_variance_one():
    states = np.random.default_rng(0).normal(size=(200_000, 4))
    moved = states @ plant.DYNAMICS.T
    np.testing.assert_allclose(np.cov(moved.T) + plant.NOISE, np.eye(4), atol=0.02)
    values = np.einsum("ni,ij,nj->n", states, plant.VALUE, states) - np.trace(plant.VALUE)
    np.testing.assert_allclose([values.mean(), values.std()], [0.0, 1.0], atol=0.02)


def test_one_step_of_the_plant_has_its_mean_and_noise():
    keys = jax.random.split(jax.random.key(0), 5000)
    start = jnp.array([1.0, 2.0, -1.0, 0.5])
    moved = np.asarray(jax.vmap(plant.move, (None, 0))(start, keys))
    np.testing.assert_allclose(moved.mean(0), plant.DYNAMICS @ np.asarray(start), atol=0.02)
    np.testing.assert_allclose(np.cov(moved.T), plant.NOISE, atol=0.005)


def test_running_moments_are_those_of_all_rows():
    rows = jax.random.normal(jax.random.key(0), (50, 3)) * jnp.array([[1.0, 10.0, 0.1]]) + 5.0
    moments = Moments.of(rows[:20])
    for row in rows[20:]:
        moments = moments.add(row)
    expected = (rows[0] - rows.mean(0)) / rows.std(0)
    np.testing.assert_allclose(moments.standardized(rows[0]), expected, rtol=1e-4)


def test_sparse_values_keep_one_in_ten_of_each_unit():
    values = np.asarray(sparse_init(jax.random.key(0), (32, 200)))
    assert (np.count_nonzero(values, axis=0) == 3).all()
    assert np.abs(values).max() < np.sqrt(1 / 32)
    assert (np.count_nonzero(sparse_init(jax.random.key(0), (4, 9)), axis=0) == 1).all()


@pytest.mark.parametrize("error", [0.5, -8.0])
def test_the_overshooting_bound(error):
    traces = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}
    tx = obgd(0.3, 2.0)
    updates, _ = tx.update(traces, tx.init(traces), error=jnp.asarray(error))
    bound = 0.3 * 2.0 * max(abs(error), 1.0) * 3.5
    expected = -0.3 / bound * error * traces["a"]
    np.testing.assert_allclose(updates["a"], expected, rtol=1e-6)


def test_all_start_with_the_same_network():
    observations = jnp.ones((3, 4))
    outputs = {"actor": 2, "critic": 1}
    begun = {
        name: streaming.begin(method, outputs, jax.random.key(0), observations)[0]
        for name, method in METHODS.items()
        if not method.from_z and not method.bounded
    }
    first = begun["adam"]
    for params in begun.values():
        jax.tree.map(np.testing.assert_array_equal, params, first)


def test_from_z_the_network_starts_as_on_standardized_observations():
    state, observations = streaming._plant_stream(0)
    raw, once = METHODS["from-z"], METHODS["adam-warm-up"]
    found, expected = (
        streaming.begin(method, {"critic": 1}, jax.random.key(0), observations)[0]["critic"]
        for method in (raw, once)
    )
    standardized = Moments.of(observations).standardized(plant.observe(state))
    np.testing.assert_allclose(
        Network(1).apply({"params": found}, plant.observe(state)),
        Network(1).apply({"params": expected}, standardized),
        atol=2e-3,
    )


def test_what_is_judged():
    lengths = np.array([[1.0] * 6 + [100.0, 300.0]])
    assert streaming.late_life(lengths)[0] == pytest.approx(150.0)
    assert streaming.late_error(lengths)[0] == pytest.approx(200.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stream-td", "stream-cartpole"])
def test_every_contestant_runs_three_steps(name, tmp_path):
    arguments = {"only": (name,), "seeds": 2, "steps": 3, "results": tmp_path}
    assert command.main(**arguments) == 0
    assert "stream-x" in (tmp_path / f"{name}.md").read_text()
