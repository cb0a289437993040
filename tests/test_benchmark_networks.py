"""The networks and normalizations of the benchmarks, against NumPy and against what Flax has."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnp_optax
from benchmarks.cnn import PaperCNN, pool
from benchmarks.models import BATCH_NORM_MOMENTUM, CNN, MLP, Norm, Normalize, convolve_patches
from benchmarks.norms import BatchRenorm, FourThings, channels_per_group, renorm_clips
from benchmarks.resnet import CifarResNet, ResNet18
from benchmarks.transformer import CharTransformer
from bnp_optax._tree import KERNEL, is_named, named_leaves

NORMS: tuple[Norm, ...] = ("none", "batch", "layer", "group", "renorm", "four")
EPS = 1e-5
SHAPES = [(6, 8), (6, 3, 2, 8)]
SHAPE_IDS = ["dense", "images"]


def draw(shape, seed=0):
    """Rows that are neither centered nor of one scale."""
    rng = np.random.default_rng(seed)
    scale, shift = rng.uniform(0.5, 3, shape[-1]), rng.normal(size=shape[-1])
    return (shift + scale * rng.normal(size=shape)).astype(np.float32)


def affine(variables, seed=9):
    """The variables with other scales and biases, and these in float64."""
    rng = np.random.default_rng(seed)
    gamma, beta = rng.normal(1, 0.3, 8), rng.normal(size=8)
    params = {"scale": jnp.array(gamma, jnp.float32), "bias": jnp.array(beta, jnp.float32)}
    return {**variables, "params": params}, gamma, beta


def train(module, variables, x):
    y, state = module.apply(variables, x, train=True, mutable=["batch_stats"])
    return np.asarray(y), {**variables, **state}


def close(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# Batch renormalization


def renorm(shape, **options):
    module = BatchRenorm(**options)
    variables, gamma, beta = affine(module.init(jax.random.key(0), jnp.zeros(shape), train=True))
    return module, variables, gamma, beta


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_renorm_is_batch_norm_before_the_clips_open(shape):
    module, variables, _, _ = renorm(shape, steps=80)
    batch_norm = nn.BatchNorm(use_running_average=False, epsilon=EPS)
    x = draw(shape)
    expected, _ = batch_norm.apply(
        {**variables, "batch_stats": {"mean": jnp.zeros(8), "var": jnp.ones(8)}},
        x,
        mutable=["batch_stats"],
    )
    for step in range(11):  # 5 / 40 of the run are 10 steps; the clips are still shut at the 11th.
        y, variables = train(module, variables, x)
        close(y, expected)
        assert variables["batch_stats"]["step"] == step + 1
    y, _ = train(module, variables, x)
    assert np.abs(y - expected).max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_renorm_with_wide_clips_normalizes_by_the_running_moments(shape):
    module, variables, gamma, beta = renorm(shape, steps=40, r_max=1e6, d_max=1e6)
    rng = np.random.default_rng(3)
    mean, deviation = rng.normal(size=8), rng.uniform(0.5, 2, 8)
    state = {"mean": mean, "deviation": deviation}
    state = {name: jnp.array(value, jnp.float32) for name, value in state.items()}
    variables["batch_stats"] = {**state, "step": jnp.array(40)}
    x = draw(shape)
    expected = (x.astype(np.float64) - mean) / deviation * gamma + beta
    close(train(module, variables, x)[0], expected)
    close(module.apply(variables, x, train=False), expected)


def test_renorm_clips_and_averages_as_ioffe_does():
    shape, steps, r_max, d_max = (4, 8), 8, 1.2, 0.3
    module, variables, gamma, beta = renorm(
        shape, steps=steps, momentum=0.7, r_max=r_max, d_max=d_max
    )
    mean, deviation = np.zeros(8), np.ones(8)
    clipped = 0
    for step in range(steps):
        x = draw(shape, step)
        y, variables = train(module, variables, x)
        rows = x.astype(np.float64)
        mu, sigma = rows.mean(0), np.sqrt(rows.var(0) + EPS)
        share = 40 * step / steps
        r_clip = 1 + (r_max - 1) * np.clip((share - 5) / 35, 0, 1)
        d_clip = d_max * np.clip((share - 5) / 20, 0, 1)
        r = np.clip(sigma / deviation, 1 / r_clip, r_clip)
        d = np.clip((mu - mean) / deviation, -d_clip, d_clip)
        clipped += np.sum(np.abs(d) < d_clip)
        close(y, ((rows - mu) / sigma * r + d) * gamma + beta)
        mean, deviation = 0.7 * mean + 0.3 * mu, 0.7 * deviation + 0.3 * sigma
    assert 0 < clipped < 8 * steps
    close(variables["batch_stats"]["mean"], mean)
    close(variables["batch_stats"]["deviation"], deviation)
    close(module.apply(variables, x, train=False), (rows - mean) / deviation * gamma + beta)


@pytest.mark.parametrize(
    ("thousands", "r_max", "d_max"),
    [(0, 1, 0), (5, 1, 0), (10, 1 + 2 / 7, 1.25), (25, 1 + 8 / 7, 5), (40, 3, 5), (50, 3, 5)],
)
@pytest.mark.parametrize("steps", [40, 40_000])
def test_schedule_of_renorm_is_stretched_to_the_run(thousands, r_max, d_max, steps):
    clips = renorm_clips(thousands * steps // 40, steps, 3.0, 5.0)
    np.testing.assert_allclose(clips, (r_max, d_max), rtol=1e-5, atol=1e-5)


def test_corrections_of_renorm_are_constants_to_the_gradient():
    module, variables, _, _ = renorm((6, 8), steps=40)
    variables["batch_stats"]["step"] = jnp.array(30)
    x, weights = jnp.array(draw((6, 8))), jnp.array(draw((6, 8), 1))
    clip_r, clip_d = renorm_clips(30, 40, 3.0, 5.0)
    sigma = jnp.sqrt(x.var(0) + EPS)
    r, d = jnp.clip(sigma, 1 / clip_r, clip_r), jnp.clip(x.mean(0), -clip_d, clip_d)

    def by_hand(x):
        mu, sigma = x.mean(0), jnp.sqrt(x.var(0) + EPS)
        y = (x - mu[None]) / sigma[None] * r[None] + d[None]
        return jnp.sum(y * variables["params"]["scale"][None] * weights)

    def loss_fn(x):
        y, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.sum(y * weights)

    close(jax.grad(loss_fn)(x), jax.grad(by_hand)(x), 1e-4)


# Batch normalization with four improvements


def four_things(shape, **options):
    module = FourThings(**options)
    variables, gamma, beta = affine(module.init(jax.random.key(0), jnp.zeros(shape), train=True))
    return module, variables, gamma, beta


@pytest.mark.parametrize(("n", "part"), [(8, 4), (10, 5), (11, 11), (12, 4)])
@pytest.mark.parametrize("pixels", [(), (3, 2)], ids=SHAPE_IDS)
def test_large_batches_are_normalized_by_ghost_batches(n, part, pixels):
    x = draw((n, *pixels, 8))
    module, variables, gamma, beta = four_things(x.shape, ghost_size=4)
    y, variables = train(module, variables, x)
    assert not variables["batch_stats"]["grouped"]
    for first in range(0, n, part):
        rows = x[first : first + part].astype(np.float64)
        axes = tuple(range(rows.ndim - 1))
        expected = (rows - rows.mean(axes)) / np.sqrt(rows.var(axes) + EPS)
        close(y[first : first + part], expected * gamma + beta)


@pytest.mark.parametrize(("group_size", "size"), [(2, 2), (4, 4), (32, 8)])
@pytest.mark.parametrize("shape", [(1, 8), (7, 8), (1, 3, 2, 8), (2, 3, 2, 8)], ids=str)
def test_small_batches_are_normalized_by_groups_of_channels(shape, group_size, size):
    x = draw(shape)
    module, variables, gamma, beta = four_things(shape, ghost_size=4, group_size=group_size)
    y, variables = train(module, variables, x)
    assert variables["batch_stats"]["grouped"]
    for first in range(0, 8, size):
        block = slice(first, first + size)
        entries = x[..., block].astype(np.float64)
        expected = (entries - entries.mean()) / np.sqrt(entries.var() + EPS)
        close(y[..., block], expected * gamma[block] + beta[block])


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [3, 8], ids=["grouped", "ghost"])
@pytest.mark.parametrize("pixels", [(), (3, 2)], ids=SHAPE_IDS)
def test_evaluation_weighs_the_example_in(pixels, n, weight):
    shape = (n, *pixels, 8)
    module, variables, gamma, beta = four_things(
        shape, ghost_size=4, group_size=2, weight=weight, momentum=0.7
    )
    mean, square = np.zeros(8), np.ones(8)
    for step in range(2):
        x = draw(shape, step)
        _, variables = train(module, variables, x)
        rows = x.reshape(-1, 8).astype(np.float64)
        mean, square = 0.7 * mean + 0.3 * rows.mean(0), 0.7 * square + 0.3 * (rows**2).mean(0)
    close(variables["batch_stats"]["mean"], mean)
    close(variables["batch_stats"]["square"], square)

    x = draw((20, *pixels, 8), 7)
    y = np.asarray(module.apply(variables, x, train=False))
    group = 2 if n < 8 else 1
    for example, given in zip(x.astype(np.float64), y, strict=True):
        rows = example.reshape(-1, 8)
        m_1 = weight * rows.mean(0) + (1 - weight) * mean
        m_2 = weight * (rows**2).mean(0) + (1 - weight) * square
        m_1 = m_1.reshape(-1, group).mean(1).repeat(group)
        m_2 = m_2.reshape(-1, group).mean(1).repeat(group)
        expected = (rows - m_1) / np.sqrt(m_2 - m_1**2 + EPS) * gamma + beta
        # Where one number is its own mean and square, rounding is divided by sqrt(eps).
        close(given.reshape(-1, 8), expected, 2e-5 if weight < 1 else 2e-2)


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


# Normalizations by name


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


# Networks

IMAGES = (4, 32, 32, 3)
# Compilation is most of the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
NETWORKS = {
    "mlp": (lambda norm: MLP((8,), norm=norm), (4, 6, 5)),
    "cnn": (lambda norm: CNN(norm=norm, convolution=convolve_patches), (4, 8, 8, 3)),
    "paper cnn": (
        lambda norm: PaperCNN((4, 8, 4), 8, norm=norm, convolution=convolve_patches),
        (4, 22, 22, 3),
    ),
    "resnet": (lambda norm: CifarResNet(8, norm=norm), (4, 8, 8, 3)),
    "preactivation": (
        lambda norm: CifarResNet(8, norm=norm, preactivation=True, shortcut="projection"),
        (4, 8, 8, 3),
    ),
    "resnet-18": (lambda norm: ResNet18(4, 10, norm), IMAGES),
}


def initial(model, x):
    """Variables like the initial ones; these would take as long to compile as the network."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        if path[-1].key in ("kernel", "embedding"):
            fan_in = np.prod(shape.shape[-4:-1])
            return jnp.array(rng.normal(0, fan_in**-0.5, shape.shape), shape.dtype)
        ones = path[-1].key in ("scale", "var", "deviation", "square")
        return jnp.full(shape.shape, ones, shape.dtype)

    return jax.tree.map_with_path(leaf, jax.eval_shape(model.init, jax.random.key(0), x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_run_with_every_normalization(name, norm):
    make, shape = NETWORKS[name]
    model, x = make(norm), jnp.array(draw(shape))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(variables, x):
        logits, state = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, model.apply({**variables, **state}, x), state

    *both, state = run(initial(model, x), x)
    for logits in both:
        assert logits.shape == (shape[0], 10)
        assert jnp.all(jnp.isfinite(logits))
        assert logits.std() > 1e-6
    assert bool(jax.tree.leaves(state)) == (norm in ("batch", "renorm", "four"))


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_transformer_sees_no_later_characters(norm):
    model = CharTransformer(11, width=8, depth=2, heads=2, context=6, norm=norm)
    tokens = jnp.array(np.random.default_rng(1).integers(0, 11, (3, 5)), jnp.int32)
    variables = initial(model, tokens)
    apply = jax.jit(model.apply, static_argnames="train", compiler_options=QUICK)
    logits = apply(variables, tokens, train=True)
    assert logits.shape == (3, 5, 11)
    assert jnp.all(jnp.isfinite(logits))
    np.testing.assert_array_equal(logits, apply(variables, tokens))
    for t in range(5):
        other = apply(variables, tokens.at[:, t].set((tokens[:, t] + 1) % 11))
        np.testing.assert_array_equal(other[:, :t], logits[:, :t])
        assert np.all(np.abs(other[:, t:] - logits[:, t:]).max((0, 2)) > 1e-6)


def test_unnormalized_stream_keeps_its_variance():
    tokens = jnp.zeros((1, 4), jnp.int32)
    kernels = {}
    for norm in ("none", "layer"):
        model = CharTransformer(11, width=32, depth=2, norm=norm)
        init = jax.jit(model.init, compiler_options=QUICK)
        kernels[norm] = named_leaves(init(jax.random.key(0, impl="rbg"), tokens)["params"])
    for name, kernel in kernels["none"].items():
        ratio = kernel.std() / kernels["layer"][name].std() if kernel.std() > 0 else 1.0
        writes = name in {
            *(f"MultiHeadDotProductAttention_{i}/out/kernel" for i in range(2)),
            *(f"Dense_{2 * i + 1}/kernel" for i in range(2)),
        }
        np.testing.assert_allclose(ratio, 0.5 if writes else 1.0, rtol=0.1)


MODELS = {
    **{name: (make("none"), shape) for name, (make, shape) in NETWORKS.items()},
    "pad": (CifarResNet(14, preactivation=True), (4, 8, 8, 3)),
    "transformer": (CharTransformer(11, width=8, heads=2), None),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kernel_of_an_unnormalized_network_is_found_with_its_bias(name):
    model, shape = MODELS[name]
    x = jnp.zeros((4, 5), jnp.int32) if shape is None else jnp.zeros(shape)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]

    def loss_fn(params):
        return jnp.mean(model.apply({"params": params}, x, train=True) ** 2)

    layers = bnp_optax.find_layers(loss_fn, params)
    assert set(layers) == {leaf for leaf in named_leaves(params) if is_named(leaf, KERNEL)}
    assert all(layer.bias for layer in layers.values())


def count(model, shape):
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))["params"]
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("preactivation", [False, True])
def test_resnet_110_has_he_s_parameters_and_biases(preactivation):
    convolutions = [(3, 16)] + 36 * [(16, 16)]
    convolutions += [(16, 32)] + 35 * [(32, 32)] + [(32, 64)] + 35 * [(64, 64)]
    assert len(convolutions) == 109
    biases = sum(out for _, out in convolutions)
    kernels = sum(9 * fan_in * out for fan_in, out in convolutions) + 64 * 10 + 10
    # Normalizations have the width of what they follow; before an activation, of what they precede.
    widths = [fan_in for fan_in, _ in convolutions[1:]] + [64] if preactivation else []
    scales = 2 * sum(widths or [out for _, out in convolutions])
    if not preactivation:
        assert round((kernels + scales) / 1e6, 2) == 1.73
    model = CifarResNet(norm="batch", preactivation=preactivation)
    assert count(model, (1, 32, 32, 3)) == kernels + biases + scales
    none = CifarResNet(norm="none", preactivation=preactivation)
    assert count(none, (1, 32, 32, 3)) == kernels + biases


