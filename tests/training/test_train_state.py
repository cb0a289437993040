"""`TrainState`: one step of the transformation, statistics passed on."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from flax.training import train_state

import bnp_optax
from bnp_optax import TrainState

MODEL = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)])
BATCHES = 2.0 + jax.random.normal(jax.random.key(0), (3, 8, 3))
PARAMS = MODEL.init(jax.random.key(1), BATCHES[0])["params"]

TRANSFORMATIONS = {
    "bnp_sgd": lambda: bnp_optax.bnp_sgd(0.1),
    "bnp_adam": lambda: bnp_optax.bnp_adam(1e-2),
    "chain": lambda: optax.chain(bnp_optax.bnp_precondition(), optax.sgd(0.1)),
}


def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
    return jnp.mean((MODEL.apply({"params": params}, batch) - 1.0) ** 2)


evaluate = jax.jit(bnp_optax.value_and_grad(loss_fn))


@functools.cache
def evaluated() -> list[tuple[Any, Any]]:
    return [evaluate(PARAMS, batch)[1:] for batch in BATCHES]


def create(tx: Any, cls: type[TrainState] = TrainState, **fields: Any) -> Any:
    return cls.create(apply_fn=MODEL.apply, params=PARAMS, tx=tx, **fields)


def assert_close(actual: Any, expected: Any, rtol: float = 0.0) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, two in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_is_the_loop_by_hand(name: str) -> None:
    tx = TRANSFORMATIONS[name]()
    state = create(tx)
    params, opt_state = PARAMS, tx.init(PARAMS)
    for count, (grads, stats) in enumerate(evaluated()):
        assert int(state.step) == count
        state = state.apply_gradients(grads=grads, layer_stats=stats)
        updates, opt_state = tx.update(grads, opt_state, params, layer_stats=stats)
        params = optax.apply_updates(params, updates)
    assert int(state.step) == len(BATCHES)
    assert state.tx is tx
    assert_close((state.params, state.opt_state), (params, opt_state))


def test_layer_stats_of_none_reuse_the_running_ones() -> None:
    grads, stats = evaluated()[0]
    state = create(bnp_optax.bnp_precondition())
    state = state.apply_gradients(grads=grads, layer_stats=stats)
    after = state.apply_gradients(grads=grads, layer_stats=None)
    assert_close(after.opt_state, state.opt_state)
    assert int(after.step) == 2


def test_layer_stats_left_out() -> None:
    grads, _ = evaluated()[0]
    with pytest.raises(ValueError, match=r"`layer_stats` was left out.*`layers_0/kernel`"):
        create(bnp_optax.bnp_adam(1e-2)).apply_gradients(grads=grads)


@pytest.mark.parametrize("given", [{}, {"layer_stats": None}, {"layer_stats": "of the batch"}])
def test_a_plain_transformation_needs_none_and_ignores_them(given: dict[str, Any]) -> None:
    grads, _ = evaluated()[0]
    tx = optax.adam(1e-2)
    ours = create(tx).apply_gradients(grads=grads, **given)
    theirs = train_state.TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=tx)
    theirs = theirs.apply_gradients(grads=grads)
    assert_close((ours.params, ours.opt_state), (theirs.params, theirs.opt_state))


class WithExtras(TrainState):
    batch_stats: Any = None
    label: str = struct.field(pytree_node=False, default="")


def test_replaces_fields_of_a_subclass() -> None:
    grads, stats = evaluated()[0]
    state = create(bnp_optax.bnp_sgd(0.1), WithExtras, batch_stats=jnp.zeros(2), label="a")
    after = state.apply_gradients(
        grads=grads, layer_stats=stats, batch_stats=jnp.ones(2), label="b"
    )
    assert isinstance(after, WithExtras)
    assert_close(after.batch_stats, jnp.ones(2))
    assert after.label == "b"
    assert int(after.step) == 1
    assert_close(state.batch_stats, jnp.zeros(2))


def test_replaces_the_transformation() -> None:
    grads, stats = evaluated()[0]
    before, after = bnp_optax.bnp_sgd(0.1), bnp_optax.bnp_sgd(0.01)
    state = create(before)
    replaced = state.apply_gradients(grads=grads, layer_stats=stats, tx=after)
    assert replaced.tx is after
    assert_close(replaced.params, state.apply_gradients(grads=grads, layer_stats=stats).params)


def test_overwrites_with_the_gradient_what_flax_overwrites() -> None:
    grads, stats = evaluated()[0]
    key = "_overwrite_with_gradient"
    state = TrainState.create(
        apply_fn=MODEL.apply,
        params={"params": PARAMS, key: {"scale": jnp.ones(())}},
        tx=bnp_optax.bnp_sgd(0.1),
    )
    after = state.apply_gradients(
        grads={"params": grads, key: {"scale": jnp.full((), 7.0)}}, layer_stats=stats
    )
    expected = create(bnp_optax.bnp_sgd(0.1)).apply_gradients(grads=grads, layer_stats=stats)
    assert float(after.params[key]["scale"]) == 7.0
    assert_close(after.params["params"], expected.params)


def test_statistics_of_a_tree_with_what_flax_overwrites() -> None:
    key = "_overwrite_with_gradient"
    params = {"params": PARAMS, key: {"scale": jnp.ones(())}}
    state = TrainState.create(apply_fn=MODEL.apply, params=params, tx=bnp_optax.bnp_sgd(0.1))

    def loss(params: Any) -> jax.Array:
        return loss_fn(params["params"], BATCHES[0]) + 7.0 * params[key]["scale"]

    _, grads, stats = bnp_optax.value_and_grad(loss)(params)
    assert set(stats) == {"params/layers_0/kernel", "params/layers_2/kernel"}
    after = state.apply_gradients(grads=grads, layer_stats=stats)
    grads, stats = evaluated()[0]
    expected = create(bnp_optax.bnp_sgd(0.1)).apply_gradients(grads=grads, layer_stats=stats)
    assert_close(after.params["params"], expected.params, rtol=1e-6)
    after.apply_gradients(grads={"params": grads, key: {"scale": jnp.ones(())}}, layer_stats=None)


def test_layer_stats_given_to_the_train_state_of_flax() -> None:
    grads, stats = evaluated()[0]
    state = create(bnp_optax.bnp_sgd(0.1), train_state.TrainState)
    with pytest.raises(ValueError, match=r"`layer_stats` was left out.*`bnp_optax\.TrainState`"):
        state.apply_gradients(grads=grads, layer_stats=stats)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_compiles_once_and_donates(name: str) -> None:
    n_traces = 0

    def train_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
        nonlocal n_traces
        n_traces += 1
        loss, grads, stats = bnp_optax.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads, layer_stats=stats), loss

    start = create(TRANSFORMATIONS[name]())
    # Copies: donation deletes its arguments. An array for the step that Flax starts as an int.
    state = jax.tree.map(jnp.array, start)
    donating = jax.jit(train_step, donate_argnums=0)
    losses = []
    for batch in BATCHES:
        given = jax.tree.leaves(state)
        state, loss = donating(state, batch)
        losses.append(float(loss))
        assert all(leaf.is_deleted() for leaf in given)
    assert n_traces == 1
    assert int(state.step) == len(BATCHES)
    assert losses[-1] < losses[0]
    eager = start
    for batch in BATCHES:
        _, grads, stats = evaluate(eager.params, batch)
        eager = eager.apply_gradients(grads=grads, layer_stats=stats)
    assert_close(state.params, eager.params, rtol=1e-4)
