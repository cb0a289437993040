"""Normalizations as preconditioners, in float64: Ye's section of that name; JMLR 3.5."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from support import oracles
from support.theorem_cases import dense_problem, logarithms, normalized, properties, seeds

from bnp_optax import diagnostics
from bnp_optax.diagnostics import condition_number, extended_inputs

pytestmark = pytest.mark.usefixtures("x64")

NORMALIZATIONS = {
    "standardization": lambda x: (x.mean(0), x.std(0)),
    "min-max": lambda x: (x.min(0), x.max(0) - x.min(0)),
}


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_ye_normalized_inputs_precondition_the_first_layer(name):
    """Ye, "Input Data Normalization": the Hessian with (x - mu) / d in place of x is P^T H P.

    P = U D is that of (25) with the shift and the scale of the normalization; the network is the
    same function at p = P z. All columns of the extended inputs then have similar norms, which is
    nearly optimal by Theorem 2: sqrt(N) exactly, or sqrt(N) at most.
    """
    loss_fn, params, x, _ = dense_problem(2)
    shift, scale = (np.asarray(m) for m in NORMALIZATIONS[name](np.asarray(x)))
    p = oracles.centering_matrix(shift) @ oracles.scaling_matrix(scale**2)
    first = params["Dense_0"]
    z = np.linalg.solve(p, np.concatenate([first["bias"][None], first["kernel"]]))
    in_z = params | {"Dense_0": {"bias": jnp.asarray(z[0]), "kernel": jnp.asarray(z[1:])}}
    scaled = (x - shift[None]) / scale[None]
    np.testing.assert_allclose(loss_fn(in_z, scaled), loss_fn(params, x), rtol=1e-10)
    raw, normalized = np.asarray(extended_inputs(x)), np.asarray(extended_inputs(scaled))
    np.testing.assert_allclose(raw @ p, normalized, atol=1e-10)
    for unit in range(4):
        before = diagnostics.unit_hessian(loss_fn, params, "Dense_0/kernel", unit, x)
        after = diagnostics.unit_hessian(loss_fn, in_z, "Dense_0/kernel", unit, scaled)
        expected = p.T @ np.asarray(before) @ p
        np.testing.assert_allclose(after, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())
    norms = np.linalg.norm(normalized, axis=0) / np.sqrt(len(x))
    assert (norms <= 1 + 1e-12).all()
    if name == "standardization":
        np.testing.assert_allclose(norms, 1.0)
    else:
        assert norms.min() > 0.3
    assert np.linalg.cond(normalized) < 0.5 * np.linalg.cond(raw)


def layer_norm(h):
    """LayerNorm without its scale, its bias and its epsilon: each row to mean 0 and variance 1."""
    return (h - h.mean(axis=1, keepdims=True)) / h.std(axis=1, keepdims=True)


@properties
@given(seed=seeds, logs=logarithms)
def test_layer_norm_scales_the_rows_of_the_extended_inputs(seed, logs):
    """LayerNorm makes all rows of H^ as long as one another, whatever their size and mean.

    It is the row scaling of Ye Thm 2 after the rows are centered, so kappa is within sqrt(N) of
    the best over all sizes of the examples (on the directions that are left: the same number added
    to all weights of a unit changes nothing).
    """
    n, columns = 12, 4
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(n, columns))
    normal = layer_norm(h)
    np.testing.assert_allclose(layer_norm(h * np.exp(logs)[:, None] + logs[:, None]), normal)
    extended = np.asarray(extended_inputs(normal))
    np.testing.assert_allclose(np.linalg.norm(extended, axis=1), np.sqrt(columns + 1))
    np.testing.assert_allclose(extended @ [0, 1, 1, 1, 1], 0, atol=1e-10)
    directions = np.linalg.svd(np.ones((1, columns)))[2][1:].T
    left = h @ directions
    bound = np.sqrt(n) * np.linalg.cond(left * np.exp(logs)[:, None])
    assert condition_number(normal) <= bound * (1 + 1e-9)


def test_layer_norm_leaves_the_columns_to_batch_normalization():
    """JMLR 3.5: LayerNorm "can not address the ill-conditioning" over a batch, BNP after it can.

    Columns of other means and spreads keep them through LayerNorm.
    """
    rng = np.random.default_rng(0)
    h = rng.normal(size=(200, 6)) * [3.0, 1.0, 0.3, 0.1, 0.03, 0.01] + [5.0, -2.0, 0.0, 1.0, 0, 0]
    normal = layer_norm(h)[:, :-1]  # The last column is minus the sum of the others.
    kappa = np.linalg.cond(np.asarray(extended_inputs(normal)))
    assert kappa > 50
    assert np.linalg.cond(normalized(normal)) < 0.5 * kappa
