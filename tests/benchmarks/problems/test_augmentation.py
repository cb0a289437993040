"""Crops and flips of images, and the schedules of learning rates that go with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.problems import problems
from benchmarks.problems.augmentation import CropAndFlip, Falling


def test_crops_are_windows_of_the_padded_images():
    x = jax.random.normal(jax.random.key(0), (64, 8, 6, 3))
    out = np.asarray(jax.jit(CropAndFlip(2))(x, jax.random.key(1)))
    assert out.shape == x.shape
    padded = np.pad(np.asarray(x), ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for before, after in zip(padded, out, strict=True):
        matches = [
            (i, j, flip)
            for i in range(5)
            for j in range(5)
            for flip in (1, -1)
            if np.array_equal(before[i : i + 8, j : j + 6][:, ::flip], after)
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {i for i, _, _ in seen} == {j for _, j, _ in seen} == set(range(5))


def test_half_of_the_images_are_flipped():
    n = 4000
    x = jnp.broadcast_to(jnp.arange(4.0)[None, None, :, None], (n, 4, 4, 1))
    out = CropAndFlip(0)(x, jax.random.key(2))
    flipped = np.asarray(out[:, 0, 0, 0] == 3)
    assert abs(flipped.mean() - 0.5) < 4 * np.sqrt(0.25 / n)
    np.testing.assert_array_equal(out[~flipped], x[~flipped])
    np.testing.assert_array_equal(out[flipped], x[flipped][:, :, ::-1])
    other = CropAndFlip(0)(x, jax.random.key(3))
    assert not np.array_equal(out, other)


def test_learning_rates_of_the_paper():
    found = problems("paper")
    ten, hundred, imagenet = (
        found[name] for name in ("resnet110-cifar10", "resnet110-cifar100", "resnet18-imagenet")
    )

    def at(problem, epoch, epochs):
        steps = problem.steps
        return float(problem.schedule(0.1, steps)(jnp.asarray(round(steps * epoch / epochs))))

    warm = ten.schedule(0.1, ten.steps)
    assert float(warm(jnp.asarray(0))) == pytest.approx(0.01)
    assert float(warm(jnp.asarray(200))) == pytest.approx(0.055)
    assert float(warm(jnp.asarray(400))) == pytest.approx(0.1)
    for problem, epochs, drops in (
        (ten, 160, (80, 120)),
        (hundred, 300, (150, 220)),
        (imagenet, 100, (30, 60, 90)),
    ):
        for i, epoch in enumerate(drops):
            assert at(problem, epoch - 1, epochs) == pytest.approx(0.1 * 10**-i)
            assert at(problem, epoch, epochs) == pytest.approx(0.01 * 10**-i)
    assert at(imagenet, 0, 100) == pytest.approx(0.1)


def test_schedules_take_traced_rates_in_short_runs():
    falling = Falling((80, 120), 160)
    rates = jnp.array([0.1, 1.0])
    found = jax.vmap(lambda rate: falling(rate, 100)(jnp.asarray(60)))(rates)
    np.testing.assert_allclose(found, 0.1 * rates, rtol=1e-6)
    # A tenth of a short run warms up.
    assert float(falling(1.0, 100)(jnp.asarray(5))) == pytest.approx(0.55)
    assert float(falling(1.0, 100)(jnp.asarray(10))) == pytest.approx(1.0)
    assert float(falling(1.0, 5)(jnp.asarray(0))) == pytest.approx(1.0)
