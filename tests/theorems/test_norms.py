"""Norms, means and products in float64: JMLR Propositions 5, 10 and 11."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.theorem_cases import patches, properties, seeds

from bnp_optax.diagnostics import condition_number

pytestmark = pytest.mark.usefixtures("x64")

ENTRIES = {
    "normal": lambda rng, size: rng.normal(size=size),
    "uniform": lambda rng, size: rng.uniform(-np.sqrt(3), np.sqrt(3), size),
    "exponential": lambda rng, size: rng.exponential(size=size) - 1,
}


def norms_of_g(entries, rows, columns, repeats=8):
    """||[e, G]|| / (q sqrt(N)) for independent G."""
    rng = np.random.default_rng(0)
    q = np.sqrt(max(columns / rows, 1.0))
    found = []
    for _ in range(repeats):
        g = entries(rng, (rows, columns))
        # As in the paper, e is orthogonal to G: ||[e, G]|| = max(sqrt(N), ||G||).
        found.append(max(np.sqrt(rows), np.linalg.norm(g, 2)) / (q * np.sqrt(rows)))
    return np.mean(found)


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("rows", [8, 60])
def test_jmlr_proposition_5_the_norm_does_not_grow_with_the_width(name, rows):
    """JMLR Prop. 5: E||(1/q) [e, G]|| <= C sqrt(N), C independent of n.

    For normal entries C = 2, as E||G|| <= sqrt(N) + sqrt(n). The statement asks for unit variance
    alone and its proof takes E max_i ||g_i||^2 for E ||g_i||^2. It needs more, such as a finite
    fourth moment: see the next test.
    """
    constant = 2.0 if name != "exponential" else 2.5
    sizes = [norms_of_g(ENTRIES[name], rows, columns) for columns in (3, 10, 100, 1000)]
    assert max(sizes) <= constant
    without_q = norms_of_g(ENTRIES[name], rows, 1000) * np.sqrt(1000 / rows)
    assert without_q > 2 * constant or rows == 60


def test_jmlr_proposition_5_needs_more_than_a_variance():
    """JMLR Prop. 5 is false for entries of unit variance with an infinite fourth moment.

    With P(|g| > t) = (t_0 / t)^2.5, the largest of N n entries alone is about (N n)^0.4, which
    outgrows sqrt(n) at N = n. (For real data ||column||^2 = N rules out most of this.)
    """

    def heavy(rng, size):
        sign = rng.choice([-1.0, 1.0], size)
        return sign * (1 + rng.pareto(2.5, size)) / np.sqrt(2.5 / 0.5)

    means = [norms_of_g(heavy, n, n, repeats=60) for n in (4, 32, 256)]
    assert means[1] > 1.4 * means[0]
    assert means[2] > 1.4 * means[1]


@properties
@given(
    seed=seeds,
    r=st.integers(2, 7),
    s=st.integers(2, 7),
    m=st.integers(0, 2),
    constant=st.booleans(),
)
def test_jmlr_proposition_10_mean_over_the_feature_map(seed, r, s, m, constant):
    """JMLR Prop. 10: |mu(t, a, p) - mu(p)| <= (k-1) (1/2r + 1/2s - (k-1)/4rs) max |h|.

    Attained at the corners of the kernel where h is constant. It needs (k - 1) / 2 <= r, s.
    """
    k = 2 * m + 1
    shape = (2, r, s, 1)
    h = np.ones(shape) if constant else np.random.default_rng(seed).normal(size=shape)
    exact = patches(h, k).mean(axis=0)
    errors = np.abs(exact - h.mean())
    bound = (k - 1) * (1 / (2 * r) + 1 / (2 * s) - (k - 1) / (4 * r * s)) * np.abs(h).max()
    assert errors.max() <= bound + 1e-12
    if constant:
        assert errors[0] == pytest.approx(bound)


def test_jmlr_proposition_10_needs_a_map_half_as_large_as_the_kernel():
    """JMLR Prop. 10 is false for k = 5 on one pixel: the bound is 0, the error |h|."""
    k, r, s = 5, 1, 1
    assert (k - 1) * (1 / (2 * r) + 1 / (2 * s) - (k - 1) / (4 * r * s)) == 0
    assert patches(np.ones((1, r, s, 1)), k).mean(axis=0)[0] == 0


def positive_definite(rng, n, decades):
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    return q * 10.0 ** rng.uniform(-decades, 0, n) @ q.T


@properties
@given(
    seed=seeds,
    rows=st.integers(1, 8),
    columns=st.integers(1, 8),
    rank=st.integers(1, 8),
    decades=st.floats(0, 2),
)
def test_jmlr_proposition_11_condition_of_the_product(seed, rows, columns, rank, decades):
    """JMLR Prop. 11: kappa(H^^T S H^) <= kappa(H^)^2 kappa(S), for H^ of any shape and rank."""
    rng = np.random.default_rng(seed)
    rank = min(rank, rows, columns)
    h = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
    s = positive_definite(rng, rows, decades)
    assume(condition_number(h) < 1e4)
    bound = condition_number(h) ** 2 * condition_number(s, symmetric=True)
    assert condition_number(h.T @ s @ h, symmetric=True) <= bound * (1 + 1e-6)


def test_jmlr_proposition_11_products_of_rectangles_have_no_such_bound():
    """JMLR, before Prop. 11: kappa(A B) <= kappa(A) kappa(B) fails for rectangular matrices."""
    a = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    b = np.array([[1.0, 0.0], [0.0, 0.1], [0.0, np.sqrt(0.99)]])
    assert condition_number(a) * condition_number(b) == pytest.approx(1.0)
    assert condition_number(a @ b) == pytest.approx(10.0)
