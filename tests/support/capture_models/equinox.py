"""Equinox: kernels are `(out, in)` and `(out, in, *window)`, and models see one example."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from support.capture_models.by_hand import (
    attention,
    by_output,
    gelu,
    layer_norm,
    linear,
    over_time,
    relu,
    sigmoid,
    unrolled,
)
from support.capture_models.plain import nchw_convolve
from support.capture_models.record import (
    KEY,
    TORCH_DENSE,
    Model,
    Record,
    case,
    filled,
    float64,
    hand_score,
    inputs,
    score,
)


def equinox(build, forward, x):
    """Loss, parameters, arguments, float64 parameters of a model called `forward(model, x)`."""
    model = eqx.filter_eval_shape(build, KEY)
    is_param = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
    shapes, static = eqx.partition(model, is_param)
    params = filled(shapes)

    def loss_fn(params, x):
        return score(forward(eqx.combine(params, static), x))

    return loss_fn, params, (jnp.asarray(x),), float64(params)


@case("equinox")
def equinox_mlp():
    x = inputs(3, 4)
    build = lambda key: eqx.nn.MLP(4, 2, width_size=5, depth=2, key=key)  # noqa: E731
    loss_fn, params, args, p = equinox(build, lambda model, x: jax.vmap(model)(x), x)
    expected, hidden = {}, x
    for i, layer in enumerate(p.layers):
        hidden = relu(hidden) if i else hidden
        expected[f"layers/{i}/weight"] = Record([hidden], TORCH_DENSE, f"layers/{i}/bias")
        hidden = linear(hidden, layer)
    return Model(loss_fn, params, args, expected, hand_score(hidden))


class EquinoxConvNet(eqx.Module):
    first: eqx.nn.Conv2d
    grouped: eqx.nn.Conv2d
    out: eqx.nn.Linear

    def __init__(self, key):
        self.first = eqx.nn.Conv2d(2, 4, 3, stride=2, padding=1, key=key)
        self.grouped = eqx.nn.Conv2d(4, 2, 2, groups=2, use_bias=False, key=key)
        self.out = eqx.nn.Linear(8, 2, key=key)

    def __call__(self, x):
        x = jax.nn.relu(self.first(x))
        return self.out(jax.nn.relu(self.grouped(x)).ravel())


@case("equinox")
def equinox_cnn():
    x = np.moveaxis(inputs(3, 5, 5, 2), -1, 1)
    loss_fn, params, args, p = equinox(EquinoxConvNet, lambda model, x: jax.vmap(model)(x), x)
    hidden = relu(nchw_convolve(x, p.first.weight, pad=(1, 1), stride=2) + p.first.bias)
    last = relu(nchw_convolve(hidden, p.grouped.weight, groups=2))
    flat = last.reshape(3, -1)
    seen = by_output(np.moveaxis(hidden, 1, -1), 2, 2)
    expected = {
        "first/weight": Record([x], "bixy,oi__", "first/bias", 9),
        "grouped/weight": Record([seen], "bxyiO,Oi__", None, 4),
        "out/weight": Record([flat], TORCH_DENSE, "out/bias"),
    }
    return Model(loss_fn, params, args, expected, hand_score(linear(flat, p.out)))


@case("equinox")
def equinox_gru():
    """Its bias of the new state is added to a third of a product: to none of the kernels'."""
    x = inputs(3, 4, 2)

    def forward(cell, x):
        def one(sequence):
            step = lambda h, x: (cell(x, h),) * 2  # noqa: E731
            return lax.scan(step, jnp.zeros(3), sequence)[1]

        return jax.vmap(one)(x)

    loss_fn, params, args, p = equinox(lambda key: eqx.nn.GRUCell(2, 3, key=key), forward, x)

    def cell(states, x):
        (hidden,) = states
        ir, iz, i_new = np.split(x @ p.weight_ih.T + p.bias, 3, -1)
        hr, hz, h_new = np.split(hidden @ p.weight_hh.T, 3, -1)
        new = np.tanh(i_new + sigmoid(ir + hr) * (h_new + p.bias_n))
        return [new + sigmoid(iz + hz) * (hidden - new)]

    before, after = unrolled(cell, x, 3)
    expected = {
        "weight_ih": Record(over_time(x), TORCH_DENSE, "bias"),
        "weight_hh": Record(before, TORCH_DENSE),
    }
    return Model(loss_fn, params, args, expected, hand_score(np.stack(after)))


@case("equinox")
def equinox_attention():
    x = inputs(3, 4, 4)
    build = lambda key: eqx.nn.MultiheadAttention(2, 4, use_output_bias=True, key=key)  # noqa: E731
    loss_fn, params, args, p = equinox(build, lambda model, x: jax.vmap(model)(x, x, x), x)
    heads = [
        linear(x, layer).reshape(3, 4, 2, 2) for layer in (p.query_proj, p.key_proj, p.value_proj)
    ]
    mixed = attention(*heads).reshape(3, 4, 4)
    expected = {
        f"{name}_proj/weight": Record([x], TORCH_DENSE) for name in ("query", "key", "value")
    }
    expected["output_proj/weight"] = Record([mixed], TORCH_DENSE, "output_proj/bias")
    return Model(loss_fn, params, args, expected, hand_score(linear(mixed, p.output_proj)))


class EquinoxNormalized(eqx.Module):
    norm: eqx.nn.LayerNorm
    layers: tuple[eqx.nn.Linear, eqx.nn.Linear]

    def __init__(self, key):
        self.norm = eqx.nn.LayerNorm(4)
        self.layers = (eqx.nn.Linear(4, 4, key=key), eqx.nn.Linear(4, 4, key=key))

    def __call__(self, x):
        for layer in self.layers:
            x = x + jax.nn.gelu(layer(self.norm(x)))
        return x


@case("equinox")
def equinox_layer_norm():
    x = inputs(3, 4)
    loss_fn, params, args, p = equinox(EquinoxNormalized, lambda model, x: jax.vmap(model)(x), x)
    expected, hidden = {}, x.astype(np.float64)
    for i, layer in enumerate(p.layers):
        normed = layer_norm(hidden, p.norm.weight, p.norm.bias, 1e-5)
        expected[f"layers/{i}/weight"] = Record([normed], TORCH_DENSE, f"layers/{i}/bias")
        hidden = hidden + gelu(linear(normed, layer))
    return Model(loss_fn, params, args, expected, hand_score(hidden))
