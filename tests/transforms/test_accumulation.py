"""Batches that come in parts: short last ones, microbatches, and losses that are scaled."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale
from support.bnp_cases import assert_trees_close, assert_trees_equal
from support.contract_problems import bnp_states

import bnp_optax

# ---------------------------------------------------------------------------------------------
# A short batch at the end of an epoch.
# ---------------------------------------------------------------------------------------------

N_INPUTS, BATCH = 256, 64
WIDE = {"kernel": jnp.zeros((N_INPUTS, 2)), "bias": jnp.zeros(2)}


def wide_loss(params, x):
    return jnp.mean((x @ params["kernel"] + params["bias"][None] - 1.0) ** 2)


def epoch(tx, sizes, seed=0):
    """Norms of the updates, and 1 / q^2, after batches of these sizes."""
    rng = np.random.default_rng(seed)
    state, lengths, inv_q_squared = tx.init(WIDE), [], []
    for size in sizes:
        x = rng.normal(size=(size, N_INPUTS)).astype(np.float32)
        _, grads, stats = bnp_optax.value_and_grad(wide_loss)(WIDE, x)
        updates, state = tx.update(grads, state, WIDE, layer_stats=stats)
        lengths.append(float(jnp.linalg.norm(updates["kernel"])))
        inv_q_squared.append(float(bnp_optax.metrics(state)["q/kernel"]) ** -2)
    return lengths, inv_q_squared


@pytest.mark.parametrize("last", [1, 7, 63])
def test_a_short_last_batch_has_the_step_of_a_full_one(last):
    sizes = [BATCH] * 3 + [last] + [BATCH]
    lengths, inv_q_squared = epoch(bnp_optax.bnp_adam(1e-3), sizes)
    assert inv_q_squared == pytest.approx([BATCH / N_INPUTS] * 5, rel=1e-6)
    # Adam's step has the learning rate's length times P, whatever the gradient's size.
    assert 0.7 * lengths[2] < lengths[3] < 1.3 * lengths[2]


def test_q_follows_larger_batches_and_the_batch_size_given():
    _, inv_q_squared = epoch(bnp_optax.bnp_adam(1e-3), [8, 32, 16, 512, 8])
    assert inv_q_squared == pytest.approx([8 / 256, 32 / 256, 32 / 256, 1.0, 1.0], rel=1e-6)
    _, inv_q_squared = epoch(bnp_optax.bnp_adam(1e-3, batch_size=16), [64, 8])
    assert inv_q_squared == pytest.approx([16 / 256] * 2, rel=1e-6)


def test_a_batch_that_does_not_enter_has_no_size():
    tx = bnp_optax.bnp_adam(1e-3)
    state = tx.init(WIDE)
    for size, spoil in ((8, 1.0), (64, np.nan), (4, 1.0)):
        x = jax.random.normal(jax.random.key(size), (size, N_INPUTS)) * spoil
        grads, stats = bnp_optax.value_and_grad(wide_loss)(WIDE, x)[1:]
        _, state = tx.update(grads, state, WIDE, layer_stats=stats)
    logged = bnp_optax.metrics(state)
    assert float(logged["q/kernel"]) ** 2 == pytest.approx(256 / 8, rel=1e-6)
    assert int(logged["batches_rejected"]) == 1


# ---------------------------------------------------------------------------------------------
# Microbatches.
# ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (3,))(x))
        return nn.Dense(2, use_bias=False)(nn.tanh(nn.Dense(5)(x.reshape(len(x), -1))))


X = np.random.default_rng(0).normal(size=(3, 16, 6, 3)).astype(np.float32) * 4 + 20
NET = Net().init(jax.random.key(0), X[0])["params"]
OPTIMIZERS = {
    "bnp_sgd": lambda **options: bnp_optax.bnp_sgd(0.1, **options),
    "bnp_adam": lambda **options: bnp_optax.bnp_adam(1e-2, **options),
    "two preconditioners": lambda **options: optax.chain(
        bnp_optax.bnp_precondition(scale=False, **options), bnp_optax.bnp_sgd(0.1, **options)
    ),
}


def net_loss(params, x):
    return jnp.mean((Net().apply({"params": params}, x) - 1.0) ** 2)


capture = jax.jit(bnp_optax.value_and_grad(net_loss))


def trained(tx, batches, capture=capture):
    """Updates and state after all `batches`, with constant parameters."""
    update, state, updates = jax.jit(tx.update), tx.init(NET), []
    for x in batches:
        _, grads, stats = capture(NET, x)
        new, state = update(grads, state, NET, layer_stats=stats)
        updates.append(new)
    return updates, state


def in_parts(batches, k):
    return [part for x in batches for part in np.split(x, k)]


def numbers(state):
    return [leaf for found in bnp_states(state) for leaf in jax.tree.leaves(found)]


@pytest.mark.parametrize("k", [2, 16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_multi_steps_takes_the_step_of_the_full_batch(name, k):
    tx = OPTIMIZERS[name](decay=0.9)
    want, want_state = trained(tx, X)
    got, state = trained(bnp_optax.multi_steps(tx, k), in_parts(X, k))
    for i, updates in enumerate(got):
        if (i + 1) % k:
            assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert_trees_close(got[k - 1 :: k], want)
    assert_trees_close(numbers(state), numbers(want_state), 1e-5)
    assert not any(leaf.any() for leaf in jax.tree.leaves(state[1:]))


def test_parts_of_several_sizes_have_the_statistics_of_their_union():
    tx = bnp_optax.bnp_sgd(0.1)
    _, want = trained(tx, X[:1])
    _, state = trained(bnp_optax.multi_steps(tx, 3), np.split(X[0], [1, 5]))
    assert_trees_close(numbers(state), numbers(want), 1e-5)


@pytest.mark.optimized
def test_a_skipped_microbatch_adds_no_statistics():
    tx = bnp_optax.bnp_sgd(0.1)
    bad = np.full_like(X[0][:8], np.nan)
    parts = in_parts(X[:1], 2)
    multi = bnp_optax.multi_steps(tx, 2, should_skip_update_fn=optax.skip_not_finite)
    for spoiled in ([bad, *parts], [parts[0], bad, parts[1]]):
        got, state = trained(multi, spoiled)
        want, want_state = trained(bnp_optax.multi_steps(tx, 2), parts)
        assert_trees_equal(got[-1], want[-1])
        assert_trees_equal(numbers(state), numbers(want_state))


def test_multi_steps_in_a_scan_in_a_chain_and_with_a_schedule():
    tx = optax.chain(
        bnp_optax.multi_steps(bnp_optax.bnp_sgd(0.1), lambda step: jnp.where(step < 1, 2, 4))
    )

    def step(state, x):
        _, grads, stats = bnp_optax.value_and_grad(net_loss)(NET, x)
        updates, state = tx.update(grads, state, NET, layer_stats=stats)
        return state, optax.tree.norm(updates)

    parts = [*in_parts(X[:1], 4)[:2], *in_parts(X[1:2], 4)]
    state, lengths = jax.jit(lambda s, xs: jax.lax.scan(step, s, xs))(tx.init(NET), np.stack(parts))
    assert (lengths > 0).tolist() == [False, True, False, False, False, True]
    _, want = trained(bnp_optax.bnp_sgd(0.1), [X[0][:8], X[1]])
    assert_trees_close(numbers(state), numbers(want), 1e-5)


def test_multi_steps_without_statistics_or_with_wrong_ones():
    tx = bnp_optax.multi_steps(bnp_optax.bnp_sgd(0.1), 2)
    _, grads, stats = capture(NET, X[0])
    with pytest.raises(ValueError, match="`layer_stats` was left out"):
        tx.update(grads, tx.init(NET), NET)
    other = {name: jax.tree.map(lambda a: a[..., None], s) for name, s in stats.items()}
    with pytest.raises(ValueError, match=r"The statistics of `Conv_0/kernel` have shapes"):
        tx.update(grads, tx.init(NET), NET, layer_stats=other)
    _, state = tx.update(grads, tx.init(NET), NET, layer_stats=None)
    _, state = tx.update(grads, state, NET, layer_stats=stats)
    assert_trees_close(numbers(state), numbers(trained(bnp_optax.bnp_sgd(0.1), X[:1])[1]), 1e-5)


@pytest.mark.skipif(not hasattr(optax, "microbatching"), reason="this Optax has no microbatching")
def test_one_line_of_optax_gives_the_step_of_the_full_batch():
    """Its averaged `count` is that of a microbatch: N in q is for us to say."""
    in_microbatches = optax.microbatching.microbatch(
        bnp_optax.value_and_grad(net_loss),
        argnums=1,
        microbatch_size=4,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )
    tx = bnp_optax.bnp_adam(1e-2, batch_size=16)
    got, state = trained(tx, X, jax.jit(in_microbatches))
    want, want_state = trained(tx, X)
    assert_trees_close(got, want)
    assert_trees_close(numbers(state), numbers(want_state), 1e-5)


def test_multi_steps_of_optax_is_far_from_the_full_batch():
    """Why the other ways are there."""
    want, _ = trained(bnp_optax.bnp_sgd(0.1, warm_start=True), X[:1])
    tx = optax.MultiSteps(bnp_optax.bnp_sgd(0.1, warm_start=True), 8)
    got, _ = trained(tx, in_parts(X[:1], 8))
    error = optax.tree.norm(optax.tree.sub(got[-1], want[-1])) / optax.tree.norm(want[-1])
    assert error > 0.1


# ---------------------------------------------------------------------------------------------
# Scaled losses.
# ---------------------------------------------------------------------------------------------


class HalfNet(nn.Module):
    """In float16, with gradients of the first layer below its smallest number, 6e-8."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(5, dtype=jnp.float16)(x.reshape(len(x), -1)))
        return nn.Dense(2, dtype=jnp.float16)(x)


