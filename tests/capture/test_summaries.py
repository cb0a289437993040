"""What a summary lists and says, and what the functions say of arguments that are no good."""

import inspect

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.experimental.ode import odeint
from support.capture_checks import PARAMS, X, assert_nothing_is_lost, capture, linen, normal, plain

import bnp_optax
import bnp_optax.flax_nnx


@pytest.fixture(autouse=True)
def user_code():
    """Scales and biases are broadcast against batches, as in most code."""
    with jax.numpy_rank_promotion("allow"):
        yield


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
    loss_fn = lambda p, ids: jnp.mean((f(p, ids) - 1) ** 2)  # noqa: E731
    summary = bnp_optax.summarize(loss_fn, params, ids)
    assert set(summary.shapes) == kernels
    assert len(summary.layers) == 2
    (reason,) = summary.uncovered.values()
    assert "embedding" in reason
    assert "2 of 3 kernels covered" in str(summary)


def linen_square(p, x):
    return nn.Dense(3).apply({"params": p}, x)


def by_odeint(f, p, x):
    """An adaptive solver, which evaluates the field before its loop too, at the start."""
    field = lambda y, t, p: jnp.tanh(f(p, y)) - y  # noqa: E731
    return odeint(field, x, jnp.array([0.0, 1.0]), p, rtol=1e-3, atol=1e-3)[1]


def by_fixed_point(f, p, x):
    """A deep equilibrium, with the gradient of one more step than the loop takes."""

    @jax.custom_vjp
    def solve(p, x):
        step = lambda c: (c[0] + 1, jnp.tanh(f(p, c[1]) / 8 + x))  # noqa: E731
        return lax.while_loop(lambda c: c[0] < 20, step, (0, x))[1]

    def backward(residuals, g):
        p, x, y = residuals
        return jax.vjp(lambda p, x: jnp.tanh(f(p, y) / 8 + x), p, x)[1](g)

    solve.defvjp(lambda p, x: (solve(p, x), (p, x, solve(p, x))), backward)
    return solve(p, x)


@pytest.mark.parametrize("solver", [by_odeint, by_fixed_point])
@pytest.mark.parametrize("f", [linen_square, plain])
def test_the_reason_of_a_loop_names_the_remedy(f, solver):
    """Most rows of the kernel are in a `while_loop`, as they are by diffrax's default adjoint."""

    def loss_fn(p, x):
        return jnp.mean((solver(f, p["field"], x) @ p["head"] - 1) ** 2)

    params = {"field": {"kernel": normal(1, 3, 3), "bias": normal(3, 3)}, "head": normal(2, 3, 1)}
    stats, reasons = assert_nothing_is_lost(loss_fn, params, X)
    assert stats["head"].count == 16
    assert "while" in reasons.get("field/kernel", "")
    assert "scan" in reasons["field/kernel"] or "DirectAdjoint" in reasons["field/kernel"]


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
    for call in calls:
        try:
            found = set(call()[2])
        except (TypeError, ValueError) as error:
            found = str(error)
        if isinstance(found, str):
            assert "eqx.partition" in found
        else:
            assert found == {"layers/0/weight", "layers/1/weight"}


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


# Kernels that are mixed with other numbers before they meet inputs.

FROZEN = normal(20, 3, 4)
MIXED = {
    "change of a frozen kernel": lambda w, _: FROZEN + w,
    "scaled change": lambda w, _: FROZEN + 0.1 * w,
    "beside a frozen one": lambda w, _: jnp.concatenate([FROZEN, w], 1),
    "copies": lambda w, _: jnp.tile(w, (1, 2)),
    "Kronecker product": lambda w, _: jnp.kron(w, jnp.ones((1, 2))),
    "change of one that is given": lambda w, data: data[:3, :1] + w,
    "drawn weights": lambda w, data: w + 0.1 * jax.random.normal(jax.random.key(0), w.shape),
}


@pytest.mark.parametrize("name", MIXED)
def test_kernels_mixed_with_numbers_are_listed(name):
    mix = MIXED[name]
    n_outputs = jax.eval_shape(mix, FROZEN, X).shape[1]
    params = {"w": normal(21, 3, 4), "head": normal(22, n_outputs, 2)}

    def loss_fn(p, x):
        return jnp.mean((jnp.tanh(x @ mix(p["w"], x)) @ p["head"]) ** 2)

    summary = bnp_optax.summarize(loss_fn, params, X)
    assert set(summary.layers) == {"head"}
    assert "1 of 2 kernels covered" in str(summary)
    assert any(name in summary.uncovered["w"] for name in ("add", "concatenate", "tile", "mul"))


def test_position_table_before_scores_is_no_kernel():
    """It is added to activations, and these are multiplied by kernels."""
    params = {"position": normal(23, 16, 3), "query": normal(24, 3, 3), "key": normal(25, 3, 3)}

    def loss_fn(p, x):
        x = x + p["position"]
        return jnp.mean((x @ p["query"]) @ (x @ p["key"]).T)

    assert "2 of 2 kernels covered" in str(bnp_optax.summarize(loss_fn, params, X))
