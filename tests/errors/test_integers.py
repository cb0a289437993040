"""Integers among the parameters stay as they are, whatever came before made of their updates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.contract_problems import READY_MADE, TRANSFORMATIONS, make

import bnp_optax
from bnp_optax import bnp

X = jax.random.normal(jax.random.key(1), (8, 3)) + 2.0
# In float32, 16777217 + 0.0 is 16777216. A leaf named `kernel` is no layer if it is of integers.
INTEGERS = {
    "table": {"kernel": jnp.array([[16777217, 2], [-3, 4]])},
    "flags": jnp.array([True, False]),
}
REAL = {"real": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
PARAMS = REAL | INTEGERS


def loss_fn(params: Any) -> jax.Array:
    return jnp.mean((X @ params["real"]["kernel"] + params["real"]["bias"][None]) ** 2)


def grad_fn(params: Any) -> Any:
    real = jax.grad(loss_fn)({"real": params["real"]})
    return jax.tree.map(jnp.zeros_like, params) | real


_, _, STATS = bnp_optax.value_and_grad(loss_fn, second_moments=True)(REAL)
GRADS = grad_fn(PARAMS)
# What a transformation may have for gradients of integers.
CAME = {
    "integers": GRADS,
    "floats": GRADS | jax.tree.map(lambda p: jnp.zeros(p.shape), INTEGERS),
}
IN_Z = {
    **{name: lambda name=name: make(name) for name in READY_MADE},
    "adamw": lambda: bnp_optax.in_zspace(optax.adamw(0.1, weight_decay=0.1), bnp()),
    "muon": lambda: bnp_optax.in_zspace(optax.contrib.muon(0.1), bnp()),
    "rms": lambda: bnp_optax.in_zspace(optax.adamw(0.1), bnp_optax.rms()),
    "whiten_adam, decay": lambda: bnp_optax.whiten_adam(0.1, weight_decay=0.1),
    "momentum before": lambda: bnp_optax.in_zspace(optax.sgd(0.1), bnp(), before=optax.ema(0.9)),
}
# They hand on what came for integers.
PASSING = {
    **{name: lambda name=name: make(name) for name in TRANSFORMATIONS if name not in READY_MADE},
    "momentum, precondition": lambda: bnp_optax.precondition(bnp(), before=optax.ema(0.9)),
    "l1 of all": lambda: bnp_optax.proximal_l1(1.0, 1.0, True),
    "decay of all": lambda: bnp_optax.zspace_weight_decay(0.1, True),
}
PASSING = {name: make for name, make in PASSING.items() if not name.startswith("in_zspace")}


def updates_of(tx: Any, grads: Any) -> Any:
    tx = optax.with_extra_args_support(tx)
    state = tx.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(
            grads, state, PARAMS, layer_stats=STATS, grad_fn=grad_fn, value=1.0
        )
    return updates


@pytest.mark.parametrize("came", CAME)
@pytest.mark.parametrize("name", IN_Z)
def test_optimizers_leave_integers_where_they_are(name: str, came: str) -> None:
    updates = updates_of(IN_Z[name](), CAME[came])
    stepped = optax.apply_updates(PARAMS, updates)
    for key, old in INTEGERS.items():
        for one, two in zip(*map(jax.tree.leaves, (stepped[key], old)), strict=True):
            np.testing.assert_array_equal(one, two)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    assert not np.array_equal(stepped["real"]["kernel"], PARAMS["real"]["kernel"])


@pytest.mark.parametrize("came", CAME)
@pytest.mark.parametrize("name", PASSING)
def test_transformations_hand_on_what_came_for_integers(name: str, came: str) -> None:
    marked = CAME[came] | {"flags": CAME[came]["flags"] + (7 if came == "floats" else True)}
    if name == "proximal_l1":  # Gradient descent goes before it.
        marked = CAME[came]
    updates = updates_of(PASSING[name](), marked)
    for key in INTEGERS:
        for one, two in zip(*map(jax.tree.leaves, (updates[key], marked[key])), strict=True):
            np.testing.assert_array_equal(one, two)
            assert name == "proximal_l1" or jnp.result_type(one) == jnp.result_type(two)


def test_the_rest_is_what_it_is_without_integers() -> None:
    for name in READY_MADE:
        tx = make(name)
        alone, _ = tx.update({"real": GRADS["real"]}, tx.init(REAL), REAL, layer_stats=STATS)
        among, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, layer_stats=STATS)
        for one, two in zip(*map(jax.tree.leaves, (alone["real"], among["real"])), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-6)