HALF = HalfNet().init(jax.random.key(0), X[0])["params"]


def half_loss(params, x):
    out = HalfNet().apply({"params": params}, (x - 20.0) / 10.0)
    return jnp.mean((1e-3 * out.astype(jnp.float32)) ** 2) * 1e-3


def loss_and_stats(params, x):
    loss, _, stats = bnp_optax.value_and_grad(half_loss)(params, x)
    return loss, stats


@jax.jit
def scaled_step(state, scale, x):
    scaled = scale.value_and_grad(loss_and_stats, has_aux=True)
    scale, finite, (loss, stats), grads = scaled(state.params, x)
    stepped = state.apply_gradients(grads=grads, layer_stats=stats)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
    return state, scale, (loss, grads, stats)


def half_state():
    return bnp_optax.TrainState.create(
        apply_fn=HalfNet().apply, params=HALF, tx=bnp_optax.bnp_adam(1e-3)
    )


def test_a_dynamic_scale_scales_neither_gradients_nor_statistics():
    _, _, (loss, grads, stats) = scaled_step(half_state(), DynamicScale(scale=2.0**16), X[0])
    want_loss, unscaled, want_stats = jax.jit(bnp_optax.value_and_grad(half_loss))(HALF, X[0])
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-6)
    assert_trees_equal(stats, want_stats)
    # Without a scale, the gradient in float16 is lost; it is compared with that in float32.
    assert not np.any(unscaled["Dense_0"]["bias"])
    want = jax.grad(lambda p: half_loss(p, X[0]) * 2.0**16)(HALF)
    assert_trees_close(grads, jax.tree.map(lambda g: g / 2.0**16, want), 1e-3)
    assert np.any(grads["Dense_0"]["bias"])


