"""`drop_in`: trainers that own the step end where the explicit way does."""

import jax
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState
from support.bnp_cases import assert_trees_close
from support.drop_in_cases import (
    BARE,
    BATCHES,
    LAYERS,
    MODEL,
    N_BATCH,
    OPTIMIZERS,
    Trainer,
    assert_ends_there,
    bare_loss,
    explicit,
    wrapped,
)
from support.quick_jit import jit

import bnp_optax


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_of_a_trainer_are_those_of_the_explicit_way(name):
    trainer = Trainer(*wrapped(name)).fit(BATCHES)
    assert_ends_there(trainer.params, name)
    assert_trees_close(trainer.state, explicit(name)[1], 1e-5)


def test_the_train_state_of_flax():
    loss_fn, params, tx = wrapped()
    state = TrainState.create(apply_fn=MODEL.apply, params=params, tx=tx)

    @jit
    def step(state, x):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, x)
        return state.apply_gradients(grads=grads), loss

    for x in BATCHES:
        state, _ = step(state, x)
    assert_ends_there(state.params)


@pytest.mark.parametrize("k", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_multi_steps_of_optax_take_the_step_of_the_whole_batch(name, k):
    loss_fn, params, tx = wrapped(name)
    parts = BATCHES.reshape(len(BATCHES) * k, N_BATCH // k, *BATCHES.shape[2:])
    assert_ends_there(Trainer(loss_fn, params, optax.MultiSteps(tx, k)).fit(parts).params, name)


def test_microbatches_in_a_scan_and_sums_in_place_of_means():
    loss_fn, params, tx = wrapped()

    def mean_loss(params, x):
        parts = x.reshape(4, -1, *x.shape[1:])
        _, losses = jax.lax.scan(lambda _, part: (None, loss_fn(params, part)), None, parts)
        return losses.mean()

    assert_ends_there(Trainer(mean_loss, params, tx).fit(BATCHES).params)

    def summed_gradients(params, x):
        parts = x.reshape(4, -1, *x.shape[1:])
        grads = jax.vmap(jax.grad(loss_fn), (None, 0))(params, parts)
        return jax.tree.map(lambda g: g.sum(0), grads)

    grads = jit(summed_gradients)(params, BATCHES[0])
    divided = {**grads, "params": jax.tree.map(lambda g: g / 4, grads["params"])}
    updates, _ = tx.update(divided, jit(tx.init)(params), params)
    assert_ends_there(optax.apply_updates(params, updates), n_steps=1)


def test_losses_of_groups_under_vmap():
    loss_fn, params, tx = wrapped()

    def mean_loss(params, x):
        return jax.vmap(lambda rows: loss_fn(params, rows))(x.reshape(8, 2, *x.shape[1:])).mean()

    assert_ends_there(Trainer(mean_loss, params, tx).fit(BATCHES).params)


@pytest.mark.parametrize("scale", [-1.0, 2.0**15])
def test_a_scaled_loss_has_the_same_statistics(scale):
    loss_fn, params, tx = wrapped()

    def scaled(params, x):
        return scale * loss_fn(params, x)

    def unscaled(grads):
        return jax.tree.map(lambda g: g / scale, grads)

    def unscaled_but_statistics(grads):
        return {**grads, "params": unscaled(grads["params"])}

    for change in (unscaled, unscaled_but_statistics):
        assert_ends_there(Trainer(scaled, params, tx, change).fit(BATCHES).params)


def test_the_dynamic_scale_of_flax():
    loss_fn, params, tx = wrapped()
    scale, state = DynamicScale(scale=2.0**16), jit(tx.init)(params)
    for x in BATCHES[:2]:
        scale, finite, _, grads = scale.value_and_grad(loss_fn)(params, x)
        assert finite
        updates, state = jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_ends_there(params, n_steps=2)


@pytest.mark.parametrize(
    "clip", [optax.clip_by_global_norm(0.05), optax.clip(0.01)], ids=["global norm", "entries"]
)
def test_clipping_inside_and_outside_is_that_of_the_bare_gradient(clip):
    def clipped(grads):
        return clip.update(grads, clip.init(grads))[0]

    preconditioner = bnp_optax.bnp(layers=LAYERS)
    with_clip = bnp_optax.in_zspace(optax.sgd(0.1), preconditioner, before=clip)
    params, state = BARE, jit(with_clip.init)(BARE)
    for x in BATCHES[:3]:
        _, grads, stats = jit(bnp_optax.value_and_grad(bare_loss))(params, x)
        assert optax.tree.norm(clipped(grads)) < 0.9 * optax.tree.norm(grads)
        updates, state = jit(with_clip.update)(grads, state, params, layer_stats=stats)
        params = optax.apply_updates(params, updates)

    without = bnp_optax.in_zspace(optax.sgd(0.1), preconditioner)
    loss_fn, start, inside = bnp_optax.drop_in(bare_loss, BARE, with_clip, BATCHES[0])
    outside = bnp_optax.drop_in(bare_loss, BARE, without, BATCHES[0]).tx
    for trainer in (
        Trainer(loss_fn, start, inside),
        Trainer(loss_fn, start, outside, clipped),
        Trainer(loss_fn, start, optax.chain(clip, outside)),
    ):
        found = trainer.fit(BATCHES[:3])
        assert_trees_close(bnp_optax.bare_params(found.params), params, 1e-6)


def test_statistics_do_not_count_in_the_norm_of_the_gradients():
    loss_fn, params, _ = wrapped()
    norm = optax.tree.norm(jit(jax.grad(loss_fn))(params, BATCHES[0] * 1e3))
    want = optax.tree.norm(jit(jax.grad(bare_loss))(BARE, BATCHES[0] * 1e3))
    assert float(norm) == pytest.approx(float(want), rel=1e-6)


def test_decay_masks_and_partitions_see_the_bare_parameters():
    def kernels(params):
        assert set(params) == set(BARE)
        return jax.tree.map(lambda p: p.ndim > 1, params)

    # Adam's usual eps makes steps of what rounding leaves of gradients near zero.
    decayed = bnp_optax.bnp_adamw(1e-2, eps=1e-2, weight_decay=0.1, mask=kernels, layers=LAYERS)
    labels = {**jax.tree.map(lambda _: "train", BARE), "Dense_0": {"kernel": "freeze"}}
    but_one = {name: layer for name, layer in LAYERS.items() if name != "Dense_0/kernel"}
    frozen = optax.partition(
        {
            "train": bnp_optax.bnp_adam(1e-2, eps=1e-2, layers=but_one),
            "freeze": optax.set_to_zero(),
        },
        labels,
    )
    for tx, layers in ((decayed, LAYERS), (frozen, but_one)):
        _, grads, stats = jit(bnp_optax.value_and_grad(bare_loss, layers=layers))(BARE, BATCHES[0])
        want, _ = jit(tx.update)(grads, jit(tx.init)(BARE), BARE, layer_stats=stats)
        loss_fn, params, in_trainer = bnp_optax.drop_in(
            bare_loss, BARE, tx, BATCHES[0], layers=layers
        )
        grads = jit(jax.grad(loss_fn))(params, BATCHES[0])
        got, _ = jit(in_trainer.update)(grads, jit(in_trainer.init)(params), params)
        assert_trees_close(bnp_optax.bare_params(got), want, 1e-6)
        assert want["Dense_0"]["kernel"].any() == (tx is decayed)
