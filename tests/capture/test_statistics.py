"""The algebra of `LayerStats`, and the precision of means and variances in float32."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles

import bnp_optax

# The contract: variances to 1e-3 of float64's, however large the mean.
VAR_RTOL = 1e-3
# A mean is a float32 number: half a unit in its last place, and a few roundings on the way.
MEAN_RTOL = 5e-7

DENSE, SEQUENCES, CONV = "dense", "sequences", "conv"


def model_for(kind, dtype=None, **keywords):
    if kind == CONV:
        return nn.Conv(3, (3, 3), dtype=dtype, **keywords)
    return nn.Dense(3, dtype=dtype, **keywords)


@functools.cache
def loss_and_grad_of(model, jit):
    def loss_fn(params, x):
        return jnp.mean(model.apply({"params": params}, x).astype(jnp.float32) ** 2)

    loss_and_grad = bnp_optax.value_and_grad(loss_fn)
    return jax.jit(loss_and_grad) if jit else loss_and_grad


def capture(model, x, *, jit=True):
    """Statistics of the one layer `model` on `x`."""
    x = jnp.asarray(x)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)
    _, _, stats = loss_and_grad_of(model, jit)(params, x)
    return stats["kernel"]


def batch(shape, ratio, std=1.0, seed=0):
    """float32 inputs with |mean| / standard deviation = `ratio`, in both signs, by feature."""
    rng = np.random.default_rng(seed)
    stds = std * 10.0 ** rng.uniform(-1, 1, shape[-1])
    means = ratio * stds * np.where(np.arange(shape[-1]) % 2, -1, 1)
    return (means + stds * rng.normal(size=shape)).astype(np.float32)


def assert_moments_match(stats, x, mean_rtol=MEAN_RTOL):
    mean, var = oracles.input_moments(x)
    np.testing.assert_allclose(np.ravel(stats.mean), mean, rtol=mean_rtol)
    np.testing.assert_allclose(np.ravel(stats.var), var, rtol=VAR_RTOL)


# Batch 64 and 4096 rows of a dense layer; a sequence; 65,536 rows of a convolution.
SHAPES = {
    "dense_64": (DENSE, (64, 8)),
    "dense_4096": (DENSE, (4096, 8)),
    "sequences_4096": (SEQUENCES, (32, 128, 8)),
    "conv_65536": (CONV, (16, 64, 64, 4)),
}


@functools.cache
def precise(name, ratio, jit):
    kind, shape = SHAPES[name]
    x = batch(shape, ratio)
    return capture(model_for(kind), x, jit=jit), x


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("ratio", [0.5, 1e2, 1e4])
@pytest.mark.parametrize("name", SHAPES)
def test_variance_is_accurate_where_the_mean_is_much_larger(name, ratio, jit):
    stats, x = precise(name, ratio, jit)
    # A mean of half a standard deviation is itself a sum with cancellation.
    assert_moments_match(stats, x, MEAN_RTOL if ratio > 1 else 1e-5)


@pytest.mark.parametrize("std", [1e-6, 1e-3, 1e6])
def test_variance_is_accurate_at_any_scale(std):
    x = batch((256, 8), 1e4, std)
    assert_moments_match(capture(model_for(DENSE), x), x)


@pytest.mark.parametrize("position", [0, 100])
def test_variance_is_accurate_with_an_outlier(position):
    # The outlier makes up nearly all of the variance, wherever it stands in the batch.
    x = batch((256, 8), 1e4)
    x[position] *= 2.0
    assert_moments_match(capture(model_for(DENSE), x), x)


def test_variance_is_accurate_along_a_drift():
    # Sorted inputs: the first is far from the mean of the rest.
    x = np.sort(batch((4096, 8), 1e4), axis=0)
    assert_moments_match(capture(model_for(DENSE), x), x)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("constant", [0.0, 0.1, 12345.678])
def test_variance_of_constant_inputs_is_the_square_of_a_rounding_at_most(constant, jit):
    """The mean of seven equal numbers may be their neighbor: far below the floors of `bnp`."""
    stats = capture(model_for(DENSE), np.full((7, 3), constant, np.float32), jit=jit)
    rounding = 2 * np.finfo(np.float32).eps * constant
    assert (np.asarray(stats.var) <= rounding**2).all()
    np.testing.assert_array_equal(stats.total_variance, stats.var)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("ratio", [0.5, 20.0, 100.0])
@pytest.mark.parametrize("name", ["dense_64", "conv_65536"])
def test_bfloat16_activations_have_the_variance_of_the_numbers_that_they_are(name, ratio, jit):
    kind, shape = SHAPES[name]
    x = jnp.asarray(batch(shape, ratio), jnp.bfloat16)
    stats = capture(model_for(kind, jnp.bfloat16), x, jit=jit)
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype(jnp.float32)}
    assert_moments_match(stats, np.asarray(x, np.float64), MEAN_RTOL if ratio > 1 else 1e-5)


# ---------------------------------------------------------------------------------------------
# Total variance.
# ---------------------------------------------------------------------------------------------


def formula(stats):
    """Total variance as the definition of the fields has it."""
    return stats.var + jnp.maximum(stats.sq_mean - stats.mean**2, 0.0)


def in_numpy(stats):
    mean, var, sq_mean = (np.asarray(a) for a in (stats.mean, stats.var, stats.sq_mean))
    return var + np.maximum(sq_mean - mean**2, np.float32(0))


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda stats: stats.total_variance,
        jax.jit(lambda stats: stats.total_variance),
        formula,
        jax.jit(formula),
        in_numpy,
    ],
    ids=["property", "jitted_property", "formula", "jitted_formula", "numpy"],
)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", SHAPES)
def test_total_variance_of_one_batch_is_its_variance_to_the_last_bit(name, jit, evaluate):
    stats, _ = precise(name, 1e4, jit)
    np.testing.assert_array_equal(evaluate(stats), stats.var)


@pytest.mark.parametrize("evaluate", [lambda s: s.total_variance, formula], ids=["own", "formula"])
def test_total_variance_inside_the_jitted_step_is_the_variance_to_the_last_bit(evaluate):
    x = batch((64, 8), 1e4)
    model = model_for(DENSE)
    params = {"kernel": jnp.ones((8, 3)), "bias": jnp.zeros(3)}

    @jax.jit
    def step(params, x):
        loss_and_grad = bnp_optax.value_and_grad(lambda p: model.apply({"params": p}, x).sum())
        _, _, stats = loss_and_grad(params)
        return stats["kernel"].var, evaluate(stats["kernel"])

    var, total = step(params, x)
    np.testing.assert_array_equal(total, var)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", SHAPES)
def test_square_of_the_mean_in_one_batch_is_the_square_of_the_mean(name, jit):
    # To two units in the last place: what must be exact is the total variance.
    stats, _ = precise(name, 1e4, jit)
    np.testing.assert_allclose(stats.sq_mean, np.square(np.asarray(stats.mean)), rtol=2.4e-7)


def averaged(parts):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *parts)


@functools.cache
def microbatches(kind, ratio, spread):
    """A batch of 16 whose four quarters have means that differ by `spread` standard deviations."""
    shape = (16, 8) if kind == DENSE else (16, 6, 5, 4)
    x = batch(shape, ratio)
    shift = spread * np.arange(4).repeat(4).reshape(-1, *(1,) * (len(shape) - 1)) * x.std()
    x = (x + shift).astype(np.float32)
    model = model_for(kind)
    return [capture(model, part) for part in np.split(x, 4)], x


@pytest.mark.parametrize("ratio", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("kind", [DENSE, CONV])
def test_average_over_four_microbatches_is_the_statistic_of_the_batch(kind, ratio):
    parts, x = microbatches(kind, ratio, spread=1.0)
    average = averaged(parts)
    mean, var = oracles.input_moments(x)
    np.testing.assert_allclose(np.ravel(average.mean), mean, rtol=1e-5)
    np.testing.assert_allclose(np.ravel(average.total_variance), var, rtol=VAR_RTOL)
    # Most of it lies between the microbatches, so the variance within them would not do.
    assert (np.ravel(average.var) < 0.9 * var).any()


@pytest.mark.parametrize("ratio", [3.0, 10.0, 30.0])
def test_average_over_two_halves_of_one_distribution_has_the_variance_of_the_batch(ratio):
    # The halves' means differ by chance alone. E[m^2] - E[m]^2 is rounded at 6e-8 of m^2, some
    # times over: 4e-4 of the variance at ratio 30.
    x = batch((32, 512), ratio)
    average = averaged([capture(model_for(DENSE), part) for part in np.split(x, 2)])
    _, var = oracles.input_moments(x)
    np.testing.assert_allclose(np.ravel(average.total_variance), var, rtol=VAR_RTOL)


@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_average_over_equal_microbatches_is_each_of_them(ratio):
    stats, _ = precise("dense_64", ratio, True)
    average = averaged([stats] * 4)
    np.testing.assert_array_equal(average.mean, stats.mean)
    np.testing.assert_array_equal(average.total_variance, stats.var)


def test_average_by_hand():
    # Means 1 and 5, variances 4 and 0: mean 3, variance (4 + 0)/2 + (1 + 25)/2 - 9 = 6.
    parts = [
        capture(model_for(DENSE), np.array(x, np.float32))
        for x in ([[-1.0], [3.0]], [[5.0], [5.0]])
    ]
    average = averaged(parts)
    assert float(average.mean[0, 0]) == 3.0
    assert float(average.sq_mean[0, 0]) == pytest.approx(13.0, rel=1e-6)
    assert float(average.total_variance[0, 0]) == pytest.approx(6.0, rel=1e-6)
    assert float(average.count) == 2.0


def test_pmean_is_the_average_over_microbatches():
    parts, x = microbatches(DENSE, 1.0, spread=1.0)
    model = model_for(DENSE)

    def shard(x):
        return jax.lax.pmean(capture(model, x, jit=False), "shards")

    stats = jax.vmap(shard, axis_name="shards", out_axes=None)(x.reshape(4, 4, 8))
    want = averaged(parts)
    assert jax.tree.structure(stats) == jax.tree.structure(want)
    for got, expected in zip(jax.tree.leaves(stats), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


# ---------------------------------------------------------------------------------------------
# Shapes, counts and the pytree.
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape", "stats_shape", "input_axes", "positions"),
    [
        (nn.Dense(5), (6, 4), (4, 1), {-2}, 1),
        (nn.Dense(5), (2, 3, 4), (4, 1), {-2}, 1),
        (nn.Conv(5, (3, 3)), (2, 7, 6, 4), (1, 1, 4, 1), {-4, -3, -2}, 42),
        (nn.Conv(5, (3, 3), strides=2), (2, 7, 6, 4), (1, 1, 4, 1), {-4, -3, -2}, 12),
        (nn.Conv(5, (3, 3), padding="VALID"), (2, 7, 6, 4), (1, 1, 4, 1), {-4, -3, -2}, 20),
        (nn.Conv(6, (3, 3), feature_group_count=2), (2, 7, 6, 4), (1, 1, 2, 6), {-4, -3, -2}, 42),
        (nn.Conv(8, (3, 3), feature_group_count=4), (2, 7, 6, 4), (1, 1, 1, 8), {-4, -3, -2}, 42),
        (nn.Conv(5, (3,)), (2, 7, 4), (1, 4, 1), {-3, -2}, 7),
        (nn.Conv(5, (2, 3, 2)), (2, 3, 4, 5, 2), (1, 1, 1, 2, 1), {-5, -4, -3, -2}, 60),
    ],
    ids=[
        "dense",
        "dense_on_sequences",
        "conv",
        "conv_strided",
        "conv_valid",
        "conv_grouped",
        "conv_depthwise",
        "conv_1d",
        "conv_3d",
    ],
)
def test_shapes_and_counts(model, shape, stats_shape, input_axes, positions):
    stats = capture(model, batch(shape, 1.0))
    assert stats.mean.shape == stats.var.shape == stats.sq_mean.shape == stats_shape
    assert set(stats.layer.input_axes) == input_axes
    assert stats.layer.positions == positions
    n = np.prod(shape[:-1]) if isinstance(model, nn.Dense) else shape[0]
    assert float(stats.batch_size) == n
    assert float(stats.count) == n * positions
    assert stats.count.shape == ()
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype(jnp.float32)}
    assert (stats.layer.kernel, stats.layer.bias) == ("kernel", "bias")


def test_each_output_of_a_grouped_convolution_has_the_moments_of_its_own_group():
    x = batch((4, 6, 5, 6), 2.0)
    stats = capture(nn.Conv(9, (3, 3), feature_group_count=3), x)
    mean, var = oracles.input_moments(x)
    for output in range(9):
        channels = slice(2 * (output // 3), 2 * (output // 3) + 2)
        np.testing.assert_allclose(stats.mean[0, 0, :, output], mean[channels], rtol=1e-5)
        np.testing.assert_allclose(stats.var[0, 0, :, output], var[channels], rtol=1e-5)


def test_moments_of_a_convolution_are_those_of_the_whole_input():
    # Stride 3 and no padding: the window never meets the last rows and columns.
    x = batch((3, 8, 8, 2), 1.0)
    x[:, 6:] += 5.0
    stats = capture(nn.Conv(4, (3, 3), strides=3, padding="VALID"), x)
    mean, var = oracles.input_moments(x)
    np.testing.assert_allclose(np.ravel(stats.mean), mean, rtol=1e-5)
    np.testing.assert_allclose(np.ravel(stats.var), var, rtol=1e-5)
    assert float(stats.batch_size) == 3.0


def test_a_numpy_input_is_as_good_as_a_jax_one():
    x = batch((6, 4), 1.0)
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
    loss_and_grad = bnp_optax.value_and_grad(lambda p, x: nn.Dense(3).apply({"params": p}, x).sum())
    of_numpy, of_jax = (loss_and_grad(params, y)[2]["kernel"] for y in (x, jnp.asarray(x)))
    for got, want in zip(jax.tree.leaves(of_numpy), jax.tree.leaves(of_jax), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_layer_without_a_bias_says_so():
    assert capture(nn.Dense(3, use_bias=False), batch((4, 2), 1.0)).layer.bias is None


class CalledTwice(nn.Module):
    """One layer on two halves of a batch, of different sizes."""

    split: int

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(3, name="shared")
        return jnp.concatenate([layer(x[: self.split]), layer(x[self.split :])])


def test_a_layer_called_twice_has_the_moments_of_all_that_it_saw():
    x = batch((10, 4), 1.0)
    x[:3] += 4.0
    x = jnp.asarray(x)
    model = CalledTwice(3)
    params = {"shared": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    loss_and_grad = bnp_optax.value_and_grad(lambda p: model.apply({"params": p}, x).sum())
    _, _, stats = jax.jit(loss_and_grad)(params)
    mean, var = oracles.input_moments(x)
    stats = stats["shared/kernel"]
    np.testing.assert_allclose(np.ravel(stats.mean), mean, rtol=1e-5)
    np.testing.assert_allclose(np.ravel(stats.total_variance), var, rtol=1e-5)
    assert float(stats.count) == 10.0


def test_statistics_pass_through_jax_transformations_with_their_names():
    stats = capture(nn.Conv(5, (3, 3)), batch((2, 4, 4, 3), 1.0))
    leaves, treedef = jax.tree.flatten(stats)
    assert len(leaves) == 4
    through = jax.jit(lambda s: jax.tree.map(lambda leaf: 2 * leaf, s))(stats)
    assert jax.tree.structure(through) == treedef
    assert through.layer == stats.layer
    assert (stats.layer.kernel, stats.layer.bias, stats.layer.positions) == ("kernel", "bias", 16)
    assert stats.layer.input_axes == (-4, -3, -2)
    np.testing.assert_array_equal(through.mean, 2 * stats.mean)
