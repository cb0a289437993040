"""What keeps and moves the state of every transformation: Optax, files, and NNX."""

import pickle
from collections.abc import Callable
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.tree_util import DictKey, SequenceKey
from support.contract_problems import (
    LEAFWISE,
    READY_MADE,
    REGULARIZING,
    Net,
    assert_close,
    assert_same,
    avals,
    descent,
    make,
    on_every_transformation,
    on_every_tree,
    problem_of,
    run,
    training_step,
)

import bnp_optax
from bnp_optax import Layer, LayerStats
from bnp_optax._tree import is_hidden


@on_every_tree
def test_map_params_finds_the_params_of_the_state(name: str, kind: str) -> None:
    tx, problem = make(name), problem_of(kind)
    fresh = tx.init(problem.params)
    used = run(tx, problem)[1]
    ones = jax.tree.map(lambda _: 1.0, problem.params)
    for state in (fresh, used):
        marked = optax.tree.map_params(
            tx,
            lambda x, rest: x if is_hidden(x) else 0.0 * x + rest,
            state,
            ones,
            transform_non_params=lambda x: 0 * x,
            is_leaf=is_hidden,
        )
        assert avals(marked) == avals(state)
        # The keys of the parameters come last in the path of whatever belongs to one.
        for path, leaf in jax.tree.leaves_with_path(marked):
            assert (leaf == isinstance(path[-1], DictKey | SequenceKey)).all()


@on_every_tree
def test_state_survives_pickle_and_flax_serialization(name: str, kind: str) -> None:
    tx, problem = make(name), problem_of(kind)
    _, state = run(tx, problem)
    assert_same(pickle.loads(pickle.dumps(state)), state)
    fresh = tx.init(problem.params)
    as_dict = flax.serialization.to_state_dict(state)
    assert_same(flax.serialization.from_state_dict(fresh, as_dict), state)
    as_bytes = flax.serialization.to_bytes(state)
    assert_same(flax.serialization.from_bytes(fresh, as_bytes), state)


@pytest.mark.parametrize("name", READY_MADE)
def test_training_continues_from_an_orbax_checkpoint(name: str, tmp_path: Any) -> None:
    problem = problem_of("net")

    def create() -> bnp_optax.TrainState:
        return bnp_optax.TrainState.create(
            apply_fn=Net().apply, params=problem.params, tx=make(name)
        )

    def proceed(state: bnp_optax.TrainState) -> bnp_optax.TrainState:
        for grads, extra in problem.steps:
            state = state.apply_gradients(grads=grads, layer_stats=extra["layer_stats"])
        return state

    state = proceed(create())
    restored = restored_by_orbax(state, create(), tmp_path)
    assert_same(jax.tree.leaves(proceed(restored)), jax.tree.leaves(proceed(state)))


@pytest.mark.parametrize("name", [*REGULARIZING, *LEAFWISE])
def test_parameters_and_state_continue_from_an_orbax_checkpoint(name: str, tmp_path: Any) -> None:
    problem, tx = problem_of("tuple"), descent(name)
    step = training_step(tx, problem)
    start = problem.params, tx.init(problem.params)
    carry, _ = step(start, problem.batches[0])
    restored = restored_by_orbax(carry, start, tmp_path)
    assert_same(step(restored, problem.batches[1]), step(carry, problem.batches[1]))


def restored_by_orbax(state: Any, fresh: Any, folder: Any) -> Any:
    """`state`, saved and restored into the structure of `fresh`."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        restored = checkpointer.restore(folder / "state", abstract)
    assert_same(jax.tree.leaves(restored), jax.tree.leaves(state))
    return restored


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.last = nnx.Linear(3, 3, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jnp.tanh(self.first(x)))


def dense_stats(inputs: jax.Array, kernel: str, bias: str | None) -> LayerStats:
    mean, var = inputs.mean(0)[:, None], inputs.var(0)[:, None]
    count = jnp.float32(len(inputs))
    moment = inputs.T @ inputs / count
    return LayerStats(mean, var, mean**2, count, Layer(kernel, bias, (-2,)), moment)


def nnx_steps(tx: Any, transform: Callable[..., Any]) -> tuple[Any, Any]:
    """Parameters after two steps of `nnx.Optimizer`, and after the same steps on a dict."""
    model = NNXNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = 2.0 + jax.random.normal(jax.random.key(0), (8, 3))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = tx.init(params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(optimizer))]

    def loss(params: Any) -> jax.Array:
        first, last = params["first"], params["last"]
        hidden = jnp.tanh(x @ first["kernel"] + first["bias"][None])
        return jnp.mean((hidden @ last["kernel"] - 1.0) ** 2)

    grad_fn = jax.grad(loss)

    @transform
    def step(model: NNXNet, optimizer: nnx.Optimizer) -> tuple[Any, Any]:
        stats = {
            "first/kernel": dense_stats(x, "first/kernel", "first/bias"),
            "last/kernel": dense_stats(jnp.tanh(model.first(x)), "last/kernel", None),
        }
        grads = nnx.grad(lambda model: jnp.mean((model(x) - 1.0) ** 2))(model)
        optimizer.update(model, grads, layer_stats=stats, grad_fn=grad_fn)
        return nnx.to_pure_dict(grads), stats

    for _ in range(2):
        grads, stats = step(model, optimizer)
        updates, state = tx.update(grads, state, params, layer_stats=stats, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
    assert shapes == [leaf.shape for leaf in jax.tree.leaves(nnx.state(optimizer))]
    return nnx.to_pure_dict(nnx.state(model, nnx.Param)), params


@on_every_transformation
def test_nnx_optimizer_takes_layer_stats(name: str) -> None:
    assert_close(*nnx_steps(descent(name), lambda function: function), rtol=1e-4)


def test_nnx_optimizer_takes_layer_stats_under_jit() -> None:
    assert_close(*nnx_steps(bnp_optax.bnp_adam(1e-3), nnx.jit), rtol=1e-4)
