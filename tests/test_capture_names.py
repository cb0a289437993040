"""Names of layers, what a summary lists, layouts of kernels, and models of several frameworks."""

import dataclasses
import functools
import inspect
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capture_checks import (
    PARAMS,
    X,
    assert_nothing_is_lost,
    assert_rows,
    assert_trees,
    capture,
    linen,
    normal,
    plain,
)
from flax import nnx
from flax.training.train_state import TrainState
from jax import lax

import bnp_optax
import bnp_optax.flax_nnx


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("policy", "value"), meta_fields=()
)
@dataclasses.dataclass
class P:
    """Actor and critic, one attribute named as Flax names the content of its boxes."""

    policy: Any
    value: Any


# Trees of three leaves, some of whose slash-separated paths are the same.
TREES = {
    "attribute and key": lambda a, b, c: {"h": P(policy=a, value=b), "h/policy": c},
    "key and key": lambda a, b, c: {"h": {"w": a, "v": b}, "h/w": c},
    "key and index": lambda a, b, c: {"h": [a, b], "h/0": c},
    "boxed and not": lambda a, b, c: {"h": P(policy=a, value=b), "h/value": c},
    "two slashes": lambda a, b, c: {"h/w": {"v": a}, "h": {"w/v": b}, "o": c},
    "attribute `value` alone": lambda a, b, c: {"g": P(policy=a, value=b), "h": c},
}


def columns(tree, x):
    """A loss in which leaf i, in flattening order, meets the rows `x + i`."""
    return sum(jnp.mean((x + i) @ w) ** 2 for i, w in enumerate(jax.tree.leaves(tree)))


@pytest.mark.parametrize("name", TREES)
def test_every_leaf_gets_its_own_statistics_or_the_names_are_refused(name):
    weights = [normal(i, 3, 2) for i in range(3)]
    tree = TREES[name](*weights)
    structure = jax.tree.structure(tree)
    apart = dict(zip("abc", jax.tree.leaves(tree), strict=True))

    def update(params):
        _, grads, stats = bnp_optax.value_and_grad(columns)(params, X)
        assert len(stats) == 3
        tx = bnp_optax.bnp_precondition(warm_start=True)
        updates, _ = tx.update(grads, tx.init(params), params, layer_stats=stats)
        return stats, updates

    try:
        stats, updates = update(tree)
    except ValueError as error:
        message = str(error)
    else:
        message = None
        # Each mean once: nobody's statistics are another's.
        means = sorted(float(s.mean[0, 0]) for s in stats.values())
        first = float(X[:, 0].mean())
        np.testing.assert_allclose(means, [first, first + 1, first + 2], rtol=1e-5)
        wanted = list(update(apart)[1].values())
        assert_trees(updates, structure.unflatten(wanted), 1e-5)
    if message is not None:
        assert "h" in message
        assert name != "attribute `value` alone", "these names differ"


@pytest.mark.parametrize("f", [linen, plain])
def test_keys_with_slashes(f):
    params = {"block/0": {"dense/1": PARAMS}}
    loss_fn = lambda p, x: jnp.mean(f(p["block/0"]["dense/1"], x) ** 2)  # noqa: E731
    stats = capture(loss_fn, params, X)
    assert_rows(stats["block/0/dense/1/kernel"], X)
    assert stats["block/0/dense/1/kernel"].layer.bias == "block/0/dense/1/bias"


# Layouts.

# A kernel of 3 inputs and 5 outputs in another layout, from the usual one and back.
LAYOUTS = {
    "(out, in)": (lambda w: w.T, lambda w: w.T),
    "(out, 1, in)": (lambda w: w.T[:, None], lambda w: w[:, 0].T),
    "flat": (lambda w: w.reshape(-1), lambda w: w.reshape(3, 5)),
}


@pytest.mark.parametrize("names", [("kernel", "bias"), ("weight", "bias")])
@pytest.mark.parametrize("layout", ["(out, in)", "(out, 1, in)"])
def test_another_layout_of_the_kernel_gives_the_same_steps(layout, names):
    """As in PyTorch and Equinox; the bias runs along the first axis."""
    put, take = LAYOUTS[layout]
    kernel, bias = names
    usual = {kernel: normal(1, 3, 5), bias: normal(2, 5)}

    def step(params, take):
        loss_fn = lambda p, x: jnp.mean((x @ take(p[kernel]) + p[bias][None] - 1) ** 2)  # noqa: E731
        layers = bnp_optax.find_layers(loss_fn, params, X)
        assert layers[kernel].bias == bias
        tx = bnp_optax.in_zspace(optax_sgd(), bnp_optax.bnp(layers=layers))
        state = tx.init(params)
        for _ in range(2):
            _, grads, stats = bnp_optax.value_and_grad(loss_fn, layers=layers)(params, X)
            updates, state = tx.update(grads, state, params, layer_stats=stats)
            params = jax.tree.map(jnp.add, params, updates)
        return params

    got = step(usual | {kernel: put(usual[kernel])}, take)
    assert_trees(got | {kernel: take(got[kernel])}, step(usual, lambda w: w), 1e-5)


