"""The report of the diagnostics: its numbers, its table and figure, and what it needs."""

import builtins
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from support.diagnostics_problems import (
    MLP,
    bnp_state,
    dense_hessian,
    dense_preconditioner,
    problem,
    unit_indices,
)

import bnp_optax
from bnp_optax import diagnostics

ROW = diagnostics.LayerReport("kernel", 2, 1, 1, 1.0, 1.0, 1.0, 1.0, 1.0)


@pytest.mark.usefixtures("x64")
def test_report_against_dense_matrices():
    loss_fn, params, args = problem(MLP((5, 3)), (20, 4))
    P = bnp_optax.bnp(decay=0.5)
    state = bnp_state(loss_fn, params, args, P)
    got = diagnostics.report(
        loss_fn, params, *args, preconditioner=P, state=state, max_units=3, num_lanczos=60
    )
    hessian, _ = dense_hessian(loss_fn, params, args)
    p = dense_preconditioner(P, state, params)
    kappas_d = diagnostics.conditioning(state)
    chosen = {"Dense_0": [0, 2, 4], "Dense_1": [0, 1, 2]}
    norms = []
    for row, (layer, units) in zip(got.layers, chosen.items(), strict=True):
        assert row.kernel == f"{layer}/kernel"
        assert (row.units, row.units_used) == (len(params[layer]["bias"]), 3)
        for matrix, kappa in (
            (hessian, row.kappa),
            (p.T @ hessian @ p, row.kappa_preconditioned),
        ):
            blocks = [matrix[np.ix_(i, i)] for i in (unit_indices(params, layer, u) for u in units)]
            expected = np.median([np.linalg.cond(block) for block in blocks])
            assert kappa == pytest.approx(expected, rel=1e-6)
        assert row.kappa_d == pytest.approx(float(kappas_d[row.kernel]))
        places = np.concatenate([unit_indices(params, layer, u) for u in range(row.units)])
        block = np.ix_(places, places)
        norms.append([np.linalg.norm(m[block], 2) for m in (hessian, p.T @ hessian @ p)])
    norms = np.array(norms)
    expected = norms / norms.sum(axis=0)
    np.testing.assert_allclose(got.shares, expected[:, 0], rtol=1e-6)
    np.testing.assert_allclose(got.shares_preconditioned, expected[:, 1], rtol=1e-6)


def test_report_is_printed_and_drawn():
    rows = (
        diagnostics.LayerReport("a/kernel", 12, 4, 2, 1234.5, 6.25, 9.0, 3.0, 1.0),
        diagnostics.LayerReport("b/kernel", 3000, 10, 0, math.nan, math.nan, 2.0, 1.0, 1.0),
    )
    got = diagnostics.Report(rows)
    assert str(got).splitlines() == [
        "kernel    fan-in  units    κ(H)      κ(PᵀHP)  κ(D)  share of H  of PᵀHP",
        "--------  ------  -------  --------  -------  ----  ----------  -------",
        "a/kernel  12      2 of 4   1.23e+03  6.25     9     75.0%       50.0%",
        "b/kernel  3000    0 of 10                     2     25.0%       50.0%",
    ]
    assert got.__rich__().row_count == 2
    left, right = got.figure().axes
    assert [len(bars) for bars in left.containers] == [2, 2, 2]
    assert [bar.get_width() for bar in right.containers[0]] == [75.0, 25.0]
    assert [label.get_text() for label in left.get_yticklabels()] == ["a/kernel", "b/kernel"]


def test_report_without_a_preconditioner_and_of_a_unit_that_is_off():
    """A ReLU that is never active has a Hessian of 0, which no condition number is of."""

    def loss_fn(params, x):
        hidden = nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
        return jnp.mean((hidden @ params["b"]["kernel"]) ** 2)

    rng = np.random.default_rng(0)
    params = {
        "a": {
            "kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
            "bias": jnp.array([1.0, -1e3]),
        },
        "b": {"kernel": jnp.asarray(rng.normal(size=(2, 1)), jnp.float32)},
    }
    x = jnp.asarray(rng.normal(size=(9, 3)), jnp.float32)
    got = diagnostics.report(loss_fn, params, x, max_fan_in=2)
    assert (got.layers[0].units_used, got.layers[1].units_used) == (0, 1)
    assert math.isnan(got.layers[0].kappa)
    got = diagnostics.report(loss_fn, params, x)
    assert (got.layers[0].units, got.layers[0].units_used) == (2, 1)
    assert math.isfinite(got.layers[0].kappa)
    assert math.isnan(got.layers[0].kappa_preconditioned)
    left, right = got.figure().axes
    assert (len(left.containers), len(right.containers)) == (1, 1)


def test_report_of_no_layer():
    with pytest.raises(ValueError, match=r"no leaf named `kernel` with two .* it has `w`"):
        diagnostics.report(lambda p: jnp.sum(p["w"]), {"w": jnp.ones(2)})
    loss_fn, params, args = problem(MLP(), (7, 5))
    with pytest.raises(ValueError, match="`max_units` must be at least 1, got 0"):
        diagnostics.report(loss_fn, params, *args, max_units=0)


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("matfree", lambda: diagnostics.hessian_extremes(jnp.sum, jnp.ones(3))),
        ("matplotlib", lambda: diagnostics.Report((ROW,)).figure()),
    ],
)
def test_extras_that_are_not_installed(module, call, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"needs {module}.*'bnp-optax\[diagnostics\]'"):
        call()
