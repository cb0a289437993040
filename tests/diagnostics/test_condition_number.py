"""Condition numbers and extended inputs, against matrices whose singular values are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnp_optax import diagnostics

RNG = np.random.default_rng(0)

orthogonal = functools.lru_cache(
    lambda n, seed: np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
)


@settings(max_examples=30, deadline=None)
@given(
    exponents=st.lists(st.floats(-3, 3), min_size=1, max_size=6),
    extra=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_condition_number_is_the_ratio_of_the_nonzero_singular_values(exponents, extra):
    sizes = 10.0 ** np.array(exponents)
    matrix = np.zeros((len(sizes) + extra[0], len(sizes) + extra[1]))
    matrix[: len(sizes), : len(sizes)] = np.diag(sizes)
    matrix = orthogonal(matrix.shape[0], 0) @ matrix @ orthogonal(matrix.shape[1], 1)
    expected = sizes.max() / sizes.min()
    assert diagnostics.condition_number(matrix) == pytest.approx(expected, rel=1e-7)
    assert diagnostics.condition_number(matrix.T) == pytest.approx(expected, rel=1e-7)


def test_condition_number_of_an_indefinite_symmetric_matrix():
    q = orthogonal(4, 3)
    matrix = q @ np.diag([-5.0, 2.0, 0.5, 0.0]) @ q.T
    assert diagnostics.condition_number(matrix, symmetric=True) == pytest.approx(10.0)
    assert diagnostics.condition_number(matrix) == pytest.approx(10.0)


def test_what_counts_as_zero_follows_the_dtype_of_the_matrix():
    matrix = np.diag([1.0, 1e-4, 1e-9])
    assert diagnostics.condition_number(matrix) == pytest.approx(1e9)
    assert diagnostics.condition_number(matrix.astype(np.float32)) == pytest.approx(1e4)
    assert diagnostics.condition_number(jnp.asarray(matrix, jnp.float32)) == pytest.approx(1e4)
    assert diagnostics.condition_number(np.diag([4, 2, 0])) == 2.0


@pytest.mark.parametrize("symmetric", [False, True])
def test_condition_number_under_jit(symmetric):
    matrix = jnp.asarray(orthogonal(3, 1) @ np.diag([6.0, 3.0, 0.0]) @ orthogonal(3, 1).T)
    under_jit = jax.jit(functools.partial(diagnostics.condition_number, symmetric=symmetric))
    assert float(under_jit(matrix)) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_extended_inputs_have_a_one_in_front(shape):
    h = RNG.normal(size=shape)
    got = diagnostics.extended_inputs(h)
    assert got.shape == (*shape[:-1], shape[-1] + 1)
    np.testing.assert_array_equal(got[..., 0], np.ones(shape[:-1]))
    np.testing.assert_allclose(got[..., 1:], h, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: np.ones(3), r"`matrix` must be a matrix .* got an array of shape \(3,\)"),
        (lambda: np.ones((2, 0)), r"rows and columns, got an array of shape \(2, 0\)"),
        (lambda: np.array([[1.0, np.nan], [np.inf, 0]]), "finite, but 2 of its 4 entries are not"),
        (lambda: np.zeros((2, 2)), "`matrix` is zero: it has no nonzero singular value"),
    ],
)
def test_condition_number_of_no_matrix(call, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.condition_number(call())


def test_hessians_are_square():
    with pytest.raises(ValueError, match=r"square and symmetric.*got shape \(2, 3\)"):
        diagnostics.condition_number(np.ones((2, 3)), symmetric=True)


def test_extended_inputs_of_a_number():
    with pytest.raises(ValueError, match=r"`h` must have the inputs .* got the scalar 2\.0"):
        diagnostics.extended_inputs(2.0)