def optax_sgd():
    import optax

    return optax.sgd(0.1)


def test_a_flat_kernel_is_covered_or_said_not_to_be():
    put, take = LAYOUTS["flat"]
    params = {"w": put(normal(1, 3, 5)), "b": normal(2, 5), "v": normal(3, 5, 1)}
    loss_fn = lambda p, x: jnp.mean((x @ take(p["w"]) + p["b"][None]) @ p["v"]) ** 2  # noqa: E731
    stats, reasons = assert_nothing_is_lost(loss_fn, params, X, kernels=("w", "v"))
    assert reasons.get("w") or stats["w"].count == 16


# Frameworks together.


@pytest.mark.parametrize("second", ["plain", "nnx", "equinox"])
def test_a_model_of_two_frameworks_loses_nothing(second):
    """One Linen layer must not decide what becomes of the others."""
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    others = {
        "plain": ({"w": normal(1, 2, 3)}, lambda p, h: h @ p["w"], "w"),
        "nnx": (nnx.state(layer), lambda p, h: nnx.merge(nnx.graphdef(layer), p)(h), "kernel"),
        "equinox": (
            eqx.nn.Linear(2, 3, key=jax.random.key(0)),
            lambda p, h: jax.vmap(p)(h),
            "weight",
        ),
    }
    other, apply, kernel = others[second]
    params = {"linen": PARAMS, "other": other, "last": {"kernel": normal(2, 3, 1)}}

    def loss_fn(p, x):
        h = apply(p["other"], jnp.tanh(linen(p["linen"], x)))
        return jnp.mean(jnp.tanh(h) @ p["last"]["kernel"] - 1) ** 2

    with jax.numpy_rank_promotion("allow"):
        stats, reasons = assert_nothing_is_lost(loss_fn, params, X)
        hidden = jnp.tanh(linen(PARAMS, X))
        assert not reasons
        assert_rows(stats["linen/kernel"], X)
        assert_rows(stats[f"other/{kernel}"], hidden)
        assert_rows(stats["last/kernel"], jnp.tanh(apply(other, hidden)))


