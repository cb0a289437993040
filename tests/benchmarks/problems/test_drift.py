"""The drift of inputs: its formula, its ends, and how far it scatters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.benchmark_problem_cases import SMALL

from benchmarks.problems import drift


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
