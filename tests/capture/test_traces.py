"""Captures inside JAX's transformations and inside each other, of no rows, of symbolic shapes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from support.capture_checks import (
    FRAMEWORKS,
    PARAMS,
    X,
    assert_nothing_is_lost,
    assert_rows,
    assert_trees,
    capture,
    jit,
    normal,
    plain,
)

import bnp_optax

HEAD = {"kernel": normal(8, 3, 2), "bias": normal(9, 2)}


def square(f):
    return lambda p, x: jnp.mean(f(p, x) ** 2)


# Weights broadcast over the steps of a scan.


class Broadcast(nn.Module):
    """One cell run over time, with its parameters cast: the carry and the weights in bf16."""

    cast: bool
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        class Cell(nn.Module):
            @nn.compact
            def __call__(self, h, row):
                dense = nn.Dense(3, name="dense", dtype=row.dtype)
                return jnp.tanh(dense(row) + h), None

        cell = nn.remat(Cell) if self.remat else Cell
        over = nn.scan(cell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1)
        if self.cast:
            x = x.astype(jnp.bfloat16)
        return over(name="cell")(jnp.zeros((len(x), 3), x.dtype), x)[0]


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("cast", ["layer", "parameters", "none"])
def test_weights_that_a_scan_broadcasts(cast, remat):
    x = normal(5, 4, 6, 3) + 1
    model = Broadcast(cast != "none", remat)
    params = model.init(jax.random.key(0), x)["params"]

    def loss_fn(p, x):
        if cast == "parameters":
            p = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p)
        return jnp.sum(model.apply({"params": p}, x).astype(jnp.float32) ** 2)

    stats, _ = assert_nothing_is_lost(loss_fn, params, x)
    rows = x if cast == "none" else x.astype(jnp.bfloat16)
    assert_rows(stats["cell/dense/kernel"], rows)
    assert stats["cell/dense/kernel"].layer.bias == "cell/dense/bias"


# A capture inside a capture.


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_capture_in_a_loss_that_is_captured(framework):
    loss = square(FRAMEWORKS[framework])
    params = PARAMS
    if framework == "nnx":
        params = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)

    def nested(value_and_grad):
        def loss_fn(p, x):
            value, grads = value_and_grad(loss)(p, x)[:2]
            return value + optax.tree.norm(grads)

        return loss_fn

    (value, grads, stats), want = (
        jit(f(nested(f)))(params, X) for f in (bnp_optax.value_and_grad, jax.value_and_grad)
    )
    assert_trees((value, grads), want)
    assert_rows(stats["kernel"], X)


@pytest.mark.parametrize("framework", ["linen", "plain"])
def test_statistics_in_a_loss_are_constants(framework):
    """As everything a capture returns besides the loss and the gradient."""

    def loss_fn(p, x):
        hidden = FRAMEWORKS[framework](p["first"], x)
        inner = lambda q: jnp.mean((hidden @ q["w"] + q["b"][None]) ** 2)  # noqa: E731
        value, _, stats = bnp_optax.value_and_grad(inner)(p["second"])
        return value + jnp.sum(stats["w"].mean)

    params = {"first": PARAMS, "second": {"w": normal(4, 2, 2), "b": normal(5, 2)}}

    def without(p, x):
        hidden = FRAMEWORKS[framework](p["first"], x)
        return jnp.mean((hidden @ p["second"]["w"] + p["second"]["b"][None]) ** 2)

    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, X)
    assert_trees(grads, jax.grad(without)(params, X))
    assert_rows(stats["first/kernel"], X)


# Nothing to measure.

ROWLESS = {
    "dense": (nn.Dense(2), (0, 3)),
    "dense, no bias": (nn.Dense(2, use_bias=False), (0, 3)),
    "sequences of length zero": (nn.Dense(2), (4, 0, 3)),
    "convolution": (nn.Conv(2, (3,)), (0, 5, 3)),
    "dense general": (nn.DenseGeneral((2, 2)), (0, 3)),
}


@pytest.mark.parametrize("name", ROWLESS)
def test_no_rows(name):
    model, shape = ROWLESS[name]
    params = model.init(jax.random.key(0), jnp.ones((1, *shape[1:])))["params"]
    # The mean over no rows would be NaN in JAX as well.
    loss_fn = lambda p, x: jnp.sum(model.apply({"params": p}, x) ** 2)  # noqa: E731
    stats = capture(loss_fn, params, jnp.zeros(shape))["kernel"]
    assert stats.count == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stats))
    assert np.isfinite(stats.total_variance).all()
    captured = bnp_optax.value_and_grad(loss_fn, second_moments=True)
    _, _, found = jit(captured)(params, jnp.zeros(shape))
    assert not found["kernel"].second_moment.any()


@pytest.mark.parametrize("framework", ["linen", "plain"])
def test_no_rows_beside_rows(framework):
    """A class that is absent from a batch, say."""
    f = FRAMEWORKS[framework]
    loss_fn = lambda p, x, none: square(f)(p, x) + jnp.sum(f(p, none) ** 2)  # noqa: E731
    stats = capture(loss_fn, PARAMS, X, jnp.zeros((0, 3)))
    assert_rows(stats["kernel"], X)


@pytest.mark.parametrize("framework", ["linen", "plain"])
@pytest.mark.parametrize("shape", [(0, 2), (3, 0), (0, 0)])
def test_kernels_with_an_axis_of_no_entries(shape, framework):
    """A feature group that is switched off; the layers beside it are not to suffer."""
    # Flax's default initializer divides by the number of entries whenever the module is applied.
    empty = nn.Dense(shape[1], kernel_init=nn.initializers.zeros)
    f = {"linen": lambda p, x: empty.apply({"params": p}, x), "plain": plain}[framework]
    params = {"empty": {"kernel": jnp.ones(shape), "bias": jnp.ones(shape[1:])}, "head": HEAD}

    def loss_fn(p, x):
        aside = jnp.sum(f(p["empty"], x[:, : shape[0]]) ** 2)
        return square(FRAMEWORKS[framework])(p["head"], x) + aside

    stats = capture(loss_fn, params, X)
    assert_rows(stats["head/kernel"], X)
    for leaf in jax.tree.leaves(stats):
        assert np.isfinite(leaf).all()


# Shapes that are not known yet.


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(jnp.tanh(nn.Conv(4, (3,))(x)))


EXPORTED = {
    "linen": (FRAMEWORKS["linen"], PARAMS, "b, 3"),
    "plain": (plain, PARAMS, "b, 3"),
    "sequences": (FRAMEWORKS["linen"], PARAMS, "b, t, 3"),
    "convolution": (Convolutional, None, "b, 5, 3"),
    "nnx": (FRAMEWORKS["nnx"], None, "b, 3"),
}


FINER = {
    "weights": {"weights": lambda x: jnp.arange(x.shape[0]) > 1},
    "sampled": {"sample_rows": 8},
    "second moments": {"second_moments": True},
    "sketches": {"second_moments": True, "second_moment_fan_in": 2},
    "weighted second moments": {
        "second_moments": True,
        "weights": lambda x: jnp.arange(x.shape[0]) > 1,
    },
}


@pytest.mark.parametrize("finer", ["", *FINER])
@pytest.mark.parametrize("name", EXPORTED)
def test_exported_for_any_batch(name, finer):
    f, params, text = EXPORTED[name]
    if name == "convolution":
        model = f()
        f = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
        params = model.init(jax.random.key(0), jnp.ones((1, 5, 3)))["params"]
    if name == "nnx":
        params = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)

    @functools.partial(jax.jit, static_argnames="finer")
    def step(p, x, finer):
        loss, grads, stats = bnp_optax.value_and_grad(square(f), **FINER.get(finer, {}))(p, x)
        return loss, grads, {k: jax.tree.leaves(s) for k, s in stats.items()}

    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape(text), jnp.float32)
    shapes = jax.eval_shape(lambda: params), shape
    exported = jax.export.export(jax.jit(functools.partial(step, finer=finer)))(*shapes)
    for n in (4, 7):
        x = normal(n, *{"b, 3": (n, 3), "b, t, 3": (n, 2, 3), "b, 5, 3": (n, 5, 3)}[text])
        # Of a number of rows that is not known all are taken.
        want = step(params, x, finer="" if finer == "sampled" else finer)
        assert_trees(exported.call(params, x), want, 1e-5)


# Transformations of the captured function.


@pytest.mark.parametrize("framework", ["linen", "plain"])
@pytest.mark.parametrize("data_axis", [None, 0])
def test_ensembles(framework, data_axis):
    many = jax.vmap(lambda s: jax.tree.map(lambda a: a * s, PARAMS))(jnp.arange(1.0, 5.0))
    x = X if data_axis is None else normal(3, 4, 16, 3)
    in_axes = (0, data_axis)
    loss_fn = square(FRAMEWORKS[framework])
    loss, grads, stats = jax.vmap(bnp_optax.value_and_grad(loss_fn), in_axes)(many, x)
    assert_trees((loss, grads), jax.vmap(jax.value_and_grad(loss_fn), in_axes)(many, x))
    assert stats["kernel"].mean.shape == (4, 3, 1)
    for i in range(4):
        one = jax.tree.map(lambda a: a[i], stats["kernel"])  # noqa: B023
        assert_rows(one, x if data_axis is None else x[i])


def in_scan(step, params, batches):
    return lax.scan(lambda p, x: (p, step(p, x)), params, batches)[1]


def in_map(step, params, batches):
    return lax.map(lambda x: step(params, x), batches)


def in_fori(step, params, batches):
    first = step(params, batches[0])
    outs = jax.tree.map(lambda a: jnp.zeros((2, *a.shape), a.dtype), first)
    put = lambda i, o: jax.tree.map(lambda a, b: a.at[i].set(b), o, step(params, batches[i]))  # noqa: E731
    return lax.fori_loop(0, 2, put, outs)


def in_cond(step, params, batches):
    outs = [lax.cond(x[0, 0] > -99, step, step, params, x) for x in batches]
    return jax.tree.map(lambda *a: jnp.stack(a), *outs)


def in_checkpoint(step, params, batches):
    outs = [jax.checkpoint(step)(params, x) for x in batches]
    return jax.tree.map(lambda *a: jnp.stack(a), *outs)


@pytest.mark.parametrize("place", [in_scan, in_map, in_fori, in_cond, in_checkpoint])
@pytest.mark.parametrize("framework", ["linen", "plain"])
def test_in_control_flow(framework, place):
    batches, loss_fn = normal(2, 2, 16, 3), square(FRAMEWORKS[framework])
    run = lambda f: jit(lambda p, x: place(f(loss_fn), p, x))(PARAMS, batches)  # noqa: E731
    loss, grads, stats = run(bnp_optax.value_and_grad)
    assert_trees((loss, grads), run(jax.value_and_grad))
    for i in range(2):
        assert_rows(jax.tree.map(lambda a: a[i], stats["kernel"]), batches[i])  # noqa: B023


@pytest.mark.parametrize("framework", ["linen", "plain"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map(check_vma, framework):
    """Each device has its part of the batch, and the gradient that JAX gives it there."""
    loss_fn = square(FRAMEWORKS[framework])

    def on_devices(value_and_grad):
        def local(p, x):
            loss, grads, *stats = value_and_grad(loss_fn)(p, x)
            return lax.pmean((loss, grads, *stats), "data")

        mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
        )
        return jax.jit(sharded)(PARAMS, X)

    loss, grads, stats = on_devices(bnp_optax.value_and_grad)
    assert_trees((loss, grads), on_devices(jax.value_and_grad))
    assert_rows(stats["kernel"], X, count=4)


def loss_on_devices(framework, p, x):
    def local(p, x):
        return lax.pmean(square(FRAMEWORKS[framework])(p, x), "data")

    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    return jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())(p, x)


@pytest.mark.parametrize("framework", ["linen", "plain"])
def test_of_a_loss_with_a_shard_map(framework):
    stats = capture(functools.partial(loss_on_devices, framework), PARAMS, X)
    assert_rows(stats["kernel"], X)


@pytest.mark.parametrize("framework", ["linen", "plain"])
def test_abstractly(framework):
    """Shapes and layers are known without numbers."""
    function = bnp_optax.value_and_grad(square(FRAMEWORKS[framework]))
    shapes = jax.eval_shape(function, PARAMS, X)
    loss, grads, stats = function(PARAMS, X)
    assert jax.tree.structure(shapes) == jax.tree.structure((loss, grads, stats))
    compiled = jax.jit(function).lower(PARAMS, X).compile()
    assert_trees(compiled(PARAMS, X)[:2], (loss, grads))
