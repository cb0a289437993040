"""`drop_in`: states and checkpoints, and what is refused."""

import functools
from typing import NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from support.bnp_cases import assert_trees_close, assert_trees_equal
from support.drop_in_cases import (
    BARE,
    BATCHES,
    LAYERS,
    N_BATCH,
    OPTIMIZERS,
    Trainer,
    assert_ends_there,
    bare_loss,
    wrapped,
)
from support.quick_jit import jit

import bnp_optax


def test_without_statistics_the_running_ones_are_reused():
    loss_fn, params, tx = wrapped()
    grads = jit(jax.grad(loss_fn))(params, BATCHES[0])
    _, state = jit(tx.update)(grads, jit(tx.init)(params), params)
    others = jax.grad(lambda p: bare_loss(p["params"], BATCHES[1]))(params)
    got, after = jit(tx.update)(others, state, params)
    bare_tx = OPTIMIZERS["bnp_adam"]()
    want, _ = jit(bare_tx.update)(others["params"], state, BARE, layer_stats=None)
    assert_trees_close(bnp_optax.bare_params(got), want, 1e-6)
    assert_trees_equal(after.preconditioner.mean, state.preconditioner.mean)
    assert int(bnp_optax.metrics(tx.init(params))["layers_never_seen"]) == 3


def test_a_batch_that_is_not_finite_moves_no_running_statistics():
    loss_fn, params, tx = wrapped()
    _, state = jit(tx.update)(
        jit(jax.grad(loss_fn))(params, BATCHES[0]), jit(tx.init)(params), params
    )
    bad = np.full_like(BATCHES[1], np.nan)
    _, after = jit(tx.update)(jit(jax.grad(loss_fn))(params, bad), state, params)
    assert_trees_equal(after.preconditioner.mean, state.preconditioner.mean)
    assert int(bnp_optax.metrics(after)["batches_rejected"]) == 3
    skipping = optax.MultiSteps(tx, 2, should_skip_update_fn=optax.skip_not_finite)
    parts = [bad[:8], BATCHES[0][:8], bad[:8], BATCHES[0][8:]]
    found = Trainer(loss_fn, params, skipping).fit(parts)
    assert_ends_there(found.params, n_steps=1)


@pytest.mark.parametrize("library", ["flax", "orbax"])
def test_checkpoints(library, tmp_path):
    loss_fn, params, tx = wrapped()
    first = Trainer(loss_fn, params, tx).fit(BATCHES[:4])
    saved, like = (first.params, first.state), (params, jit(tx.init)(params))
    if library == "flax":
        restored = flax.serialization.from_bytes(like, flax.serialization.to_bytes(saved))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", saved)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", like)
    assert_trees_equal(restored, saved)
    second = Trainer(loss_fn, params, tx)
    second.params, second.state = restored
    assert_trees_equal(second.fit(BATCHES[4:]).params, first.fit(BATCHES[4:]).params)
    assert_ends_there(second.params)


def test_hyperparameters_and_params_of_the_state():
    def adam(learning_rate):
        return bnp_optax.bnp_adam(learning_rate, eps=1e-3, layers=LAYERS, batch_size=N_BATCH)

    injected = optax.inject_hyperparams(adam)(learning_rate=1e-2)
    loss_fn, params, tx = bnp_optax.drop_in(bare_loss, BARE, injected, BATCHES[0])
    trainer = Trainer(loss_fn, params, tx).fit(BATCHES)
    assert_ends_there(trainer.params)
    assert float(trainer.state.hyperparams["learning_rate"]) == pytest.approx(1e-2)
    seen: list[tuple[int, ...]] = []
    mapped = optax.tree.map_params(tx, lambda a: seen.append(a.shape) or a, trainer.state)
    assert jax.tree.structure(mapped) == jax.tree.structure(trainer.state)
    # The two moments of Adam among them.
    assert seen.count(BARE["Dense_0"]["kernel"].shape) == 2


class Recorded(NamedTuple):
    n: int = 0


