"""Derivatives by the inputs in the loss: rows are those of the points, and each counts once."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from support.capture_checks import (
    FRAMEWORKS,
    PARAMS,
    assert_nothing_is_lost,
    assert_rows,
    mean_square,
    normal,
)
from support.capture_checks import X as ROWS
from support.capture_networks import NETWORKS, OPERATORS, X, check, derivative_loss


@pytest.fixture(autouse=True)
def user_code():
    """Equinox and Haiku add biases to batches, as most code does."""
    with jax.numpy_rank_promotion("allow"):
        yield


FEW = ["grad", "hessian", "jvp", "linearize"]
WITH_BIAS = ["linen", "plain"]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["linen", "linen, no bias", "plain"])
def test_values_and_derivatives_at_the_same_points(name, operator):
    network = NETWORKS[name]()
    # In Taylor mode JAX computes tanh by another formula, so what the second layer meets there are
    # other rows than those for the values: then the derivative is taken alone.
    weight = 0.0 if operator == "Taylor mode" else 1.0
    check(network, derivative_loss(network, OPERATORS[operator], weight))


@pytest.mark.parametrize("operator", OPERATORS)
def test_without_a_bias_and_a_mark_the_count_is_right_or_there_is_a_reason(operator):
    """Nothing tells such a product from that of a tangent but where its rows come from."""
    network = NETWORKS["plain, no bias"]()
    loss_fn = derivative_loss(network, OPERATORS[operator])
    check(network, loss_fn, only_if_covered=network.kernels)


@pytest.mark.parametrize("operator", FEW)
@pytest.mark.parametrize("name", ["nnx", "equinox", "haiku"])
def test_other_frameworks(name, operator):
    network = NETWORKS[name]()
    check(network, derivative_loss(network, OPERATORS[operator]))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["linen", "linen, no bias", "plain"])
def test_derivatives_alone(name, operator):
    """The last layer's outputs do not enter the loss, its kernel does, with other factors."""
    network = NETWORKS[name]()
    loss_fn = derivative_loss(network, OPERATORS[operator], weight=0.0)
    check(network, loss_fn, only_if_covered=network.kernels[1:])


WRAPPERS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "jit of checkpoint": lambda u: jax.jit(jax.checkpoint(u)),
    "checkpoint with a policy": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable
    ),
}


@pytest.mark.parametrize("operator", FEW)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", WITH_BIAS)
def test_of_a_network_inside_a_call(name, wrapper, operator):
    network = NETWORKS[name]()
    check(network, derivative_loss(network, OPERATORS[operator], wrap=WRAPPERS[wrapper]))


@pytest.mark.parametrize("name", [*WITH_BIAS, "linen, no bias", "nnx"])
def test_a_gradient_of_the_whole_batch(name):
    """Energy and force, without `vmap`."""
    network = NETWORKS[name]()

    def loss_fn(p, x):
        energy = lambda x: jnp.sum(network.head(p, network.hidden(p, x)))  # noqa: E731
        value, force = jax.value_and_grad(energy)(x)
        return value**2 / 16 + jnp.mean(force**2)

    check(network, loss_fn)


@pytest.mark.parametrize("name", [*WITH_BIAS, "linen, no bias"])
def test_points_of_the_interior_and_of_the_boundary_add_up(name):
    """A heat equation: u, u_t and u_xx at the same 16 points, u at 8 others."""
    network, boundary = NETWORKS[name](), normal(5, 8, 3) - 1

    def loss_fn(p, inside, boundary):
        u = functools.partial(network, p)
        slope = lambda row, axis: jax.grad(u)(row)[axis]  # noqa: E731
        u_t = jax.vmap(lambda row: slope(row, 0))(inside)
        u_xx = jax.vmap(lambda row: jax.grad(slope)(row, 1)[1])(inside)
        source = jax.vmap(u)(inside)
        return jnp.mean((u_t - u_xx - source) ** 2) + jnp.mean(jax.vmap(u)(boundary) ** 2)

    stats, _ = assert_nothing_is_lost(loss_fn, network.params, X, boundary)
    for name, *rows in zip(network.kernels, network.rows(X), network.rows(boundary), strict=True):
        assert_rows(stats[name], *rows)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_same_rows_again_do_not_count_again(framework):
    f = FRAMEWORKS[framework]
    params = PARAMS
    if framework == "nnx":
        params = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)

    def loss_fn(p):
        return mean_square(f, p) + jnp.mean(jnp.sin(f(p, ROWS)))

    stats, _ = assert_nothing_is_lost(loss_fn, params)
    assert_rows(stats["kernel"], ROWS)
