"""Starting in z: raw units in, no scaling by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnp_optax

UNITS = [  # x -> scale x + shift, one for each input.
    (np.array([1e3, 1e-4, 1.0]), np.array([5e3, 0.0, -2.0])),
    (np.array([2.0, 30.0, 1e-2]), np.array([0.0, 7.0, 0.5])),
]
X = np.random.default_rng(0).normal(size=(8, 16, 3)) * [1.0, 2.0, 0.5] + [0.3, -1.0, 0.0]
Y = jnp.asarray(np.sin(X.sum(-1)), jnp.float32)
# P scales every input, however small, and stays as the statistics that it was given.
HELD = {"eps_rel": 0.0, "eps_abs": 0.0, "scale": False, "shrinkage": 0.0, "scale_bias": False}


class Net(nn.Module):
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(8, use_bias=self.use_bias, name="first")(x))
        return nn.Dense(1, name="last")(x)[..., 0]


def in_units(units):
    scale, shift = units
    return jnp.asarray(X * scale + shift, jnp.float32)


def standardized():
    mean, std = X.mean((0, 1)), X.std((0, 1))
    return jnp.asarray((X - mean) / std, jnp.float32)


def loss_fn(params, x, y):
    return jnp.mean((Net().apply({"params": params}, x) - y) ** 2)


def trained(x, n_steps=200):
    """The losses of training on batches `x` from z, with P of the input layer held."""
    z = Net().init(jax.random.key(0), x[0])["params"]
    params, fixed = bnp_optax.start_in_zspace(loss_fn, z, list(zip(x, Y, strict=True)))
    layers = {name: stats.layer for name, stats in fixed.items()}
    tx = bnp_optax.bnp_adam(1e-2, layers=layers, **HELD)

    def step(carry, batch):
        params, state = carry
        loss, grads, stats = bnp_optax.value_and_grad(loss_fn, fixed=fixed)(params, *batch)
        stats = {name: stats[name] for name in layers}
        updates, state = tx.update(grads, state, params, layer_stats=stats)
        return (optax.apply_updates(params, updates), state), loss

    order = np.arange(n_steps) % len(x)
    return jax.jit(lambda carry: jax.lax.scan(step, carry, (x[order], Y[order])))(
        (params, tx.init(params))
    )[1]


@pytest.mark.parametrize("units", UNITS)
def test_training_does_not_depend_on_units(units):
    losses = trained(standardized())
    np.testing.assert_allclose(trained(in_units(units)), losses, rtol=2e-3)
    assert losses[-8:].mean() < 0.7 * losses[:8].mean()


@pytest.mark.parametrize("units", UNITS)
def test_the_network_at_the_start_is_the_one_on_standardized_inputs(units):
    x, wanted = in_units(units), standardized()
    z = Net().init(jax.random.key(0), x[0])["params"]
    params, fixed = bnp_optax.start_in_zspace(loss_fn, z, list(zip(x, Y, strict=True)))
    assert set(fixed) == {"first/kernel"}
    out = Net().apply({"params": params}, x)
    np.testing.assert_allclose(out, Net().apply({"params": z}, wanted), atol=1e-4)
    for name in ("kernel", "bias"):
        assert np.array_equal(params["last"][name], z["last"][name])


def test_constant_inputs_and_inputs_of_zero():
    x = jnp.stack([jnp.linspace(0.0, 9.0, 16), jnp.full(16, 1e4), jnp.zeros(16)], axis=-1)
    z = Net().init(jax.random.key(0), x)["params"]
    params, _ = bnp_optax.start_in_zspace(loss_fn, z, [(x, Y[0])])
    kernel = params["first"]["kernel"] / z["first"]["kernel"]
    np.testing.assert_allclose(kernel[:, 0], [1 / x[:, 0].std(), 1e-4, 1.0], rtol=1e-5)
    out = Net().apply({"params": params}, x)
    other = Net().apply({"params": params}, x.at[:, 1].set(1e4 * (1 + 1e-6)))
    np.testing.assert_allclose(out, other, atol=1e-3)


def test_a_layer_without_a_bias_is_divided_by_the_root_mean_square():
    model = Net(use_bias=False)

    def loss_fn(params, x):
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    x = in_units(UNITS[0])[0]
    z = model.init(jax.random.key(0), x)["params"]
    params, _ = bnp_optax.start_in_zspace(loss_fn, z, [x])
    kernel = params["first"]["kernel"] / z["first"]["kernel"]
    np.testing.assert_allclose(kernel[:, 0], 1 / np.sqrt(np.mean(x**2, 0)), rtol=1e-4)


def test_of_nnx():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graph, z = nnx.split(model)
    x = in_units(UNITS[1])[0]

    def loss_fn(params, x):
        return jnp.mean(nnx.merge(graph, params)(x) ** 2)

    params, _ = bnp_optax.start_in_zspace(loss_fn, z, [x])
    out = nnx.merge(graph, params)(x)
    wanted = model((x - x.mean(0, keepdims=True)) / x.std(0, keepdims=True))
    np.testing.assert_allclose(out, wanted, atol=1e-4)


def test_errors():
    params = Net().init(jax.random.key(0), X[0])["params"]
    with pytest.raises(ValueError, match="`batches` is empty"):
        bnp_optax.start_in_zspace(loss_fn, params, [])


@pytest.mark.parametrize("option", [{"warm_start": True}, {"shrinkage": 0.0}, {}])
def test_with_the_options_of_the_docstring_p_is_held_from_the_first_step(option):
    x = jnp.array([[0.0, 0.0], [100.0, 1e6]])
    z = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}

    def loss_fn(params, x):
        return jnp.mean(nn.Dense(3).apply({"params": params}, x) ** 2)

    params, fixed = bnp_optax.start_in_zspace(loss_fn, z, [x])
    _, grads, stats = bnp_optax.value_and_grad(loss_fn, fixed=fixed)(params, x)
    exact = bnp_optax.bnp(eps_rel=1e-8, eps_abs=0.0, scale=False, **option)
    tx = bnp_optax.precondition(exact)
    first, state = tx.update(grads, tx.init(params), params, layer_stats=stats)
    second, _ = tx.update(grads, state, params, layer_stats=stats)
    ratio = first["kernel"] / second["kernel"]
    if option:
        np.testing.assert_allclose(ratio, 1.0, rtol=1e-4)
    else:
        assert float(ratio.min()) > 1.5