class Bare(nn.Module):
    """Linen layers, a kernel of the module's own, and einsums of raw parameters."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(4, name="dense")(x)
        h = jnp.tanh(h @ self.param("kernel", nn.initializers.normal(1.0), (4, 5)))
        w = self.param("proj", nn.initializers.normal(1.0), (5, 2, 3))
        return jnp.einsum("bi,iho->bho", h, w).sum((1, 2))


def test_a_module_with_kernels_of_its_own():
    params = Bare().init(jax.random.key(0), X)["params"]
    loss_fn = lambda p, x: jnp.mean(Bare().apply({"params": p}, x) ** 2)  # noqa: E731
    stats, reasons = assert_nothing_is_lost(loss_fn, params, X)
    assert not reasons
    assert set(stats) == {"dense/kernel", "kernel", "proj"}
    assert_rows(stats["dense/kernel"], X)
    assert_rows(stats["kernel"], nn.Dense(4).apply({"params": params["dense"]}, X))


FP8 = ["Fp8DotGeneralOp", "Fp8DirectDotGeneralOp"]
# The quantized operands are rounded to three bits of mantissa.
ROUNDING = 2.0**-4


def fp8_case(name):
    operation = getattr(nn.fp8_ops, name)
    model = nn.Sequential(
        [nn.Dense(16, dot_general_cls=operation), nn.Dense(2, dot_general_cls=operation)]
    )
    x = normal(0, 16, 32) + 1
    variables = model.init(jax.random.key(0), x)
    loss_fn = lambda v, x: jnp.mean(model.apply(v, x) ** 2)  # noqa: E731
    return model, loss_fn, variables, x


@pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp:DeprecationWarning")
@pytest.mark.parametrize("name", FP8)
def test_fp8_layers(name):
    _, loss_fn, variables, x = fp8_case(name)
    _, _, stats = bnp_optax.value_and_grad(loss_fn)(variables, x)
    assert {name.removeprefix("params/") for name in stats} == {
        "layers_0/kernel",
        "layers_1/kernel",
    }
    (first,) = (s for name, s in stats.items() if "layers_0" in name)
    assert first.count == 16
    assert first.layer.bias.endswith("layers_0/bias")
    np.testing.assert_allclose(first.mean[:, 0], x.mean(0), atol=ROUNDING * np.abs(x).max())
    deviation = np.sqrt(first.var[:, 0])
    np.testing.assert_allclose(deviation, x.std(0), atol=ROUNDING * np.abs(x).max())


@pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp:DeprecationWarning")
@pytest.mark.parametrize("name", FP8)
def test_fp8_in_a_train_state(name):
    """`params` holds the scales, which their gradients overwrite, beside the parameters."""
    model, loss_fn, variables, x = fp8_case(name)
    tx = bnp_optax.bnp_sgd(1e-3)
    state = bnp_optax.TrainState.create(apply_fn=model.apply, params=variables, tx=tx)
    assert isinstance(state, TrainState)
    before = loss_fn(state.params, x)
    for _ in range(3):
        _, grads, stats = bnp_optax.value_and_grad(loss_fn)(state.params, x)
        state = state.apply_gradients(grads=grads, layer_stats=stats)
    assert loss_fn(state.params, x) < before
    scales = state.params["_overwrite_with_gradient"]
    assert jax.tree.structure(scales) == jax.tree.structure(grads["_overwrite_with_gradient"])


# Summaries.


class Stack(nn.Module):
    """Scales of shape (layers, features), a class token, a position table, an embedding."""

    @nn.compact
    def __call__(self, ids):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                x = x + nn.Dense(4, name="dense")(nn.LayerNorm(name="norm")(x))
                return x * self.param("scale", nn.initializers.ones, (4,)), None

        x = nn.Embed(7, 4, name="embed")(ids)
        token = self.param("token", nn.initializers.normal(1.0), (1, 1, 4))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, 4)), x], 1)
        x = x + self.param("position", nn.initializers.normal(1.0), (1, x.shape[1], 4))
        over = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(2, name="head")(over(name="blocks")(x, None)[0][:, 0])


def plain_stack(p, ids):
    """The same without a framework."""
    x = p["embed"][ids]
    x = jnp.concatenate([jnp.broadcast_to(p["token"], (len(x), 1, 4)), x], 1) + p["position"]

    def body(x, q):
        y = jax.nn.standardize(x, axis=-1) * q["norm"] + q["shift"]
        return (x + y @ q["w"] + q["b"]) * q["scale"], None

    return lax.scan(body, x, p["blocks"])[0][:, 0] @ p["head"]


@pytest.mark.parametrize("framework", ["linen", "plain"])
def test_a_summary_lists_kernels_only(framework):
    """What is added to or scales the activations is no kernel, whatever its shape."""
    ids = jnp.arange(6).reshape(2, 3)
    if framework == "linen":
        params = Stack().init(jax.random.key(0), ids)["params"]
        f = lambda p, ids: Stack().apply({"params": p}, ids)  # noqa: E731
        kernels = {"blocks/dense/kernel", "head/kernel", "embed/embedding"}
    else:
        names = {"norm": (2, 4), "shift": (2, 4), "scale": (2, 4), "w": (2, 4, 4), "b": (2, 4)}
        params = {
            "embed": normal(0, 7, 4),
            "token": normal(1, 1, 1, 4),
            "position": normal(2, 1, 4, 4),
            "blocks": {name: normal(3, *shape) for name, shape in names.items()},
            "head": normal(4, 4, 2),
        }
        f, kernels = plain_stack, {"blocks/w", "head", "embed"}
    with jax.numpy_rank_promotion("allow"):
        loss_fn = lambda p, ids: jnp.mean((f(p, ids) - 1) ** 2)  # noqa: E731
        summary = bnp_optax.summarize(loss_fn, params, ids)
    assert set(summary.shapes) == kernels
    assert len(summary.layers) == 2
    (reason,) = summary.uncovered.values()
    assert "embedding" in reason
    assert "2 of 3 kernels covered" in str(summary)


def test_the_reason_of_a_loop_names_the_remedy():
    """The default adjoint of diffrax, among others, is such a loop."""

    def loss_fn(p, x):
        body = lambda c: (c[0] + 1, jnp.tanh(c[1] @ lax.stop_gradient(p["w"])))  # noqa: E731
        x = lax.while_loop(lambda c: c[0] < x[0, 0].astype(int) + 3, body, (0, x))[1]
        return jnp.mean((x @ p["v"] - 1) ** 2) + jnp.sum(p["w"] ** 2)

    params = {"w": normal(1, 3, 3), "v": normal(2, 3, 1)}
    stats, reasons = assert_nothing_is_lost(loss_fn, params, X)
    assert stats["v"].count == 16
    assert "while" in reasons["w"]
    assert "scan" in reasons["w"] or "DirectAdjoint" in reasons["w"]


@pytest.mark.parametrize("has_aux", [False, True])
def test_an_equinox_model_passed_whole(has_aux):
    """Its activation functions are leaves, which `jax.grad` does not differentiate."""
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))

    def loss_fn(model, x):
        loss = jnp.mean(jax.vmap(model)(x) ** 2)
        return (loss, {"n": len(x)}) if has_aux else loss

    calls = [lambda: bnp_optax.value_and_grad(loss_fn, has_aux)(model, X)]
    if not has_aux:
        calls += [
            lambda: (None, None, bnp_optax.find_layers(loss_fn, model, X)),
            lambda: (None, None, bnp_optax.summarize(loss_fn, model, X).layers),
        ]
    with jax.numpy_rank_promotion("allow"):
        for call in calls:
            try:
                found = call()[2]
            except (TypeError, ValueError) as error:
                message = str(error)
            else:
                message, found = None, set(found)
            if message is None:
                assert found == {"layers/0/weight", "layers/1/weight"}
            else:
                assert "eqx.partition" in message


# Arguments.


@pytest.mark.parametrize(
    "layers",
    [["kernel"], "kernel", {"kernel"}, {"kernel": None}, {"kernel": "Dense"}, 3, ("kernel",)],
)
@pytest.mark.parametrize("f", [linen, plain])
def test_layers_that_find_layers_did_not_make(f, layers):
    loss_fn = lambda p, x: jnp.mean(f(p, x) ** 2)  # noqa: E731
    with pytest.raises((TypeError, ValueError), match="find_layers"):
        bnp_optax.value_and_grad(loss_fn, layers=layers)(PARAMS, X)


def test_an_empty_choice_of_layers_is_none_of_them():
    loss_fn = lambda p, x: jnp.mean(linen(p, x) ** 2)  # noqa: E731
    assert capture(loss_fn, PARAMS, X, layers={}) == {}
    with pytest.raises(ValueError, match="find_layers"):
        bnp_optax.value_and_grad(loss_fn, layers={"other": bnp_optax.find_layers})(PARAMS, X)


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.conv = nnx.Conv(4, 3, (3,), rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, ids):
        return self.head(jnp.tanh(self.conv(self.embed(ids))).mean(1))


def nnx_loss(model, ids, conv_bias=0.0):
    """Its own keyword reaches it, and no other does."""
    return jnp.mean((model(ids) + conv_bias - 1) ** 2)


OPTIONS = {"embeddings": True, "conv_statistics": "patch", "wrt": nnx.Param}


@pytest.mark.parametrize("option", OPTIONS)
def test_nnx_functions_take_the_options_of_the_capture(option):
    model, ids = Classifier(nnx.Rngs(0)), jnp.arange(10).reshape(2, 5) % 7
    options = {option: OPTIONS[option]}
    ours = bnp_optax.flax_nnx
    layers = ours.find_layers(nnx_loss, model, ids, conv_bias=0.5, **options)
    summary = ours.summarize(nnx_loss, model, ids, conv_bias=0.5, **options)
    _, _, stats = ours.value_and_grad(nnx_loss, **options)(model, ids, conv_bias=0.5)
    assert set(layers) == set(stats) == set(summary.layers)
    assert ("embed/embedding" in stats) == (option == "embeddings")
    for name, layer in layers.items():
        assert layer.stats_shape == stats[name].mean.shape
        assert layer == stats[name].layer == summary.layers[name]


def test_nnx_dataset_statistics():
    model = nnx.Sequential(
        nnx.Conv(3, 4, (3,), rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    )
    loss_fn = lambda model, x: jnp.mean((model(x) - 1) ** 2)  # noqa: E731
    batches = normal(3, 5, 4, 6, 3)
    fixed = bnp_optax.flax_nnx.dataset_statistics(
        loss_fn, model, batches, conv_statistics="patch", wrt=nnx.Param
    )
    assert list(fixed) == ["layers/0/kernel"]
    assert fixed["layers/0/kernel"].mean.shape == (3, 3, 1)
    captured = bnp_optax.flax_nnx.value_and_grad(loss_fn, fixed=fixed, conv_statistics="patch")
    assert set(captured(model, batches[0])[2]) == {"layers/0/kernel", "layers/1/kernel"}


@pytest.mark.parametrize("name", ["find_layers", "summarize", "dataset_statistics"])
def test_nnx_has_the_same_options_as_the_others(name):
    """A keyword that one of the two does not know would be handed to the loss."""
    here = inspect.signature(getattr(bnp_optax.flax_nnx, name)).parameters
    there = inspect.signature(getattr(bnp_optax, name)).parameters
    assert set(there) - {"params"} <= set(here)
    assert set(here) - set(there) == {"model", "wrt"}
