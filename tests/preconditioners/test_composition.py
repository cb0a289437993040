"""`compose`: statistics of a layer are kept in one of the two preconditioners only."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax import bnp, compose, mean_activation, rms, whiten

X = jax.random.normal(jax.random.key(1), (64, 3)) * jnp.array([[1.0, 9.0, 0.2]]) + 5.0
MODEL = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)])
PARAMS = MODEL.init(jax.random.key(0), X)["params"]
FIRST, SECOND = "layers_0/kernel", "layers_2/kernel"


def loss_fn(params):
    return jnp.mean((MODEL.apply({"params": params}, X) - 1.0) ** 2)


LAYERS = bnp_optax.find_layers(loss_fn, PARAMS)
KEEPING = {"bnp": bnp, "whiten": whiten, "mean_activation": mean_activation}


@pytest.mark.parametrize("inner", KEEPING)
@pytest.mark.parametrize("outer", KEEPING)
def test_two_that_keep_statistics_of_one_layer_are_refused(outer, inner):
    one, two = KEEPING[outer](), KEEPING[inner](layers={SECOND: LAYERS[SECOND]})
    both = compose(one, two)
    message = f"keep statistics of `{SECOND}`: .*Take one of the two, or give each its own layers"
    with pytest.raises(ValueError, match=message):
        both.init(PARAMS)
    with pytest.raises(ValueError, match=message):
        compose(rms(), both).init(PARAMS)
    with pytest.raises(ValueError, match=message):
        compose(compose(two, rms()), one).init(PARAMS)


@pytest.mark.parametrize("inner", KEEPING)
@pytest.mark.parametrize("outer", KEEPING)
def test_each_in_its_own_layers_is_what_it_is_alone(outer, inner):
    _, grads, stats = bnp_optax.value_and_grad(loss_fn, second_moments=True)(PARAMS)

    def updated(preconditioner):
        tx = bnp_optax.precondition(preconditioner)
        return tx.update(grads, tx.init(PARAMS), PARAMS, layer_stats=stats)[0]

    one = KEEPING[outer](layers={FIRST: LAYERS[FIRST]})
    two = KEEPING[inner](layers={SECOND: LAYERS[SECOND]})
    both = updated(compose(one, two))
    expected = {**updated(one), "layers_2": updated(two)["layers_2"]}
    for a, b in zip(*map(jax.tree.leaves, (both, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_adaptive_one_behind_is_allowed():
    compose(bnp(), rms()).init(PARAMS)
    compose(rms(), whiten()).init(PARAMS)


def test_placeholders_for_parameters_have_no_layers():
    tx = bnp_optax.in_zspace(optax.sgd(0.1), compose(bnp(), rms()))
    state = tx.init(PARAMS)
    moved = optax.tree.map_params(tx, lambda x: x + 1.0, state)
    assert jax.tree.structure(moved) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("make", "argument"),
    [(lambda: compose(bnp, rms()), "outer"), (lambda: compose(bnp(), optax.adam(1.0)), "inner")],
)
def test_something_else_than_a_preconditioner(make, argument):
    with pytest.raises(ValueError, match=f"`{argument}` must be a `Preconditioner`, such as"):
        make()
