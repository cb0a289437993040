"""Condition numbers of extended inputs and of `whiten`, against dense matrices in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.linalg import fractional_matrix_power
from support.diagnostics_problems import MLP, problem

import bnp_optax
from bnp_optax import diagnostics

MIX = np.random.default_rng(0).normal(size=(4, 4)) + 2 * np.eye(4)


def dense_problem(bias=True):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(50, 4)) @ MIX + 1.0, jnp.float32)
    model = nn.Dense(3, use_bias=bias)
    params = model.init(jax.random.key(0), x)["params"]

    def loss_fn(params):
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    return loss_fn, params, np.asarray(x, np.float64)


def whitened(loss_fn, params, tx_or_p, **options):
    _, grads, stats = bnp_optax.value_and_grad(loss_fn, second_moments=True)(params)
    return tx_or_p.update(grads, tx_or_p.init(params), params, layer_stats=stats, **options)


def moment_of(x, bias):
    h = np.concatenate([np.ones((len(x), int(bias))), x], axis=1)
    return h.T @ h / len(h)


def root_of(x, exponent, damping, bias):
    """P = U diag(1, S) after one batch from M2 = I, mu = 0, which count as one."""
    n = x.shape[1]
    mean = 0.5 * x.mean(0) if bias else np.zeros(n)
    second = 0.5 * np.eye(n) + 0.5 * x.T @ x / len(x)
    c = second - np.outer(mean, mean)
    s = fractional_matrix_power(c + damping * np.trace(c) / n * np.eye(n), -exponent)
    if not bias:
        return s
    u = np.eye(n + 1)
    u[0, 1:] = -mean
    return u @ np.block([[np.eye(1), np.zeros((1, n))], [np.zeros((n, 1)), s]])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("exponent", "damping"), [(0.5, 0.0), (0.25, 0.1)])
def test_columns_of_the_report(bias, exponent, damping):
    loss_fn, params, x = dense_problem(bias)
    P = bnp_optax.whiten(exponent=exponent, damping=damping)
    state = whitened(loss_fn, params, P)
    got = diagnostics.report(loss_fn, params, preconditioner=P, state=state, inputs=True)
    (row,) = got.layers
    moment, p = moment_of(x, bias), root_of(x, exponent, damping, bias)
    assert row.inputs.kappa == pytest.approx(np.linalg.cond(moment), rel=1e-3)
    expected = np.linalg.cond(p.T @ moment @ p)
    assert row.inputs.kappa_preconditioned == pytest.approx(expected, rel=1e-3)
    assert expected < 0.5 * np.linalg.cond(moment)
    s = p[int(bias) :, int(bias) :]
    sizes = np.r_[np.ones(int(bias)), np.linalg.svd(s, compute_uv=False)]
    assert row.kappa_d == pytest.approx(sizes.max() / sizes.min(), rel=1e-3)
    header, _, line = str(got).splitlines()
    assert header.split()[-5:] == ["PᵀHP", "κ(M)", "κ(PᵀMP)", "seen", "rejected"]
    assert line.split()[-2:] == ["1", "0"]


def test_the_report_without_p_and_of_a_layer_of_many():
    loss_fn, params, args = problem(MLP((5, 3)), (20, 4))
    got = diagnostics.report(loss_fn, params, *args, inputs=True, max_fan_in=4)
    first, second = got.layers
    moment = moment_of(np.asarray(args[0], np.float64), True)
    assert first.inputs.kappa == pytest.approx(np.linalg.cond(moment), rel=1e-3)
    assert np.isnan(first.inputs.kappa_preconditioned)
    assert second.inputs is None
    assert diagnostics.report(loss_fn, params, *args).layers[0].inputs is None


def test_of_a_grouped_convolution():
    model = nn.Conv(4, (2, 2), feature_group_count=2)
    x = jax.random.normal(jax.random.key(0), (6, 4, 4, 4))
    params = model.init(jax.random.key(1), x)["params"]

    def loss_fn(params):
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    _, _, stats = bnp_optax.value_and_grad(loss_fn, second_moments=True)(params)
    assert diagnostics.extended_second_moment(stats["kernel"]).shape == (2, 9, 9)
    layers = bnp_optax.find_layers(loss_fn, params)
    got = diagnostics.report(loss_fn, params, layers=layers, inputs=True)
    assert got.layers[0].inputs is None


def test_a_second_moment_that_was_not_captured():
    loss_fn, params, _ = dense_problem()
    _, _, stats = bnp_optax.value_and_grad(loss_fn)(params)
    with pytest.raises(ValueError, match=r"`stats` of `kernel` has no second moment\. Capture it"):
        diagnostics.extended_second_moment(stats["kernel"])


@pytest.mark.parametrize("max_fan_in", [1024, 2])
def test_metrics_of_whitened_layers(max_fan_in):
    loss_fn, params, x = dense_problem()
    tx = bnp_optax.whiten_adam(1e-2, max_fan_in=max_fan_in, rank=4)
    updates, state = whitened(loss_fn, params, tx)
    logged = jax.jit(bnp_optax.metrics)(state, updates=updates)
    assert "q/kernel" not in logged
    s = root_of(x, 0.25, 0.1, True)[1:, 1:]
    sizes = np.linalg.svd(s, compute_uv=False)
    assert float(logged["gain/kernel"]) == pytest.approx(np.sqrt(np.mean(sizes**2)), rel=1e-3)
    sizes = np.r_[1.0, sizes]
    assert float(logged["kappa/kernel"]) == pytest.approx(sizes.max() / sizes.min(), rel=1e-3)
    in_z = np.linalg.solve(s, np.asarray(updates["kernel"], np.float64))
    got = float(logged["update_norm_in_z/kernel"])
    assert got == pytest.approx(np.linalg.norm(in_z), rel=1e-3)
    assert int(logged["layers_never_seen"]) == int(logged["batches_rejected"]) == 0


def test_metrics_of_both_kinds_and_of_a_layer_of_another_name():
    x = jax.random.normal(jax.random.key(0), (8, 3))

    def loss_fn(params):
        return jnp.mean((jnp.tanh(x @ params["w1"] + params["b1"][None]) @ params["w2"]) ** 2)

    params = {"w1": jnp.ones((3, 2)), "b1": jnp.zeros(2), "w2": jnp.ones((2, 1))}
    layers = bnp_optax.find_layers(loss_fn, params)
    one, other = ({name: layers[name]} for name in ("w1", "w2"))
    tx = optax.chain(
        bnp_optax.precondition(bnp_optax.bnp(layers=one)),
        bnp_optax.precondition(bnp_optax.whiten(layers=other)),
    )
    _, grads, stats = bnp_optax.value_and_grad(loss_fn, second_moments=["w2"])(params)
    state = tx.init(params)
    assert int(bnp_optax.metrics(state)["layers_never_seen"]) == 2
    updates, state = tx.update(grads, state, params, layer_stats=stats)
    logged = bnp_optax.metrics(state, updates=updates)
    assert int(logged["layers_never_seen"]) == 0
    assert {"kappa/w1", "kappa/w2", "update_norm/w2", "update_norm_in_z/w1"} <= set(logged)
    # Of which axes `w2` sums over, its name does not tell.
    assert "update_norm_in_z/w2" not in logged
    assert "update_norm_in_z/w2" in bnp_optax.metrics(state, layers, updates=updates)
