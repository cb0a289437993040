"""Batch normalization preconditioning with bad numbers or none, stacked layers, and shards."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.bnp_cases import (
    all_finite,
    assert_close,
    assert_trees_close,
    assert_trees_equal,
    captured,
    drifting_inputs,
    random_params,
    setting,
    targets,
    transformation,
)
from support.oracles import Options

import bnp_optax

# ---------------------------------------------------------------------------------------------
# Bad numbers, and no statistics.
# ---------------------------------------------------------------------------------------------


def stepped(name, init, update, n_steps=2):
    """The state after some steps, and gradients and statistics for one more."""
    case, params, _, target_shape = setting(name)
    state = init(params)
    for step in range(n_steps + 1):
        x, y = drifting_inputs(case.shape, step), targets(target_shape, step)
        _, grads, stats = captured(name)(params, x, y)
        if step < n_steps:
            _, state = update(grads, state, params, layer_stats=stats)
    return params, state, grads, stats


def spoiled(stats, how):
    """Statistics of the layer `a` with one bad number, or of no rows at all."""
    layer = stats["a/kernel"]
    if how == "no rows":
        empty = jax.tree.map(jnp.zeros_like, layer)
        return stats | {"a/kernel": empty}
    value, field = how.split()
    array = getattr(layer, field)
    array = array.ravel().at[0].set(float(value)).reshape(array.shape)
    return stats | {"a/kernel": dataclasses.replace(layer, **{field: array})}


def with_rejected(state, more, layer=None):
    """The state with `more` rejected batches in the numbers of a layer, or of all of them."""

    def counted(path, numbers):
        return numbers.at[2].add(more if layer in (None, path[0].key) else 0)

    return state._replace(numbers=jax.tree_util.tree_map_with_path(counted, state.numbers))


FIELDS = ["mean", "var", "sq_mean", "count"]
BAD = [
    *(f"{value} {field}" for value in ("nan", "inf") for field in FIELDS),
    *("-1 var", "0 count", "no rows"),
]


@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize("name", ["dense", "conv_grouped", "dense_without_bias"])
def test_bad_statistics_do_not_enter_the_running_ones(name, how):
    init, update = transformation()
    params, state, grads, stats = stepped(name, init, update)
    updates, after = update(grads, state, params, layer_stats=spoiled(stats, how))
    reused, _ = update(grads, state, params, layer_stats=None)
    rejected = 0 if how in ("0 count", "no rows") else 1
    assert_trees_equal(after, with_rejected(state, rejected, "a"))
    assert_trees_equal(updates, reused)
    assert all_finite(updates)


@pytest.mark.parametrize("how", BAD)
def test_bad_statistics_of_one_layer_leave_the_others_alone(how):
    init, update = transformation()
    params, state, grads, stats = stepped("mlp", init, update)
    good, _ = update(grads, state, params, layer_stats=stats)
    updates, _ = update(grads, state, params, layer_stats=spoiled(stats, how))
    for layer in ("b", "c"):
        assert_trees_equal(updates[layer], good[layer])
    assert not np.array_equal(updates["a"]["kernel"], good["a"]["kernel"])


@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize("warm_start", [False, True])
def test_training_goes_on_after_a_bad_first_batch(warm_start, how):
    init, update = transformation(warm_start=warm_start)
    params, state, grads, stats = stepped("dense", init, update, n_steps=0)
    after_bad = update(grads, state, params, layer_stats=spoiled(stats, how))[1]
    updates, _ = update(grads, after_bad, params, layer_stats=stats)
    want, _ = update(grads, state, params, layer_stats=stats)
    assert_trees_equal(updates, want)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_with_a_bad_number_does_not_enter_the_running_statistics(value):
    case, params, _, target_shape = setting("mlp")
    init, update = transformation()
    _, state, grads, _ = stepped("mlp", init, update)
    x = drifting_inputs(case.shape, 3)
    x[0, 0] = value
    _, _, stats = captured("mlp")(params, x, targets(target_shape, 3))
    _, after = update(grads, state, params, layer_stats=stats)
    assert_trees_equal(after, with_rejected(state, 1))


@pytest.mark.parametrize("decay", [0.99, 0.0])
@pytest.mark.parametrize(
    "name", ["dense", "dense_one_example", "dense_without_bias", "conv_depthwise"]
)
@pytest.mark.parametrize("constant", [0.0, 3.0, 1e4])
def test_inputs_without_variance_give_finite_updates(name, decay, constant):
    case, params, _, target_shape = setting(name)
    init, update = transformation(decay=decay)
    state = init(params)
    x = np.full(case.shape, constant, np.float32)
    for step in range(2):
        _, grads, stats = captured(name)(params, x, targets(target_shape, step))
        updates, state = update(grads, state, params, layer_stats=stats)
        assert all_finite(updates)
        assert all_finite(state)


def test_one_dead_input_gives_finite_updates():
    case, params, _, target_shape = setting("dense")
    x = drifting_inputs(case.shape, 0)
    x[:, 2] = 0.0
    init, update = transformation(decay=0.0)
    y = targets(target_shape, 0)
    _, grads, stats = captured("dense")(params, x, y)
    updates, _ = update(grads, init(params), params, layer_stats=stats)
    _, want = oracles.bnp_step(case.layers, {}, params, x, y, Options(decay=0.0))
    np.testing.assert_array_equal(updates["a"]["kernel"][2], 0.0)
    assert_trees_close(updates, want)


@pytest.mark.parametrize("name", ["dense", "conv_grouped", "conv_without_bias"])
def test_zero_gradients_give_zero_updates(name):
    init, update = transformation()
    params, state, grads, stats = stepped(name, init, update)
    zeros = jax.tree.map(jnp.zeros_like, grads)
    updates, _ = update(zeros, state, params, layer_stats=stats)
    assert_trees_equal(updates, zeros)


@pytest.mark.parametrize("name", ["dense", "conv_grouped", "conv_without_bias", "mlp"])
def test_no_statistics_leave_the_state_and_still_precondition(name):
    init, update = transformation(decay=0.5)
    params, state, grads, _ = stepped(name, init, update)
    updates, after = update(grads, state, params, layer_stats=None)
    assert_trees_equal(after, state)

    case, _, _, target_shape = setting(name)
    running, options = {}, Options(decay=0.5)
    for step in range(2):
        x, y = drifting_inputs(case.shape, step), targets(target_shape, step)
        running, _ = oracles.bnp_step(case.layers, running, params, x, y, options)
    # With decay 1, the oracle's step moves nothing and preconditions with what is there.
    x, y = drifting_inputs(case.shape, 2), targets(target_shape, 2)
    _, want = oracles.bnp_step(case.layers, running, params, x, y, Options(decay=1.0))
    assert_trees_close(updates, want)


# ---------------------------------------------------------------------------------------------
# Stacked layers.
# ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer that keeps its input's shape, with an output that is neither centered nor scaled."""

    kind: str

    @nn.compact
    def __call__(self, x, _):
        features = x.shape[-1]
        bias = not self.kind.endswith("without_bias")
        if self.kind.startswith("dense"):
            y = nn.Dense(features, use_bias=bias, name="layer")(x)
        else:
            groups = 2 if self.kind.startswith("conv_grouped") else 1
            y = nn.Conv(
                features,
                (3, 3),
                feature_group_count=groups,
                use_bias=bias,
                name="layer",
            )(x)
        return nn.relu(1.7 * y), None


