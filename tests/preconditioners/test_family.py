"""Each optimizer of `docs/family.md` is what its paper's formula says, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.quick_jit import jit
from support.whiten_cases import CASES, draw

import bnp_optax
from bnp_optax import bnp, mean_activation, orthogonalize, precondition, whiten

CASE = CASES["no_bias"]
X = CASE.batch(0)
ROWS = np.asarray(X, np.float64)
# The moments of one batch; the default decay gives the start a share, 0 none.
SECOND = ROWS.T @ ROWS / len(ROWS)
DAMPING = 0.3
GAMMA = DAMPING * np.trace(SECOND) / 5


def assert_close(got, want, tolerance=1e-4):
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def step(tx, case=CASE, x=X):
    """The update of one step, and the gradient, in float64."""
    _, grads, stats = bnp_optax.value_and_grad(case.loss, second_moments=True)(case.params, x)
    updates, _ = tx.update(grads, tx.init(case.params), case.params, layer_stats=stats)
    return (jax.tree.map(lambda a: np.asarray(a, np.float64), tree) for tree in (updates, grads))


def test_foof():
    """W <- W - eta (C + lambda I)^-1 G, C = E[h h^T] (Benzing 2022)."""
    foof = precondition(whiten(exponent=0.5, damping=DAMPING, decay=0.0))
    updates, grads = step(optax.chain(foof, optax.sgd(0.1)))
    want = -0.1 * np.linalg.solve(SECOND + GAMMA * np.eye(5), grads["kernel"])
    assert_close(updates["kernel"], want)


def test_foof_with_a_bias_is_that_of_the_extended_inputs():
    """Without damping (E[h^ h^T])^-1 = U diag(1, C^-1) U^T: centering is elimination."""
    case = CASES["dense"]
    x = case.batch(0)
    updates, grads = step(precondition(whiten(exponent=0.5, damping=0.0, decay=0.0)), case, x)
    extended = np.concatenate([np.ones((len(x), 1)), np.asarray(x, np.float64)], axis=1)
    want = np.linalg.solve(extended.T @ extended / len(x), case.units(grads)[0])
    assert_close(case.units(updates)[0], want, 1e-3)


def newton_schulz(x, n_steps=5):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / np.linalg.norm(x)
    for _ in range(n_steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def test_newton_muon():
    """msgn(G (Z Z^T + gamma I)^-1), of kernels (out, in)."""
    tx = optax.chain(
        precondition(whiten(exponent=0.5, damping=DAMPING, decay=0.0)),
        orthogonalize(momentum=0.0, rms=None),
    )
    updates, grads = step(tx)
    inverse = np.linalg.inv(SECOND + GAMMA * np.eye(5))
    assert_close(updates["kernel"].T, newton_schulz(grads["kernel"].T @ inverse), 1e-3)


def test_mac():
    """(mu mu^T + gamma I)^-1 G, by Sherman and Morrison, from the mean alone."""
    _, grads, stats = bnp_optax.value_and_grad(CASE.loss)(CASE.params, X)
    tx = precondition(mean_activation(damping=2.0))
    updates, _ = tx.update(grads, tx.init(CASE.params), CASE.params, layer_stats=stats)
    mu = ROWS.mean(0)
    want = np.linalg.solve(np.outer(mu, mu) + 2.0 * np.eye(5), np.asarray(grads["kernel"]))
    assert_close(np.asarray(updates["kernel"]), want)


@pytest.mark.parametrize("name", ["dense", "attention", "grouped_convolution", "stacked"])
def test_mac_is_a_preconditioner(name):
    """P is a root of it in every block, its inverse is the inverse, and biases stay."""
    case = CASES[name]
    mac = mean_activation(damping=2.0, layers=case.layers())
    value_and_grad = jit(bnp_optax.value_and_grad(case.loss))
    state = mac.init(case.params)
    means, shares = [], 0.95 ** np.arange(3)[::-1]
    for seed in range(3):
        _, grads, stats = value_and_grad(case.params, case.batch(seed))
        state = mac.update(grads, state, layer_stats=stats)
        if name != "grouped_convolution":  # The mean of the map is not that of its patches.
            rows = case.rows(np.asarray(case.batch(seed), np.float64))
            means.append(rows.mean(1))
    P = mac.operator(state)
    back = P.solve(P.mv(case.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), back, case.params)
    np.testing.assert_array_equal(P.mv(case.params)["bias"], case.params["bias"])
    twice = P.mv(P.transpose(grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), twice, P.gram(grads)
    )
    if means:
        mean = np.einsum("t,tbn->bn", shares / shares.sum(), np.stack(means))
        columns = case.columns(np.asarray(grads["kernel"], np.float64))
        got = case.columns(np.asarray(P.gram(grads)["kernel"], np.float64))
        for mu, g, one in zip(mean, columns, got, strict=True):
            want = np.linalg.solve(np.outer(mu, mu) + 2.0 * np.eye(len(mu)), g)
            assert_close(one, want, 1e-4)


def test_bnp_is_whitening_by_the_diagonal():
    case = CASES["dense"]
    x = case.batch(0)
    diagonal = precondition(bnp(decay=0.0, eps_rel=0.0, eps_abs=0.0, scale=False))
    updates, grads = step(diagonal, case, x)
    rows = np.asarray(x, np.float64)
    shift = np.eye(6)
    shift[0, 1:] = -rows.mean(0)
    M = shift @ np.diag([1.0, *1 / rows.var(0)]) @ shift.T
    assert_close(case.units(updates)[0], M @ case.units(grads)[0])


def test_column_scaling():
    """Ye, Theorem 2: without a bias, columns of H are divided by their norms."""
    scaling = precondition(bnp(decay=0.0, eps_rel=0.0, eps_abs=0.0, scale=False))
    updates, grads = step(scaling)
    assert_close(updates["kernel"], grads["kernel"] / np.diag(SECOND)[:, None])


# The ready-made ones.


def test_whiten_adam_is_adam_in_z_with_p_divided():
    """By sqrt(n + 1), of which Adam sees nothing but in how far it goes."""
    case = CASES["dense"]
    options = {"refresh_every": 1, "decay": 0.9}
    x = case.batch(0)
    ours, _ = step(bnp_optax.whiten_adam(0.01, **options), case, x)
    theirs, _ = step(bnp_optax.in_zspace(optax.adam(0.01), whiten(**options)), case, x)
    for name in ("kernel", "bias"):
        assert_close(ours[name], theirs[name] / np.sqrt(6))


def test_whiten_muon_is_muon_in_z():
    case = CASES["dense"]
    x = case.batch(0)
    ours, _ = step(bnp_optax.whiten_muon(0.01), case, x)
    muon = optax.contrib.muon(0.01, consistent_rms=0.2)
    theirs, _ = step(bnp_optax.in_zspace(muon, whiten()), case, x)
    for name in ("kernel", "bias"):
        assert_close(ours[name], theirs[name], 1e-3)


@pytest.mark.parametrize("make", [bnp_optax.whiten_adam, bnp_optax.whiten_muon])
def test_weight_decay_shrinks_z(make):
    """And so p, by learning_rate * weight_decay on top of the step without; P is linear."""
    case = CASES["dense"]
    x = case.batch(0)
    without, _ = step(make(0.01), case, x)
    plain, _ = step(make(0.01, weight_decay=0.0, mask=lambda _: False), case, x)
    decayed, _ = step(make(0.01, weight_decay=0.3), case, x)
    for name in ("kernel", "bias"):
        assert_close(plain[name], without[name])
        assert_close(decayed[name], without[name] - 0.003 * case.params[name])


@pytest.mark.parametrize("make", [bnp_optax.whiten_adam, bnp_optax.whiten_muon])
def test_a_mask_says_what_decays_in_z(make):
    """The kernel's z alone: the bias of z stays, but P moves the bias of p with the kernel."""
    case = CASES["dense"]
    x = case.batch(0)
    mask = {"kernel": True, "bias": False}
    without, _ = step(make(0.01, decay=0.0), case, x)
    decayed, _ = step(make(0.01, weight_decay=0.3, mask=mask, decay=0.0), case, x)
    kernel = case.params["kernel"]
    assert_close(decayed["kernel"], without["kernel"] - 0.003 * kernel)
    moved = 0.003 * np.mean(np.asarray(x), 0) @ np.asarray(kernel)
    assert_close(decayed["bias"], without["bias"] + moved, 1e-3)


