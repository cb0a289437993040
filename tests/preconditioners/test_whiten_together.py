"""Layers of one shape are decomposed at once, in one branch, and only those that are due change."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnp_optax
from bnp_optax.preconditioners import running_covariance

WIDTH, DEPTH, ROWS = 6, 4, 32


def network() -> dict:
    keys = jax.random.split(jax.random.key(0), DEPTH)
    return {
        f"layer{i}": {
            "kernel": jax.random.normal(key, (WIDTH, WIDTH)) / 3.0,
            "bias": jnp.zeros(WIDTH),
        }
        for i, key in enumerate(keys)
    }


def loss_fn(params, x):
    for i in range(DEPTH):
        x = jnp.tanh(x @ params[f"layer{i}"]["kernel"] + params[f"layer{i}"]["bias"][None])
    return jnp.mean(x**2)


def batches(n: int) -> jax.Array:
    mix = jnp.eye(WIDTH) + 0.3
    return jax.random.normal(jax.random.key(1), (n, ROWS, WIDTH)) @ mix + 2.0


def captured(params, x):
    return bnp_optax.value_and_grad(loss_fn, second_moments=True)(params, x)[1:]


def decompositions(jaxpr) -> list:
    """The shapes of what each branch decomposes, a list for each `cond` with a decomposition.

    On a GPU: a choice by platform has the CPU's way first, and everyone else's last.
    """
    found, here, platforms = [], [], set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "platform_index":
            platforms |= set(eqn.outvars)
        if eqn.primitive.name == "cond" and eqn.invars[0] in platforms:
            here += itertools.chain(*decompositions(eqn.params["branches"][-1].jaxpr))
            continue
        if eqn.primitive.name == "eigh":
            here.append(eqn.outvars[0].aval.shape)
        within = [
            shapes
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr)
            if is_jaxpr(inner)
            for shapes in decompositions(getattr(inner, "jaxpr", inner))
        ]
        if eqn.primitive.name == "cond":
            found += [list(itertools.chain(*within))] if within else []
        else:
            here += itertools.chain(*within)
    return [*found, *([here] if here else [])]


def is_jaxpr(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def traced(params, **options) -> list:
    whiten = bnp_optax.whiten(**options)
    grads, stats = captured(params, batches(1)[0])
    return decompositions(
        jax.make_jaxpr(lambda g, s, st: whiten.update(g, s, layer_stats=st))(
            grads, whiten.init(params), stats
        ).jaxpr
    )


def test_one_branch_decomposes_all_layers_of_a_shape():
    assert traced(network()) == [[(DEPTH, WIDTH, WIDTH)]]


def test_no_more_are_decomposed_at_once_than_fit(monkeypatch):
    jax.clear_caches()  # Of what the other test traced.
    monkeypatch.setattr(running_covariance, "_AT_ONCE", 3 * WIDTH**2)
    assert traced(network()) == [[(3, WIDTH, WIDTH), (WIDTH, WIDTH)]]


@pytest.mark.parametrize("max_fan_in", [1024, 4])
def test_each_layer_is_decomposed_as_if_it_were_alone(max_fan_in):
    params = network()
    options = {"max_fan_in": max_fan_in, "rank": 2, "refresh_every": 3}
    together = bnp_optax.whiten(**options)
    layers = bnp_optax.find_layers(loss_fn, params, batches(1)[0])
    alone = {
        name: bnp_optax.whiten(layers={kernel: layers[kernel]}, **options)
        for name in params
        for kernel in [f"{name}/kernel"]
    }
    states = {name: tx.init(params) for name, tx in alone.items()}
    state = together.init(params)
    for x in batches(7):
        grads, stats = captured(params, x)
        state = together.update(grads, state, layer_stats=stats)
        for name, tx in alone.items():
            one = {f"{name}/kernel": stats[f"{name}/kernel"]}
            states[name] = tx.update(grads, states[name], layer_stats=one)
    p = together.operator(state).mv(params)
    for name, tx in alone.items():
        one = tx.operator(states[name]).mv(params)[name]
        for leaf in ("kernel", "bias"):
            np.testing.assert_allclose(p[name][leaf], one[leaf], rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_not_due_keeps_its_eigenvectors():
    params = network()
    whiten = bnp_optax.whiten()
    grads, stats = captured(params, batches(1)[0])
    first = whiten.update(grads, whiten.init(params), layer_stats=stats)
    # Of a second batch that is not finite in one layer, the others' is their second.
    grads, stats = captured(params, 3.0 * batches(2)[1])
    bad = jax.tree.map(lambda x: x * jnp.nan, stats["layer1/kernel"])
    stats = stats | {"layer1/kernel": bad}
    second = whiten.update(grads, first, layer_stats=stats)
    for name in params:
        before, after = (s.vectors[name]["kernel"] for s in (first, second))
        assert bool(jnp.all(before == after)) == (name == "layer1"), name
