"""Batch renormalization of the benchmarks, against NumPy and Flax's batch normalization."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.benchmark_network_cases import EPS, SHAPE_IDS, affine, close, draw, train

from benchmarks.networks.norms import BatchRenorm, renorm_clips

SHAPES = [(6, 8), (6, 3, 2, 8)]


def renorm(shape, **options):
    module = BatchRenorm(**options)
    variables, gamma, beta = affine(module.init(jax.random.key(0), jnp.zeros(shape), train=True))
    return module, variables, gamma, beta


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_renorm_is_batch_norm_before_the_clips_open(shape):
    module, variables, _, _ = renorm(shape, steps=80)
    batch_norm = nn.BatchNorm(use_running_average=False, epsilon=EPS)
    x = draw(shape)
    expected, _ = batch_norm.apply(
        {**variables, "batch_stats": {"mean": jnp.zeros(8), "var": jnp.ones(8)}},
        x,
        mutable=["batch_stats"],
    )
    for step in range(11):  # 5 / 40 of the run are 10 steps; the clips are still shut at the 11th.
        y, variables = train(module, variables, x)
        close(y, expected)
        assert variables["batch_stats"]["step"] == step + 1
    y, _ = train(module, variables, x)
    assert np.abs(y - expected).max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_renorm_with_wide_clips_normalizes_by_the_running_moments(shape):
    module, variables, gamma, beta = renorm(shape, steps=40, r_max=1e6, d_max=1e6)
    rng = np.random.default_rng(3)
    mean, deviation = rng.normal(size=8), rng.uniform(0.5, 2, 8)
    state = {"mean": mean, "deviation": deviation}
    state = {name: jnp.array(value, jnp.float32) for name, value in state.items()}
    variables["batch_stats"] = {**state, "step": jnp.array(40)}
    x = draw(shape)
    expected = (x.astype(np.float64) - mean) / deviation * gamma + beta
    close(train(module, variables, x)[0], expected)
    close(module.apply(variables, x, train=False), expected)


def test_renorm_clips_and_averages_as_ioffe_does():
    shape, steps, r_max, d_max = (4, 8), 8, 1.2, 0.3
    module, variables, gamma, beta = renorm(
        shape, steps=steps, momentum=0.7, r_max=r_max, d_max=d_max
    )
    mean, deviation = np.zeros(8), np.ones(8)
    clipped = 0
    for step in range(steps):
        x = draw(shape, step)
        y, variables = train(module, variables, x)
        rows = x.astype(np.float64)
        mu, sigma = rows.mean(0), np.sqrt(rows.var(0) + EPS)
        share = 40 * step / steps
        r_clip = 1 + (r_max - 1) * np.clip((share - 5) / 35, 0, 1)
        d_clip = d_max * np.clip((share - 5) / 20, 0, 1)
        r = np.clip(sigma / deviation, 1 / r_clip, r_clip)
        d = np.clip((mu - mean) / deviation, -d_clip, d_clip)
        clipped += np.sum(np.abs(d) < d_clip)
        close(y, ((rows - mu) / sigma * r + d) * gamma + beta)
        mean, deviation = 0.7 * mean + 0.3 * mu, 0.7 * deviation + 0.3 * sigma
    assert 0 < clipped < 8 * steps
    close(variables["batch_stats"]["mean"], mean)
    close(variables["batch_stats"]["deviation"], deviation)
    close(module.apply(variables, x, train=False), (rows - mean) / deviation * gamma + beta)


@pytest.mark.parametrize(
    ("thousands", "r_max", "d_max"),
    [(0, 1, 0), (5, 1, 0), (10, 1 + 2 / 7, 1.25), (25, 1 + 8 / 7, 5), (40, 3, 5), (50, 3, 5)],
)
@pytest.mark.parametrize("steps", [40, 40_000])
def test_schedule_of_renorm_is_stretched_to_the_run(thousands, r_max, d_max, steps):
    clips = renorm_clips(thousands * steps // 40, steps, 3.0, 5.0)
    np.testing.assert_allclose(clips, (r_max, d_max), rtol=1e-5, atol=1e-5)


def test_corrections_of_renorm_are_constants_to_the_gradient():
    module, variables, _, _ = renorm((6, 8), steps=40)
    variables["batch_stats"]["step"] = jnp.array(30)
    x, weights = jnp.array(draw((6, 8))), jnp.array(draw((6, 8), 1))
    clip_r, clip_d = renorm_clips(30, 40, 3.0, 5.0)
    sigma = jnp.sqrt(x.var(0) + EPS)
    r, d = jnp.clip(sigma, 1 / clip_r, clip_r), jnp.clip(x.mean(0), -clip_d, clip_d)

    def by_hand(x):
        mu, sigma = x.mean(0), jnp.sqrt(x.var(0) + EPS)
        y = (x - mu[None]) / sigma[None] * r[None] + d[None]
        return jnp.sum(y * variables["params"]["scale"][None] * weights)

    def loss_fn(x):
        y, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.sum(y * weights)

    close(jax.grad(loss_fn)(x), jax.grad(by_hand)(x), 1e-4)
