"""Scaling and centering in float64: Ye Theorems 2 and 4; JMLR Lemma A1 and Theorem 4."""

import itertools

import numpy as np
import pytest
import scipy.optimize
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.theorem_cases import centered, hidden, logarithms, normalized, properties, seeds

from bnp_optax.diagnostics import condition_number, extended_inputs

pytestmark = pytest.mark.usefixtures("x64")

# ---------------------------------------------------------------------------------------------
# Scaling: Ye Theorem 2, JMLR Lemma A1 (van der Sluis).
# ---------------------------------------------------------------------------------------------


def best_scaling(matrix, starts=3):
    """A local minimum over diagonal D_0 of kappa(A D_0), by its logarithms."""

    def kappa(log_scale):
        return np.log(np.linalg.cond(matrix * np.exp(log_scale)))

    norms = -np.log(np.linalg.norm(matrix, axis=0))
    rng = np.random.default_rng(0)
    tries = [norms, *(norms + rng.normal(size=norms.size) for _ in range(starts - 1))]
    options = {"maxiter": 600, "xatol": 1e-6, "fatol": 1e-8}
    found = (
        scipy.optimize.minimize(kappa, x, method="Nelder-Mead", options=options).fun for x in tries
    )
    return np.exp(min(found))


@settings(max_examples=12, deadline=None)
@given(seed=seeds, columns=st.integers(2, 4))
def test_ye_theorem_2_scaling_to_one_norm_is_nearly_optimal(seed, columns):
    """Ye Thm 2, JMLR Lemma A1: kappa(A D) <= sqrt(n) min over diagonal D_0 of kappa(A D_0).

    D_0 must be invertible, which the papers leave unsaid: with a single nonzero entry, A D_0 has
    one nonzero singular value and by JMLR's definition kappa = 1.
    """
    matrix = hidden(seed, rows=12, columns=columns)
    scaled = matrix / np.linalg.norm(matrix, axis=0)
    optimum = best_scaling(matrix)
    assert np.linalg.cond(scaled) <= np.sqrt(columns) * optimum * (1 + 1e-9)
    # The minimum was looked for in earnest: it is not above what the theorem's D attains.
    assert optimum <= np.linalg.cond(scaled) * (1 + 1e-9)
    single = np.eye(columns)[0]
    assert condition_number(matrix * single) == 1.0


@properties
@given(seed=seeds, columns=st.integers(2, 6), logs=logarithms)
def test_ye_theorem_2_against_any_scaling_of_columns(seed, columns, logs):
    """Ye Thm 2 for columns, with any D_0 in place of the best."""
    matrix = hidden(seed, rows=12, columns=columns)
    scaled = matrix / np.linalg.norm(matrix, axis=0)
    bound = np.sqrt(columns) * np.linalg.cond(matrix * np.exp(logs[:columns]))
    assert np.linalg.cond(scaled) <= bound * (1 + 1e-9)


@properties
@given(seed=seeds, columns=st.integers(2, 6), logs=logarithms)
def test_ye_theorem_2_against_any_scaling_of_rows(seed, columns, logs):
    """Ye Thm 2 as printed: rows of a matrix of full column rank, with the factor sqrt(m)."""
    matrix = np.random.default_rng(seed).normal(size=(12, columns)) * np.exp(logs)[::-1, None]
    scaled = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    bound = np.sqrt(12) * np.linalg.cond(matrix * np.exp(logs)[:, None])
    assert np.linalg.cond(scaled) <= bound * (1 + 1e-9)


# ---------------------------------------------------------------------------------------------
# Centering and scaling of H^: JMLR Theorem 4 (Ye Theorem 4) and what follows it.
# ---------------------------------------------------------------------------------------------


@properties
@given(seed=seeds, columns=st.integers(1, 7), shift=st.floats(0, 100))
def test_jmlr_theorem_4_centering_never_harms(seed, columns, shift):
    """JMLR Thm 4: kappa(H^ U) <= kappa(H^)."""
    h = hidden(seed, columns=columns, shift=shift)
    before = np.linalg.cond(np.asarray(extended_inputs(h)))
    assume(before < 1e10)
    assert np.linalg.cond(centered(h)) <= before * (1 + 1e-9)


@properties
@given(seed=seeds, columns=st.integers(1, 7))
def test_jmlr_theorem_4_is_strict(seed, columns):
    """JMLR Thm 4: strictly less if mu is not orthogonal to the principal component."""
    h = hidden(seed, columns=columns, spread=1.0)
    mean = h.mean(axis=0)
    principal = np.linalg.eigh(np.cov(h.T).reshape(columns, columns))[1][:, -1]
    assume(abs(mean @ principal) > 0.1)
    before, after = np.linalg.cond(np.asarray(extended_inputs(h))), np.linalg.cond(centered(h))
    assert after < before * (1 - 1e-6)


def test_jmlr_theorem_4_without_its_conditions():
    """Where JMLR Thm 4 promises no strict inequality: mu = 0, or mu orthogonal to x_max."""
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    h = signs * [10.0, 1.0, 0.1]
    for mean in ([0.0, 0.0, 0.0], [0.0, 0.3, 0.0]):
        before = np.linalg.cond(np.asarray(extended_inputs(h + mean)))
        assert np.linalg.cond(centered(h + mean)) == pytest.approx(before, rel=1e-12)
    moved = h + np.array([0.3, 0.0, 0.0])
    before = np.linalg.cond(np.asarray(extended_inputs(moved)))
    assert np.linalg.cond(centered(moved)) < before * (1 - 1e-6)


@properties
@given(seed=seeds, columns=st.integers(1, 6), logs=logarithms)
def test_jmlr_theorem_4_normalizing_is_within_the_root_of_the_best(seed, columns, logs):
    """JMLR Thm 4: kappa(G^) <= sqrt(n + 1) kappa(H^ U D_0) for any invertible diagonal D_0."""
    h = hidden(seed, columns=columns, spread=4.0)
    other = centered(h) * np.exp(logs[: columns + 1])
    bound = np.sqrt(columns + 1) * np.linalg.cond(other)
    assert np.linalg.cond(normalized(h)) <= bound * (1 + 1e-9)


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_jmlr_theorem_4_with_property_a_normalizing_is_best(seed):
    """JMLR, after Thm 4: with Property A the root drops out. Two inputs always have it."""
    h = hidden(seed, columns=2)
    best = best_scaling(centered(h))
    assert np.linalg.cond(normalized(h)) == pytest.approx(best, rel=1e-5)


@properties
@given(seed=seeds, columns=st.integers(1, 6))
def test_jmlr_kappa_of_d_bounds_the_gain(seed, columns):
    """JMLR, after Thm 4: kappa(H^ U) <= kappa(G^) kappa(D), so that kappa(H^)^2 may fall by
    kappa(D)^2; with uncorrelated inputs and mean 0 it falls by exactly that.
    """
    h = hidden(seed, columns=columns, spread=4.0)
    d = np.concatenate([[1.0], 1 / h.std(axis=0)])
    kappa_d = d.max() / d.min()
    assert np.linalg.cond(centered(h)) <= np.linalg.cond(normalized(h)) * kappa_d * (1 + 1e-9)
    q, _ = np.linalg.qr(h - h.mean(axis=0))
    uncorrelated = q * h.std(axis=0) * np.sqrt(len(h))
    before = np.linalg.cond(np.asarray(extended_inputs(uncorrelated)))
    after = np.linalg.cond(normalized(uncorrelated))
    assert before / after == pytest.approx(kappa_d, rel=1e-6)
