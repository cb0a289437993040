"""What the loss gives and takes passes through: derivatives, policies, arguments, `aux`, dtypes."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from support.capture_checks import (
    FRAMEWORKS,
    PARAMS,
    X,
    assert_rows,
    assert_trees,
    capture,
    jit,
    linen,
    mean_square,
    named,
)

import bnp_optax


@jax.custom_vjp
def reversed_gradient(x):
    return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (jax.tree.map(lambda a: -3 * a, g),))


def clipped_layer(f):
    """A layer with a derivative of its own: the cotangent of its parameters is clipped."""

    @jax.custom_vjp
    def layer(p, z):
        return f(p, z)

    def backward(residuals, g):
        p, z = residuals
        dp, dz = jax.vjp(f, p, z)[1](g)
        scale = 0.1 / optax.tree.norm(dp)
        return jax.tree.map(lambda a: scale * a, dp), dz

    layer.defvjp(lambda p, z: (f(p, z), (p, z)), backward)
    return layer


def by_custom_gradient(f):
    @jax.custom_gradient
    def layer(p, z):
        out, pull = jax.vjp(f, p, z)
        return out, lambda g: pull(2 * g)

    return layer


def by_custom_jvp(f):
    @jax.custom_jvp
    def layer(p, z):
        return f(p, z)

    @layer.defjvp
    def rule(primals, tangents):
        out, tangent = jax.jvp(f, primals, tangents)
        return out, 5 * tangent

    return layer


def implicit(f):
    """The gradient through a linear solve, by its own transposition."""

    def layer(p, z):
        solved = lax.custom_linear_solve(
            lambda v: 2 * v, f(p, z), lambda _, b: b / 2, symmetric=True
        )
        return jnp.sin(solved)

    return layer


DERIVATIVES = {
    "gradient reversal of the outputs": lambda f: lambda p, z: reversed_gradient(f(p, z)),
    "gradient reversal of the parameters": lambda f: lambda p, z: f(reversed_gradient(p), z),
    "clipped cotangents": clipped_layer,
    "custom_gradient": by_custom_gradient,
    "custom_jvp": by_custom_jvp,
    "custom_linear_solve": implicit,
}


@pytest.mark.parametrize("name", DERIVATIVES)
@pytest.mark.parametrize("framework", ["linen", "plain"])
def test_functions_with_derivatives_of_their_own_keep_them(framework, name):
    layer = DERIVATIVES[name](FRAMEWORKS[framework])
    stats = capture(lambda p: jnp.mean(layer(p, X) ** 2), PARAMS)
    assert_rows(stats["kernel"], X)


POLICIES = {
    "default": None,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "named": jax.checkpoint_policies.save_only_these_names("hidden"),
    "all but named": jax.checkpoint_policies.save_anything_except_these_names("hidden"),
}


class Rematerialized(nn.Module):
    policy: Any

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x):
                hidden = checkpoint_name(jnp.sin(nn.Dense(4, name="up")(x)), "hidden")
                return jnp.cos(nn.Dense(3, name="down")(hidden))

        return nn.remat(Block, policy=self.policy)(name="block")(x)


@pytest.mark.parametrize("name", POLICIES)
def test_a_checkpoint_keeps_its_policy(name):
    """The same values, and no product more or less in the step: nothing else is saved."""
    model = Rematerialized(POLICIES[name])
    params = model.init(jax.random.key(0), X)["params"]
    loss_fn = lambda p: jnp.mean(model.apply({"params": p}, X) ** 2)  # noqa: E731
    stats = capture(loss_fn, params)
    assert_rows(stats["block/up/kernel"], X)
    texts = [
        str(jax.make_jaxpr(f)(params))
        for f in (jax.value_and_grad(loss_fn), bnp_optax.value_and_grad(loss_fn))
    ]
    assert texts[0].count("dot_general") == texts[1].count("dot_general")


def test_keywords_are_passed_on():
    def loss_fn(p, z, *, scale, mode="train", layers=2, has_aux=0.0):
        assert mode == "eval"
        return jnp.mean((scale * linen(p, z)) ** layers) + has_aux

    # Also keywords named as those of the capture itself.
    keywords = {"scale": jnp.array(3.0), "mode": "eval", "layers": 2, "has_aux": 1.0}
    loss, grads, stats = bnp_optax.value_and_grad(loss_fn)(PARAMS, z=X, **keywords)
    assert_trees((loss, grads), jax.value_and_grad(loss_fn)(PARAMS, z=X, **keywords))
    assert_rows(stats["kernel"], X)


class Metrics(NamedTuple):
    name: Any
    values: Any


AUX = {
    "string": "train",
    "function": math.sqrt,
    "class": nn.Dense,
    "integer": 3,
    "float": 0.5,
    "boolean": True,
    "None": None,
    "numpy array": np.arange(3.0),
    "numpy array in float64": np.ones(2, np.float64),
    "numpy strings": np.array(["a", "b"]),
    "numpy scalar": np.float32(2.0),
    "array": jnp.arange(3),
    "random key": jax.random.key(0),
    "empty": {},
    "nested": {
        "metrics": Metrics("loss", [1, 2.0, None, "x"]),
        "more": {"f": math.cos, "a": np.ones(2)},
    },
}


@pytest.mark.parametrize("name", AUX)
@pytest.mark.parametrize("framework", ["linen", "plain"])
def test_auxiliary_outputs_are_returned_as_they_are(framework, name):
    def loss_fn(p):
        out = FRAMEWORKS[framework](p, X)
        return jnp.mean(out**2), {"given": AUX[name], "computed": out}

    (_, aux), _, _ = bnp_optax.value_and_grad(loss_fn, has_aux=True)(PARAMS)
    (_, expected), _ = jax.value_and_grad(loss_fn, has_aux=True)(PARAMS)
    assert jax.tree.structure(aux) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(aux), jax.tree.leaves(expected), strict=True):
        assert type(got) is type(want)
        if isinstance(want, jax.Array) and jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        if isinstance(want, np.ndarray | jax.Array):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)
        else:
            assert got is want or got == want


CONTAINERS = {
    "FrozenDict": (lambda p: freeze(p), lambda p: p),
    "tuple": (lambda p: (p["kernel"], p["bias"]), lambda t: {"kernel": t[0], "bias": t[1]}),
    "NamedTuple": (
        lambda p: Metrics(p["kernel"], p["bias"]),
        lambda t: {"kernel": t.name, "bias": t.values},
    ),
    "with None": (lambda p: p | {"frozen": None, "empty": {}}, lambda p: p),
    "with a scalar": (lambda p: p | {"scale": jnp.array(2.0)}, lambda p: p),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_gradients_come_in_the_containers_of_the_parameters(name):
    put, take = CONTAINERS[name]

    def loss_fn(p):
        q = take(p)
        scale = q.get("scale", 1.0)
        return scale * mean_square(linen, {"kernel": q["kernel"], "bias": q["bias"]})

    assert len(capture(loss_fn, put(PARAMS))) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_are_kept(dtype):
    params = jax.tree.map(lambda a: a.astype(dtype), PARAMS)
    model = nn.Dense(2, dtype=dtype, param_dtype=dtype)

    def loss_fn(p):
        return jnp.mean(model.apply({"params": p}, X) ** 2)

    stats = capture(loss_fn, params)["kernel"]
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("framework", ["linen", "plain"])
def test_what_jax_refuses_is_refused(framework):
    f = FRAMEWORKS[framework]
    losses = [lambda p: f(p, X), lambda p: jnp.sum(f(p, X)).astype(int)]
    for loss_fn in losses:
        with pytest.raises(TypeError):
            jax.value_and_grad(loss_fn)(PARAMS)
        with pytest.raises(TypeError):
            bnp_optax.value_and_grad(loss_fn)(PARAMS)
    whole = PARAMS | {"step": jnp.array(1)}
    with pytest.raises(TypeError, match="int"):
        bnp_optax.value_and_grad(lambda p: mean_square(f, {k: p[k] for k in PARAMS}))(whole)


def test_effects_happen_once():
    """The network runs once, whatever the capture looks at."""
    seen = []

    def loss_fn(p):
        out = linen(p, X)
        jax.debug.callback(lambda y: seen.append(y.shape), out)
        return jnp.mean(out**2)

    jax.block_until_ready(jit(bnp_optax.value_and_grad(loss_fn))(PARAMS))
    jax.effects_barrier()
    assert seen == [(16, 2)]


def test_names_of_the_leaves_are_those_of_the_gradient():
    params = {"head": PARAMS, "rest": [PARAMS]}
    loss_fn = lambda p: mean_square(linen, p["head"]) + 2 * mean_square(linen, p["rest"][0])  # noqa: E731
    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
    assert set(stats) == {name for name in named(grads) if name.endswith("kernel")}
