"""Second moments of rows, captured, and by hand in float64."""

import jax
import jax.numpy as jnp
import numpy as np

import bnp_optax
from support.quick_jit import jit


def draw(seed, *shape):
    """Rows whose mean is not 0 and whose entries are correlated."""
    x = np.random.default_rng(seed).normal(size=shape) + 1.5
    return jnp.asarray(x + 0.7 * np.roll(x, 1, -1), jnp.float32)


def captured(loss_fn, params, *args, second_moments=True, **options):
    value_and_grad = bnp_optax.value_and_grad(loss_fn, second_moments=second_moments, **options)
    return jit(value_and_grad)(params, *args)[2]


def assert_of_rows(stats, rows, tolerance=2e-6):
    """`stats` has the moments of `rows` (N, n), or (blocks, N, n)."""
    rows = np.asarray(rows, np.float64)
    mean = rows.mean(-2)
    moment = np.swapaxes(rows, -1, -2) @ rows / rows.shape[-2]
    covariance = moment - mean[..., :, None] * mean[..., None, :]
    scale = np.abs(moment).max()
    assert stats.second_moment.dtype == jnp.float32
    assert stats.second_moment.shape == moment.shape
    np.testing.assert_allclose(stats.second_moment, moment, rtol=0, atol=tolerance * scale)
    np.testing.assert_allclose(stats.covariance, covariance, rtol=0, atol=tolerance * scale)
    np.testing.assert_allclose(stats.rows_mean, mean, rtol=0, atol=tolerance * scale**0.5)


def linen(module, x, name="kernel"):
    params = module.init(jax.random.key(0), x)["params"]
    return captured(lambda p, x: jnp.mean(module.apply({"params": p}, x) ** 2), params, x)[name]