class Scanned(nn.Module):
    kind: str
    depth: int

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
        )
        return stack(self.kind, name="stack")(x, None)[0]


class Unrolled(nn.Module):
    kind: str
    depth: int

    @nn.compact
    def __call__(self, x):
        for index in range(self.depth):
            x, _ = Block(self.kind, name=f"block_{index}")(x, None)
        return x


def last_updates(model, params, batches, explicit):
    """The updates of the last of a few steps at the same parameters."""

    def loss_fn(params, x, y):
        return jnp.mean((model.apply({"params": params}, x) - y) ** 2)

    layers = bnp_optax.find_layers(loss_fn, params, *batches[0]) if explicit else None
    tx = bnp_optax.bnp_precondition(decay=0.8, layers=layers)

    @jax.jit
    def step(state, params, x, y):
        _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, x, y)
        return tx.update(grads, state, params, layer_stats=stats)

    state = tx.init(params)
    for x, y in batches:
        updates, state = step(state, params, x, y)
    return updates


@pytest.mark.parametrize("kind", ["dense", "dense_without_bias", "conv_grouped"])
def test_layers_stacked_by_scan_equal_the_layers_one_by_one(kind):
    depth, shape = 2, (6, 4) if kind.startswith("dense") else (3, 4, 5, 4)
    scanned, unrolled = Scanned(kind, depth), Unrolled(kind, depth)
    stacked = random_params(scanned, drifting_inputs(shape, 0))
    batches = [
        (jnp.asarray(drifting_inputs(shape, step)), jnp.asarray(targets(shape, step)))
        for step in range(3)
    ]

    def unstacked(tree):
        blocks = tree["stack"]
        return {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(depth)}

    one_by_one = last_updates(unrolled, unstacked(stacked), batches, explicit=False)
    # Without `layers`, the state of a grouped convolution takes its shape at the first step.
    for explicit in (False, True) if kind == "conv_grouped" else (False,):
        updates = last_updates(scanned, stacked, batches, explicit)
        assert_trees_close(unstacked(updates), one_by_one)


