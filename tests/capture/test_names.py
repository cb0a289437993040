"""Names of layers, layouts of kernels, models of several frameworks, and FP8."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from support.capture_checks import (
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
    "no clash": lambda a, b, c: {"g": P(policy=a, value=b), "h": c},
    "a key for another's attribute": lambda a, b, c: {"g": P(policy=a, value=b), "value": c},
}
ALL_DIFFER = {"no clash", "a key for another's attribute"}


def columns(tree, x):
    """A loss in which leaf i, in flattening order, meets the rows `x + i`."""
    return sum(jnp.mean((x + i) @ w) ** 2 for i, w in enumerate(jax.tree.leaves(tree)))


def step_of(tree):
    """Statistics and updates of one step of the loss `columns`."""
    layers = bnp_optax.find_layers(columns, tree, X)
    _, grads, stats = bnp_optax.value_and_grad(columns)(tree, X)
    tx = bnp_optax.bnp_precondition(warm_start=True, layers=layers)
    return stats, tx.update(grads, tx.init(tree), tree, layer_stats=stats)[0]


@pytest.mark.parametrize("name", TREES)
def test_every_leaf_gets_its_own_statistics_or_the_names_are_refused(name):
    tree = TREES[name](*(normal(i, 3, 2) for i in range(3)))
    try:
        stats, updates = step_of(tree)
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "`h" in refused, "the names that clash are not told"
        assert name not in ALL_DIFFER, refused
        return
    # Each mean once: nobody's statistics are another's.
    means = sorted(float(s.mean[0, 0]) for s in stats.values())
    first = float(X[:, 0].mean())
    np.testing.assert_allclose(means, [first, first + 1, first + 2], rtol=1e-5)
    _, wanted = step_of(dict(zip("abc", jax.tree.leaves(tree), strict=True)))
    assert_trees(updates, jax.tree.structure(tree).unflatten(wanted.values()), 1e-5)


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
}


@pytest.mark.parametrize("given", ["layers", "no layers"])
@pytest.mark.parametrize("kernel", ["kernel", "weight"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_of_the_kernel_gives_the_same_steps(layout, kernel, given):
    """As in PyTorch and Equinox; the bias runs along the kernel's first axis."""
    put, take = LAYOUTS[layout]
    usual = {kernel: normal(1, 3, 5), "bias": normal(2, 5)}

    def steps(params, take, layers=None):
        loss_fn = lambda p, x: jnp.mean((x @ take(p[kernel]) + p["bias"][None] - 1) ** 2)  # noqa: E731
        if layers is None:
            layers = bnp_optax.find_layers(loss_fn, params, X)
            assert layers[kernel].bias == "bias"
        tx = bnp_optax.in_zspace(optax.sgd(0.1), bnp_optax.bnp(layers=layers or None))
        state = tx.init(params)
        for _ in range(2):
            _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, X)
            updates, state = tx.update(grads, state, params, layer_stats=stats)
            params = jax.tree.map(jnp.add, params, updates)
        return params

    wanted, start = steps(usual, lambda w: w), usual | {kernel: put(usual[kernel])}
    if given == "layers":
        got = steps(start, take)
    else:
        # What is guessed before the first statistics may do, or must name what does.
        try:
            got = steps(start, take, layers={})
        except ValueError as error:
            refused = str(error)
        else:
            refused = ""
        if refused:
            assert "find_layers" in refused
            return
    assert_trees(got | {kernel: take(got[kernel])}, wanted, 1e-5)


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