@pytest.mark.parametrize("k", [0, -1, 2.0, "2", None, jnp.float32(2), np.array([2])])
def test_numbers_of_microbatches_that_are_none(k):
    with pytest.raises(ValueError, match="`every_k_schedule` must be an integer > 0, got"):
        bnp_optax.multi_steps(optax.sgd(0.1), k)


@pytest.mark.parametrize("k", [2, np.int64(2), jnp.int32(2), np.array(2), lambda _: 2])
def test_numbers_of_microbatches_in_any_type(k):
    tx = bnp_optax.multi_steps(optax.sgd(1.0), k)
    state = tx.init(jnp.ones(1))
    moves = []
    for _ in range(4):
        updates, state = tx.update(jnp.ones(1), state, jnp.ones(1))
        moves.append(float(updates[0]))
    assert moves == [0.0, -1.0, 0.0, -1.0]
    assert state.multi_steps.mini_step.dtype == jnp.int32


def test_an_injected_number_of_microbatches_may_be_set():
    tx = optax.inject_hyperparams(bnp_optax.multi_steps)(optax.sgd(1.0), every_k_schedule=2)
    state = tx.init(jnp.ones(1))
    state.hyperparams["every_k_schedule"] = jnp.int32(1)
    updates, _ = jax.jit(tx.update)(jnp.ones(1), state, jnp.ones(1))
    assert float(updates[0]) == -1.0


def test_a_step_that_overflows_moves_neither_parameters_nor_statistics():
    state, scale, _ = scaled_step(half_state(), DynamicScale(scale=2.0**16), X[0])
    too_large = scale.replace(scale=jnp.float32(2.0**60))
    after, scale, (_, grads, stats) = scaled_step(state, too_large, X[1])
    assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stats))
    assert_trees_equal(after, state)
    assert float(scale.scale) == 2.0**59
    after, _, _ = scaled_step(state, scale.replace(scale=jnp.float32(2.0**16)), X[1])
    assert int(after.step) == 2
    (found,) = bnp_states(after.opt_state)
    assert {float(numbers[1]) for numbers in jax.tree.leaves(found.numbers)} == {2.0}
