"""Captured statistics against inputs recorded by hand, for models of every framework."""

import functools
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxpr_as_fun
from support.capture_models import CASES, filled, inputs, score
from support.quick_jit import jit

import bnp_optax

RTOL = 1e-4
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(autouse=True)
def user_code():
    """The models add biases to batches, as most code does."""
    with jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def model_of(name):
    return BY_NAME[name].make()


@functools.cache
def plain(name):
    """Loss and gradient by `jax.value_and_grad`."""
    model = model_of(name)
    return jax.device_get(jit(jax.value_and_grad(model.loss_fn))(model.params, *model.args))


class Captured(NamedTuple):
    """What a compiled `value_and_grad` gave, and its abstract evaluation before that.

    `variances` are the stats' total variances. `n_traces` counts the traces of the loss up to the
    abstract evaluation, the first call and the second.
    """

    loss: Any
    grads: Any
    stats: dict[str, bnp_optax.LayerStats]
    variances: dict[str, Any]
    abstract: Any
    n_traces: list[int]


@functools.cache
def captured(name):
    model, traces, n_traces = model_of(name), [], []

    def traced(params, *args):
        traces.append(name)
        return model.loss_fn(params, *args)

    @jit
    def function(params, *args):
        loss, grads, stats = bnp_optax.value_and_grad(traced)(params, *args)
        return loss, grads, stats, {name: layer.total_variance for name, layer in stats.items()}

    abstract = jax.eval_shape(function, model.params, *model.args)
    n_traces.append(len(traces))
    results = jax.device_get(function(model.params, *model.args))
    n_traces.append(len(traces))
    function(model.params, *model.args)
    n_traces.append(len(traces))
    return Captured(*results, abstract, n_traces)


def assert_close(got, want, rounding, scale, message=""):
    """Equal up to `RTOL` and to `rounding` of numbers as large as `scale`."""
    np.testing.assert_allclose(got, want, rtol=RTOL, atol=rounding * scale, err_msg=message)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_rerun_by_hand_ran_the_same_network(name):
    """Guards the catalogue: an input recorded wrongly would have given another loss."""
    loss, _ = plain(name)
    np.testing.assert_allclose(loss, model_of(name).loss, atol=4 * BY_NAME[name].rounding)


@pytest.mark.parametrize("name", BY_NAME)
def test_statistics_are_those_of_the_recorded_inputs(name):
    rounding, got = BY_NAME[name].rounding, captured(name)
    for kernel, record in model_of(name).expected.items():
        layer, (count, mean, variance) = got.stats[kernel], record.pooled()
        if record.calls:
            assert layer.mean.shape == layer.var.shape == layer.sq_mean.shape == mean.shape, kernel
        assert_close(layer.mean, mean, rounding, record.scale, kernel)
        assert_close(got.variances[kernel], variance, 4 * rounding, record.scale**2, kernel)
        assert {a.dtype for a in jax.tree.leaves(layer)} == {jnp.dtype("float32")}
        assert layer.count.shape == ()
        assert layer.count == count, kernel
        assert layer.layer.kernel == kernel
        assert layer.layer.bias == record.bias, kernel
        assert layer.layer.positions == record.positions, kernel
        assert layer.layer.input_axes == record.input_axes, kernel


def assert_same_layer(got, want, rounding, scale):
    assert jax.tree.structure(got) == jax.tree.structure(want)  # The static fields too.
    assert got.count == want.count, want.layer.kernel
    assert_close(got.mean, want.mean, rounding, scale, f"mean of {want}")
    assert_close(got.var, want.var, 4 * rounding, scale**2, f"var of {want}")
    assert_close(got.sq_mean, want.sq_mean, 4 * rounding, scale**2, f"sq_mean of {want}")


@pytest.mark.parametrize("name", BY_NAME)
def test_value_and_gradient_are_those_of_jax(name):
    rounding, got, (loss, grads) = BY_NAME[name].rounding, captured(name), plain(name)
    np.testing.assert_allclose(got.loss, loss, rtol=1e-6, atol=rounding)
    assert jax.tree.structure(got.grads) == jax.tree.structure(grads)
    # Of the whole gradient: that of a key's bias is 0 but for the rounding of what cancels there.
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    for one, other in zip(jax.tree.leaves(got.grads), jax.tree.leaves(grads), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=rounding * largest)


