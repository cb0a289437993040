"""`layers=`: what `find_layers` returns, or a part of it; layouts that names do not tell."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import oracles

import bnp_optax
from bnp_optax import Layer, LayerStats

X = jax.random.normal(jax.random.key(0), (6, 3)) * 3 + 1
MODEL = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)])
PARAMS = MODEL.init(jax.random.key(1), X)["params"]
FIRST, SECOND = "layers_0/kernel", "layers_2/kernel"
PLAIN = {"w1": jnp.ones((3, 2)), "b1": jnp.zeros(2), "head": {"kernel": jnp.ones((2, 1))}}


def loss_fn(params):
    return jnp.mean((MODEL.apply({"params": params}, X) - 1.0) ** 2)


def plain_loss(params):
    hidden = jnp.tanh(X @ params["w1"] + params["b1"][None])
    return jnp.mean((hidden @ params["head"]["kernel"]) ** 2)


def updates_with(layers, loss=loss_fn, params=PARAMS):
    _, grads, stats = bnp_optax.value_and_grad(loss)(params)
    tx = bnp_optax.bnp_precondition(layers=layers)
    return grads, tx.update(grads, tx.init(params), params, layer_stats=stats)[0]


FOUND = bnp_optax.find_layers(loss_fn, PARAMS)
CHOSEN = {FIRST: FOUND[FIRST]}


def test_the_chosen_layer_is_preconditioned_and_no_other():
    grads, updates = updates_with(CHOSEN)
    _, everywhere = updates_with(None)
    for one, two in (("layers_0", everywhere), ("layers_2", grads)):
        np.testing.assert_array_equal(updates[one]["kernel"], two[one]["kernel"])
        np.testing.assert_array_equal(updates[one]["bias"], two[one]["bias"])
    assert (updates["layers_0"]["kernel"] != grads["layers_0"]["kernel"]).any()


def test_no_layer_chosen_changes_nothing():
    grads, updates = updates_with({})
    jax.tree.map(np.testing.assert_array_equal, updates, grads)


@pytest.mark.parametrize(
    ("layers", "got"),
    [
        ([FIRST], "got a `list`"),
        ({FIRST}, "got a `set`"),
        (lambda name: True, "got a `function`"),
        ({FIRST: "bias"}, "got a dict with a `str` for `layers_0/kernel`"),
    ],
)
def test_layers_that_are_no_dict_of_layers(layers, got):
    with pytest.raises(
        ValueError, match=f"`layers` must be a dict of .*{got}.* filter those of `layers"
    ):
        bnp_optax.bnp(layers=layers)


def test_a_choice_serves_the_ready_made_optimizers_and_inject_hyperparams():
    tx = optax.inject_hyperparams(bnp_optax.bnp_sgd, static_args=("layers",))(0.1, layers=CHOSEN)
    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, layer_stats=stats)
    np.testing.assert_allclose(
        updates["layers_2"]["kernel"], -0.1 * grads["layers_2"]["kernel"], rtol=1e-6
    )


def test_a_name_that_is_not_there():
    with pytest.raises(ValueError, match="`layers` has `layers_9/kernel`, which the parameters"):
        bnp_optax.bnp_precondition(layers={"layers_9/kernel": FOUND[FIRST]}).init(PARAMS)


def test_find_layers_serves_parameters_of_any_name():
    grads, updates = updates_with(
        bnp_optax.find_layers(plain_loss, PLAIN), loss=plain_loss, params=PLAIN
    )
    assert (updates["w1"] != grads["w1"]).any()
    assert (updates["b1"] != grads["b1"]).any()
    with pytest.raises(ValueError, match="`layer_stats` has `w1`, which is not named `kernel`"):
        updates_with(None, loss=plain_loss, params=PLAIN)


def test_a_bias_that_the_name_does_not_tell():
    params = {"kernel": jnp.ones((3, 2)), "b": jnp.zeros(2), "bias": jnp.zeros(2)}

    def loss(p):
        return jnp.mean((X @ p["kernel"] + p["b"][None]) ** 2)

    message = (
        "`kernel` has the bias `b` .*shape .3, 2. tell of the bias `bias`.* Pass `layers=bnp_o"
    )
    with pytest.raises(ValueError, match=message):
        updates_with(None, loss=loss, params=params)
    grads, updates = updates_with(bnp_optax.find_layers(loss, params), loss=loss, params=params)
    assert (updates["b"] != grads["b"]).any()
    np.testing.assert_array_equal(updates["bias"], grads["bias"])


def stats_of(layer, count, x):
    """Statistics of inputs (rows, features), or (rows, layers, features) of stacked layers."""
    shape = layer.stats_shape
    if x.ndim == 3 and layer.input_axes == (-3,):
        x = x.transpose(0, 2, 1)
    mean, var = x.mean(0).reshape(shape), x.var(0).reshape(shape)
    return LayerStats.of_batch(jnp.asarray(mean), jnp.asarray(var), jnp.float32(count), layer)


def preconditioned(params, grads, layer, x, layers):
    tx = bnp_optax.bnp_precondition(decay=0.0, layers=layers)
    given = {layer.kernel: stats_of(layer, len(x), x)}
    return tx.update(grads, tx.init(params), params, layer_stats=given)[0]


def in_float32(*arrays):
    return [np.asarray(array, np.float32) for array in arrays]


@pytest.mark.parametrize("shape", [(4, 3), (3, 3)])
def test_a_kernel_in_the_layout_of_pytorch(shape):
    rng = np.random.default_rng(0)
    x, g_w, g_b = in_float32(
        rng.normal(size=(9, 3)) * [1, 2, 4] + 1, rng.normal(size=shape), rng.normal(size=shape[0])
    )
    params = {"kernel": jnp.ones(shape), "bias": jnp.ones(shape[0])}
    grads = {"kernel": jnp.asarray(g_w), "bias": jnp.asarray(g_b)}
    layer = Layer("kernel", "bias", (-1,), kernel_shape=shape)
    updates = preconditioned(params, grads, layer, x, {"kernel": layer})
    running = oracles.initial(3)
    _, want_w, want_b = oracles.algorithm_2(running, x, g_w.T, g_b, oracles.Options(decay=0.0))
    np.testing.assert_allclose(updates["kernel"], want_w.T, rtol=2e-5)
    np.testing.assert_allclose(updates["bias"], want_b, rtol=2e-5, atol=1e-6)
    message = "The statistics say that `kernel` has the bias `bias`.* Pass `layers=bnp_optax.find"
    with pytest.raises(ValueError, match=message):
        preconditioned(params, grads, layer, x, None)


def test_layers_stacked_on_axis_one_are_those_stacked_on_axis_zero():
    rng = np.random.default_rng(1)
    x, g_w, g_b = in_float32(
        rng.normal(size=(9, 2, 3)) * [1, 2, 4] + 1,
        rng.normal(size=(2, 3, 4)),
        rng.normal(size=(2, 4)),
    )
    first = Layer("kernel", "bias", (-2,), stats_axes=(-3, -2), kernel_shape=(2, 3, 4))
    second = dataclasses.replace(
        first,
        input_axes=(-3,),
        bias_axes=(-1, -2),
        kernel_shape=(3, 2, 4),
    )
    one = {"kernel": jnp.asarray(g_w), "bias": jnp.asarray(g_b)}
    two = {"kernel": one["kernel"].transpose(1, 0, 2), "bias": one["bias"].T}
    a = preconditioned(one, one, first, x, {"kernel": first})
    for by_name in (None, {"kernel": first}):
        again = preconditioned(one, one, first, x, by_name)
        jax.tree.map(np.testing.assert_array_equal, a, again)
    b = preconditioned(two, two, second, x, {"kernel": second})
    np.testing.assert_allclose(b["kernel"].transpose(1, 0, 2), a["kernel"], rtol=1e-6)
    np.testing.assert_allclose(b["bias"].T, a["bias"], rtol=1e-6, atol=1e-6)
    running = oracles.initial(3)
    for i in range(2):
        _, want_w, want_b = oracles.algorithm_2(
            running, x[:, i], g_w[i], g_b[i], oracles.Options(decay=0.0)
        )
        np.testing.assert_allclose(a["kernel"][i], want_w, rtol=2e-5)
        np.testing.assert_allclose(a["bias"][i], want_b, rtol=2e-5, atol=1e-6)
    with pytest.raises(ValueError, match="The statistics say that `kernel` has the bias `bias`"):
        preconditioned(two, two, second, x, None)


def test_half_a_layer_is_frozen_by_partition_and_not_by_a_zero_gradient():
    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(PARAMS)
    frozen = grads | {"layers_0": grads["layers_0"] | {"bias": jnp.zeros(4)}}
    tx = bnp_optax.bnp_sgd(0.1, warm_start=True)
    updates, _ = tx.update(frozen, tx.init(PARAMS), PARAMS, layer_stats=stats)
    assert (jnp.abs(updates["layers_0"]["bias"]) > 1e-6).all()
    labels = jax.tree.map(lambda _: "train", PARAMS)
    labels["layers_0"]["bias"] = "freeze"
    tx = optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, layer_stats=stats)
    np.testing.assert_array_equal(updates["layers_0"]["bias"], 0.0)
    assert (updates["layers_0"]["kernel"] != 0.0).any()


def test_submodules_are_there_without_an_import_of_their_own():
    assert bnp_optax.flax_nnx.value_and_grad is not bnp_optax.value_and_grad
    with pytest.raises(AttributeError, match="module 'bnp_optax' has no attribute 'nothing'"):
        _ = bnp_optax.nothing
