"""Models of Equinox, Haiku and NNX, rerun by hand in NumPy."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from support.capture_models.by_hand import (
    affine,
    attend,
    convolve,
    gelu,
    layer_norm,
    linear,
    over_time,
    relu,
    sigmoid,
    unrolled,
)
from support.capture_models.equinox import equinox
from support.capture_models.haiku import haiku
from support.capture_models.nnx import from_nnx
from support.capture_models.real_cases import RealModel, inputs, real
from support.capture_models.record import DENSE, TORCH_DENSE, Record, hand_score


@real()
def equinox_mlp(batch):
    x = inputs(batch, 4)
    build = lambda key: eqx.nn.MLP(4, 2, width_size=5, depth=2, key=key)  # noqa: E731
    loss_fn, params, args, p = equinox(build, lambda model, x: jax.vmap(model)(x), x)
    expected, hidden = {}, x
    for i, layer in enumerate(p.layers):
        hidden = relu(hidden) if i else hidden
        expected[f"layers/{i}/weight"] = Record([hidden], TORCH_DENSE, f"layers/{i}/bias")
        hidden = linear(hidden, layer)
    return RealModel(loss_fn, params, args, expected, hand_score(hidden))


class SpiralClassifier(eqx.Module):
    """Equinox's example of a recurrent network."""

    cell: eqx.nn.GRUCell
    linear: eqx.nn.Linear
    bias: jax.Array

    def __init__(self, key):
        self.cell = eqx.nn.GRUCell(2, 3, key=key)
        self.linear = eqx.nn.Linear(3, 1, use_bias=False, key=key)
        self.bias = jnp.zeros(1)

    def __call__(self, sequence):
        step = lambda h, x: (self.cell(x, h), None)  # noqa: E731
        out, _ = lax.scan(step, jnp.zeros(3), sequence)
        return jax.nn.sigmoid(self.linear(out) + self.bias)


@real()
def equinox_gru(batch):
    """The head's bias is a parameter beside the layer."""
    x = inputs(batch, 4, 2)
    loss_fn, params, args, p = equinox(SpiralClassifier, lambda model, x: jax.vmap(model)(x), x)

    def cell(states, x):
        (hidden,) = states
        ir, iz, i_new = np.split(x @ p.cell.weight_ih.T + p.cell.bias, 3, -1)
        hr, hz, h_new = np.split(hidden @ p.cell.weight_hh.T, 3, -1)
        new = np.tanh(i_new + sigmoid(ir + hr) * (h_new + p.cell.bias_n))
        return [new + sigmoid(iz + hz) * (hidden - new)]

    before, after = unrolled(cell, x, 3)
    expected = {
        "cell/weight_ih": Record(over_time(x), TORCH_DENSE, "cell/bias"),
        "cell/weight_hh": Record(before, TORCH_DENSE),
        "linear/weight": Record([after[-1]], TORCH_DENSE, "bias"),
    }
    out = sigmoid(after[-1] @ p.linear.weight.T + p.bias)
    return RealModel(loss_fn, params, args, expected, hand_score(out))


@real()
def haiku_mlp(batch):
    x = inputs(batch, 4)
    loss_fn, params, args, p = haiku(lambda x: hk.nets.MLP([5, 4, 2])(x), x)
    expected, hidden = {}, x
    for i in range(3):
        hidden = relu(hidden) if i else hidden
        name = f"mlp/~/linear_{i}"
        expected[f"{name}/w"] = Record([hidden], DENSE, f"{name}/b")
        hidden = hidden @ p[name]["w"] + p[name]["b"]
    return RealModel(loss_fn, params, args, expected, hand_score(hidden))


@real()
def haiku_residual(batch):
    """Convolutions without biases, layer norms with scales and offsets."""

    def forward(x):
        for name in ("one", "two"):
            y = hk.LayerNorm(-1, True, True, name=f"norm_{name}")(x)
            x = x + hk.Conv2D(2, 3, with_bias=False, name=f"conv_{name}")(jax.nn.relu(y))
        return hk.Linear(3, name="head")(jnp.mean(x, (1, 2)))

    x = inputs(batch, 4, 4, 2)
    loss_fn, params, args, p = haiku(forward, x)
    expected, hidden = {}, x.astype(np.float64)
    for name in ("one", "two"):
        norm = p[f"norm_{name}"]
        seen = relu(layer_norm(hidden, norm["scale"], norm["offset"], 1e-5))
        expected[f"conv_{name}/w"] = Record([seen], "bxyi,__io", None, 16)
        hidden = hidden + convolve(seen, p[f"conv_{name}"]["w"], (1, 1))
    pooled = hidden.mean((1, 2))
    expected["head/w"] = Record([pooled], DENSE, "head/b")
    out = pooled @ p["head"]["w"] + p["head"]["b"]
    return RealModel(loss_fn, params, args, expected, hand_score(out))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm_1, self.norm_2 = nnx.LayerNorm(4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class NNXTransformer(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(2)])
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@real()
def nnx_transformer(batch):
    x = inputs(batch, 3, 4)
    loss_fn, params, args, p = from_nnx(lambda: NNXTransformer(nnx.Rngs(0)), x)
    expected, hidden = {}, x.astype(np.float64)
    for i in range(2):
        block, prefix = p["blocks"][i], f"blocks/{i}/"
        normed = layer_norm(hidden, **block["norm_1"], eps=1e-6)
        records, mixed = attend(normed, block["attention"], f"{prefix}attention/")
        hidden = hidden + mixed
        normed = layer_norm(hidden, **block["norm_2"], eps=1e-6)
        wide = gelu(affine(normed, block["up"]))
        records[f"{prefix}up/kernel"] = Record([normed], DENSE, f"{prefix}up/bias")
        records[f"{prefix}down/kernel"] = Record([wide], DENSE, f"{prefix}down/bias")
        expected |= records
        hidden = hidden + affine(wide, block["down"])
    expected["head/kernel"] = Record([hidden], DENSE, "head/bias")
    return RealModel(loss_fn, params, args, expected, hand_score(affine(hidden, p["head"])))


class NNXConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv_1 = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.conv_2 = nnx.Conv(3, 4, (3, 3), strides=(2, 2), padding=1, rngs=rngs)
        self.norm = nnx.GroupNorm(4, 2, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv_2(nnx.relu(self.conv_1(x)))))
        return self.out(x.mean((1, 2)))


@real()
def nnx_cnn(batch):
    x = inputs(batch, 5, 5, 2)
    loss_fn, params, args, p = from_nnx(lambda: NNXConvNet(nnx.Rngs(0)), x)
    first = relu(convolve(x, p["conv_1"]["kernel"], (1, 1)) + p["conv_1"]["bias"])
    second = convolve(first, p["conv_2"]["kernel"], (1, 1), stride=2) + p["conv_2"]["bias"]
    grouped = second.reshape(batch, -1, 2, 2)
    centered = grouped - grouped.mean((1, 3), keepdims=True)
    normed = centered / np.sqrt(grouped.var((1, 3), keepdims=True) + 1e-6)
    normed = normed.reshape(second.shape) * p["norm"]["scale"] + p["norm"]["bias"]
    pooled = relu(normed).mean((1, 2))
    expected = {
        "conv_1/kernel": Record([x], "bxyi,__io", "conv_1/bias", 25),
        "conv_2/kernel": Record([first], "bxyi,__io", "conv_2/bias", 9),
        "out/kernel": Record([pooled], DENSE, "out/bias"),
    }
    return RealModel(loss_fn, params, args, expected, hand_score(affine(pooled, p["out"])))