def test_auxiliary_outputs_and_chosen_layers():
    model = model_of("plain_dict")

    def loss_fn(params, x):
        return model.loss_fn(params, x), {"hidden": jnp.tanh(x @ params["w1"]), "rows": len(x)}

    layers = bnp_optax.find_layers(model.loss_fn, model.params, *model.args)
    chosen = {"w2": layers["w2"]}
    function = bnp_optax.value_and_grad(loss_fn, has_aux=True, layers=chosen)
    (loss, aux), grads, stats = jit(function)(model.params, *model.args)
    (want, want_aux), want_grads = jit(jax.value_and_grad(loss_fn, has_aux=True))(
        model.params, *model.args
    )
    assert jax.tree.structure(aux) == jax.tree.structure(want_aux)
    for got, expected in zip(
        jax.tree.leaves((loss, aux, grads)),
        jax.tree.leaves((want, want_aux, want_grads)),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
    assert set(stats) == {"w2"}


@pytest.mark.parametrize("name", BY_NAME)
def test_coverage(name):
    """Each kernel is covered or has a reason, and the layers found foretell the statistics."""
    case, model, stats = BY_NAME[name], model_of(name), captured(name).stats
    arguments = jax.eval_shape(lambda: (model.params, *model.args))
    summary = bnp_optax.summarize(model.loss_fn, *arguments)
    assert set(stats) == set(summary.layers) == set(model.expected)
    assert set(summary.uncovered) == set(case.uncovered)
    for kernel, reason in summary.uncovered.items():
        assert re.search(case.uncovered[kernel], reason), f"{kernel}: {reason}"
    for kernel, layer in summary.layers.items():
        assert stats[kernel].layer == layer
        assert stats[kernel].mean.shape == layer.stats_shape


@pytest.mark.parametrize("name", BY_NAME)
def test_one_trace_serves_abstract_evaluation_and_every_call(name):
    got = captured(name)
    assert got.n_traces[0] == got.n_traces[1] == got.n_traces[2] >= 1
    assert got.abstract == jax.eval_shape(lambda: got[:4])


class Idle(nn.Module):
    @nn.compact
    def __call__(self, x):
        if self.is_initializing():
            nn.Dense(2, name="idle")(x)
        return nn.Dense(3, name="busy")(x)


def test_a_layer_that_never_runs_has_statistics_of_nothing():
    model, x = Idle(), jnp.asarray(inputs(3, 4))
    params = filled(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    loss_fn = lambda params: score(model.apply({"params": params}, x))  # noqa: E731
    summary = bnp_optax.summarize(loss_fn, params)
    assert set(summary.layers) == {"busy/kernel"}
    assert summary.uncovered == {"idle/kernel": "the loss does not depend on it"}
    _, _, stats = jit(bnp_optax.value_and_grad(loss_fn))(params)
    assert stats["busy/kernel"].count == 3
    idle = stats["idle/kernel"]
    assert idle.count == 0
    assert idle.mean.shape == (4, 1)
    assert idle.layer.bias == "idle/bias"


# ---------------------------------------------------------------------------------------------
# Random architectures.
# ---------------------------------------------------------------------------------------------

WIDTH = 3


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(2)(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1], use_bias=False)(nn.gelu(y)), None


class Random(nn.Module):
    """Blocks by name, on any number of axes."""

    blocks: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(WIDTH, name="shared")
        for block in self.blocks:
            match block:
                case "dense":
                    x = nn.Dense(WIDTH)(x)
                case "no bias":
                    x = nn.Dense(WIDTH, use_bias=False)(x)
                case "relu":
                    x = nn.relu(x)
                case "tanh":
                    x = jnp.tanh(x)
                case "norm":
                    x = nn.LayerNorm()(x)
                case "residual":
                    x, _ = Residual()(x)
                case "shared":
                    x = shared(x[..., :1] + jnp.arange(WIDTH))
                case "scan" | "scan remat":
                    layer = nn.remat(Residual) if "remat" in block else Residual
                    scanned = nn.scan(
                        layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
                    )
                    x, _ = scanned()(x, None)
                case "flatten":
                    x = x.reshape(x.shape[0], -1)
                case "heads":
                    x = nn.DenseGeneral((2, WIDTH))(x)
                case "conv" | "strided conv":
                    x = x if x.ndim > 2 else x[..., None]
                    strides = 2 if block == "strided conv" else 1
                    x = nn.Conv(WIDTH, (2,) * (x.ndim - 2), strides=strides)(x)
        return nn.Dense(2)(x.reshape(x.shape[0], -1))


BLOCKS = [
    "dense",
    "no bias",
    "relu",
    "tanh",
    "norm",
    "residual",
    "shared",
    "scan",
    "scan remat",
    "flatten",
    "heads",
    "conv",
    "strided conv",
]


ARCHITECTURES = st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5).map(tuple)


def random_model(blocks):
    """A loss of one argument, its parameters, and the names of all kernels."""
    model, x = Random(blocks), jnp.asarray(inputs(2, 2, 2, 2))
    params = filled(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    paths = [[key.key for key in path] for path, _ in jax.tree.leaves_with_path(params)]
    kernels = {"/".join(path) for path in paths if path[-1] == "kernel"}
    return lambda params: score(model.apply({"params": params}, x)), params, kernels


def unnamed(loss_fn, params):
    """The same loss, traced before its layers could name their inputs."""
    traced = jaxpr_as_fun(jax.make_jaxpr(loss_fn)(params))
    return lambda params: traced(*jax.tree.leaves(params))[0]


@given(blocks=ARCHITECTURES)
@settings(max_examples=25, deadline=None)
def test_every_layer_of_random_architectures_is_found(blocks):
    loss_fn, params, kernels = random_model(blocks)
    layers = bnp_optax.find_layers(loss_fn, params)
    assert set(layers) == kernels
    assert layers == bnp_optax.find_layers(unnamed(loss_fn, params), params)


@given(blocks=ARCHITECTURES)
@example(blocks=("conv", "relu", "shared", "flatten", "shared", "scan remat"))
@settings(max_examples=6, deadline=None)
def test_names_change_nothing_in_random_architectures(blocks):
    loss_fn, params, kernels = random_model(blocks)

    def both(params):
        functions = loss_fn, unnamed(loss_fn, params)
        return [bnp_optax.value_and_grad(function)(params) for function in functions]

    (loss, grads, named), (other_loss, other_grads, found) = jax.device_get(jit(both)(params))
    np.testing.assert_allclose(loss, other_loss, rtol=1e-5, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max()),
        grads,
        other_grads,
    )
    assert set(named) == set(found) == kernels
    for kernel, layer in named.items():
        scale = float(np.sqrt(np.max(layer.var + layer.sq_mean)))
        assert_same_layer(found[kernel], layer, 1e-5, scale)
