"""`rms`, `adagrad` and `compose`: Optax's optimizers as compositions, and dense algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax

RATE = 0.01
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.array([0.5, -2.0])}

COMPOSITIONS = {
    "adam": (
        optax.chain(
            bnp_optax.precondition(bnp_optax.rms(0.99, 1e-7), before=optax.ema(0.8)),
            optax.scale(-RATE),
        ),
        optax.adam(RATE, b1=0.8, b2=0.99, eps=1e-7),
    ),
    "adamw": (
        optax.chain(
            bnp_optax.precondition(bnp_optax.rms(), before=optax.ema(0.9)),
            bnp_optax.zspace_weight_decay(0.1),
            optax.scale(-RATE),
        ),
        optax.adamw(RATE, weight_decay=0.1),
    ),
    "rmsprop": (
        optax.chain(bnp_optax.precondition(bnp_optax.rms(0.9)), optax.scale(-RATE)),
        optax.rmsprop(RATE, decay=0.9, eps_in_sqrt=False, bias_correction=True),
    ),
    "adagrad": (
        optax.chain(bnp_optax.precondition(bnp_optax.adagrad()), optax.scale(-RATE)),
        optax.adagrad(RATE),
    ),
}


def trajectory(tx, steps=100):
    """Parameters after each step on a quartic bowl of very unequal scales, with noise."""
    scales = jax.tree.map(lambda p: jnp.logspace(-2, 2, p.size).reshape(p.shape), PARAMS)

    def loss_fn(params, noise):
        terms = jax.tree.map(lambda p, s, n: s * (p + n) ** 2 + p**4, params, scales, noise)
        return sum(jnp.sum(term) for term in jax.tree.leaves(terms))

    def step(carry, key):
        params, state = carry
        noise = optax.tree.random_like(key, PARAMS)
        grads = jax.grad(loss_fn)(params, noise)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.jit(lambda: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), keys)[1])()


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_optimizers_are_compositions(name):
    ours, theirs = map(trajectory, COMPOSITIONS[name])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
        assert np.abs(a[-1] - a[0]).max() > 0.05


def gradients(n, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=3) * np.array([1.0, 10.0, 0.1]) for _ in range(n)]


def run(preconditioner, grads):
    params = {"w": jnp.ones(3)}
    state = preconditioner.init(params)
    for g in grads:
        g = {"w": jnp.asarray(g, jnp.float32)}
        state = preconditioner.update(g, state, params, layer_stats=None)
    return state


def test_rms_started_with_the_first_square_is_a_weighted_average():
    """Ye (7): weight decay^(t-1) on the first square, (1 - decay) decay^(t-k) on the k-th."""
    decay, grads = 0.8, gradients(5)
    state = run(bnp_optax.rms(decay, eps=0.0, bias_correction=False), grads)
    t = len(grads)
    weights = [decay ** (t - 1)] + [(1 - decay) * decay ** (t - k) for k in range(2, t + 1)]
    assert np.isclose(sum(weights), 1.0)
    expected = sum(weight * g**2 for weight, g in zip(weights, grads, strict=True))
    np.testing.assert_allclose(state.nu["w"], expected, rtol=1e-5)
    P = bnp_optax.rms(decay, eps=0.0, bias_correction=False).operator(state)
    np.testing.assert_allclose(P.mv({"w": jnp.ones(3)})["w"], expected**-0.25, rtol=1e-5)


def dense_rms(grads, decay, eps):
    nu = sum((1 - decay) * decay ** (len(grads) - 1 - k) * g**2 for k, g in enumerate(grads))
    return np.diag((np.sqrt(nu / (1 - decay ** len(grads))) + eps) ** -0.5)


def dense_adagrad(grads, eps, start):
    return np.diag((start + sum(g**2 for g in grads) + eps) ** -0.25)


@pytest.mark.parametrize(
    ("preconditioner", "dense"),
    [
        (bnp_optax.rms(0.9, 1e-3), lambda grads: dense_rms(grads, 0.9, 1e-3)),
        (bnp_optax.adagrad(1e-3, 0.2), lambda grads: dense_adagrad(grads, 1e-3, 0.2)),
    ],
    ids=["rms", "adagrad"],
)
def test_matrices(preconditioner, dense):
    grads = gradients(6)
    operator, P = preconditioner.operator(run(preconditioner, grads)), dense(grads)
    for v in np.eye(3):
        tree = {"w": jnp.asarray(v, jnp.float32)}
        np.testing.assert_allclose(operator.mv(tree)["w"], P @ v, rtol=1e-5)
        pulled_back = operator.transpose(tree)["w"]
        np.testing.assert_allclose(pulled_back, P.T @ v, rtol=1e-5)
        solved = operator.solve(tree)["w"]
        np.testing.assert_allclose(solved, np.linalg.solve(P, v), rtol=1e-5)


def test_compose_is_the_product_with_the_inner_one_in_the_outer_ones_space():
    outer, inner = bnp_optax.adagrad(1e-3), bnp_optax.rms(0.9, 1e-3)
    composed = bnp_optax.compose(outer, inner)
    grads = gradients(6)
    operator = composed.operator(run(composed, grads))
    P_outer = dense_adagrad(grads, 1e-3, 0.1)
    pulled_back = [dense_adagrad(grads[: k + 1], 1e-3, 0.1) @ g for k, g in enumerate(grads)]
    P = P_outer @ dense_rms(pulled_back, 0.9, 1e-3)
    for v in np.eye(3):
        tree = {"w": jnp.asarray(v, jnp.float32)}
        np.testing.assert_allclose(operator.mv(tree)["w"], P @ v, rtol=1e-5)
        np.testing.assert_allclose(operator.transpose(tree)["w"], P.T @ v, rtol=1e-5)
        solved = operator.solve(tree)["w"]
        np.testing.assert_allclose(solved, np.linalg.solve(P, v), rtol=1e-5)


@pytest.mark.parametrize(
    "preconditioner",
    [
        bnp_optax.rms(eps=0.0),
        bnp_optax.rms(eps=0.0, bias_correction=False),
        bnp_optax.adagrad(eps=0.0, initial_accumulator_value=0.0),
    ],
)
def test_zero_gradients_give_finite_updates(preconditioner):
    tx = bnp_optax.precondition(preconditioner)
    zeros = {"w": jnp.zeros(3)}
    updates, state = tx.update(zeros, tx.init(zeros), zeros)
    np.testing.assert_array_equal(updates["w"], np.zeros(3))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("make", [bnp_optax.adam_l1, None])
def test_low_precision_follows_adam(dtype, make):
    if make is None:
        scaled = bnp_optax.precondition(bnp_optax.rms(), before=optax.ema(0.9))
        ours = optax.chain(scaled, optax.scale(-RATE))
    else:
        ours = make(RATE, 0.0)

    def trained(tx, dtype):
        params = {"w": jnp.array([[1.0, -2.0, 0.3]], dtype)}
        state = tx.init(params)
        step = jax.jit(tx.update)
        for t in range(50):
            grads = jax.tree.map(
                lambda p, t=t: (p - 0.1 + 0.2 * jnp.sin(t)).astype(p.dtype), params
            )
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
        return np.asarray(params["w"], np.float32)

    adam = trained(optax.adam(RATE), jnp.float32)
    theirs = trained(optax.adam(RATE), dtype)
    got = trained(ours, dtype)
    assert np.abs(got - adam).max() <= 2 * np.abs(theirs - adam).max() + 0.01
    assert np.abs(got - [[1.0, -2.0, 0.3]]).min() > 0.1


def test_complex_parameters_have_a_real_scale():
    tx = bnp_optax.precondition(bnp_optax.rms(eps=0.0))
    params = {"w": jnp.array([1.0 + 1.0j, 2.0])}
    grads = {"w": jnp.array([3.0 + 4.0j, -2.0j])}
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [0.6 + 0.8j, -1.0j], rtol=1e-5)
    assert state.nu["w"].dtype == jnp.float32


def test_integers_pass_through():
    tx = bnp_optax.precondition(bnp_optax.rms())
    params = {"n": jnp.array([3]), "w": jnp.array([2.0])}
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["n"], [3])
    assert updates["n"].dtype == params["n"].dtype


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: bnp_optax.rms(decay=1.0), "decay"),
        (lambda: bnp_optax.rms(eps=-1.0), "eps"),
        (lambda: bnp_optax.adagrad(eps=-1.0), "eps"),
        (lambda: bnp_optax.adagrad(initial_accumulator_value=-1.0), "initial_accumulator_value"),
    ],
)
def test_hyper_parameters_out_of_range(make, name):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        make()
