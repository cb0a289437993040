"""NNX models."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from support.capture_models.by_hand import (
    affine,
    attend,
    convolve,
    gru_cell,
    over_time,
    relu,
    unrolled,
)
from support.capture_models.record import (
    DENSE,
    Model,
    Record,
    case,
    filled,
    float64,
    hand_score,
    inputs,
    score,
)


def from_nnx(build, x, forward=lambda model, x: model(x)):
    """Loss, parameters, arguments and float64 parameters of an NNX model, which is split."""
    graphdef, state = nnx.split(nnx.eval_shape(build), nnx.Param)
    params = filled(state)

    def loss_fn(params, x):
        return score(forward(nnx.merge(graphdef, params), x))

    return loss_fn, params, (jnp.asarray(x),), float64(nnx.to_pure_dict(params))


@case("nnx")
def nnx_mlp():
    x = inputs(3, 4)

    def build():
        rngs = nnx.Rngs(0)
        return nnx.Sequential(nnx.Linear(4, 5, rngs=rngs), nnx.relu, nnx.Linear(5, 2, rngs=rngs))

    loss_fn, params, args, p = from_nnx(build, x)
    first, last = p["layers"][0], p["layers"][2]
    hidden = relu(affine(x, first))
    expected = {
        "layers/0/kernel": Record([x], DENSE, "layers/0/bias"),
        "layers/2/kernel": Record([hidden], DENSE, "layers/2/bias"),
    }
    return Model(loss_fn, params, args, expected, hand_score(affine(hidden, last)))


class NNXConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), padding=1, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.out(self.drop(x.mean((1, 2))))


@case("nnx")
def nnx_cnn():
    """The rerun takes the dropped entries from a module in the same state."""
    x = inputs(3, 3, 4, 2)
    build = lambda: NNXConvNet(nnx.Rngs(0))  # noqa: E731
    graphdef, state, _ = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    rest = jax.jit(lambda: nnx.state(build(), nnx.Not(nnx.Param)))()
    params = filled(state)

    def loss_fn(params, rest, x):
        return score(nnx.merge(graphdef, params, rest, copy=True)(x))

    p = float64(nnx.to_pure_dict(params))
    conv = convolve(x, p["conv"]["kernel"], (1, 1)) + p["conv"]["bias"]
    centered = conv - conv.mean((0, 1, 2))
    normed = centered / np.sqrt(conv.var((0, 1, 2)) + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
    pooled = relu(normed).mean((1, 2))
    again = nnx.merge(graphdef, params, rest, copy=True)
    dropped = pooled * np.asarray(again.drop(jnp.ones((3, 3))), np.float64)
    assert (dropped == 0).any()
    expected = {
        "conv/kernel": Record([x], "bxyi,__io", "conv/bias", 12),
        "out/kernel": Record([dropped], DENSE, "out/bias"),
    }
    return Model(
        loss_fn, params, (rest, jnp.asarray(x)), expected, hand_score(affine(dropped, p["out"]))
    )


@case("nnx")
def nnx_attention():
    x = inputs(3, 4, 4)
    build = lambda: nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))  # noqa: E731
    loss_fn, params, args, p = from_nnx(build, x)
    expected, out = attend(x, p)
    return Model(loss_fn, params, args, expected, hand_score(out))


class NNXLayers(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def create(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        self.layers = create(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def forward(layer, x):
            return nnx.tanh(layer(x))

        return forward(self.layers, x)


@case("nnx")
def nnx_scan_remat():
    x = inputs(3, 4)
    loss_fn, params, args, p = from_nnx(lambda: NNXLayers(nnx.Rngs(0)), x)
    hidden = [x]
    for w, b in zip(p["layers"]["kernel"], p["layers"]["bias"], strict=True):
        hidden.append(np.tanh(hidden[-1] @ w + b))
    record = Record([np.stack(hidden[:-1])], "Lbi,Lio", "layers/bias")
    return Model(loss_fn, params, args, {"layers/kernel": record}, hand_score(hidden[-1]))


@case("nnx")
def nnx_gru():
    """One product for three gates, and the states of all steps."""
    x = inputs(3, 4, 2)
    build = lambda: nnx.GRUCell(2, 3, rngs=nnx.Rngs(0))  # noqa: E731
    run = lambda cell, x: nnx.RNN(cell, rngs=nnx.Rngs(0))(x)  # noqa: E731
    loss_fn, params, args, p = from_nnx(build, x, run)
    gates = {
        f"{kind}{gate}": {"kernel": kernel, "bias": bias}
        for kind, layer in (("i", p["dense_i"]), ("h", p["dense_h"]))
        for gate, kernel, bias in zip(
            "rzn",
            np.split(layer["kernel"], 3, -1),
            np.split(layer.get("bias", np.zeros(9)), 3),
            strict=True,
        )
    }
    before, after = unrolled(gru_cell(gates), x, 3)
    expected = {
        "dense_i/kernel": Record(over_time(x), DENSE, "dense_i/bias"),
        "dense_h/kernel": Record(before, DENSE),
    }
    return Model(loss_fn, params, args, expected, hand_score(np.stack(after)))