def test_resnet_18_has_torchvision_s_parameters_and_biases():
    widths = [64, 64, 64, 64, 64]
    widths += [128] * 5 + [256] * 5 + [512] * 5  # Four convolutions and a projection each.
    assert count(ResNet18(norm="batch"), (1, 224, 224, 3)) == 11_689_512 + sum(widths)


def test_resnet_s_initial_kernels_are_he_normal_times_the_scale():
    model = CifarResNet(14, init_scale=0.1)
    init = jax.jit(model.init, compiler_options=QUICK)
    params = init(jax.random.key(0, impl="rbg"), jnp.zeros((1, 8, 8, 3)))["params"]
    for name, leaf in named_leaves(params).items():
        if not is_named(name, KERNEL):
            assert not np.any(leaf)
        elif leaf.size > 10_000:
            # The kernels of equal blocks are stacked along the first axis.
            fan_in = np.prod(leaf.shape[-4:-1])
            np.testing.assert_allclose(leaf.std(), 0.1 * np.sqrt(2 / fan_in), rtol=0.05)
            assert leaf.ndim == 4 or len(np.unique(leaf[:, 0, 0, 0, 0])) == leaf.shape[0]


def test_paper_cnn_has_the_tutorial_s_shapes_and_glorot_kernels():
    params = jax.jit(PaperCNN().init, compiler_options=QUICK)(
        jax.random.key(0, impl="rbg"), jnp.zeros(IMAGES)
    )["params"]
    expected = {
        "Conv_0": (3, 3, 3, 32),
        "Conv_1": (3, 3, 32, 64),
        "Conv_2": (3, 3, 64, 32),
        "Dense_0": (512, 64),
        "Dense_1": (64, 10),
    }
    assert {name: layer["kernel"].shape for name, layer in params.items()} == expected
    for layer in params.values():
        *window, fan_in, fan_out = layer["kernel"].shape
        bound = np.sqrt(6 / (np.prod(window) * (fan_in + fan_out)))
        assert 0.95 * bound < np.abs(layer["kernel"]).max() <= bound
        assert not np.any(layer["bias"])


