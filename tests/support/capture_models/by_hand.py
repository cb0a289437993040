"""Layers in float64 NumPy, written out from their definition."""

import math

import numpy as np

from support.capture_models.record import ATTENTION_OUT, Record


def relu(x):
    return np.maximum(x, 0.0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    """In the tanh form, JAX's default."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def affine(x, layer):
    """A dense layer; further kernel axes are outputs."""
    return np.tensordot(x, layer["kernel"], 1) + layer.get("bias", 0.0)


def layer_norm(x, scale, bias, eps):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def attention(query, key, value):
    """Attention between sequences `(..., time, heads, features)`."""
    logits = np.einsum("...qhd,...khd->...hqk", query, key) / math.sqrt(query.shape[-1])
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("...hqk,...khd->...qhd", odds / odds.sum(-1, keepdims=True), value)


def convolve(x, kernel, pad=(0, 0), stride=1, dilation=1, groups=1):
    """A convolution of `(batch, *space, channels)`, `pad` and `stride` equal along all space."""
    space = range(1, x.ndim - 1)
    x = np.pad(x, [pad if axis in space else (0, 0) for axis in range(x.ndim)])
    reach = [(k - 1) * dilation + 1 for k in kernel.shape[:-2]]
    windows = np.lib.stride_tricks.sliding_window_view(x, reach, tuple(space))
    windows = windows[(slice(None), *[slice(None, None, stride)] * len(space))]
    windows = windows[(..., *[slice(None, None, dilation)] * len(space))]
    windows = np.moveaxis(windows, x.ndim - 1, -1)  # Channels last, as in the kernel.
    outputs = [
        np.tensordot(part, kernel_part, kernel.ndim - 1)
        for part, kernel_part in zip(
            np.split(windows, groups, -1), np.split(kernel, groups, -1), strict=True
        )
    ]
    return np.concatenate(outputs, -1)


def by_output(x, groups, features):
    """`(..., channels)` as what each output of a grouped convolution sees: `(..., c, features)`."""
    return np.repeat(np.stack(np.split(x, groups, -1), -1), features // groups, -1)


def positions_of(outputs):
    return math.prod(outputs.shape[1:-1])


def spaced_out(x, stride):
    """`x` with `stride - 1` zeros between its positions."""
    spaced = np.zeros((len(x), *[(n - 1) * stride + 1 for n in x.shape[1:-1]], x.shape[-1]))
    spaced[(slice(None), *[slice(None, None, stride)] * (x.ndim - 2))] = x
    return spaced


def attend(x, p, prefix=""):
    """Self-attention of Flax by hand: its records and its output."""
    heads = [affine(x, p[name]) for name in ("query", "key", "value")]
    mixed = attention(*heads)
    records = {
        f"{prefix}{name}/kernel": Record([x], "...i,ihd", f"{prefix}{name}/bias")
        for name in ("query", "key", "value")
    }
    records[f"{prefix}out/kernel"] = Record([mixed], ATTENTION_OUT, f"{prefix}out/bias")
    return records, np.tensordot(mixed, p["out"]["kernel"], 2) + p["out"]["bias"]


def stack(layers):
    """Records of the same layer at each depth as those of one stack."""
    return {
        name: Record(
            [np.stack([layer[name].calls[0] for layer in layers])],
            "L{},L{}".format(*record.axes.split(",")),
            record.bias,
        )
        for name, record in layers[0].items()
    }


def unrolled(cell, x, features, n_states=1):
    """Run `cell(states, x_t) -> states` over time, from zeros; the last state is the output.

    Returns:
      The outputs, before each step and after it, each a list over time.
    """
    states = [np.zeros((len(x), features))] * n_states
    before, after = [], []
    for row in np.swapaxes(x, 0, 1):
        before.append(states[-1])
        states = cell(states, row)
        after.append(states[-1])
    return before, after


def over_time(x):
    return list(np.swapaxes(x, 0, 1))


def simple_cell(p):
    return lambda states, x: [np.tanh(affine(x, p["i"]) + affine(states[-1], p["h"]))]


def lstm_cell(p):
    def cell(states, x):
        carry, hidden = states
        i, f, g, o = (
            affine(x, p[f"i{gate}"]) + affine(hidden, p[f"h{gate}"])
            for gate in ("i", "f", "g", "o")
        )
        carry = sigmoid(f) * carry + sigmoid(i) * np.tanh(g)
        return [carry, sigmoid(o) * np.tanh(carry)]

    return cell


def gru_cell(p):
    def cell(states, x):
        (hidden,) = states
        reset = sigmoid(affine(x, p["ir"]) + affine(hidden, p["hr"]))
        update = sigmoid(affine(x, p["iz"]) + affine(hidden, p["hz"]))
        new = np.tanh(affine(x, p["in"]) + reset * affine(hidden, p["hn"]))
        return [(1 - update) * new + update * hidden]

    return cell


def linear(x, layer):
    """A dense layer of Equinox, whose kernels are `(out, in)`."""
    return x @ layer.weight.T + (0.0 if layer.bias is None else layer.bias)
