"""Batch normalization with four improvements, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.benchmark_network_cases import EPS, SHAPE_IDS, affine, close, draw, train

from benchmarks.networks.norms import FourThings


def four_things(shape, **options):
    module = FourThings(**options)
    variables, gamma, beta = affine(module.init(jax.random.key(0), jnp.zeros(shape), train=True))
    return module, variables, gamma, beta


@pytest.mark.parametrize(("n", "part"), [(8, 4), (10, 5), (11, 11), (12, 4)])
@pytest.mark.parametrize("pixels", [(), (3, 2)], ids=SHAPE_IDS)
def test_large_batches_are_normalized_by_ghost_batches(n, part, pixels):
    x = draw((n, *pixels, 8))
    module, variables, gamma, beta = four_things(x.shape, ghost_size=4)
    y, variables = train(module, variables, x)
    assert not variables["batch_stats"]["grouped"]
    for first in range(0, n, part):
        rows = x[first : first + part].astype(np.float64)
        axes = tuple(range(rows.ndim - 1))
        expected = (rows - rows.mean(axes)) / np.sqrt(rows.var(axes) + EPS)
        close(y[first : first + part], expected * gamma + beta)


@pytest.mark.parametrize(("group_size", "size"), [(2, 2), (4, 4), (32, 8)])
@pytest.mark.parametrize("shape", [(1, 8), (7, 8), (1, 3, 2, 8), (2, 3, 2, 8)], ids=str)
def test_small_batches_are_normalized_by_groups_of_channels(shape, group_size, size):
    x = draw(shape)
    module, variables, gamma, beta = four_things(shape, ghost_size=4, group_size=group_size)
    y, variables = train(module, variables, x)
    assert variables["batch_stats"]["grouped"]
    for first in range(0, 8, size):
        block = slice(first, first + size)
        entries = x[..., block].astype(np.float64)
        expected = (entries - entries.mean()) / np.sqrt(entries.var() + EPS)
        close(y[..., block], expected * gamma[block] + beta[block])


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [3, 8], ids=["grouped", "ghost"])
@pytest.mark.parametrize("pixels", [(), (3, 2)], ids=SHAPE_IDS)
def test_evaluation_weighs_the_example_in(pixels, n, weight):
    shape = (n, *pixels, 8)
    module, variables, gamma, beta = four_things(
        shape, ghost_size=4, group_size=2, weight=weight, momentum=0.7
    )
    mean, square = np.zeros(8), np.ones(8)
    for step in range(2):
        x = draw(shape, step)
        _, variables = train(module, variables, x)
        rows = x.reshape(-1, 8).astype(np.float64)
        mean, square = 0.7 * mean + 0.3 * rows.mean(0), 0.7 * square + 0.3 * (rows**2).mean(0)
    close(variables["batch_stats"]["mean"], mean)
    close(variables["batch_stats"]["square"], square)

    x = draw((20, *pixels, 8), 7)
    y = np.asarray(module.apply(variables, x, train=False))
    group = 2 if n < 8 else 1
    for example, given in zip(x.astype(np.float64), y, strict=True):
        rows = example.reshape(-1, 8)
        m_1 = weight * rows.mean(0) + (1 - weight) * mean
        m_2 = weight * (rows**2).mean(0) + (1 - weight) * square
        m_1 = m_1.reshape(-1, group).mean(1).repeat(group)
        m_2 = m_2.reshape(-1, group).mean(1).repeat(group)
        expected = (rows - m_1) / np.sqrt(m_2 - m_1**2 + EPS) * gamma + beta
        # Where one number is its own mean and square, rounding is divided by sqrt(eps).
        close(given.reshape(-1, 8), expected, 2e-5 if weight < 1 else 2e-2)