# ---------------------------------------------------------------------------------------------
# Averages over shards.
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "conv", "conv_grouped", "mlp"])
def test_average_over_two_half_batches_has_the_variance_of_the_whole(name):
    case, params, _, target_shape = setting(name)
    x, y = drifting_inputs(case.shape, 1), targets(target_shape, 1)
    half = len(x) // 2
    x[:half] += 2.0
    halves = [captured(name)(params, *pair)[2] for pair in _split(x, y)]
    average = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    _, _, whole = captured(name)(params, x, y)
    for key, stats in whole.items():
        assert_close(average[key].mean, stats.mean, 1e-5, key)
        assert_close(average[key].total_variance, stats.total_variance, 1e-4, key)
        assert float(jnp.max(average[key].total_variance - average[key].var)) > 0.1


def _split(x, y):
    half = len(x) // 2
    return (x[:half], y[:half]), (x[half:], y[half:])


@pytest.mark.parametrize("name", ["dense", "conv", "conv_grouped", "dense_without_bias"])
def test_pmean_over_shards_gives_the_step_of_the_whole_batch(name):
    case, params, loss_fn, target_shape = setting(name)

    def sharded(params, x, y):
        _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, x, y)
        return jax.lax.pmean((grads, stats), "shards")

    over_shards = jax.jit(
        jax.vmap(sharded, in_axes=(None, 0, 0), out_axes=None, axis_name="shards")
    )
    # The count of a shard is that of its own examples: `batch_size` tells N of the whole.
    init, update = transformation(decay=0.5, batch_size=case.shape[0])
    state, running = init(params), {}
    for step in range(3):
        x, y = drifting_inputs(case.shape, step), targets(target_shape, step)
        x[: len(x) // 2] += 2.0
        grads, stats = over_shards(params, *(a.reshape(2, -1, *a.shape[1:]) for a in (x, y)))
        updates, state = update(grads, state, params, layer_stats=stats)
        running, want = oracles.bnp_step(case.layers, running, params, x, y, Options(decay=0.5))
        assert_trees_close(updates, want)