def test_functions_of_parameters_are_given_bare_ones():
    seen = {}

    def update(updates, state, params=None, *, value_fn, obj_fn, grad_fn, grad, value, layer_stats):
        seen.update(value=value, grad=grad, fn=value_fn(params), by=grad_fn(params))
        seen.update(objective=obj_fn(params))
        assert set(layer_stats) == set(LAYERS)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: Recorded(), update)
    loss_fn, params, tx = bnp_optax.drop_in(bare_loss, BARE, tx, BATCHES[0])
    value_fn = functools.partial(loss_fn, x=BATCHES[0])
    value, grads = jax.value_and_grad(value_fn)(params)
    tx.update(
        grads,
        jit(tx.init)(params),
        params,
        value=value,
        grad=grads,
        value_fn=value_fn,
        obj_fn=value_fn,
        grad_fn=jax.grad(value_fn),
    )
    assert float(seen["value"]) == pytest.approx(float(seen["fn"]), rel=1e-6)
    assert float(seen["objective"]) == float(seen["fn"])
    assert_trees_equal(seen["grad"], bnp_optax.bare_params(grads))
    assert_trees_close(seen["by"], bnp_optax.bare_params(grads), 1e-6)


def test_layers_that_are_not_layers():
    with pytest.raises(ValueError, match=r"`layers` must be a dict of `Layer`.*got a `list`"):
        wrapped(layers=["Dense_0/kernel"])


def test_parameters_that_are_not_wrapped():
    loss_fn, params, tx = wrapped()
    message = r"a dict of `params` and `layer_stats`; got a `dict` with the keys \['Conv_0'"
    for call in (
        lambda: loss_fn(BARE, BATCHES[0]),
        lambda: jit(tx.init)(BARE),
        lambda: tx.update(BARE, jit(tx.init)(params), params),
        lambda: tx.update(params, jit(tx.init)(params), BARE),
        lambda: bnp_optax.bare_params(BARE),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="got a `ArrayImpl`"):
        bnp_optax.bare_params(jnp.ones(3))


def test_parameters_of_other_layers():
    one = {"Dense_0/kernel": LAYERS["Dense_0/kernel"]}
    other = bnp_optax.drop_in(bare_loss, BARE, optax.identity(), BATCHES[0], layers=one)
    loss_fn, _, tx = wrapped()
    message = r"`layer_stats` of shape \(17,\), but its layers need \(100,\)"
    with pytest.raises(ValueError, match=message):
        loss_fn(other.params, BATCHES[0])
    with pytest.raises(ValueError, match=message):
        tx.init(other.params)


def test_statistics_of_other_layers_than_those_of_the_start():
    def either(params, x, which):
        return jnp.mean(x @ params[which])

    params = {"one": jnp.ones((3, 2)), "two": jnp.ones((3, 2))}
    x = jnp.ones((4, 3))
    loss_fn, params, _ = bnp_optax.drop_in(either, params, optax.identity(), x, "one")
    message = r"statistics of the layers `two`, which are not those.*was given: `one`"
    with pytest.raises(ValueError, match=message):
        loss_fn(params, x, "two")


def test_a_batch_of_other_sizes_has_its_own_number_of_examples():
    """`count` is of positions too: of twice as long sequences it is twice that."""

    def loss_fn(params, x):
        return jnp.mean(nn.Conv(2, (3,)).apply({"params": params}, x) ** 2)

    params = nn.Conv(2, (3,)).init(jax.random.key(0), BATCHES[0])["params"]
    seen = {}

    def update(updates, state, params=None, *, layer_stats):
        seen.update(layer_stats)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: Recorded(), update)
    loss_fn, params, tx = bnp_optax.drop_in(loss_fn, params, tx, BATCHES[0])
    x = np.concatenate([BATCHES[0], BATCHES[1]], axis=1)[:5]
    tx.update(jit(jax.grad(loss_fn))(params, x), tx.init(params), params)
    assert float(seen["kernel"].batch_size) == pytest.approx(5.0)
    np.testing.assert_allclose(seen["kernel"].mean.ravel(), x.mean((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_fewer_digits_than_variances_need(dtype):
    loss_fn, params, tx = wrapped()
    half = jax.tree.map(lambda a: a.astype(dtype), params)
    message = f"got `layer_stats` in {jnp.dtype(dtype)}, where variances have no digits left"
    with pytest.raises(ValueError, match=message):
        loss_fn(half, BATCHES[0])
    with pytest.raises(ValueError, match=message):
        tx.update(half, jit(tx.init)(params), params)


def test_an_option_that_is_not_one_and_a_loss_without_its_aux():
    with pytest.raises(ValueError, match="`sample_rows` must be an integer > 0"):
        wrapped(sample_rows=0)
    with pytest.raises(TypeError, match="With `has_aux=True` the loss must return"):
        wrapped(has_aux=True)
