"""What devices say to one another for the statistics of a batch that is spread over them."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from support import oracles

import bnp_optax
from benchmarks.cost.transformer import Transformer
from benchmarks.scale.modes import MODES
from benchmarks.scale.training import OPTIMIZERS, batches

WIDTH = 64
MODEL = Transformer(WIDTH, 2, scanned=False)
COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|all-to-all|collective-permute)(-start)?\("
)
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(n=4, kind="auto"):
    return Mesh(np.array(jax.devices()[:n]), ("data",), axis_types=(KINDS[kind],))


def collectives(compiled):
    """Each collective of a program, with the bytes of its result."""
    found = []
    for line in compiled.as_text().splitlines():
        if match := COLLECTIVE.search(line):
            shapes = re.findall(r"(?:f|s|u)32\[([\d,]*)\]", match[1])
            sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
            found.append((match[2], 4 * sum(sizes)))
    return found


def loss_fn(params, tokens):
    logits: Any = MODEL.apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@functools.cache
def collectives_of_a_step(method, fsdp=False, **options):
    """Those of a training step on four devices, with each kernel on all of them or in shards."""
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    mesh = mesh_of()

    def sharding(leaf):
        is_cut = fsdp and leaf.ndim > 1 and max(leaf.shape) >= WIDTH
        return NamedSharding(mesh, PartitionSpec("data") if is_cut else PartitionSpec())

    def place(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shardings = jax.tree.map(sharding, shapes)
    params = jax.tree.map(place, shapes, shardings)
    everywhere = NamedSharding(mesh, PartitionSpec())
    tokens = jax.ShapeDtypeStruct(
        (16, 33), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    tx = optax.adam(1e-3) if method == "adam" else bnp_optax.bnp_adam(1e-3)
    tx = optax.with_extra_args_support(tx)
    of_state = bnp_optax.state_sharding(tx, shapes, shardings)
    state = jax.tree.map(place, jax.eval_shape(tx.init, params), of_state)

    def step(params, state, tokens):
        if method == "adam":
            (loss, grads), stats = jax.value_and_grad(loss_fn)(params, tokens), None
        else:
            captured = bnp_optax.value_and_grad(loss_fn, **options)
            loss, grads, stats = captured(params, tokens)
        updates, state = tx.update(grads, state, params, layer_stats=stats)
        return optax.apply_updates(params, updates), state, loss

    out = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    jitted = jax.jit(step, out_shardings=(*out, everywhere))
    return collectives(jitted.lower(params, state, tokens).compile())


def size(found, *kinds):
    return sum(n_bytes for kind, n_bytes in found if not kinds or kind in kinds)


@pytest.mark.parametrize("options", [{}, {"sample_rows": 64}], ids=["all_rows", "sampled"])
def test_statistics_are_two_sums_over_devices_for_all_layers(options):
    adam = collectives_of_a_step("adam")
    bnp = collectives_of_a_step("bnp", **options)
    assert size(adam) > 300_000  # The gradient of every parameter.
    assert {kind for kind, _ in bnp} == {"all-reduce"}
    assert len(bnp) <= len(adam) + 2
    assert size(adam) < size(bnp) <= 1.05 * size(adam)


@pytest.mark.parametrize("options", [{}, {"sample_rows": 64}], ids=["all_rows", "sampled"])
def test_sharded_kernels_are_gathered_for_the_loss_alone(options):
    adam = collectives_of_a_step("adam", fsdp=True)
    bnp = collectives_of_a_step("bnp", fsdp=True, **options)
    assert size(adam, "all-gather") > 200_000
    assert size(bnp, "all-gather") <= 1.05 * size(adam, "all-gather")
    assert size(bnp) <= 1.05 * size(adam)
    # A row of a layer's statistics is no kernel.
    kernels = [
        [n for kind, n in found if kind == "all-gather" and n >= 4 * WIDTH**2]
        for found in (adam, bnp)
    ]
    assert sorted(kernels[0]) == sorted(kernels[1])
    assert kernels[0]


def test_features_in_shards_are_moved_once_to_join_the_layers():
    """Mean, variance and rest together, of three layers: not each of them apart."""
    training = MODES["auto, columns"](OPTIMIZERS["bnp_adam"], False)
    x, y = (training.place(a[0]) for a in batches())
    found = collectives(training.step.lower(training.carry, x, y).compile())
    moved = [n_bytes for kind, n_bytes in found if kind == "all-to-all"]
    assert 0 < len(moved) <= 4


def rows(shape, ratio=1e4):
    """float32 inputs far from zero that drift along the batch: shards differ in their means."""
    rng = np.random.default_rng(0)
    stds = 10.0 ** rng.uniform(-1, 1, shape[-1])
    noise = rng.normal(size=shape) + np.linspace(-2, 2, shape[0]).reshape(-1, *[1] * len(shape[1:]))
    return (ratio * stds + stds * noise).astype(np.float32)


def added(y, bias):
    return y + jnp.broadcast_to(bias, y.shape)


def dense(params, x):
    return jnp.mean(added(x @ params["kernel"], params["bias"]) ** 2)


def conv(params, x):
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), [(1, 1), (1, 1)], None, None, dimensions
    )
    return jnp.mean(added(y, params["bias"]) ** 2)


CASES = {
    "dense": (dense, (64, 8), (8, 3)),
    "sequences": (dense, (32, 6, 8), (8, 3)),
    "one_row_a_device": (dense, (4, 8), (8, 3)),
    "rows_of_two_devices": (dense, (66, 8), (8, 3)),
    "conv": (conv, (16, 5, 5, 4), (3, 3, 4, 2)),
}


def measured(loss, shape, x, kind="auto", n_devices=4, **options):
    mesh = mesh_of(n_devices, kind)
    params = {"kernel": np.full(shape, 0.1, np.float32), "bias": np.zeros(shape[-1], np.float32)}

    def place(tree, *spec):
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))

    captured = jax.jit(bnp_optax.value_and_grad(loss, **options))
    if kind == "explicit":
        with jax.set_mesh(mesh):
            return captured(place(params), place(x, "data"))[2]["kernel"]
    return captured(place(params), place(x, "data"))[2]["kernel"]


def assert_moments(stats, x):
    mean, var = oracles.input_moments(x)
    np.testing.assert_allclose(np.ravel(stats.mean), mean, rtol=5e-7)
    np.testing.assert_allclose(np.ravel(stats.var), var, rtol=1e-3)
    np.testing.assert_array_equal(stats.total_variance, stats.var)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "n_devices"),
    [(name, n) for name, (_, shape, _) in CASES.items() for n in (2, 4) if shape[0] % n == 0],
)
def test_moments_of_groups_keep_their_digits(name, kind, n_devices):
    loss, shape, kernel = CASES[name]
    x = rows(shape)
    stats = measured(loss, kernel, x, kind, n_devices)
    assert_moments(stats, x)
    assert float(stats.count) == np.prod(shape[:-1])


def test_weights_that_leave_a_device_no_row():
    x = rows((16, 8))
    weights = np.where(np.arange(16) < 4, 0.0, 1.0 + np.arange(16) % 2).astype(np.float32)
    x[:4] = np.nan
    stats = measured(dense, (8, 3), x, weights=lambda x: weights)
    assert_moments(stats, np.repeat(x, weights.astype(int), axis=0))
    assert float(stats.count) == weights.sum()


@pytest.mark.parametrize("n_rows", [2, 8, 10])
def test_a_sample_is_as_large_on_every_device(n_rows):
    """Of fewer rows than devices, all; else as many from each device, so at least as many."""
    x = np.zeros((64, 64), np.float32)
    np.fill_diagonal(x, 1.0)
    mean = np.ravel(measured(dense, (64, 3), x, sample_rows=n_rows).mean)
    taken = np.flatnonzero(mean)
    n_devices = jax.device_count()
    assert len(taken) == (n_rows if n_rows < n_devices else -(-n_rows // n_devices) * n_devices)
    np.testing.assert_allclose(mean[taken], 1 / len(taken), rtol=1e-6)
    assert {len(taken) // 4 or 1} == {np.sum(taken // 16 == d) for d in set(taken // 16)}


def test_a_kernel_used_twice_and_a_scan_have_the_moments_of_all_their_rows():
    def loss(params, x):
        def step(carry, row):
            return carry + dense(params, row), None

        total, _ = jax.lax.scan(step, 0.0, jnp.moveaxis(x, 1, 0))
        return total + dense(params, 3.0 * x[:, 0])

    x = rows((8, 5, 8))
    every = np.concatenate([x.reshape(-1, 8), np.float32(3.0) * x[:, 0]])
    assert_moments(measured(loss, (8, 3), x), every)


@pytest.mark.parametrize("check_vma", [False, True])
def test_rows_spread_by_shard_map_within_the_loss(check_vma):
    spec = PartitionSpec("data")
    mapped = functools.partial(
        jax.shard_map, mesh=mesh_of(), out_specs=PartitionSpec(), check_vma=check_vma
    )

    def loss(params, x):
        def mean(params, x):
            return jax.lax.pmean(dense(params, x), "data")

        return mapped(mean, in_specs=(PartitionSpec(), spec))(params, x)

    x = rows((16, 8))
    assert_moments(measured(loss, (8, 3), x), x)
