"""Options of capture: patches, samples of rows, weights, embeddings, and fixed statistics."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import bnp_optax

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


# --- conv_statistics='patch'


class Map:
    """A convolution, with an oracle that forms every patch in float64."""

    def __init__(self, sizes, strides, padding, input_dilation, dilation, groups, shape, channels):
        self.sizes, self.strides, self.padding = sizes, strides, padding
        self.input_dilation, self.dilation, self.groups = input_dilation, dilation, groups
        self.x = normal(3, 2, *shape, channels) * 2 + 3
        self.params = {"k": normal(4, *sizes, channels // groups, 6), "b": normal(5, 6)}
        spatial = "HWD"[: len(sizes)]
        self.numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")

    def loss(self, params, x):
        y = lax.conv_general_dilated(
            x,
            params["k"],
            self.strides,
            self.padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.dilation,
            feature_group_count=self.groups,
            dimension_numbers=self.numbers,
        )
        return jnp.mean((y + params["b"].reshape((1,) * (y.ndim - 1) + (-1,))) ** 2)

    def patches(self):
        """What each kernel entry meets: (*sizes, channels, rows)."""
        x = np.asarray(self.x, np.float64)
        n = x.ndim - 2
        dilated = np.zeros(
            (
                x.shape[0],
                *((s - 1) * d + 1 for s, d in zip(x.shape[1:-1], self.input_dilation, strict=True)),
                x.shape[-1],
            )
        )
        dilated[(slice(None), *(slice(None, None, d) for d in self.input_dilation))] = x
        padded = np.pad(dilated, [(0, 0), *self.padding, (0, 0)])
        outputs = [
            (padded.shape[1 + i] - (self.sizes[i] - 1) * self.dilation[i] - 1) // self.strides[i]
            + 1
            for i in range(n)
        ]
        result = np.zeros((*self.sizes, x.shape[-1], x.shape[0] * np.prod(outputs)))
        for offset in itertools.product(*map(range, self.sizes)):
            box = tuple(
                slice(o * d, o * d + (m - 1) * s + 1, s)
                for o, d, m, s in zip(offset, self.dilation, outputs, self.strides, strict=True)
            )
            rows = padded[(slice(None), *box)].reshape(-1, x.shape[-1])
            result[offset] = rows.T
        return result


MAPS = {
    "same": Map((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 1, (5, 6), 4),
    "valid": Map((2, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 1, (5, 6), 4),
    "strided, dilated, uneven": Map((3, 2), (2, 1), ((1, 0), (2, 1)), (1, 1), (1, 2), 1, (5, 6), 4),
    "grouped": Map((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), (1, 1), 2, (5, 6), 4),
    "transposed": Map((3, 3), (1, 1), ((2, 1), (1, 2)), (2, 2), (1, 1), 1, (4, 3), 4),
    "one axis": Map((3,), (1,), ((2, 0),), (1,), (1,), 1, (7,), 4),
    "three axes": Map(
        (2, 1, 2), (1, 1, 1), ((0, 1), (0, 0), (1, 0)), (1, 1, 1), (1, 1, 1), 1, (3, 2, 3), 4
    ),
}


@pytest.mark.parametrize("name", MAPS)
def test_patch_statistics_are_those_of_every_patch(name):
    """(19) and (20) of the JMLR paper, without forming a patch."""
    case = MAPS[name]
    captured = jax.jit(bnp_optax.value_and_grad(case.loss, conv_statistics="patch"))
    stats = captured(case.params, case.x)[2]["k"]
    patches = case.patches()
    for got, expected in ((stats.mean, patches.mean(-1)), (stats.var, patches.var(-1))):
        by_group = expected.reshape(*case.sizes, case.groups, -1)
        each = 6 // case.groups if case.groups > 1 else 1
        expected = np.repeat(np.moveaxis(by_group, -2, -1), each, -1)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert stats.count == patches.shape[-1]
    assert stats.layer.bias == "b"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [3, 5])
def test_proposition_10(seed, k):
    """The mean of the map is near that of the patches, as the bound says, and not always equal."""
    half = k // 2
    case = Map((k, k), (1, 1), ((half, half),) * 2, (1, 1), (1, 1), 1, (6, 7), 4)
    x = case.x + 3 * jax.random.normal(jax.random.key(seed), (1, 6, 7, 1))
    patch = bnp_optax.value_and_grad(case.loss, conv_statistics="patch")(case.params, x)[2]["k"]
    channel = bnp_optax.value_and_grad(case.loss)(case.params, x)[2]["k"]
    r, s = x.shape[1:3]
    bound = (k - 1) * (1 / (2 * r) + 1 / (2 * s) - (k - 1) / (4 * r * s))
    error = jnp.abs(patch.mean - channel.mean)
    assert (error <= bound * jnp.abs(x).max((0, 1, 2)).reshape(1, 1, -1, 1) * (1 + 1e-5)).all()
    assert error.max() > 0.01


def test_patch_variance_is_accurate_at_a_large_mean():
    case = MAPS["valid"]
    x = normal(9, *case.x.shape) + 1e4
    stats = bnp_optax.value_and_grad(case.loss, conv_statistics="patch")(case.params, x)[2]["k"]
    oracle = Map((2, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 1, (5, 6), 4)
    oracle.x = x
    np.testing.assert_allclose(stats.var[..., 0], oracle.patches().var(-1), rtol=1e-3)


def test_training_with_patch_statistics():
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Conv(2, (3, 3), feature_group_count=2)])
    x = normal(1, 4, 5, 5, 3) + 2
    params = model.init(KEY, x)["params"]
    loss_fn = lambda p, x: jnp.mean((model.apply({"params": p}, x) - 1) ** 2)  # noqa: E731
    layers = bnp_optax.find_layers(loss_fn, params, x, conv_statistics="patch")
    assert layers["layers_0/kernel"].stats_shape == (3, 3, 3, 1)
    tx = bnp_optax.bnp_sgd(0.3, layers=layers)
    captured = bnp_optax.value_and_grad(loss_fn, layers=layers, conv_statistics="patch")

    def step(carry, _):
        params, state = carry
        loss, grads, stats = captured(params, x)
        updates, state = tx.update(grads, state, params, layer_stats=stats)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.jit(lambda c: lax.scan(step, c, length=20))((params, tx.init(params)))
    assert losses[-1] < 0.5 * losses[0]


# --- sample_rows


def test_a_sample_of_rows_is_spread_over_the_batch_and_the_sequence():
    x = jnp.stack(jnp.meshgrid(jnp.arange(8.0), jnp.arange(16.0), indexing="ij"), -1)
    model = nn.Dense(3)
    params = model.init(KEY, x)["params"]
    loss_fn = lambda p, x: jnp.mean(model.apply({"params": p}, x) ** 2)  # noqa: E731
    captured = bnp_optax.value_and_grad(loss_fn, sample_rows=32)
    loss, grads, stats = captured(params, x)
    full_loss, full_grads, full = bnp_optax.value_and_grad(loss_fn)(params, x)
    assert loss == full_loss
    np.testing.assert_array_equal(grads["kernel"], full_grads["kernel"])
    got, expected = stats["kernel"], full["kernel"]
    # Both coordinates have been sampled over their whole ranges, 0..7 and 0..15.
    np.testing.assert_allclose(got.mean, expected.mean, atol=0.5)
    np.testing.assert_allclose(got.var, expected.var, rtol=0.2)
    assert (got.mean != expected.mean).any()
    assert got.count == expected.count == 128
    assert (captured(params, x)[2]["kernel"].mean == got.mean).all()


def test_a_sample_at_least_as_large_as_the_batch_is_the_batch():
    x = normal(0, 6, 3)
    loss_fn = lambda p, x: jnp.mean((x @ p["w"]) ** 2)  # noqa: E731
    params = {"w": normal(1, 3, 2)}
    full = bnp_optax.value_and_grad(loss_fn)(params, x)[2]["w"]
    for rows in (6, 100):
        got = bnp_optax.value_and_grad(loss_fn, sample_rows=rows)(params, x)[2]["w"]
        np.testing.assert_array_equal(got.mean, full.mean)
        np.testing.assert_array_equal(got.var, full.var)


def test_a_sample_for_patches_takes_whole_examples():
    case = MAPS["same"]
    x = normal(2, 8, 5, 6, 4)
    options = {"conv_statistics": "patch", "sample_rows": 60}  # two of eight maps of 30
    got = bnp_optax.value_and_grad(case.loss, **options)(case.params, x)[2]["k"]
    means = [
        bnp_optax.value_and_grad(case.loss, conv_statistics="patch")(case.params, x[i : i + 1])[2][
            "k"
        ].mean
        for i in range(8)
    ]
    pairs = [(means[i] + means[j]) / 2 for i in range(8) for j in range(i)]
    assert min(float(jnp.abs(pair - got.mean).max()) for pair in pairs) < 1e-5


# --- weights

MASK = (jnp.arange(7)[None] < jnp.array([7, 3, 1, 5, 2, 4])[:, None]).astype(jnp.float32)
SEQUENCES = jnp.where(MASK[..., None] > 0, normal(5, 6, 7, 3) + 1, jnp.nan)


def check_masked(stats, rows):
    rows = np.asarray(rows, np.float64)
    np.testing.assert_allclose(np.ravel(stats.mean), rows.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.ravel(stats.total_variance), rows.var(0), rtol=1e-3)
    assert stats.count == len(rows)


def test_padding_does_not_count():
    params = {"w": normal(1, 3, 2), "v": normal(2, 2, 2)}

    def loss_fn(p, x, mask):
        h = jnp.tanh(x @ p["w"])
        flat = h.reshape(-1, 2) @ p["v"]
        return jnp.sum(jnp.where(mask.reshape(-1, 1) > 0, flat, 0.0) ** 2)

    captured = bnp_optax.value_and_grad(loss_fn, weights=lambda x, mask: mask)
    _, _, stats = jax.jit(captured)(params, SEQUENCES, MASK)
    rows = SEQUENCES[MASK > 0]
    check_masked(stats["w"], rows)
    check_masked(stats["v"], jnp.tanh(rows @ params["w"]))


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_does_not_count_in_a_recurrent_network(reverse):
    """The scan's steps are the sequence's positions: each takes its own column of the mask."""
    params = {"w": normal(1, 3, 2), "u": normal(2, 2, 2), "b": normal(3, 2)}
    x = jnp.where(MASK[..., None] > 0, SEQUENCES, 50.0)

    def states(p, x):
        def step(h, now):
            new = jnp.tanh(now @ p["w"] + (h @ p["u"] + p["b"][None]))
            return new, h

        return lax.scan(step, jnp.zeros((6, 2)), jnp.moveaxis(x, 1, 0), reverse=reverse)

    def loss_fn(p, x, mask):
        return jnp.sum(states(p, x)[0] ** 2)

    captured = bnp_optax.value_and_grad(loss_fn, weights=lambda x, mask: mask)
    _, _, stats = jax.jit(captured)(params, x, MASK)
    check_masked(stats["w"], x[MASK > 0])
    check_masked(stats["u"], jnp.moveaxis(states(params, x)[1], 0, 1)[MASK > 0])


@pytest.mark.parametrize("shape", [(16, 64, 65, 3), (70_001, 3)])
def test_many_rows_of_unequal_weight_keep_their_digits(shape):
    """One float32 sum of so many rows would lose the variance where the mean is 10^4 times it."""
    rng = np.random.default_rng(0)
    x = (1e4 + rng.normal(size=shape)).astype(np.float32)
    weights = rng.integers(0, 3, shape[0]).astype(np.float32)
    captured = bnp_optax.value_and_grad(
        lambda p, x: jnp.mean(x @ p["w"]), weights=lambda x: jnp.asarray(weights)
    )
    _, _, stats = jax.jit(captured)({"w": normal(1, 3, 2)}, jnp.asarray(x))
    each = np.repeat(weights, np.prod(shape[1:-1], dtype=int))
    rows = x.reshape(-1, 3).astype(np.float64)
    mean = np.average(rows, axis=0, weights=each)
    np.testing.assert_allclose(np.ravel(stats["w"].mean), mean, rtol=5e-7)
    var = np.average((rows - mean) ** 2, axis=0, weights=each)
    np.testing.assert_allclose(np.ravel(stats["w"].var), var, rtol=1e-3)


def test_weights_of_examples():
    """A row of weight 2 counts as two; a convolution's pixels have their example's weight."""
    weights = jnp.array([2.0, 0.0, 1.0])
    x = normal(1, 3, 4, 4, 2)
    twice = x[jnp.array([0, 0, 2])]
    params = {"k": normal(2, 3, 3, 2, 3), "v": normal(3, 3, 2)}

    def loss_fn(p, x):
        y = lax.conv_general_dilated(
            x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean((y.mean((1, 2)) @ p["v"]) ** 2)

    for options in ({}, {"conv_statistics": "patch"}):
        captured = bnp_optax.value_and_grad(loss_fn, weights=lambda x: weights, **options)
        got = captured(params, x)[2]
        expected = bnp_optax.value_and_grad(loss_fn, **options)(params, twice)[2]
        for name in params:
            np.testing.assert_allclose(got[name].mean, expected[name].mean, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(got[name].var, expected[name].var, rtol=1e-4, atol=1e-6)
            assert got[name].count == expected[name].count


def test_a_batch_of_padding_alone_does_not_enter():
    params = {"w": normal(1, 3, 2)}
    loss_fn = lambda p, x: jnp.mean((x @ p["w"]) ** 2)  # noqa: E731
    captured = bnp_optax.value_and_grad(loss_fn, weights=lambda x: jnp.zeros(len(x)))
    _, grads, stats = captured(params, normal(2, 4, 3))
    assert stats["w"].count == 0
    tx = bnp_optax.bnp_precondition(layers=bnp_optax.find_layers(loss_fn, params, normal(2, 4, 3)))
    before = tx.init(params)
    _, after = tx.update(grads, before, params, layer_stats=stats)
    np.testing.assert_array_equal(after.var["w"], before.var["w"])


def test_weights_that_do_not_fit():
    params = {"w": normal(1, 3, 2)}
    loss_fn = lambda p, x: jnp.mean((x @ p["w"]) ** 2)  # noqa: E731
    captured = bnp_optax.value_and_grad(loss_fn, weights=lambda x: jnp.ones(5))
    with pytest.raises(
        ValueError, match=r"`weights` of shape \(5,\) do not fit .* sizes \(4,\)"
    ) as e:
        captured(params, normal(2, 4, 3))
    assert "at the inputs of `w`" in e.value.__notes__[0]


# --- embeddings


def test_an_embedding_is_a_layer_of_one_hot_inputs():
    ids = jnp.array([[0, 1, 1], [3, 1, 0]])
    params = {"table": normal(1, 5, 3), "w": normal(2, 3, 2)}
    one_hot = jax.nn.one_hot(ids, 5)

    def loss_fn(p, ids):
        return jnp.mean((p["table"][ids] @ p["w"]) ** 2)

    def as_product(p, one_hot):
        return jnp.mean((one_hot @ p["table"] @ p["w"]) ** 2)

    got = bnp_optax.value_and_grad(loss_fn, embeddings=True)(params, ids)[2]
    expected = bnp_optax.value_and_grad(as_product)(params, one_hot)[2]
    for name in params:
        np.testing.assert_allclose(got[name].mean, expected[name].mean, rtol=1e-5)
        np.testing.assert_allclose(got[name].var, expected[name].var, rtol=1e-5, atol=1e-7)
        assert got[name].count == expected[name].count
        assert got[name].layer.input_axes == expected[name].layer.input_axes
    assert "table" not in bnp_optax.value_and_grad(loss_fn)(params, ids)[2]


def test_a_preconditioned_embedding_moves_rare_and_frequent_rows_alike():
    """A bias-free layer's D is 1/rms, so M divides row i's gradient by its frequency."""
    ids = jnp.array([0] * 90 + [1] * 9 + [2])
    params = {"table": jnp.zeros((3, 1))}
    loss_fn = lambda p, ids: -jnp.mean(p["table"][ids])  # noqa: E731
    layers = bnp_optax.find_layers(loss_fn, params, ids, embeddings=True)
    tx = bnp_optax.bnp_precondition(
        layers=layers, warm_start=True, eps_rel=0.0, eps_abs=0.0, scale=False
    )
    _, grads, stats = bnp_optax.value_and_grad(loss_fn, layers=layers, embeddings=True)(params, ids)
    updates, _ = tx.update(grads, tx.init(params), params, layer_stats=stats)
    np.testing.assert_allclose(grads["table"][:, 0], [-0.9, -0.09, -0.01], rtol=1e-5)
    np.testing.assert_allclose(updates["table"][:, 0], [-1.0, -1.0, -1.0], rtol=1e-4)


# --- dataset_statistics


def net(p, x):
    return jnp.mean((jnp.tanh(x @ p["w1"] + p["b1"][None]) @ p["w2"]) ** 2)


NET = {"w1": normal(1, 3, 4), "b1": normal(2, 4), "w2": normal(3, 4, 2)}


def test_statistics_of_a_data_set_are_of_all_its_rows():
    rows = normal(0, 22, 3) * jnp.array([[1.0, 10.0, 0.1]]) + jnp.array([[1000.0, 0.0, -1.0]])
    batches = [rows[:8], rows[8:16], rows[16:]]  # the last one is smaller
    fixed = bnp_optax.dataset_statistics(net, NET, batches)
    assert list(fixed) == ["w1"]
    x = np.asarray(rows, np.float64)
    np.testing.assert_allclose(fixed["w1"].mean[:, 0], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(fixed["w1"].total_variance[:, 0], x.var(0), rtol=1e-3)
    assert fixed["w1"].count == 8
    assert fixed["w1"].layer.bias == "b1"


def test_fixed_statistics_are_returned_and_cost_nothing():
    x = normal(0, 8, 3)
    fixed = bnp_optax.dataset_statistics(net, NET, [x])
    captured = jax.jit(bnp_optax.value_and_grad(net, fixed=fixed))
    _, _, stats = captured(NET, x + 5)
    np.testing.assert_array_equal(stats["w1"].mean, fixed["w1"].mean)
    assert sorted(stats) == ["w1", "w2"]
    wide = {"w1": normal(1, 500, 4), "b1": normal(2, 4), "w2": normal(3, 4, 2)}
    data = normal(4, 64, 500)
    fixed = bnp_optax.dataset_statistics(net, wide, [data])

    def flops(function):
        return jax.jit(function).lower(wide, data).compile().cost_analysis()["flops"]

    plain = flops(jax.value_and_grad(net))
    assert flops(bnp_optax.value_and_grad(net, fixed=fixed)) < 1.02 * plain
    assert flops(bnp_optax.value_and_grad(net)) > 1.05 * plain


def test_fixed_statistics_of_a_linen_layer():
    model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)])
    x = normal(0, 8, 3)
    params = model.init(KEY, x)["params"]
    loss_fn = lambda p, x: jnp.mean(model.apply({"params": p}, x) ** 2)  # noqa: E731
    fixed = bnp_optax.dataset_statistics(loss_fn, params, [(x,), (x + 1,)])
    _, _, stats = bnp_optax.value_and_grad(loss_fn, fixed=fixed)(params, x)
    assert sorted(stats) == ["layers_0/kernel", "layers_2/kernel"]
    np.testing.assert_allclose(stats["layers_0/kernel"].mean[:, 0], x.mean(0) + 0.5, rtol=1e-4)


@pytest.mark.parametrize("transformation", [jax.jit, jax.vmap])
def test_data_sets_under_transformations(transformation):
    x = normal(0, 2, 8, 3)
    with pytest.raises(ValueError, match="`params` or `batches` are traced: statistics of a data"):
        transformation(lambda x: bnp_optax.dataset_statistics(net, NET, [x]))(x)


def test_data_sets_that_tell_nothing():
    with pytest.raises(ValueError, match="`batches` is empty"):
        bnp_optax.dataset_statistics(net, NET, [])
    table = {"table": normal(1, 5, 3), "w": normal(2, 3, 2)}
    loss_fn = lambda p, ids: jnp.mean((p["table"][ids] @ p["w"]) ** 2)  # noqa: E731
    with pytest.raises(ValueError, match="those of every layer depend on parameters"):
        bnp_optax.dataset_statistics(loss_fn, table, [jnp.array([0, 1])])
    x = normal(0, 8, 3)
    fixed = bnp_optax.dataset_statistics(net, NET, [x])
    with pytest.raises(ValueError, match="`fixed` has `w1`, but `params` has no such leaf"):
        bnp_optax.value_and_grad(net, fixed=fixed)({"w2": NET["w2"]}, x)


# --- bad options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_statistics": "pixel"}, "`conv_statistics` must be one of 'channel', 'patch'"),
        ({"sample_rows": 0}, "`sample_rows` must be an integer > 0 or None, got 0"),
        ({"sample_rows": 2.5}, "`sample_rows` must be an integer > 0 or None, got 2.5"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        bnp_optax.value_and_grad(net, **options)
