"""A value is a view of a parameter only while no operand depends on data: at any batch size."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from support.capture_checks import assert_rows, assert_trees, capture, normal

import bnp_optax
import bnp_optax.flax_nnx

T, N = 4, 6


@pytest.fixture(autouse=True)
def user_code():
    """Scales and shifts are broadcast against batches, as in most code."""
    with jax.numpy_rank_promotion("allow"):
        yield


def rms_norm(h):
    return h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)


def layer_norm(h):
    return jax.nn.standardize(h, axis=-1)


def group_norm(h):
    return jax.nn.standardize(h.reshape(*h.shape[:-1], 2, 3), axis=-1).reshape(h.shape)


def with_class_token(p, h):
    token = jnp.broadcast_to(p["token"], (len(h), 1, N))
    return jnp.concatenate([token, h], 1)


def with_class_token_last(p, h):
    return jnp.concatenate([h, jnp.tile(p["token"], (len(h), 1, 1))], 1)


def masked_by_token(p, h):
    return jnp.where((h > 0).any(-1, keepdims=True), h, p["row"])


def written_into(p, h):
    """The first position is overwritten by a learned one."""
    return lax.dynamic_update_slice(h, jnp.broadcast_to(p["token"], (len(h), 1, N)), (0, 0, 0))


def learned_start(p, h):
    """Hidden states over time, from a learned first one that is broadcast over the batch."""
    start = jnp.broadcast_to(p["row"], (len(h), N))
    body = lambda carry, x: (jnp.tanh(carry + x), carry)  # noqa: E731
    return jnp.swapaxes(lax.scan(body, start, jnp.swapaxes(h, 0, 1))[1], 0, 1)


def gated_residual(p, h):
    gate = jax.nn.sigmoid(p["row"])
    return gate * h + (1 - gate) * p["table"]


# What comes between the first layer, whose outputs are (batch, T, N), and the second.
BETWEEN = {
    "layer norm": lambda p, h: layer_norm(h) * p["row"] + p["shift"],
    "RMS norm": lambda p, h: rms_norm(h) * p["row"],
    "RMS norm, one plus scale": lambda p, h: rms_norm(h) * (1.0 + p["row"]),
    "group norm": lambda p, h: group_norm(h) * p["row"] + p["shift"],
    "batch norm with fixed moments": lambda p, h: (h - 0.1) / 1.5 * p["row"] + p["shift"],
    "layer scale": lambda p, h: h * p["row"],
    "layer scale of a residual": lambda p, h: h + jnp.sin(h) * p["row"],
    "scale broadcast before use": lambda p, h: h * jnp.broadcast_to(p["row"], h.shape),
    "scale of a map": lambda p, h: h * p["table"],
    "position table": lambda p, h: h + p["table"],
    "position table with a batch axis": lambda p, h: h + p["table"][None],
    "part of a position table": lambda p, h: h + p["long"][: h.shape[1]],
    "position table, looked up": lambda p, h: h + jnp.take(p["long"], jnp.arange(T), axis=0),
    "shift": lambda p, h: h + p["row"],
    "learned gate": lambda p, h: h * jax.nn.sigmoid(p["row"]),
    "learned mixture": gated_residual,
    "swish with a learned slope": lambda p, h: h * jax.nn.sigmoid(p["row"] * h),
    "PReLU": lambda p, h: jnp.where(h > 0, h, p["row"] * h),
    "learned cap": lambda p, h: jnp.minimum(h, p["row"]),
    "learned exponent": lambda p, h: jnp.abs(h) ** jnp.exp(p["row"]),
    "division": lambda p, h: h / jnp.exp(p["row"]),
    "parameter minus activations": lambda p, h: p["table"] - h,
    "class token": with_class_token,
    "class token last": with_class_token_last,
    "mask token": masked_by_token,
    "written into": written_into,
    "learned start": learned_start,
    "scale under jit": lambda p, h: jax.jit(jnp.multiply)(h, p["row"]),
    "scale under checkpoint": lambda p, h: jax.checkpoint(jnp.multiply)(h, p["row"]),
    "scale under vmap": lambda p, h: jax.vmap(lambda h: h * p["row"])(h),
    "scale in a scan": lambda p, h: lax.scan(lambda h, s: (h * s, None), h, p["long"])[0],
    "scale in one branch": lambda p, h: lax.cond(
        h.sum() > 1e9, lambda h: h, lambda h: h * p["row"], h
    ),
}
PARAMS = {
    "w": normal(1, 3, N),
    "b": normal(2, N),
    "v": normal(3, N, 2),
    "c": normal(4, 2),
    "row": normal(5, N) + 1,
    "shift": normal(6, N),
    "table": normal(7, T, N),
    "long": normal(8, T + 2, N) + 1,
    "token": normal(9, 1, 1, N),
}


def loss_with(between):
    def loss_fn(p, x):
        h = jnp.tanh(x @ p["w"] + p["b"])
        return jnp.sum((between(p, h) @ p["v"] + p["c"]) ** 2)

    return loss_fn


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", BETWEEN)
def test_what_follows_a_parameter_is_an_activation(name, batch):
    between, x = BETWEEN[name], normal(0, batch, T, 3) + 1
    stats = capture(loss_with(between), PARAMS, x)
    assert set(stats) == {"w", "v"}
    assert_rows(stats["w"], x)
    assert_rows(stats["v"], between(PARAMS, jnp.tanh(x @ PARAMS["w"] + PARAMS["b"])))
    assert (stats["w"].layer.bias, stats["v"].layer.bias) == ("b", "c")


@pytest.mark.parametrize("name", ["layer norm", "layer scale", "position table", "class token"])
def test_rows_without_a_batch_axis(name):
    """As a function of one example, under `vmap` or on its own; here of (T, N) or (N,)."""
    between = {
        "layer norm": BETWEEN["layer norm"],
        "layer scale": BETWEEN["layer scale"],
        "position table": lambda p, h: h + p["table"],
        "class token": lambda p, h: jnp.concatenate([p["token"][0], h]),
    }[name]
    x = normal(0, T, 3) + 1
    h = jnp.tanh(x @ PARAMS["w"] + PARAMS["b"])
    assert_rows(capture(loss_with(between), PARAMS, x)["v"], between(PARAMS, h))
    over_batch = lambda p, x: jax.vmap(loss_with(between), (None, 0))(p, x).sum()  # noqa: E731
    assert_rows(capture(over_batch, PARAMS, x[None])["v"], between(PARAMS, h))


@pytest.mark.parametrize("name", BETWEEN)
def test_layers_found_at_one_batch_size_serve_another(name):
    loss_fn = loss_with(BETWEEN[name])
    one, four = normal(0, 1, T, 3), normal(1, 4, T, 3)
    layers = [bnp_optax.find_layers(loss_fn, PARAMS, x) for x in (one, four)]
    assert layers[0] == layers[1]
    for x in (one, four):
        for chosen in layers:
            assert set(capture(loss_fn, PARAMS, x, layers=chosen)) == set(chosen)
    reasons = [bnp_optax.summarize(loss_fn, PARAMS, x).uncovered for x in (one, four)]
    assert reasons[0] == reasons[1]


# The norms of the frameworks themselves.


LINEN = {
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": nn.RMSNorm,
    "GroupNorm": lambda: nn.GroupNorm(num_groups=2),
    "InstanceNorm": lambda: nn.GroupNorm(num_groups=None, group_size=1),
}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", LINEN)
def test_linen_norms(name, batch):
    hidden = nn.Sequential([nn.Dense(N), LINEN[name]()])
    model = nn.Sequential([*hidden.layers, nn.Dense(3)])
    x = normal(0, batch, 8)
    params = model.init(jax.random.key(0), x)["params"]
    loss_fn = lambda p, x: jnp.sum((model.apply({"params": p}, x) - 1) ** 2)  # noqa: E731
    stats = capture(loss_fn, params, x)
    assert_rows(stats["layers_0/kernel"], x)
    kept = {name: layer for name, layer in params.items() if name != "layers_2"}
    assert_rows(stats["layers_2/kernel"], hidden.apply({"params": kept}, x))


NNX = {
    "LayerNorm": nnx.LayerNorm,
    "RMSNorm": nnx.RMSNorm,
    "GroupNorm": lambda n, rngs: nnx.GroupNorm(n, num_groups=2, rngs=rngs),
    "BatchNorm": lambda n, rngs: nnx.BatchNorm(n, use_running_average=True, rngs=rngs),
}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", NNX)
def test_nnx_norms(name, batch):
    rngs = nnx.Rngs(0)
    first, norm = nnx.Linear(8, N, rngs=rngs), NNX[name](N, rngs=rngs)
    model = nnx.Sequential(first, norm, nnx.Linear(N, 3, rngs=rngs))
    loss_fn = lambda model, x: jnp.sum((model(x) - 1) ** 2)  # noqa: E731
    x = normal(0, batch, 8)
    loss, grads, stats = bnp_optax.flax_nnx.value_and_grad(loss_fn)(model, x)
    assert_trees((loss, grads), nnx.value_and_grad(loss_fn)(model, x))
    assert set(stats) == {"layers/0/kernel", "layers/2/kernel"}
    assert_rows(stats["layers/0/kernel"], x)
    assert_rows(stats["layers/2/kernel"], norm(first(x)))


@pytest.mark.parametrize("batch", [1, 4])
def test_equinox_norm(batch):
    keys = jax.random.split(jax.random.key(0))
    first, second = eqx.nn.Linear(8, N, key=keys[0]), eqx.nn.Linear(N, 3, key=keys[1])
    params = {"first": first, "norm": eqx.nn.LayerNorm(N), "second": second}

    def hidden(p, row):
        return p["norm"](p["first"](row))

    def loss_fn(p, x):
        return jnp.sum(jax.vmap(lambda row: p["second"](hidden(p, row)) - 1)(x) ** 2)

    x = normal(0, batch, 8)
    stats = capture(loss_fn, params, x)
    assert_rows(stats["first/weight"], x)
    assert_rows(stats["second/weight"], jax.vmap(lambda row: hidden(params, row))(x))


@pytest.mark.parametrize("batch", [1, 4])
def test_haiku_norm(batch):
    def hidden(x):
        return hk.LayerNorm(-1, True, True, name="norm")(hk.Linear(N, name="first")(x))

    model = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(3, name="second")(hidden(x))))
    x = normal(0, batch, 8)
    params = model.init(jax.random.key(0), x)
    stats = capture(lambda p, x: jnp.sum((model.apply(p, x) - 1) ** 2), params, x)
    assert_rows(stats["first/w"], x)
    assert_rows(stats["second/w"], hk.without_apply_rng(hk.transform(hidden)).apply(params, x))


class VisionTransformer(nn.Module):
    """Class token, position table, norms before the layers, layer scale."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(N, name="embed")(x)
        token = self.param("token", nn.initializers.normal(1.0), (1, 1, N))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, N)), x], 1)
        x = x + self.param("position", nn.initializers.normal(1.0), (1, x.shape[1], N))
        y = nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm_1")(x))
        x = x + self.param("scale", nn.initializers.ones, (N,)) * y
        y = nn.Dense(N, name="down")(
            nn.gelu(nn.Dense(8, name="up")(nn.LayerNorm(name="norm_2")(x)))
        )
        return nn.Dense(2, name="head")((x + y)[:, 0])


@pytest.mark.parametrize("batch", [1, 4])
def test_every_kernel_of_a_vision_transformer(batch):
    model, x = VisionTransformer(), normal(0, batch, T, 3)
    params = model.init(jax.random.key(0), x)["params"]
    stats = capture(lambda p, x: jnp.sum((model.apply({"params": p}, x) - 1) ** 2), params, x)
    rows = {"embed": batch * T, "head": batch}
    names = ["attention/query", "attention/key", "attention/value", "attention/out", "up", "down"]
    rows |= dict.fromkeys(names, batch * (T + 1))
    assert {name: s.count for name, s in stats.items()} == {
        f"{k}/kernel": n for k, n in rows.items()
    }
