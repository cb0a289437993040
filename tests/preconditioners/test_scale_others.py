"""Parameters of no layer: left alone by `bnp`, at the layers' mean gain with `scale_others`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax

OPTIONS = {"eps_rel": 0.3, "eps_abs": 1e-8, "shrinkage": 10.0}
X = np.random.default_rng(0).normal(size=(64, 3)) * [2.0, 0.5, 0.2] + 0.3
Y = jnp.asarray(np.sin(X.sum(-1, keepdims=True)), jnp.float32)


def start():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "first": {"kernel": jax.random.normal(keys[0], (3, 8)) / 2, "bias": jnp.zeros(8)},
        "last": {"kernel": jax.random.normal(keys[1], (8, 1)) / 3, "bias": jnp.zeros(1)},
        "temperature": jnp.array([0.5, 2.0]),
        "step": jnp.int32(3),
    }


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    out = hidden @ params["last"]["kernel"] + params["last"]["bias"][None]
    return jnp.mean((params["temperature"][0] * out + params["temperature"][1] - y) ** 2)


def state_of(bnp, x, **options):
    params = start()
    float_params = {k: v for k, v in params.items() if k != "step"}
    value_and_grad = bnp_optax.value_and_grad(loss_fn, **options)
    _, grads, stats = value_and_grad(float_params, jnp.asarray(x, jnp.float32), Y)
    grads = grads | {"step": jnp.int32(0)}
    return bnp.update(grads, bnp.init(params), params, layer_stats=stats)


def gain_of(inputs, examples, fan_in):
    """Root mean square of 1 / (sigma~ q), from one batch, whose weight is as `shrinkage` says."""
    mean, var = inputs.mean(0), inputs.var(0)
    weight = examples / (examples + OPTIONS["shrinkage"])
    u = var + ((1 - weight) * mean) ** 2
    v = weight * u + (1 - weight) * u.mean()
    sigma2 = v + OPTIONS["eps_rel"] * v.mean() + OPTIONS["eps_abs"]
    return np.sqrt(np.mean(1 / sigma2) / max(fan_in / examples, 1.0))


def gains(x):
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), start())
    hidden = np.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return [gain_of(x, 64, 3), gain_of(hidden, 64, 8)]


def test_the_factor_is_the_geometric_mean_of_the_gains():
    x = 4.0 * X
    state = state_of(bnp := bnp_optax.bnp(scale_others=True, **OPTIONS), x)
    want = np.exp(np.mean(np.log(gains(x))))
    assert abs(np.log(want)) > 0.3
    P, tree = bnp.operator(state), start()
    for method, power in {"mv": 1, "transpose": 1, "solve": -1, "gram": 2}.items():
        got = getattr(P, method)(tree)
        expected = tree["temperature"] * want**power
        np.testing.assert_allclose(got["temperature"], expected, rtol=1e-4, err_msg=method)
        assert got["step"] == 3
        assert got["step"].dtype == jnp.int32
    logged = bnp_optax.metrics(state)
    np.testing.assert_allclose(
        [logged["gain/first/kernel"], logged["gain/last/kernel"]], gains(x), rtol=1e-4
    )


def test_numbers_of_python_and_of_bfloat16():
    bnp = bnp_optax.bnp(scale_others=True, **OPTIONS | {"eps_abs": 0.0})
    P = bnp.operator(state_of(bnp, X * 1e6))
    got = P.mv(start() | {"temperature": jnp.ones(2, jnp.bfloat16), "bare": 2.0, "whole": 3})
    assert got["temperature"].dtype == jnp.bfloat16
    assert float(got["temperature"][0]) == pytest.approx(0.1, rel=1e-2)
    assert float(got["bare"]) == pytest.approx(0.2)
    assert got["whole"] == 3


def test_without_it_others_are_left_alone():
    P = (bnp := bnp_optax.bnp(**OPTIONS)).operator(state_of(bnp, X))
    for method in ("mv", "transpose", "solve", "gram"):
        assert np.array_equal(getattr(P, method)(start())["temperature"], start()["temperature"])


@pytest.mark.parametrize(("units", "bound"), [(1e-6, 10.0), (1e6, 0.1)])
def test_the_factor_is_bounded(units, bound):
    P = (bnp := bnp_optax.bnp(scale_others=True, **OPTIONS | {"eps_abs": 0.0})).operator(
        state_of(bnp, X * units)
    )
    np.testing.assert_allclose(P.mv(start())["temperature"], start()["temperature"] * bound)


def test_before_the_first_statistics_and_without_layers_the_factor_is_one():
    bnp = bnp_optax.bnp(scale_others=True)
    for params in (start(), {"temperature": jnp.ones(2)}):
        got = bnp.operator(bnp.init(params)).mv(params)
        assert np.array_equal(got["temperature"], params["temperature"])


@pytest.mark.parametrize("units", [1e-3, 1e3])
def test_held_layers_do_not_count_so_that_training_does_not_depend_on_units(units):
    def losses(x):
        x = jnp.asarray(x, jnp.float32)
        z = {k: v for k, v in start().items() if k != "step"}
        params, fixed = bnp_optax.start_in_zspace(loss_fn, z, [(x, Y)])
        tx = bnp_optax.bnp_adam(1e-2, fixed=fixed)

        def step(carry, _):
            params, state = carry
            loss, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, x, Y)
            updates, state = tx.update(grads, state, params, layer_stats=stats)
            return (optax.apply_updates(params, updates), state), loss

        carry = params, tx.init(params)
        return jax.jit(lambda carry: jax.lax.scan(step, carry, length=50))(carry)[1]

    expected = losses(X)
    np.testing.assert_allclose(losses(X * units), expected, rtol=2e-3)
    assert expected[-1] < 0.5 * expected[0]
