"""A bias is a layer's only if its entries lie as the kernel's columns do where they are added."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from support.capture_checks import normal

import bnp_optax

X = normal(0, 6, 3)
W, B, V = normal(1, 3, 4), normal(2, 4), normal(3, 4, 2)


@pytest.fixture(autouse=True)
def broadcasting():
    """As users add biases."""
    with jax.numpy_rank_promotion("allow"):
        yield


def bias_of(f, params=None):
    params = {"w": W, "b": B} if params is None else params
    return bnp_optax.find_layers(lambda p: jnp.mean(jnp.tanh(f(p)) ** 2), params)["w"].bias


def by_heads(x, order):
    """The last axis as two by two, in another order of these, and as one again."""
    return x.reshape(*x.shape[:-1], 2, 2).transpose(order).reshape(x.shape)


OTHER_COLUMNS = {
    "result reversed": lambda p: (X @ p["w"])[:, ::-1] + p["b"],
    "kernel reversed": lambda p: X @ p["w"][:, ::-1] + p["b"],
    "bias reversed": lambda p: X @ p["w"] + p["b"][::-1],
    "kernel rolled": lambda p: X @ jnp.roll(p["w"], 1, 1) + p["b"],
    "result shuffled": lambda p: by_heads(X @ p["w"], (0, 2, 1)) + p["b"],
    "kernel shuffled": lambda p: X @ by_heads(p["w"], (0, 2, 1)) + p["b"],
    "halves exchanged": lambda p: jnp.concatenate(
        [X @ p["w"][:, :2] + p["b"][2:], X @ p["w"][:, 2:] + p["b"][:2]], 1
    ),
    "in a function": lambda p: jax.jit(lambda y, b: y[:, ::-1] + b)(X @ p["w"], p["b"]),
    "before a function": lambda p: jax.jit(lambda w, b: X @ w + b)(p["w"][:, ::-1], p["b"]),
}
SAME_COLUMNS = {
    "as they are": lambda p: X @ p["w"] + p["b"],
    "both reversed": lambda p: X @ p["w"][:, ::-1] + p["b"][::-1],
    "result and bias reversed": lambda p: (X @ p["w"])[:, ::-1] + p["b"][::-1],
    "both shuffled": lambda p: by_heads(X @ p["w"], (0, 2, 1)) + by_heads(p["b"], (1, 0)),
    "heads moved": lambda p: (
        (X @ p["w"]).reshape(6, 2, 2).transpose(1, 0, 2) + p["b"].reshape(2, 1, 2)
    ),
    "halves": lambda p: jnp.concatenate(
        [X @ p["w"][:, :2] + p["b"][:2], X @ p["w"][:, 2:] + p["b"][2:]], 1
    ),
    "inputs reversed": lambda p: X @ p["w"][::-1] + p["b"],
    "in a function": lambda p: jax.jit(lambda y, b: y[:, ::-1] + b[::-1])(X @ p["w"], p["b"]),
    "before a function": lambda p: jax.jit(lambda w, b: X @ w + b)(p["w"][:, ::-1], p["b"][::-1]),
}


@pytest.mark.parametrize("name", OTHER_COLUMNS)
def test_columns_that_lie_otherwise_have_no_bias(name):
    assert bias_of(OTHER_COLUMNS[name]) is None


@pytest.mark.parametrize("name", SAME_COLUMNS)
def test_columns_that_lie_alike_have_one(name):
    assert bias_of(SAME_COLUMNS[name]) == "b"


def stacked(order):
    params = {"w": normal(4, 2, 3, 3), "b": normal(5, 2, 3)}

    def f(p):
        x = X
        for i, j in enumerate(order):
            x = jnp.tanh(x @ p["w"][i] + p["b"][j])
        return x

    return bias_of(f, params)


def test_layers_of_a_stack_have_their_own_biases():
    assert stacked((0, 1)) == "b"
    assert stacked((1, 0)) is None


def test_ensemble_of_convolutions_has_its_biases():
    ensemble = nn.vmap(
        nn.Conv, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0
    )(4, (3, 3))
    x = normal(6, 2, 5, 6, 6, 3)
    params = ensemble.init(jax.random.key(0), x)["params"]
    layers = bnp_optax.find_layers(
        lambda p: jnp.mean(ensemble.apply({"params": p}, x) ** 2), params
    )
    assert layers["kernel"].bias == "bias"
    _, _, stats = bnp_optax.value_and_grad(lambda p: jnp.mean(ensemble.apply({"params": p}, x)))(
        params
    )
    mean = stats["kernel"].mean[:, 0, 0, :, 0]
    assert jnp.allclose(mean, x.mean((1, 2, 3)), atol=1e-6)
