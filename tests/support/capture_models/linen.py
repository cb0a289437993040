"""Linen models."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from support.capture_models.by_hand import (
    affine,
    attend,
    convolve,
    gelu,
    gru_cell,
    layer_norm,
    lstm_cell,
    over_time,
    relu,
    simple_cell,
    spaced_out,
    stack,
    unrolled,
)
from support.capture_models.record import (
    DENSE,
    KEY,
    Model,
    Record,
    case,
    filled,
    float64,
    hand_score,
    inputs,
    score,
)


def linen(model, *args, **keywords):
    """Loss, parameters, arguments and float64 parameters of a Linen model."""
    shapes = jax.eval_shape(functools.partial(model.init, **keywords), KEY, *args)
    params = filled(shapes["params"])

    def loss_fn(params, *args):
        return score(model.apply({"params": params}, *args, **keywords))

    return loss_fn, params, tuple(map(jnp.asarray, args)), float64(params)


@case("linen")
def linen_mlp():
    x = inputs(3, 4)
    loss_fn, params, args, p = linen(nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(2)]), x)
    hidden = relu(affine(x, p["layers_0"]))
    expected = {
        "layers_0/kernel": Record([x], DENSE, "layers_0/bias"),
        "layers_2/kernel": Record([hidden], DENSE, "layers_2/bias"),
    }
    return Model(loss_fn, params, args, expected, hand_score(affine(hidden, p["layers_2"])))


# Eight bits of mantissa, two layers deep.
@case("linen", rounding=2.0**-7)
def linen_mlp_bfloat16():
    x = inputs(3, 4)
    dense = functools.partial(nn.Dense, dtype=jnp.bfloat16)
    loss_fn, params, args, p = linen(nn.Sequential([dense(5), nn.relu, dense(2)]), x)
    hidden = relu(affine(x, p["layers_0"]))
    expected = {
        "layers_0/kernel": Record([x], DENSE, "layers_0/bias"),
        "layers_2/kernel": Record([hidden], DENSE, "layers_2/bias"),
    }
    return Model(loss_fn, params, args, expected, hand_score(affine(hidden, p["layers_2"])))


@case("linen")
def linen_attention():
    x = inputs(3, 4, 3)
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)
    loss_fn, params, args, p = linen(model, x)
    expected, out = attend(x, p)
    return Model(loss_fn, params, args, expected, hand_score(out))


class TransformerBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="norm_1")(x)
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=4, name="attention")(y)
        y = nn.gelu(nn.Dense(5, name="up")(nn.LayerNorm(name="norm_2")(x)))
        return x + nn.Dense(4, name="down")(y), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            nn.remat(TransformerBlock),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return nn.Dense(2, name="head")(blocks(name="blocks")(x, None)[0])


@case("linen")
def linen_transformer_scan_remat():
    x = inputs(2, 3, 4)
    loss_fn, params, args, p = linen(Transformer(), x)
    layers, hidden = [], x.astype(np.float64)
    for depth in range(2):
        block = jax.tree.map(lambda leaf: leaf[depth], p["blocks"])  # noqa: B023
        normed = layer_norm(hidden, **block["norm_1"], eps=1e-6)
        records, mixed = attend(normed, block["attention"], "blocks/attention/")
        hidden = hidden + mixed
        normed = layer_norm(hidden, **block["norm_2"], eps=1e-6)
        wide = gelu(affine(normed, block["up"]))
        records["blocks/up/kernel"] = Record([normed], DENSE, "blocks/up/bias")
        records["blocks/down/kernel"] = Record([wide], DENSE, "blocks/down/bias")
        layers.append(records)
        hidden = hidden + affine(wide, block["down"])
    expected = stack(layers) | {"head/kernel": Record([hidden], DENSE, "head/bias")}
    return Model(loss_fn, params, args, expected, hand_score(affine(hidden, p["head"])))


def linen_recurrent(cell, by_hand, n_states=1):
    """`nn.RNN` of a cell; kernels named `h*` see the last output, those named `i*` the input."""
    x = inputs(3, 4, 2)
    loss_fn, params, args, p = linen(nn.RNN(cell), x)
    before, after = unrolled(by_hand(p["cell"]), x, 3, n_states)
    expected = {
        f"cell/{name}/kernel": Record(
            before if name.startswith("h") else over_time(x),
            DENSE,
            f"cell/{name}/bias" if "bias" in layer else None,
        )
        for name, layer in p["cell"].items()
    }
    return Model(loss_fn, params, args, expected, hand_score(np.stack(after)))


@case("linen")
def linen_simple_cell():
    return linen_recurrent(nn.SimpleCell(3), simple_cell)


@case("linen")
def linen_lstm():
    return linen_recurrent(nn.LSTMCell(3), lstm_cell, n_states=2)


@case("linen")
def linen_lstm_concatenated():
    """The kernels of the gates are concatenated before the product."""
    return linen_recurrent(nn.OptimizedLSTMCell(3), lstm_cell, n_states=2)


@case("linen")
def linen_gru():
    return linen_recurrent(nn.GRUCell(3), gru_cell)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, name="shared")
        return jnp.concatenate([dense(nn.relu(dense(x))), dense(x[:1] * 3)])


@case("linen")
def linen_shared():
    """Three calls, the last of fewer rows."""
    x = inputs(3, 4)
    loss_fn, params, args, p = linen(Shared(), x)
    calls = [x, relu(affine(x, p["shared"])), 3 * x[:1]]
    out = np.concatenate([affine(call, p["shared"]) for call in calls[1:]])
    expected = {"shared/kernel": Record(calls, DENSE, "shared/bias")}
    return Model(loss_fn, params, args, expected, hand_score(out))


class SharedConv(nn.Module):
    @nn.compact
    def __call__(self, x):
        conv = nn.Conv(2, (3,), name="shared")
        return conv(nn.relu(conv(x)))


@case("linen")
def linen_shared_conv():
    x = inputs(2, 4, 2)
    loss_fn, params, args, p = linen(SharedConv(), x)
    hidden = relu(convolve(x, p["shared"]["kernel"], (1, 1)) + p["shared"]["bias"])
    out = convolve(hidden, p["shared"]["kernel"], (1, 1)) + p["shared"]["bias"]
    record = Record([x, hidden], "bxi,_io", "shared/bias", 4)
    return Model(loss_fn, params, args, {"shared/kernel": record}, hand_score(out))


@case("linen")
def linen_dense_general():
    x = inputs(3, 2, 3)
    model = nn.DenseGeneral((2, 2), axis=(-2, -1))
    loss_fn, params, args, p = linen(model, x)
    out = np.tensordot(x, p["kernel"], 2) + p["bias"]
    return Model(
        loss_fn, params, args, {"kernel": Record([x], "btd,tdop", "bias")}, hand_score(out)
    )


@case("linen")
def linen_dense_general_batch():
    """With a kernel for each entry of a batch axis."""
    x = inputs(4, 3, 2)
    model = nn.DenseGeneral(5, axis=-1, batch_dims=(0,))
    loss_fn, params, args, p = linen(model, x)
    out = np.einsum("hbi,hio->hbo", x, p["kernel"]) + p["bias"][:, None]
    record = Record([x], "Hbi,Hio", "bias")
    return Model(loss_fn, params, args, {"kernel": record}, hand_score(out))


@case("linen")
def linen_einsum():
    x = inputs(3, 2, 4)
    loss_fn, params, args, p = linen(nn.Einsum((4, 2, 3), "...d,dhk->...hk"), x)
    out = np.einsum("btd,dhk->bthk", x, p["kernel"]) + p["bias"]
    return Model(
        loss_fn, params, args, {"kernel": Record([x], "...i,ihd", "bias")}, hand_score(out)
    )


@case("linen")
def linen_vmap_ensemble():
    x = inputs(3, 2, 4)
    model = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(5)
    loss_fn, params, args, p = linen(model, x)
    out = np.einsum("ebi,eio->ebo", x, p["kernel"]) + p["bias"][:, None]
    record = Record([x], "Lbi,Lio", "bias")
    return Model(loss_fn, params, args, {"kernel": record}, hand_score(out))


@case("linen")
def linen_ensemble_of_stacked_params():
    """`jax.vmap` over members, each with a batch of its own."""
    x = inputs(2, 3, 4)
    model = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])
    params = filled(jax.eval_shape(jax.vmap(model.init), jax.random.split(KEY, 2), x)["params"])

    def loss_fn(params, x):
        return score(jax.vmap(lambda p, x: model.apply({"params": p}, x))(params, x))

    p = float64(params)
    first, last = p["layers_0"], p["layers_2"]
    hidden = relu(np.einsum("ebi,eio->ebo", x, first["kernel"]) + first["bias"][:, None])
    out = np.einsum("ebi,eio->ebo", hidden, last["kernel"]) + last["bias"][:, None]
    expected = {
        "layers_0/kernel": Record([x], "Lbi,Lio", "layers_0/bias"),
        "layers_2/kernel": Record([hidden], "Lbi,Lio", "layers_2/bias"),
    }
    return Model(loss_fn, params, (jnp.asarray(x),), expected, hand_score(out))


@case("linen")
def linen_vmap_over_examples():
    x = inputs(3, 4)
    model = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(2)])
    _, params, args, p = linen(model, x)

    def loss_fn(params, x):
        return jnp.mean(jax.vmap(lambda row: score(model.apply({"params": params}, row)))(x))

    hidden = relu(affine(x, p["layers_0"]))
    expected = {
        "layers_0/kernel": Record([x], DENSE, "layers_0/bias"),
        "layers_2/kernel": Record([hidden], DENSE, "layers_2/bias"),
    }
    return Model(loss_fn, params, args, expected, hand_score(affine(hidden, p["layers_2"])))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        down = nn.relu(nn.Conv(3, (2, 2), strides=2, padding="VALID", name="down")(x))
        up = nn.relu(nn.ConvTranspose(2, (2, 2), strides=(2, 2), name="up")(down))
        return nn.Conv(2, (1, 1), name="out")(jnp.concatenate([x, up], -1))


@case("linen")
def linen_unet():
    x = inputs(2, 4, 4, 2)
    loss_fn, params, args, p = linen(UNet(), x)
    down = relu(convolve(x, p["down"]["kernel"], stride=2) + p["down"]["bias"])
    up = relu(convolve(spaced_out(down, 2), p["up"]["kernel"], (1, 1)) + p["up"]["bias"])
    both = np.concatenate([x, up], -1)
    out = convolve(both, p["out"]["kernel"]) + p["out"]["bias"]
    expected = {
        "down/kernel": Record([x], "bxyi,__io", "down/bias", 4),
        "up/kernel": Record([down], "bxyi,__io", "up/bias", 16),
        "out/kernel": Record([both], "bxyi,__io", "out/bias", 16),
    }
    return Model(loss_fn, params, args, expected, hand_score(out))


class WeightNormalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="out")(nn.WeightNorm(nn.Dense(3, name="normed"))(x))


@case("linen", {"normed/kernel": "`mul` changes it"})
def linen_weight_norm():
    x = inputs(3, 4)
    loss_fn, params, args, p = linen(WeightNormalized(), x)
    kernel, (scale,) = p["normed"]["kernel"], jax.tree.leaves(p["WeightNorm_0"])
    hidden = x @ (kernel / np.linalg.norm(kernel, axis=0) * scale) + p["normed"]["bias"]
    expected = {"out/kernel": Record([hidden], DENSE, "out/bias")}
    return Model(loss_fn, params, args, expected, hand_score(affine(hidden, p["out"])))


class Embedded(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(2, name="out")(nn.Embed(6, 3, name="embed")(tokens))


@case("linen", {"embed/embedding": "`gather` looks"})
def linen_embedding():
    tokens = np.array([[0, 5, 2], [1, 2, 2]])
    loss_fn, params, args, p = linen(Embedded(), tokens)
    embedded = p["embed"]["embedding"][tokens]
    expected = {"out/kernel": Record([embedded], DENSE, "out/bias")}
    return Model(loss_fn, params, args, expected, hand_score(affine(embedded, p["out"])))


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(4, name="first")(x))
        return nn.Dense(2, name="out")(nn.Dropout(0.5, deterministic=False, name="drop")(x))


@case("linen")
def linen_batch_norm_dropout():
    """Flax hands out the dropped entries; the rerun takes them over."""
    x, model, key = inputs(4, 3), Normalized(), jax.random.key(3)
    shapes = jax.eval_shape(model.init, {"params": key, "dropout": key}, x)
    params = filled(shapes["params"])
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["batch_stats"])

    def apply(params, x, **keywords):
        variables = {"params": params, "batch_stats": state}
        return model.apply(variables, x, rngs={"dropout": key}, **keywords)

    def loss_fn(params, x):
        return score(apply(params, x, mutable=["batch_stats"])[0])

    p = float64(params)
    collections = ["batch_stats", "intermediates"]
    record = functools.partial(apply, mutable=collections, capture_intermediates=True)
    _, seen = jax.jit(record)(params, x)
    kept = np.asarray(seen["intermediates"]["drop"]["__call__"][0]) != 0
    assert 0 < kept.sum() < kept.size
    hidden = affine(x, p["first"]).T
    dropped = 2 * kept * layer_norm(hidden, 1.0, 0.0, 1e-5).T * p["norm"]["scale"]
    dropped += 2 * kept * p["norm"]["bias"]
    expected = {
        "first/kernel": Record([x], DENSE, "first/bias"),
        "out/kernel": Record([dropped], DENSE, "out/bias"),
    }
    return Model(
        loss_fn, params, (jnp.asarray(x),), expected, hand_score(affine(dropped, p["out"]))
    )
