"""Linen models against inputs that Flax recorded, and gradients against `jax.value_and_grad`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support.linen_models import (
    IMAGES,
    KEY,
    MODELS,
    ROWS,
    SEQUENCES,
    Block,
    NeverRuns,
    OwnKernel,
    Reparametrized,
    make_loss,
    recorded_inputs,
    vmapped_dense,
)

import bnp_optax

EAGER = [(name, False) for name in ("dense", "conv, grouped", "scan over layers with remat")]


@pytest.mark.parametrize(("name", "jit"), [(name, True) for name in MODELS] + EAGER)
def test_value_gradient_and_aux_are_those_of_jax(name, jit):
    model, x = MODELS[name]
    params, loss_fn = make_loss(model, x)
    function = bnp_optax.value_and_grad(loss_fn, has_aux=True)
    (loss, aux), grads, stats = (jax.jit(function) if jit else function)(params, x)
    plain = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (expected, expected_aux), expected_grads = plain(params, x)
    assert set(stats) == {
        "/".join(key.key for key in path)
        for path, _ in jax.tree.leaves_with_path(params)
        if path[-1].key == "kernel"
    }
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    for got, want in zip(
        jax.tree.leaves((aux, grads)), jax.tree.leaves((expected_aux, expected_grads)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        assert got.dtype == want.dtype


UNLOOPED = [
    name
    for name in MODELS
    if not any(
        word in name for word in ("scan", "vmap", "cell", "GRU", "LSTM", "share_scope", "remat")
    )
]


@pytest.mark.parametrize("name", UNLOOPED)
def test_statistics_are_those_of_the_recorded_inputs(name):
    model, x = MODELS[name]
    params, loss_fn = make_loss(model, x)
    calls = recorded_inputs(loss_fn, params, x)
    _, _, stats = jax.jit(bnp_optax.value_and_grad(loss_fn, has_aux=True))(params, x)
    for kernel, layer_stats in stats.items():
        inputs = calls[kernel.rpartition("/")[0]]
        if name == "subclass of dense":
            inputs = [2 * ROWS]
        inputs = [np.asarray(call, np.float64) for call in inputs]
        mean = np.asarray(layer_stats.mean)
        # Which axes of the input the kernel meets: all but those of size one, from the right.
        if name.startswith(("dense general", "einsum with")) or kernel == "out/kernel":
            (call,) = inputs
            reduce_axes = (0, 1) if kernel == "out/kernel" else (0,)
            if name == "dense general, batch axis":
                reduce_axes = (1,)
            expected_mean, expected_var = call.mean(reduce_axes), call.var(reduce_axes)
        else:
            flat = np.concatenate([call.reshape(-1, call.shape[-1]) for call in inputs])
            expected_mean, expected_var = flat.mean(0), flat.var(0)
        groups = {"conv, grouped": 2, "conv, depthwise": 4}.get(name, 1)
        if groups > 1:
            by_output = [
                s.reshape(groups, -1).repeat(8 // groups, 0).T
                for s in (expected_mean, expected_var)
            ]
            expected_mean, expected_var = by_output
        squeezed = mean.reshape(expected_mean.shape)
        tolerance = 1e-2 if name == "dense in bfloat16" else 1e-5
        np.testing.assert_allclose(squeezed, expected_mean, rtol=tolerance, atol=1e-6)
        var = np.asarray(layer_stats.total_variance).reshape(expected_var.shape)
        np.testing.assert_allclose(var, expected_var, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kernel", "count", "positions", "input_axes", "bias"),
    [
        ("dense", "kernel", 6, 1, (-2,), "bias"),
        ("dense without bias", "kernel", 6, 1, (-2,), None),
        ("dense on sequences", "kernel", 15, 1, (-2,), "bias"),
        ("dense on a single example", "kernel", 1, 1, (-2,), "bias"),
        ("conv", "kernel", 128, 64, (-4, -3, -2), "bias"),
        ("conv, strided", "kernel", 32, 16, (-4, -3, -2), "bias"),
        ("conv, valid", "kernel", 72, 36, (-4, -3, -2), "bias"),
        ("conv, no batch axis", "kernel", 64, 64, (-4, -3, -2), "bias"),
        ("conv, two batch axes", "kernel", 128, 8, (-3, -2), "bias"),
        ("conv transpose", "kernel", 512, 256, (-4, -3, -2), "bias"),
        ("conv transpose, kernel transposed", "kernel", 128, 64, (-4, -3, -1), "bias"),
        ("dense general, two axes", "kernel", 3, 1, (-4, -3), "bias"),
        ("dense general, batch axis", "kernel", 5, 1, (-2,), "bias"),
        ("einsum with a batch index", "kernel", 3, 1, (-2,), "bias"),
        ("attention", "out/kernel", 15, 1, (-3, -2), "out/bias"),
        ("LSTM", "cell/hi/kernel", 15, 1, (-2,), "cell/hi/bias"),
        ("optimized LSTM", "cell/ii/kernel", 15, 1, (-2,), None),
        ("scan over layers", "blocks/up/kernel", 6, 1, (-2,), "blocks/up/bias"),
        ("shared module", "shared/kernel", 12, 1, (-2,), "shared/bias"),
        ("shared module on batches of two sizes", "shared/kernel", 6, 1, (-2,), "shared/bias"),
    ],
)
def test_count_positions_axes_and_bias(name, kernel, count, positions, input_axes, bias):
    model, x = MODELS[name]
    params, loss_fn = make_loss(model, x)
    _, _, stats = bnp_optax.value_and_grad(loss_fn, has_aux=True)(params, x)
    layer_stats = stats[kernel]
    assert layer_stats.count.shape == ()
    assert layer_stats.count == count
    assert layer_stats.layer.positions == positions
    assert layer_stats.layer.input_axes == input_axes
    assert layer_stats.layer.bias == bias
    assert layer_stats.layer.kernel == kernel
    assert layer_stats.mean.dtype == layer_stats.var.dtype == jnp.float32


@pytest.mark.parametrize("name", MODELS)
def test_found_layers_have_the_shapes_of_their_statistics(name):
    model, x = MODELS[name]
    params, loss_fn = make_loss(model, x)
    loss = lambda params, x: loss_fn(params, x)[0]  # noqa: E731
    layers = bnp_optax.find_layers(loss, params, x)
    abstract = jax.eval_shape(lambda: (params, x))
    assert bnp_optax.find_layers(loss, *abstract) == layers
    _, _, stats = bnp_optax.value_and_grad(loss, layers=layers)(params, x)
    for kernel, layer in layers.items():
        assert stats[kernel].mean.shape == stats[kernel].var.shape == layer.stats_shape
        np.broadcast_shapes(layer.stats_shape, layer.kernel_shape)


@pytest.mark.parametrize("name", ["layers in a loop", "scan over layers"])
def test_remat_does_not_change_statistics(name):
    params, loss_fn = make_loss(*MODELS[name])
    _, loss_with_remat = make_loss(*MODELS[f"{name} with remat"])
    _, _, stats = jax.jit(bnp_optax.value_and_grad(loss_fn, has_aux=True))(params, ROWS)
    function = jax.jit(bnp_optax.value_and_grad(loss_with_remat, has_aux=True))
    _, _, stats_with_remat = function(params, ROWS)
    assert len(stats) == len(params) * 2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        stats,
        stats_with_remat,
    )


def test_scanned_layers_keep_their_own_statistics():
    model, x = MODELS["scan over layers"]
    params, loss_fn = make_loss(model, x)
    _, _, stats = jax.jit(bnp_optax.value_and_grad(loss_fn, has_aux=True))(params, x)
    single = Block()
    for i in range(3):
        own = jax.tree.map(lambda leaf: leaf[i], params["blocks"])  # noqa: B023
        hidden = np.asarray(nn.relu(x @ own["up"]["kernel"] + own["up"]["bias"][None]), np.float64)
        for kernel, inputs in (("up", np.asarray(x, np.float64)), ("down", hidden)):
            got = stats[f"blocks/{kernel}/kernel"]
            np.testing.assert_allclose(got.mean[i, :, 0], inputs.mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(got.var[i, :, 0], inputs.var(0), rtol=1e-5)
        x, _ = single.apply({"params": own}, x)


@pytest.mark.parametrize("name", ["simple cell", "LSTM", "optimized LSTM", "GRU"])
def test_recurrent_layers_average_over_time(name):
    model, x = MODELS[name]
    params, loss_fn = make_loss(model, x)
    _, _, stats = jax.jit(bnp_optax.value_and_grad(loss_fn, has_aux=True))(params, x)
    hidden = model.apply({"params": params}, x)
    inputs = {
        7: np.concatenate([np.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1),
        8: np.asarray(x),
    }
    for kernel, layer_stats in stats.items():
        n_features = layer_stats.mean.shape[0]
        flat = inputs[n_features].reshape(-1, n_features).astype(np.float64)
        np.testing.assert_allclose(
            layer_stats.mean[:, 0], flat.mean(0), rtol=1e-4, atol=1e-5, err_msg=kernel
        )
        np.testing.assert_allclose(layer_stats.total_variance[:, 0], flat.var(0), rtol=1e-4)


def test_vmap_over_examples_in_the_loss_is_one_batch():
    model = nn.Dense(3)
    params, _ = make_loss(model, ROWS)

    def loss_fn(params, rows):
        return jax.vmap(lambda row: model.apply({"params": params}, row).sum())(rows).mean()

    _, _, stats = bnp_optax.value_and_grad(loss_fn)(params, ROWS)
    assert stats["kernel"].count == 6
    rows = np.asarray(ROWS, np.float64)
    np.testing.assert_allclose(stats["kernel"].mean[:, 0], rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["kernel"].total_variance[:, 0], rows.var(0), rtol=1e-5)


def test_ensemble_by_vmap_of_the_whole_function():
    model = nn.Dense(3)
    many = jax.vmap(lambda key: model.init(key, ROWS)["params"])(jax.random.split(KEY, 4))
    loss_fn = lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)  # noqa: E731
    function = bnp_optax.value_and_grad(loss_fn)
    loss, grads, stats = jax.vmap(function, in_axes=(0, None))(many, ROWS)
    assert loss.shape == (4,)
    assert grads["kernel"].shape == (4, 8, 3)
    assert stats["kernel"].mean.shape == (4, 8, 1)


def test_a_jitted_loss_is_seen_through():
    model = nn.Dense(3)
    params, _ = make_loss(model, ROWS)
    loss_fn = jax.jit(lambda params: jnp.mean(model.apply({"params": params}, ROWS) ** 2))
    loss_fn(params)
    for _ in range(2):
        assert set(bnp_optax.find_layers(loss_fn, params)) == {"kernel"}
        _, _, stats = bnp_optax.value_and_grad(loss_fn)(params)
        assert stats["kernel"].count == 6


def test_chosen_layers_only():
    model, x = MODELS["attention"]
    params, loss_fn = make_loss(model, x)
    loss = lambda params, x: loss_fn(params, x)[0]  # noqa: E731
    layers = bnp_optax.find_layers(loss, params, x)
    chosen = {name: layer for name, layer in layers.items() if name.startswith("out")}
    _, _, stats = bnp_optax.value_and_grad(loss, layers=chosen)(params, x)
    assert set(stats) == {"out/kernel"}


def test_nested_parameters_and_other_losses_of_params():
    """Two models in one tree, a loss that also reads and penalizes the parameters."""
    first, second = nn.Dense(4), nn.Dense(2)
    params = {
        "encoder": first.init(KEY, ROWS)["params"],
        "rest": [second.init(KEY, jnp.ones((1, 4)))["params"], jnp.ones(())],
    }

    def loss_fn(params):
        hidden = first.apply({"params": params["encoder"]}, ROWS)
        out = second.apply({"params": params["rest"][0]}, hidden) * params["rest"][1]
        penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return jnp.mean(out**2) + penalty + params["encoder"]["kernel"][0, 0]

    loss, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
    expected, expected_grads = jax.value_and_grad(loss_fn)(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), grads, expected_grads)
    assert set(stats) == {"encoder/kernel", "rest/0/kernel"}
    np.testing.assert_allclose(stats["encoder/kernel"].mean[:, 0], ROWS.mean(0), rtol=1e-5)


def test_partitioned_parameters_keep_their_names():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = nn.Dense(3, kernel_init=init)
    params = model.init(KEY, ROWS)["params"]
    loss_fn = lambda params: jnp.mean(model.apply({"params": params}, ROWS) ** 2)  # noqa: E731
    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    tx = bnp_optax.bnp_sgd(1e-3)
    updates, _ = tx.update(grads, tx.init(params), params, layer_stats=stats)
    changed = optax.apply_updates(params, updates)
    assert loss_fn(changed) < loss_fn(params)


def test_a_kernel_whose_layer_never_runs_has_no_input_and_is_left_alone():
    params, loss_fn = make_loss(NeverRuns(), ROWS)
    (_, _), grads, stats = bnp_optax.value_and_grad(loss_fn, has_aux=True)(params, ROWS)
    assert stats["idle/kernel"].count == 0
    assert stats["busy/kernel"].count == 6
    tx = bnp_optax.bnp_precondition()
    before = tx.init(params)
    updates, after = tx.update(grads, before, params, layer_stats=stats)
    np.testing.assert_array_equal(after.var["idle"]["kernel"], before.var["idle"]["kernel"])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, after)))


@pytest.mark.parametrize(
    ("model", "kernel", "reason"),
    [
        (NeverRuns(), "idle/kernel", "the loss does not depend on it"),
        (Reparametrized(), "Dense_1/kernel", "`mul` changes it before it meets the inputs"),
    ],
)
def test_summary_says_why_a_kernel_is_not_covered(model, kernel, reason):
    params, loss_fn = make_loss(model, ROWS)
    summary = bnp_optax.summarize(lambda params: loss_fn(params, ROWS)[0], params)
    assert reason in summary.uncovered[kernel]
    assert kernel not in summary.layers
    assert f"no: {summary.uncovered[kernel]}" in str(summary)


def windows(x):
    """The inputs of a `ConvLocal` of width 3, at every position."""
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + x.shape[1]] for i in range(3)]
    return np.stack(shifted, -1).reshape(*x.shape[:2], -1)


@pytest.mark.parametrize(
    ("model", "x", "layer", "inputs"),
    [
        (OwnKernel(), ROWS, (None, None, (-2,), (-2,)), lambda x: x[:, :, None]),
        (nn.ConvLocal(3, (3,)), SEQUENCES, ("bias", None, (-2,), (-3, -2)), windows),
        (
            nn.Einsum((8, 2, 3), "btd,dhk->btkh"),
            SEQUENCES,
            ("bias", (-1, -2), (-3,), (-3,)),
            lambda x: x.reshape(-1, 8),
        ),
        (
            vmapped_dense(axis=1),
            SEQUENCES,
            ("bias", (-1, -2), (-3,), (-3, -2)),
            lambda x: x.transpose(1, 2, 0),
        ),
    ],
    ids=["kernel of a module's own", "local", "bias in another order", "stacked along axis 1"],
)
def test_kernels_without_a_layer_class_and_of_unusual_layouts(model, x, layer, inputs):
    params, loss_fn = make_loss(model, x)
    _, _, stats = jax.jit(bnp_optax.value_and_grad(loss_fn, has_aux=True))(params, x)
    got = stats["kernel"]
    found = got.layer
    assert (found.bias, found.bias_axes, found.input_axes, found.stats_axes) == layer
    rows = inputs(np.asarray(x, np.float64))
    assert got.count == len(rows)
    np.testing.assert_allclose(got.mean.ravel(), rows.mean(0).ravel(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.total_variance.ravel(), rows.var(0).ravel(), rtol=1e-5)


def test_summary_of_a_convolution():
    params, loss_fn = make_loss(*MODELS["conv, strided"])
    summary = bnp_optax.summarize(lambda params: loss_fn(params, IMAGES)[0], params)
    assert summary.layers["kernel"].fan_in == 36
    assert summary.batch_sizes["kernel"] == 2
    assert summary.q_squared("kernel") == 18.0  # max(36 / 2, sqrt(16))
    _, _, row, total = str(summary).splitlines()
    assert row.split() == ["kernel", "Conv", "3x3x4x6", "36", "16", "18", "yes", "yes"]
    assert total == "1 of 1 kernels covered, 100.0% of their 216 entries."


def data_mesh():
    return Mesh(np.array(jax.devices()[:2]), ("data",))


def test_statistics_of_a_sharded_batch_are_of_the_whole_batch():
    params, loss_fn = make_loss(*MODELS["dense"])
    function = jax.jit(bnp_optax.value_and_grad(loss_fn, has_aux=True))
    sharded = jax.device_put(ROWS, NamedSharding(data_mesh(), PartitionSpec("data")))
    replicated = jax.device_put(params, NamedSharding(data_mesh(), PartitionSpec()))
    _, grads, stats = function(replicated, sharded)
    _, expected_grads, expected = function(params, ROWS)
    np.testing.assert_allclose(grads["kernel"], expected_grads["kernel"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["kernel"].var, expected["kernel"].var, rtol=1e-5)
    assert stats["kernel"].count == 6


def test_pmean_over_shards_gives_the_whole_batch():
    params, loss_fn = make_loss(*MODELS["dense"])
    function = bnp_optax.value_and_grad(loss_fn, has_aux=True)

    def per_shard(params, rows):
        _, _, stats = function(params, rows)
        return jax.lax.pmean(stats, "data")

    shard_map = jax.shard_map(
        per_shard,
        mesh=data_mesh(),
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )
    stats = jax.jit(shard_map)(params, ROWS)["kernel"]
    rows = np.asarray(ROWS, np.float64)
    np.testing.assert_allclose(stats.mean[:, 0], rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.total_variance[:, 0], rows.var(0), rtol=1e-5)
    assert stats.count == 3


def test_gradient_of_the_gradient():
    """Hessian-vector products go through the captured gradient."""
    params, loss_fn = make_loss(*MODELS["dense"])
    captured = lambda params: bnp_optax.value_and_grad(loss_fn, has_aux=True)(params, ROWS)[1]  # noqa: E731
    plain = lambda params: jax.grad(loss_fn, has_aux=True)(params, ROWS)[0]  # noqa: E731
    _, got = jax.jvp(captured, (params,), (params,))
    _, expected = jax.jvp(plain, (params,), (params,))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


def test_a_loss_may_compare_params_with_another_tree():
    params, _ = make_loss(*MODELS["dense"])
    model, anchor = nn.Dense(3), jax.tree.map(jnp.zeros_like, params)

    def loss_fn(params):
        distance = jax.tree.map(lambda p, q: jnp.sum((p - q) ** 2), params, anchor)
        return jnp.mean(model.apply({"params": params}, ROWS)) + sum(jax.tree.leaves(distance))

    expected = jax.value_and_grad(loss_fn)(params)
    for layers in (None, bnp_optax.find_layers(loss_fn, params)):
        loss, grads, stats = bnp_optax.value_and_grad(loss_fn, layers=layers)(params)
        assert set(stats) == {"kernel"}
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), (loss, grads), expected
        )
