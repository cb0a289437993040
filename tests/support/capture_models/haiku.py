"""Haiku models."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from support.capture_models.by_hand import convolve, relu, sigmoid, unrolled
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


def haiku(forward, x):
    """Loss, parameters, arguments and float64 parameters of a Haiku function."""
    network = hk.without_apply_rng(hk.transform(forward))
    params = filled(jax.eval_shape(network.init, KEY, x))

    def loss_fn(params, x):
        return score(network.apply(params, x))

    return loss_fn, params, (jnp.asarray(x),), float64(params)


@case("haiku")
def haiku_mlp():
    x = inputs(3, 4)
    loss_fn, params, args, p = haiku(lambda x: hk.nets.MLP([5, 2])(x), x)
    first, last = p["mlp/~/linear_0"], p["mlp/~/linear_1"]
    hidden = relu(x @ first["w"] + first["b"])
    expected = {
        f"mlp/~/linear_{i}/w": Record([call], DENSE, f"mlp/~/linear_{i}/b")
        for i, call in enumerate((x, hidden))
    }
    return Model(loss_fn, params, args, expected, hand_score(hidden @ last["w"] + last["b"]))


@case("haiku")
def haiku_cnn():
    def forward(x):
        x = jax.nn.relu(hk.Conv2D(3, 3, stride=2, padding="SAME")(x))
        x = jax.nn.relu(hk.Conv2D(2, 2, padding="VALID", with_bias=False)(x))
        return hk.Linear(2)(hk.Flatten()(x))

    x = inputs(3, 5, 5, 2)
    loss_fn, params, args, p = haiku(forward, x)
    hidden = relu(convolve(x, p["conv2_d"]["w"], (1, 1), stride=2) + p["conv2_d"]["b"])
    flat = relu(convolve(hidden, p["conv2_d_1"]["w"])).reshape(3, -1)
    expected = {
        "conv2_d/w": Record([x], "bxyi,__io", "conv2_d/b", 9),
        "conv2_d_1/w": Record([hidden], "bxyi,__io", None, 4),
        "linear/w": Record([flat], DENSE, "linear/b"),
    }
    return Model(
        loss_fn, params, args, expected, hand_score(flat @ p["linear"]["w"] + p["linear"]["b"])
    )


@case("haiku")
def haiku_lstm():
    """One kernel for all gates, which multiplies inputs and states side by side."""

    def forward(x):
        core = hk.LSTM(3)
        return hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)[0]

    x = inputs(3, 4, 2)
    loss_fn, params, args, p = haiku(forward, x)
    w, b = p["lstm/linear"]["w"], p["lstm/linear"]["b"]
    seen = []

    def cell(states, x):
        carry, hidden = states
        seen.append(np.concatenate([x, hidden], -1))
        i, g, f, o = np.split(seen[-1] @ w + b, 4, -1)
        carry = sigmoid(f + 1) * carry + sigmoid(i) * np.tanh(g)
        return [carry, sigmoid(o) * np.tanh(carry)]

    _, after = unrolled(cell, x, 3, n_states=2)
    expected = {"lstm/linear/w": Record(seen, DENSE, "lstm/linear/b")}
    return Model(loss_fn, params, args, expected, hand_score(np.stack(after)))
