"""`drop_in` on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.bnp_cases import assert_trees_close
from support.drop_in_cases import BATCHES, Trainer, assert_ends_there, wrapped
from support.quick_jit import jit

import bnp_optax


def test_a_sharded_batch_under_jit():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    loss_fn, params, tx = wrapped()
    batches = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in BATCHES]
    trainer = Trainer(loss_fn, params, tx)
    trainer.params, trainer.state = jax.device_put(
        (trainer.params, trainer.state), NamedSharding(mesh, P())
    )
    assert_ends_there(trainer.fit(batches).params)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_also_where_shardings_are_types(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    bare = {"w": jnp.ones((8, 4)) / 9, "b": jnp.zeros(4), "v": jnp.ones((4, 1))}
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)

    def loss_fn(params, x):
        return jnp.mean((jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"] - 1.0) ** 2)

    layers = bnp_optax.find_layers(loss_fn, bare, x)
    tx = bnp_optax.bnp_adam(1e-2, eps=1e-3, layers=layers)
    loss_fn, params, tx = bnp_optax.drop_in(loss_fn, bare, tx, x)
    step = jit(stepped_on_devices(tx, jax.grad(loss_fn)))
    want, _ = step(params, jit(tx.init)(params), x)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        params = jax.device_put(params, NamedSharding(mesh, P()))
        params["params"]["w"] = jax.device_put(bare["w"], NamedSharding(mesh, P("data")))
        got, _ = step(params, jit(tx.init)(params), x)
    assert_trees_close(got, want, 1e-5)
    assert float(jnp.abs(want["params"]["w"] - bare["w"]).max()) > 1e-3


def stepped_on_devices(tx, grad_fn):
    def step(params, state, x):
        grads = grad_fn(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def test_gradients_averaged_by_pmean_in_pmap():
    loss_fn, params, tx = wrapped()
    step = stepped_on_devices(tx, lambda p, x: jax.lax.pmean(jax.grad(loss_fn)(p, x), "data"))
    mapped = jax.pmap(step, "data", in_axes=(None, None, 0), out_axes=None)
    state = jit(tx.init)(params)
    for x in BATCHES:
        params, state = mapped(params, state, x.reshape(8, 2, *x.shape[1:]))
    assert_ends_there(params)


def varying(a):
    """What is the same on all devices, with a gradient of its own on each."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(a, "data", to="varying")
    return jax.lax.pvary(a, "data")  # before jax 0.9


@pytest.mark.parametrize("by", ["pmean", "mean loss", "unchecked pmean"])
def test_gradients_averaged_in_shard_map(by):
    loss_fn, params, tx = wrapped()

    def grad_fn(p, x):
        if by == "mean loss":  # JAX adds up the gradients of what is the same on all devices.
            return jax.grad(lambda p: jax.lax.pmean(loss_fn(p, x), "data"))(p)
        if by == "pmean":
            p = jax.tree.map(varying, p)
        return jax.lax.pmean(jax.grad(loss_fn)(p, x), "data")

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jit(
        jax.shard_map(
            stepped_on_devices(tx, grad_fn),
            mesh=mesh,
            in_specs=(P(), P(), P("data")),
            out_specs=P(),
            check_vma=by != "unchecked pmean",
        )
    )
    state = jit(tx.init)(params)
    for x in BATCHES:
        params, state = mapped(params, state, x)
    assert_ends_there(params)
