"""Sketches of second moments, against matrices in float64, and as they are captured."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.second_moment_cases import captured, draw
from support.sketch_cases import K, explicit, nystrom, spectrum

import bnp_optax
from bnp_optax import diagnostics, sketches

N = 60
# The first of the signs, and the sum of all 31 x 60.
FIRST, SUM = [0, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0], 60


def loss_fn(p, x):
    return jnp.mean((x @ p["w"] + p["b"][None]) ** 2)


PARAMS = {"w": draw(1, N, 3), "b": jnp.zeros(3)}


def assert_is_sketch_of(got, matrix, tolerance=2e-6):
    want = explicit(matrix)
    scale = np.abs(want).max(axis=(-2, -1), keepdims=True)
    assert got.shape == want.shape
    assert got.dtype == jnp.float32
    np.testing.assert_array_less(np.abs(got - want) / scale, tolerance)


def moments_of(rows):
    rows = np.asarray(rows, np.float64)
    mean = rows.mean(-2)
    moment = np.swapaxes(rows, -1, -2) @ rows / rows.shape[-2]
    return moment, moment - mean[..., :, None] * mean[..., None, :]


def test_signs_are_the_same_for_ever():
    """Checkpoints hold products with them."""
    omega = np.asarray(sketches.signs(K, N))
    assert omega.shape == (K, N)
    assert set(np.unique(omega)) == {-1.0, 1.0}
    assert (omega[0, :16] > 0).astype(int).tolist() == FIRST
    assert int(omega.sum()) == SUM
    # The first of more are the same, and different ones have about nothing in common.
    np.testing.assert_array_equal(np.asarray(sketches.signs(2 * K, N))[:K], omega)
    gram = omega @ omega.T / N - np.eye(K)
    assert abs(gram).max() < 5 / N**0.5


def test_a_layer_that_is_wider_has_a_sketch():
    x = draw(0, 40, N)
    stats = captured(loss_fn, PARAMS, x, second_moment_fan_in=32)["w"]
    moment, covariance = moments_of(x)
    assert_is_sketch_of(stats.second_moment, moment)
    assert_is_sketch_of(stats.covariance, covariance)
    assert_is_sketch_of(stats.total_covariance, covariance)
    np.testing.assert_allclose(stats.rows_mean, np.mean(x, 0), rtol=1e-5)


@pytest.mark.parametrize("limit", [N, 1024])
def test_up_to_the_bound_it_is_the_matrix(limit):
    stats = captured(loss_fn, PARAMS, draw(0, 40, N), second_moment_fan_in=limit)["w"]
    assert stats.second_moment.shape == stats.covariance.shape == (N, N)


def test_a_sketch_that_were_no_smaller_is_the_matrix():
    x = draw(0, 40, K + 1)
    stats = captured(loss_fn, PARAMS | {"w": draw(1, K + 1, 3)}, x, second_moment_fan_in=2)["w"]
    assert stats.second_moment.shape == (K + 1, K + 1)


def test_by_default_above_1024():
    x = jax.ShapeDtypeStruct((4, 1025), jnp.float32)
    params = {"w": jax.ShapeDtypeStruct((1025, 3), jnp.float32), "b": PARAMS["b"]}
    value_and_grad = bnp_optax.value_and_grad(loss_fn, second_moments=True)
    _, _, stats = jax.eval_shape(value_and_grad, params, x)
    assert stats["w"].second_moment.shape == stats["w"].covariance.shape == (K + 1, 1025)


def test_layers_stacked_by_vmap_have_one_each():
    x = draw(0, 2, 30, N)
    params = {"w": draw(1, 2, N, 3)}

    def stacked(p, x):
        return jnp.mean(jax.vmap(jnp.dot)(x, p["w"]) ** 2)

    stats = captured(stacked, params, x, second_moment_fan_in=32)["w"]
    moment, covariance = moments_of(x)
    assert_is_sketch_of(stats.second_moment, moment)
    assert_is_sketch_of(stats.covariance, covariance)


def test_groups_of_a_convolution_have_one_each():
    x = draw(0, 4, 3, 56)
    params = {"w": draw(1, 2, 28, 4)}

    def grouped(p, x):
        y = jax.lax.conv_general_dilated(
            x, p["w"], (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=2
        )
        return jnp.mean(y**2)

    stats = captured(grouped, params, x, second_moment_fan_in=32)["w"]
    x = np.asarray(x, np.float64)
    patches = np.stack([x[:, i : i + 2].reshape(4, 2, 2, 28) for i in range(2)], axis=1)
    rows = np.moveaxis(patches, 3, 0).reshape(2, 8, 56)
    moment, covariance = moments_of(rows)
    assert_is_sketch_of(stats.second_moment, moment)
    assert_is_sketch_of(stats.covariance, covariance)


def test_rows_count_by_their_weights():
    x, w = draw(0, 40, N), jnp.arange(40.0) % 3
    value_and_grad = bnp_optax.value_and_grad(
        lambda p, x, w: loss_fn(p, x),
        weights=lambda x, w: w,
        second_moments=True,
        second_moment_fan_in=32,
    )
    rows, shares = np.asarray(x, np.float64), np.asarray(w, np.float64) / np.sum(w)
    want = np.einsum("r,ri,rj->ij", shares, rows, rows)
    assert_is_sketch_of(value_and_grad(PARAMS, x, w)[2]["w"].second_moment, want)


def test_a_layer_that_never_runs_has_a_sketch_of_nothing():
    params = PARAMS | {"idle": {"kernel": draw(1, N, 2), "bias": jnp.zeros(2)}}
    stats = captured(loss_fn, params, draw(0, 4, N), second_moment_fan_in=32)["idle/kernel"]
    assert stats.second_moment.shape == (K + 1, N)
    assert stats.rows_mean.shape == (N,)
    assert not jnp.any(stats.second_moment)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_averages_are_sketches_of_the_union(offset):
    parts = [draw(seed, 20, N) + offset + seed for seed in range(4)]
    every = [captured(loss_fn, PARAMS, x, second_moment_fan_in=32)["w"] for x in parts]
    moment, covariance = moments_of(np.concatenate(parts))
    for order in (every, every[::-1]):
        mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *order)
        assert_is_sketch_of(mean.second_moment, moment)
        # As of matrices, what is between the batches is known up to the rounding of the moment.
        rounding = 1e-6 * np.abs(explicit(moment)).max() / np.abs(explicit(covariance)).max()
        assert_is_sketch_of(mean.total_covariance, covariance, 2e-6 + rounding)


def test_of_one_batch_nothing_is_between_batches():
    x = draw(0, 20, N) + 1e3
    stats = captured(loss_fn, PARAMS, x, second_moment_fan_in=32)["w"]
    np.testing.assert_array_equal(stats.total_covariance, stats.covariance)
    bare = dataclasses.replace(stats, covariance=None, rows_mean=None)
    moment, covariance = moments_of(x)
    tolerance = 1e-6 * np.abs(explicit(moment)).max() / np.abs(explicit(covariance)).max()
    assert_is_sketch_of(bare.total_covariance, covariance, tolerance)


def test_a_matrix_and_a_longer_sketch_are_brought_to_a_sketch():
    matrix = moments_of(draw(0, 40, N))[0]
    like = jnp.zeros((11, N))
    want = explicit(matrix, 10)
    long = jnp.asarray(explicit(matrix, 20), jnp.float32)
    for given in (jnp.asarray(matrix, jnp.float32), long):
        np.testing.assert_allclose(sketches.fitted(given, like), want, rtol=1e-4, atol=1e-4)
    assert not sketches.can_fit(like, long)
    assert not sketches.can_fit(like, jnp.eye(N))
    assert sketches.can_fit(jnp.eye(N), like)


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_exact_where_the_rank_is_low(rank, size):
    _, _, matrix = spectrum(200, size * 0.7 ** np.arange(rank))
    got, basis = sketches.leading(jnp.asarray(explicit(matrix), jnp.float32), 16)
    basis = np.asarray(basis, np.float64)
    np.testing.assert_allclose(basis.T @ basis, np.eye(16), atol=2e-6)
    rebuilt = basis * np.asarray(got, np.float64)[:-1] @ basis.T
    np.testing.assert_allclose(rebuilt, matrix, rtol=0, atol=2e-5 * size)
    assert 0.0 <= got[-1] < 1e-5 * size


@pytest.mark.parametrize("fall", [0.7, 0.9, 0.97])
def test_the_approximation_of_nystrom(fall):
    """Of a full spectrum, that of the formula in float64."""
    _, _, matrix = spectrum(200, fall ** np.arange(200))
    want = nystrom(matrix, 8)
    got, basis = sketches.leading(jnp.asarray(explicit(matrix), jnp.float32), 8)
    basis, got = np.asarray(basis, np.float64), np.asarray(got, np.float64)
    np.testing.assert_allclose(basis * got[:-1] @ basis.T, want, rtol=0, atol=1e-4)
    assert got[:-1].sum() + 192 * got[-1] == pytest.approx(np.trace(matrix), rel=1e-5)
    # It is no more than the matrix, and not much farther from it than the best of that rank.
    best = (fall**8) / (1 - fall)
    assert np.linalg.eigvalsh(matrix - basis * got[:-1] @ basis.T)[0] > -1e-4
    assert np.trace(matrix - want) < (1 + 8 / (K - 8 - 1)) * best * 1.3


def test_of_no_input_all_values_are_zero():
    values, vectors = sketches.leading(jnp.zeros((K + 1, N)), 8)
    assert not jnp.any(values)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(8), atol=1e-6)


def test_a_matrix_has_its_leading_eigenvectors():
    values, vectors, matrix = spectrum(20, 0.5 ** np.arange(20))
    got, basis = sketches.leading(jnp.asarray(matrix, jnp.float32), 3)
    np.testing.assert_allclose(got[:-1], values[:3][::-1], rtol=1e-5)
    np.testing.assert_allclose(got[-1], values[3:].mean(), rtol=1e-4)
    np.testing.assert_allclose(np.abs(np.diag(basis[:, ::-1].T @ vectors[:, :3])), 1.0, rtol=1e-5)


def test_extended_second_moments_need_the_matrix():
    stats = captured(loss_fn, PARAMS, draw(0, 40, N), second_moment_fan_in=32)["w"]
    with pytest.raises(ValueError, match=r"sketch of its second moment.*second_moment_fan_in=60"):
        diagnostics.extended_second_moment(stats)


@pytest.mark.parametrize("fan_in", [0, 1.5, None])
def test_bounds_that_cannot_be(fan_in):
    with pytest.raises(ValueError, match="`second_moment_fan_in` must be an integer > 0"):
        bnp_optax.value_and_grad(loss_fn, second_moments=True, second_moment_fan_in=fan_in)
