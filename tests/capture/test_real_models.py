"""Capture on models with the structure of public ones, at one example and at several."""

import functools
import re

import jax
import numpy as np
import pytest

# Each of these adds its cases.
from support.capture_models import (  # noqa: F401
    real_frameworks,
    real_generative,
    real_language,
    real_rl,
    real_science,
    real_self_supervised,
    real_sequences,
    real_transformers,
    real_vision,
)
from support.capture_models.real_cases import REAL, jit

import bnp_optax

RTOL = 1e-4
BY_NAME = {case.name: case for case in REAL}
BATCHES = (1, 4)
MODELS = [(name, batch) for name in BY_NAME for batch in BATCHES]
EXACT = [(name, batch) for name, batch in MODELS if BY_NAME[name].exact]


@pytest.fixture(autouse=True)
def user_code():
    """The models add biases to batches, as most code does."""
    with jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def model_of(name, batch):
    return BY_NAME[name].make(batch)


@functools.cache
def plain(name, batch):
    """Loss and gradient by `jax.value_and_grad`."""
    model = model_of(name, batch)
    function = jit(jax.value_and_grad(model.loss_fn, has_aux=model.has_aux))
    return jax.device_get(function(model.params, *model.args))


@functools.cache
def captured(name, batch):
    """Loss, gradient, statistics and their total variances, compiled."""
    model = model_of(name, batch)

    @jit
    def function(params, *args):
        capture = bnp_optax.value_and_grad(model.loss_fn, has_aux=model.has_aux)
        value, grads, stats = capture(params, *args)
        return value, grads, stats, {name: layer.total_variance for name, layer in stats.items()}

    return jax.device_get(function(model.params, *model.args))


@functools.cache
def summary(name, batch):
    model = model_of(name, batch)
    arguments = jax.eval_shape(lambda: (model.params, *model.args))

    def loss_fn(params, *args):
        out = model.loss_fn(params, *args)
        return out[0] if model.has_aux else out

    return bnp_optax.summarize(loss_fn, *arguments)


def named_shapes(params):
    """Shapes by name, without the `value` of a box."""
    paths = jax.tree.leaves_with_path(params)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): a.shape for p, a in paths}
    return {name.removesuffix("/value"): shape for name, shape in named.items()}


@pytest.mark.parametrize(("name", "batch"), MODELS)
def test_the_recorded_run_is_that_of_the_loss(name, batch):
    """Guards the catalogue: an input recorded wrongly would have given another loss."""
    value, _ = plain(name, batch)
    model = model_of(name, batch)
    loss = value[0] if model.has_aux else value
    tolerance = 10 * BY_NAME[name].rounding
    np.testing.assert_allclose(loss, model.loss, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "batch"), MODELS)
def test_value_and_gradient_are_those_of_jax(name, batch):
    value, grads, *_ = captured(name, batch)
    want, want_grads = plain(name, batch)
    assert jax.tree.structure((value, grads)) == jax.tree.structure((want, want_grads))
    # Where a gradient is a difference of nearly equal terms, it is exact up to their size.
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want_grads))
    for got, expected in zip(jax.tree.leaves(value), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize(("name", "batch"), EXACT)
def test_statistics_are_those_of_the_recorded_inputs(name, batch):
    _, _, stats, variances = captured(name, batch)
    model, rounding = model_of(name, batch), BY_NAME[name].rounding
    shapes = named_shapes(model.params)
    missing = set(model.expected) - set(stats)
    assert missing <= BY_NAME[name].optional, sorted(missing)
    for kernel in set(model.expected) & set(stats):
        record = model.expected[kernel]
        got, (count, mean, variance) = stats[kernel], record.pooled()
        layer = got.layer
        facts = (float(got.count), layer.bias, layer.input_axes, layer.positions)
        assert facts == (count, record.bias, record.input_axes, record.positions), kernel
        for moment, want, scale, factor in (
            (got.mean, mean, record.scale, 1),
            (variances[kernel], variance, record.scale**2, 4),
        ):
            np.testing.assert_allclose(
                np.broadcast_to(moment, shapes[kernel]),
                np.broadcast_to(want, shapes[kernel]),
                rtol=RTOL,
                atol=factor * rounding * scale,
                err_msg=kernel,
            )


@pytest.mark.parametrize(("name", "batch"), MODELS)
def test_statistics_are_finite(name, batch):
    _, _, stats, _ = captured(name, batch)
    for kernel, layer in stats.items():
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(layer)), kernel


# Norm scales, class tokens, position tables, and what multiplies entry by entry.
NO_KERNEL = re.compile(
    r"\b(pos|positions|pos_embedding|wpe|cls|registers|A_log)$|norm\w*(/scale)?$|^weights$"
)


@pytest.mark.parametrize(("name", "batch"), MODELS)
def test_each_kernel_is_covered_or_has_a_reason(name, batch):
    case, model, found = BY_NAME[name], model_of(name, batch), summary(name, batch)
    assert set(found.shapes) == set(found.layers) | set(found.uncovered)
    assert all(found.uncovered.values())
    # Whatever has two axes is listed, but for biases and what meets no inputs in a product: no
    # kernel is left out in silence.
    biases = {layer.bias for layer in found.layers.values()}
    listed = set(found.shapes) | biases
    for kernel, shape in named_shapes(model.params).items():
        assert (
            kernel in listed
            or len(shape) < 2
            or kernel.endswith("bias")
            or (NO_KERNEL.search(kernel))
        ), kernel
    assert not any(NO_KERNEL.search(kernel) for kernel in found.shapes)
    if case.exact:
        optional = case.optional
        assert set(found.layers) - optional == set(model.expected) - optional, found.uncovered
        for kernel, reason in case.uncovered.items():
            if not NO_KERNEL.search(kernel):
                assert re.search(reason, found.uncovered[kernel]), found.uncovered[kernel]


@pytest.mark.parametrize("name", BY_NAME)
def test_one_example_is_covered_as_several_are(name):
    one, several = (summary(name, batch) for batch in BATCHES)
    assert set(one.layers) == set(several.layers)
    assert set(one.uncovered) == set(several.uncovered)
    for kernel, layer in one.layers.items():
        other = several.layers[kernel]
        facts = [(a.bias, a.input_axes, a.positions) for a in (layer, other)]
        assert facts[0] == facts[1], kernel


def test_there_are_enough_of_them():
    assert len(BY_NAME) >= 32
    assert len(BY_NAME) == len(REAL)
