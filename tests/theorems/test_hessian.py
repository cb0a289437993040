"""The form of the Hessian in float64: Ye Theorem 3; JMLR Propositions 2, 9 and Theorem 3."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.theorem_cases import dense_problem, normalized, patches

import bnp_optax
from bnp_optax import diagnostics
from bnp_optax.diagnostics import extended_inputs

pytestmark = pytest.mark.usefixtures("x64")


def exact_bnp(loss_fn, params, *args):
    """P = U D of the batch at hand, without floors or q."""
    P = bnp_optax.bnp(decay=0.0, eps_rel=0.0, eps_abs=0.0, scale=False)
    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, *args)
    return P, P.update(grads, P.init(params), params, layer_stats=stats)


@pytest.mark.parametrize("unit", [0, 3])
def test_jmlr_proposition_2_dense_hessian(unit):
    """JMLR Prop. 2, Ye Thm 3: the Hessian in [b, w] is H^^T S H^ with diagonal S."""
    loss_fn, params, x, curvatures = dense_problem(0)
    h = np.asarray(extended_inputs(x))
    got = diagnostics.unit_hessian(loss_fn, params, "Dense_0/kernel", unit, x)
    expected = h.T @ np.diag(curvatures(unit)) @ h
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("unit", [0, 3])
def test_jmlr_theorem_3_preconditioned_hessian(unit):
    """JMLR Thm 3: with BNP it is G^^T S G^, where G^ = [e, (h - mu) / sigma]."""
    loss_fn, params, x, curvatures = dense_problem(0)
    P, state = exact_bnp(loss_fn, params, x)
    g = normalized(np.asarray(x))
    np.testing.assert_allclose(g[:, 1:].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(g[:, 1:].std(0), 1)
    got = diagnostics.unit_hessian(
        loss_fn, params, "Dense_0/kernel", unit, x, preconditioner=P, state=state
    )
    # The library keeps statistics in float32.
    expected = g.T @ np.diag(curvatures(unit)) @ g
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("preconditioned", [False, True])
def test_jmlr_proposition_9_hessian_of_a_convolution(preconditioned):
    """JMLR Prop. 9: the Hessian in an output channel's [b, w] is H^^T S H^.

    H^ holds a patch for every example and output position; S is block diagonal, with a dense block
    for every example. With BNP it is (H^ P)^T S (H^ P).
    """
    rng = np.random.default_rng(0)
    shape, channel = (3, 4, 5, 2), 1
    x = jnp.asarray(rng.normal(size=shape) * [0.2, 4.0] + [1.0, -3.0])
    conv = nn.Conv(3, (3, 3), param_dtype=float)
    params = conv.init(jax.random.key(1), x)["params"]
    mix = jnp.asarray(rng.normal(size=(4 * 5 * 3, 2)))

    def of_one(a):
        return jnp.sum(jnp.tanh(a.ravel() @ mix) ** 2)

    def loss_fn(params, x):
        return jnp.mean(jax.vmap(of_one)(conv.apply({"params": params}, x)))

    a = conv.apply({"params": params}, x)
    s = np.zeros((60, 60))
    for j in range(3):

        def of_channel(v, j=j):
            return of_one(a[j].at[:, :, channel].set(v.reshape(4, 5)))

        block = jax.hessian(of_channel)(a[j, :, :, channel].ravel())
        s[20 * j : 20 * (j + 1), 20 * j : 20 * (j + 1)] = block / 3
    h = np.asarray(extended_inputs(patches(np.asarray(x), 3)))
    options = {}
    if preconditioned:
        P, state = exact_bnp(loss_fn, params, x)
        options = {"preconditioner": P, "state": state}
        mean, var = (np.tile(moment, 9) for moment in oracles.input_moments(x))
        h = h @ oracles.centering_matrix(mean) @ oracles.scaling_matrix(var)
    got = diagnostics.unit_hessian(loss_fn, params, "kernel", channel, x, **options)
    expected = h.T @ s @ h
    rtol = 1e-4 if preconditioned else 1e-10
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=0.1 * rtol * np.abs(expected).max())
    assert np.abs(s - np.diag(np.diag(s))).max() > 0.1 * np.abs(s).max()