@pytest.mark.parametrize("make", [bnp_optax.whiten_adam, bnp_optax.whiten_muon])
def test_negative_weight_decay_is_refused(make):
    with pytest.raises(ValueError, match=r"`weight_decay` must be finite and >= 0, got -0\.1\."):
        make(weight_decay=-0.1)


@pytest.mark.parametrize("make", [bnp_optax.whiten_adam, bnp_optax.whiten_muon])
def test_correlated_inputs_are_learned_from(make):
    """Linear regression on inputs whose covariance has a condition number of 1e4."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    scales = np.logspace(0, -2, 8)
    weights = basis @ (rng.normal(size=8) / scales)

    def batch(seed):
        rows = np.random.default_rng(seed).normal(size=(64, 8)) * scales @ basis.T
        return jnp.asarray(rows + 5.0, jnp.float32), jnp.asarray(rows @ weights, jnp.float32)

    def loss_fn(p, x, y):
        return jnp.mean((x @ p["kernel"] + p["bias"][None] - y[:, None]) ** 2)

    value_and_grad = bnp_optax.value_and_grad(loss_fn, second_moments=True)

    def trained(tx, n_steps=300):
        params = {"kernel": jnp.zeros((8, 1)), "bias": jnp.zeros(1)}
        state = tx.init(params)

        @jit
        def update(params, state, x, y):
            loss, grads, stats = value_and_grad(params, x, y)
            updates, state = tx.update(grads, state, params, layer_stats=stats)
            return optax.apply_updates(params, updates), state, loss

        for seed in range(n_steps):
            params, state, loss = update(params, state, *batch(seed))
        return float(loss)

    best = min(
        trained(optax.with_extra_args_support(optax.adam(rate))) for rate in (0.01, 0.1, 0.3)
    )
    options = {"exponent": 0.5, "damping": 0.0}
    ours = min(trained(make(rate, **options)) for rate in (0.1, 0.3))
    assert ours < 0.5 * best


@pytest.mark.parametrize("make", [bnp_optax.whiten_adam, bnp_optax.whiten_muon])
def test_options_out_of_their_range(make):
    with pytest.raises(ValueError, match="`learning_rate` must be finite and >= 0, got -1"):
        make(-1)
    with pytest.raises(ValueError, match="`exponent` must be finite and >= 0"):
        make(exponent=-1.0)


def test_the_options_of_mac_out_of_their_range():
    with pytest.raises(ValueError, match="`damping` must be finite and > 0, got 0"):
        mean_activation(damping=0)
    with pytest.raises(ValueError, match="`decay` must lie in"):
        mean_activation(decay=1.0)
    mac = mean_activation()
    other = mac.init({"a": {"kernel": draw(0, 2, 2)}})
    _, grads, stats = bnp_optax.value_and_grad(CASE.loss)(CASE.params, X)
    with pytest.raises(ValueError, match="state of `mean_activation` was made for `a/kernel`"):
        mac.update(grads, other, layer_stats=stats)


def test_mac_of_statistics_that_were_written_by_hand():
    """Whose layer does not say which shape its kernel has."""
    _, grads, stats = bnp_optax.value_and_grad(CASE.loss)(CASE.params, X)
    layer = bnp_optax.Layer("kernel", None, (-2,))
    bare = {"kernel": dataclasses.replace(stats["kernel"], layer=layer)}
    tx = precondition(mean_activation(damping=2.0))
    state = tx.init(CASE.params)
    one, two = (tx.update(grads, state, CASE.params, layer_stats=of)[0] for of in (stats, bare))
    np.testing.assert_array_equal(one["kernel"], two["kernel"])
