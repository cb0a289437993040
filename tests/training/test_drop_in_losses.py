"""`drop_in`: losses of every kind, and of every framework."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.bnp_cases import assert_trees_close
from support.drop_in_cases import (
    BARE,
    BATCHES,
    LAYERS,
    MODEL,
    OPTIMIZERS,
    Trainer,
    assert_ends_there,
    bare_loss,
    wrapped,
)
from support.quick_jit import jit

import bnp_optax


def rich_loss(params, x, key, n, name):
    """Arguments of every kind; `aux` with what is no array."""
    x = x + 0.01 * jax.random.normal(key, x.shape)
    out = MODEL.apply({"params": params}, x)
    return jnp.mean((out - n) ** 2), {"out": out, "n": n + 1, "name": name}


RICH_ARGS = (jax.ShapeDtypeStruct((2, 6, 3), jnp.float32), jax.random.key(3), 2.0, "a")


def test_arguments_and_aux_are_those_of_the_loss():
    loss_fn, params, _ = wrapped(loss_fn=rich_loss, args=RICH_ARGS, has_aux=True)
    args = (BATCHES[0], jax.random.key(3), jnp.float32(2))
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *args, "a")
    (want, want_aux), want_grads = jax.value_and_grad(rich_loss, has_aux=True)(BARE, *args, "a")
    assert float(loss) == pytest.approx(float(want), rel=1e-6)
    assert (aux.pop("name"), want_aux.pop("name")) == ("a", "a")
    assert_trees_close(aux, want_aux, 1e-6)
    assert_trees_close(bnp_optax.bare_params(grads), want_grads, 1e-6)
    assert loss_fn(params, *args, "b")[1]["name"] == "b"


def test_derivatives_by_arguments_and_through_aux_are_those_of_the_loss():
    loss_fn, params, _ = wrapped(loss_fn=rich_loss, args=RICH_ARGS, has_aux=True)

    def total(loss_fn, params, x):
        loss, aux = loss_fn(params, x, jax.random.key(3), 2, "a")
        return loss + jnp.sum(aux["out"] ** 2)

    got = jit(jax.grad(functools.partial(total, loss_fn), (0, 1)))(params, BATCHES[0])
    want = jit(jax.grad(functools.partial(total, rich_loss), (0, 1)))(BARE, BATCHES[0])
    assert_trees_close((bnp_optax.bare_params(got[0]), got[1]), want, 1e-6)


def test_derivatives_of_any_order_and_mode_are_those_of_the_bare_loss():
    loss_fn, params, _ = wrapped()
    x = BATCHES[0]
    v = jax.tree.map(jnp.ones_like, BARE)
    in_wrapped = {"params": v, "layer_stats": jnp.zeros_like(params["layer_stats"])}
    want_dot = jax.jvp(lambda p: bare_loss(p, x), (BARE,), (v,))
    assert_trees_close(jax.jvp(lambda p: loss_fn(p, x), (params,), (in_wrapped,)), want_dot, 1e-6)

    def by_forward(loss_fn, params, v):
        return jax.jvp(jax.grad(lambda p: loss_fn(p, x)), (params,), (v,))[1]

    def by_reverse(loss_fn, params, v):
        return jax.grad(lambda p: optax.tree.vdot(jax.grad(loss_fn)(p, x), v))(params)

    want = by_forward(bare_loss, BARE, v)
    for product in (by_forward, by_reverse):
        got = product(loss_fn, params, in_wrapped)
        assert_trees_close(bnp_optax.bare_params(got), want, 1e-5)
        assert not got["layer_stats"].any()


@pytest.mark.parametrize("around", [jax.jit, jax.checkpoint])
def test_under_jit_and_checkpoint_inside_the_gradient(around):
    loss_fn, params, tx = wrapped()
    assert_ends_there(Trainer(around(loss_fn), params, tx).fit(BATCHES).params)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8)(nn.tanh(nn.Dense(16)(x))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return nn.Dense(2)(block()(nn.Dense(8)(x), None)[0])


def scanned_loss(params, x):
    return jnp.mean(Scanned().apply({"params": params}, x) ** 2)


def test_costs_the_loss_alone_where_nothing_is_differentiated_and_the_capture_elsewhere():
    x = jnp.ones((32, 4))
    bare = Scanned().init(jax.random.key(0), x)["params"]
    loss_fn, params, _ = bnp_optax.drop_in(scanned_loss, bare, optax.identity(), x)

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    assert flops(loss_fn, params, x) == flops(scanned_loss, bare, x)
    captured = flops(bnp_optax.value_and_grad(scanned_loss), bare, x)
    assert flops(jax.value_and_grad(loss_fn), params, x) == pytest.approx(captured, rel=0.01)
    assert captured > 1.5 * flops(scanned_loss, bare, x)


def test_in_float64_the_gradient_is_jax_s_to_the_last_digits(x64):
    bare, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (BARE, BATCHES[0]))
    loss_fn, params, tx = bnp_optax.drop_in(bare_loss, bare, OPTIMIZERS["bnp_adam"](), x)
    grads = jit(jax.grad(loss_fn))(params, x)
    assert_trees_close(bnp_optax.bare_params(grads), jax.grad(bare_loss)(bare, x), 1e-14)
    _, want, stats = jit(bnp_optax.value_and_grad(bare_loss))(bare, x)
    explicit_tx = OPTIMIZERS["bnp_adam"]()
    want, _ = jit(explicit_tx.update)(want, jit(explicit_tx.init)(bare), bare, layer_stats=stats)
    got, _ = jit(tx.update)(grads, jit(tx.init)(params), params)
    assert_trees_close(bnp_optax.bare_params(got), want, 1e-10)


def test_options_of_the_capture():
    fixed = bnp_optax.dataset_statistics(bare_loss, BARE, list(BATCHES[:2]))
    options = {"sample_rows": 8, "fixed": fixed}
    tx = OPTIMIZERS["bnp_adam"]()
    _, grads, stats = jit(bnp_optax.value_and_grad(bare_loss, layers=LAYERS, **options))(
        BARE, BATCHES[0]
    )
    want, _ = jit(tx.update)(grads, jit(tx.init)(BARE), BARE, layer_stats=stats)
    loss_fn, params, in_trainer = wrapped(**options)
    grads = jit(jax.grad(loss_fn))(params, BATCHES[0])
    got, _ = jit(in_trainer.update)(grads, jit(in_trainer.init)(params), params)
    # Statistics travel in float32; fixed means are far from the batch's, where rounding cancels.
    assert_trees_close(bnp_optax.bare_params(got), want, 1e-5)


def trained_both_ways(loss_fn, params, x):
    """Parameters after three steps of a trainer, and of the explicit way."""
    layers = bnp_optax.find_layers(loss_fn, params, x)
    tx = bnp_optax.bnp_adam(1e-2, eps=1e-3, layers=layers)
    found = Trainer(*bnp_optax.drop_in(loss_fn, params, tx, x)).fit([x] * 3)
    state = jit(tx.init)(params)
    for _ in range(3):
        _, grads, stats = jit(bnp_optax.value_and_grad(loss_fn))(params, x)
        updates, state = jit(tx.update)(grads, state, params, layer_stats=stats)
        params = optax.apply_updates(params, updates)
    return bnp_optax.bare_params(found.params), params


def test_equinox():
    mlp = eqx.nn.MLP(3, 2, width_size=8, depth=1, key=jax.random.key(0))
    params, static = eqx.partition(mlp, eqx.is_inexact_array)

    def loss_fn(params, x):
        return jnp.mean(jax.vmap(eqx.combine(params, static))(x) ** 2)

    got, want = trained_both_ways(loss_fn, params, BATCHES[0][:, 0])
    assert_trees_close(got, want, 1e-6)
    assert eqx.combine(got, static)(jnp.ones(3)).shape == (2,)


def test_nnx():
    graphdef, params = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)

    def loss_fn(params, x):
        return jnp.mean((nnx.merge(graphdef, params)(x) - 1.0) ** 2)

    got, want = trained_both_ways(loss_fn, params, BATCHES[0][:, 0])
    assert_trees_close(got, want, 1e-6)
    assert nnx.merge(graphdef, got)(jnp.ones((1, 3))).shape == (1, 2)
