"""`layers=`: from `find_layers`, by name, or by a condition on names."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax

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
CHOICES = {
    "part of find_layers": {FIRST: FOUND[FIRST]},
    "a list": [FIRST],
    "a set": {FIRST},
    "a condition": lambda name: name.startswith("layers_0"),
}


@pytest.mark.parametrize("how", CHOICES)
def test_the_chosen_layer_is_preconditioned_and_no_other(how):
    grads, updates = updates_with(CHOICES[how])
    _, everywhere = updates_with(None)
    for one, two in (("layers_0", everywhere), ("layers_2", grads)):
        np.testing.assert_array_equal(updates[one]["kernel"], two[one]["kernel"])
        np.testing.assert_array_equal(updates[one]["bias"], two[one]["bias"])
    assert (updates["layers_0"]["kernel"] != grads["layers_0"]["kernel"]).any()


def test_no_layer_chosen_changes_nothing():
    for none in ([], {}, lambda name: False):
        grads, updates = updates_with(none)
        jax.tree.map(np.testing.assert_array_equal, updates, grads)


def test_a_choice_serves_the_ready_made_optimizers_and_inject_hyperparams():
    tx = optax.inject_hyperparams(bnp_optax.bnp_sgd, static_args=("layers",))(0.1, layers=[FIRST])
    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, layer_stats=stats)
    np.testing.assert_allclose(
        updates["layers_2"]["kernel"], -0.1 * grads["layers_2"]["kernel"], rtol=1e-6
    )


def test_a_name_that_is_not_there():
    with pytest.raises(ValueError, match="`layers` has `layers_9/kernel`, which the parameters"):
        bnp_optax.bnp_precondition(layers=["layers_9/kernel"]).init(PARAMS)


def test_a_name_that_does_not_tell_how_inputs_meet_the_leaf():
    message = r"`layers` names `w1`, of which the name does not tell .* `bnp_optax\.find_layers"
    with pytest.raises(ValueError, match=message):
        bnp_optax.bnp_precondition(layers=["w1"]).init(PLAIN)


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

    with pytest.raises(ValueError, match="`kernel` has the bias `b`, which its name does not tell"):
        updates_with(None, loss=loss, params=params)
    grads, updates = updates_with(bnp_optax.find_layers(loss, params), loss=loss, params=params)
    assert (updates["b"] != grads["b"]).any()
    np.testing.assert_array_equal(updates["bias"], grads["bias"])


def test_submodules_are_there_without_an_import_of_their_own():
    assert bnp_optax.flax_nnx.value_and_grad is not bnp_optax.value_and_grad
    with pytest.raises(AttributeError, match="module 'bnp_optax' has no attribute 'nothing'"):
        _ = bnp_optax.nothing