def test_kernels_of_small_networks_can_be_chosen():
    for model in (MLP((4,)), CNN()):
        plain, ones = (
            jax.jit(m.init, compiler_options=QUICK)(
                jax.random.key(0, impl="rbg"), jnp.zeros((1, 4, 4, 1))
            )["params"]
            for m in (model, model.clone(kernel_init=nn.initializers.ones))
        )
        assert jax.tree.structure(plain) == jax.tree.structure(ones)
        for layer in ones.values():
            np.testing.assert_array_equal(layer["kernel"], 1.0)


@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (2, 7, 5, 3), (1, 2, 3, 1)])
def test_pooling_is_flax_s(shape):
    x, weights = jnp.array(draw(shape)), jnp.array(draw((8, *shape[-1:])))

    def loss_fn(x, pool):
        y = pool(x)
        return jnp.sum(y * jnp.resize(weights, y.shape)), y

    def flax_pool(x):
        return nn.max_pool(x, (2, 2), (2, 2))

    (_, y), grad = jax.value_and_grad(loss_fn, has_aux=True)(x, pool)
    (_, expected), expected_grad = jax.value_and_grad(loss_fn, has_aux=True)(x, flax_pool)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(grad, expected_grad)


# Errors


@pytest.mark.parametrize("norm", ["batch", "group", "renorm", "four"])
def test_transformer_refuses_normalizations_over_tokens(norm):
    model = CharTransformer(11, norm=norm)
    with pytest.raises(ValueError, match=rf"`norm` must be one of .*'layer'.* got '{norm}'"):
        model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


def test_transformer_refuses_texts_beyond_its_context():
    model = CharTransformer(11, context=3)
    with pytest.raises(ValueError, match=r"`context` = 3, got length 4"):
        model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


@pytest.mark.parametrize("depth", [2, 18, 111])
def test_resnet_refuses_other_depths(depth):
    with pytest.raises(ValueError, match=rf"`depth` must be 6 n \+ 2.* got {depth}"):
        CifarResNet(depth).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_resnet_refuses_unknown_shortcuts():
    with pytest.raises(ValueError, match=r"`shortcut` must be one of .*'pad'.* got 'crop'"):
        CifarResNet(8, shortcut="crop").init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize("group_size", [3, 0])
@pytest.mark.parametrize("norm", ["group", "four"])
def test_groups_must_divide_the_channels(norm, group_size):
    assert channels_per_group(8, 32) == 8
    with pytest.raises(ValueError, match=rf"`group_size` .* 8 channels.* got {group_size}"):
        Normalize(norm, group_size=group_size).init(
            jax.random.key(0), jnp.zeros((2, 8)), train=True
        )
