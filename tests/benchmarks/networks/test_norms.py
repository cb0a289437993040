"""The benchmarks' normalizations by name: what each is, its state, and its options."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.benchmark_network_cases import EPS, close, draw, train

from benchmarks.networks.norms import BatchRenorm, channels_per_group
from benchmarks.networks.paper_cnn import PaperCNN
from benchmarks.networks.small import BATCH_NORM_MOMENTUM, MLP, Normalize
from bnp_optax._tree import named_leaves


@pytest.mark.parametrize("norm", ["renorm", "four"])
def test_normalizations_keep_their_state_through_scan_and_vmap(norm):
    xs = jnp.stack([draw((4, 8), seed) for seed in range(6)]).reshape(3, 2, 4, 8)
    module = Normalize(norm, steps=6)
    variables = module.init(jax.random.key(0), xs[0, 0], train=True)

    def step(state, x):
        y, state = module.apply({**variables, **state}, x, train=True, mutable=[*state])
        return state, y

    def run(xs):
        return jax.lax.scan(step, {"batch_stats": variables["batch_stats"]}, xs)

    state, ys = jax.vmap(run, in_axes=1, out_axes=(0, 1))(xs)
    for lane in range(2):
        alone = variables
        for x, y in zip(xs[:, lane], ys[:, lane], strict=True):
            expected, alone = train(module, alone, x)
            close(y, expected)
        for name, value in named_leaves(alone["batch_stats"]).items():
            close(named_leaves(state["batch_stats"])[name][lane], value)


def test_batch_norm_and_layer_norm_are_flax_s_under_their_old_names():
    x = draw((6, 3, 2, 8))
    variables = Normalize("batch").init(jax.random.key(0), x, train=True)
    assert set(named_leaves(variables)) == {
        f"{collection}/BatchNorm_0/{leaf}"
        for collection, leaves in {
            "params": ("scale", "bias"),
            "batch_stats": ("mean", "var"),
        }.items()
        for leaf in leaves
    }
    y, _ = train(Normalize("batch"), variables, x)
    rows = x.reshape(-1, 8).astype(np.float64)
    close(y.reshape(-1, 8), (rows - rows.mean(0)) / np.sqrt(rows.var(0) + EPS), 1e-4)
    variables = Normalize("layer").init(jax.random.key(0), x, train=True)
    assert set(named_leaves(variables)) == {"params/LayerNorm_0/scale", "params/LayerNorm_0/bias"}
    y = Normalize("layer").apply(variables, x, train=True)
    close(np.asarray(y).reshape(6, -1).mean(1), np.zeros(6))
    assert not Normalize("none").init(jax.random.key(0), x, train=True)


def test_group_norm_takes_moments_of_an_example_s_groups():
    for shape, group_size, size in (((3, 8), 4, 4), ((3, 2, 5, 8), 2, 2), ((3, 2, 5, 8), 32, 8)):
        x = draw(shape)
        module = Normalize("group", group_size=group_size)
        y, _ = module.init_with_output(jax.random.key(0), x, train=True)
        entries = x.reshape(3, -1, 8 // size, size).astype(np.float64)
        mean, var = entries.mean((1, 3), keepdims=True), entries.var((1, 3), keepdims=True)
        close(y, ((entries - mean) / np.sqrt(var + 1e-6)).reshape(shape), 1e-4)


def test_length_of_the_run_and_momentum_reach_renorm():
    x = jnp.array(draw((4, 8)))
    variables = Normalize("renorm", steps=1000).init(jax.random.key(0), x, train=True)
    state = variables["batch_stats"]["BatchRenorm_0"]
    state["step"] = jnp.array(125)
    shut, after = train(Normalize("renorm", steps=1000), variables, x)
    open_, _ = train(Normalize("renorm", steps=125), variables, x)
    assert np.abs(shut - open_).max() > 1e-2
    averages = after["batch_stats"]["BatchRenorm_0"]
    close(averages["mean"], (1 - BATCH_NORM_MOMENTUM) * x.mean(0))
    for model in (MLP((4,), norm="renorm", steps=1000), PaperCNN(norm="renorm", steps=1000)):
        images = jnp.ones((2, 32, 32, 1))
        found = []

        def record(next_fun, args, kwargs, context, found=found):
            found += [context.module.steps] if isinstance(context.module, BatchRenorm) else []
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(record):
            jax.eval_shape(model.init, jax.random.key(0), images)
        assert found
        assert set(found) == {1000}


@pytest.mark.parametrize("group_size", [3, 0])
@pytest.mark.parametrize("norm", ["group", "four"])
def test_groups_must_divide_the_channels(norm, group_size):
    assert channels_per_group(8, 32) == 8
    with pytest.raises(ValueError, match=rf"`group_size` .* 8 channels.* got {group_size}"):
        Normalize(norm, group_size=group_size).init(
            jax.random.key(0), jnp.zeros((2, 8)), train=True
        )
