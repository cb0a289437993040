"""Derivatives in the loss of scans, of mapped variables and by the parameters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support.capture_checks import (
    assert_covered_or_said,
    assert_nothing_is_lost,
    assert_rows,
    assert_trees,
    normal,
)
from support.capture_networks import NETWORKS, OPERATORS, X, check, derivative_loss

import bnp_optax

FEW = ["grad", "hessian", "jvp", "linearize"]


@pytest.fixture(autouse=True)
def user_code():
    """Equinox and Haiku add biases to batches, as most code does."""
    with jax.numpy_rank_promotion("allow"):
        yield


class Scanned(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return jnp.tanh(nn.Dense(3, name="dense")(x)), None

        block = nn.remat(Block) if self.remat else Block
        over = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(1, name="head")(over(name="blocks")(x, None)[0])[0]


def scan_linen(remat):
    model = Scanned(remat)
    params = model.init(jax.random.key(0), X[0])["params"]
    u = lambda p, row: model.apply({"params": p}, row)  # noqa: E731
    return params, u, ("blocks/dense/kernel", "head/kernel"), params["blocks"]["dense"]


def scan_plain(remat):
    stack = {"kernel": normal(1, 2, 3, 3), "bias": normal(2, 2, 3)}
    params = {"blocks": stack, "head": {"kernel": normal(3, 3, 1), "bias": normal(4, 1)}}

    def u(p, row):
        body = lambda h, layer: (jnp.tanh(h @ layer["kernel"] + layer["bias"]), None)  # noqa: E731
        h, _ = lax.scan(jax.checkpoint(body) if remat else body, row, p["blocks"])
        return (h @ p["head"]["kernel"] + p["head"]["bias"])[0]

    return params, u, ("blocks/kernel", "head/kernel"), stack


@pytest.mark.parametrize("operator", FEW)
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("make", [scan_linen, scan_plain])
def test_a_scan_over_layers_inside(make, remat, operator):
    params, u, (blocks, head), stack = make(remat)
    loss_fn = derivative_loss(u, OPERATORS[operator])
    stats, _ = assert_nothing_is_lost(loss_fn, params, X, kernels=(blocks, head))
    x = X
    for i in range(2):
        assert_rows(jax.tree.map(lambda a: a[i] if a.ndim else a, stats[blocks]), x)  # noqa: B023
        x = jnp.tanh(x @ stack["kernel"][i] + stack["bias"][i])
    assert_rows(stats[head], x)


@pytest.mark.parametrize("name", ["linen", "linen, no bias", "plain"])
def test_norms_of_leaves_beside_a_derivative(name):
    network = NETWORKS[name]()
    residual = derivative_loss(network, OPERATORS["hessian"])

    def loss_fn(p, x):
        return residual(p, x) + 0.1 * sum(jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(p))

    check(network, loss_fn)


BY_PARAMETERS = {
    "jacrev": lambda loss, p: jax.jacrev(loss)(p),
    "jacfwd": lambda loss, p: jax.jacfwd(loss)(p),
    "hessian": lambda loss, p: jax.hessian(loss)(p),
    "jvp": lambda loss, p: jax.jvp(loss, (p,), (jax.tree.map(jnp.ones_like, p),)),
    "linearize": lambda loss, p: jax.linearize(loss, p)[1](jax.tree.map(jnp.ones_like, p)),
}


@pytest.mark.parametrize("operator", BY_PARAMETERS)
@pytest.mark.parametrize("name", ["linen", "linen, no bias", "plain"])
def test_derivatives_by_the_parameters(name, operator):
    network = NETWORKS[name]()

    def loss_fn(p, x):
        square = lambda p: jnp.mean(jax.vmap(functools.partial(network, p))(x) ** 2)  # noqa: E731
        inner = jax.tree.leaves(BY_PARAMETERS[operator](square, p))
        return square(p) + sum(jnp.sum(leaf**2) for leaf in inner)

    stats, reasons = assert_nothing_is_lost(loss_fn, network.params, X, kernels=network.kernels)
    for name, rows in zip(network.kernels, network.rows(X), strict=True):
        assert_covered_or_said(stats, reasons, name, rows)


def test_a_captured_gradient_has_derivatives_of_every_mode():
    """Hessians of the loss by the captured gradient, as `jax.value_and_grad` gives them."""
    network = NETWORKS["linen"]()
    loss_fn = derivative_loss(network, OPERATORS["grad"])
    ours = lambda p: bnp_optax.value_and_grad(loss_fn)(p, X)[1]  # noqa: E731
    theirs = lambda p: jax.grad(loss_fn)(p, X)  # noqa: E731
    for mode in (jax.jacfwd, jax.jacrev, lambda f: lambda p: jax.linearize(f, p)[1](p)):
        assert_trees(mode(ours)(network.params), mode(theirs)(network.params), 1e-5)


MAPPED = {
    "normalized columns": lambda a: a / jnp.linalg.norm(a, axis=0, keepdims=True),
    "centered": lambda a: a - a.mean(0, keepdims=True),
    "reversed and added": lambda a: a + a[::-1],
    "squared": jnp.square,
}


@pytest.mark.parametrize("operator", ["value_and_grad", "jvp"])
@pytest.mark.parametrize("name", MAPPED)
def test_mapped_variables_are_not_covered_with_a_reason(name, operator):
    """What Linen's layer gets is not what `params` holds."""

    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            def on_kernels(variables):
                return jax.tree.map(lambda a: MAPPED[name](a) if a.ndim > 1 else a, variables)

            dense = nn.map_variables(nn.Dense, "params", on_kernels, init=True)
            return nn.Dense(1, name="head")(jnp.tanh(dense(5, name="mapped")(x)))[0]

    model = Mapped()
    params = model.init(jax.random.key(0), X[0])["params"]
    loss_fn = derivative_loss(lambda p, row: model.apply({"params": p}, row), OPERATORS[operator])
    stats, reasons = assert_nothing_is_lost(loss_fn, params, X)
    assert stats["head/kernel"].count == 16
    assert reasons["mapped/kernel"]
