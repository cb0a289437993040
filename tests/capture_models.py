"""Models of every framework whose layers' inputs are recorded by hand.

A case draws small parameters and inputs, and reruns the forward pass in float64 NumPy, written out
from the definition of each layer. What each kernel is multiplied with is read off on the way. The
rerun also yields the loss: one that agrees with the loss function's has run the same network.
"""

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

# ---------------------------------------------------------------------------------------------
# What is recorded.
# ---------------------------------------------------------------------------------------------

KEY = jax.random.key(0)

DENSE = "...i,io"
TORCH_DENSE = "...i,oi"
ATTENTION_OUT = "...hd,hdo"


@dataclasses.dataclass(frozen=True)
class Record:
    """The inputs that one kernel multiplies.

    Attributes:
      calls: The inputs of each call.
      axes: The axes of the inputs and of the kernel, as in an einsum: those of the same letter
        meet. In capitals, both keep them (stacked layers, the outputs of grouped convolutions).
        `x`, `y` are the feature map's, and `_` the window's, which meets no axis of the inputs.
      bias: Name of the bias added to the product, or None.
      positions: Output positions of a convolution.
    """

    calls: list[np.ndarray]
    axes: str
    bias: str | None = None
    positions: int = 1

    @property
    def input_axes(self) -> tuple[int, ...]:
        """The axes of the kernel that its product sums over, negative."""
        left, right = self.axes.split(",")
        summed = [label == "_" or (label in left and label.islower()) for label in right]
        return tuple(i - len(right) for i, is_summed in enumerate(summed) if is_summed)

    def _moments(self, call: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """Count, mean and variance of one call, in the kernel's layout."""
        call = np.asarray(call, np.float64)
        left, right = self.axes.split(",")
        spare = iter(label for label in string.ascii_lowercase if label not in self.axes)
        n_more = call.ndim - len(left.replace("...", ""))
        left = left.replace("...", "".join(next(spare) for _ in range(n_more)))
        averaged = tuple(i for i, label in enumerate(left) if label not in right)
        met = [label for label in left if label in right]
        order = [met.index(label) for label in right if label in met]
        new = tuple(i for i, label in enumerate(right) if label not in met)
        mean, var = (
            np.expand_dims(stat.transpose(order), new)
            for stat in (call.mean(averaged), call.var(averaged))
        )
        rows = math.prod(call.shape[i] for i in averaged if left[i] not in "xy")
        return rows * self.positions, mean, var

    def pooled(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Count, mean and variance over all calls, each weighted by its count; zeros if none."""
        if not self.calls:
            return 0, np.zeros(()), np.zeros(())
        counts, means, variances = zip(*map(self._moments, self.calls), strict=True)
        average = functools.partial(np.average, axis=0, weights=counts)
        mean = average(np.stack(means))
        between = average((np.stack(means) - mean) ** 2)
        return sum(counts), mean, average(np.stack(variances)) + between

    @property
    def scale(self) -> float:
        """The largest entry of the inputs."""
        return max((float(np.abs(call).max()) for call in self.calls), default=1.0)


class Model(NamedTuple):
    """A loss, where to evaluate it, and what a correct capture reports.

    `loss` is that of the rerun; `expected` maps the name of each covered kernel to its record.
    """

    loss_fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    expected: dict[str, Record]
    loss: float


@dataclasses.dataclass(frozen=True)
class Case:
    """A model by name.

    Attributes:
      name: Name of the case.
      framework: 'linen', 'nnx', 'equinox', 'haiku' or 'jax'.
      make: Builds the model.
      uncovered: Regular expression for the reason, by name of each kernel that is not covered.
      rounding: Of the network's arithmetic, relative to the largest entry of an array.
      whole: Whether the engines divide the rows into the same calls. Under `vmap` over examples
        the Linen engine sees calls with one row each.
    """

    name: str
    framework: str
    make: Callable[[], Model]
    uncovered: Mapping[str, str]
    rounding: float
    whole: bool


CASES: list[Case] = []


def case(
    framework: str,
    uncovered: Mapping[str, str] | None = None,
    rounding: float = 1e-6,
    whole: bool = True,
) -> Callable[[Callable[[], Model]], Callable[[], Model]]:
    """Add the decorated `make` to `CASES`."""

    def register(make: Callable[[], Model]) -> Callable[[], Model]:
        CASES.append(Case(make.__name__, framework, make, uncovered or {}, rounding, whole))
        return make

    return register


# ---------------------------------------------------------------------------------------------
# Parameters, inputs, and losses.
# ---------------------------------------------------------------------------------------------


def inputs(*shape, seed=1):
    """A float32 batch with another mean and spread in each feature."""
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.5, 2.0, shape[-1])
    return (rng.normal(size=shape) * spread + rng.normal(size=shape[-1])).astype(np.float32)


def filled(tree, seed=0):
    """Random parameters in the shapes of `tree`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape), a.dtype), tree)


def weights(**shapes):
    """A dict of random parameters."""
    return filled({name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()})


def float64(tree):
    """The arrays of `tree` for the rerun."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def score(outputs):
    """What every loss is of the network's outputs."""
    return jnp.mean(jnp.sin(outputs.astype(jnp.float32)))


def hand_score(outputs):
    """`score` in NumPy."""
    return float(np.mean(np.sin(outputs)))


def linen(model, *args, **keywords):
    """Loss, parameters, arguments and float64 parameters of a Linen model."""
    shapes = jax.eval_shape(functools.partial(model.init, **keywords), KEY, *args)
    params = filled(shapes["params"])

    def loss_fn(params, *args):
        return score(model.apply({"params": params}, *args, **keywords))

    return loss_fn, params, tuple(map(jnp.asarray, args)), float64(params)


def from_nnx(build, x, forward=lambda model, x: model(x)):
    """The same for an NNX model, whose parameters are split off."""
    graphdef, state = nnx.split(nnx.eval_shape(build), nnx.Param)
    params = filled(state)

    def loss_fn(params, x):
        return score(forward(nnx.merge(graphdef, params), x))

    return loss_fn, params, (jnp.asarray(x),), float64(nnx.to_pure_dict(params))


def equinox(build, forward, x):
    """The same for an Equinox model, called as `forward(model, x)`."""
    model = eqx.filter_eval_shape(build, KEY)
    is_param = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
    shapes, static = eqx.partition(model, is_param)
    params = filled(shapes)

    def loss_fn(params, x):
        return score(forward(eqx.combine(params, static), x))

    return loss_fn, params, (jnp.asarray(x),), float64(params)


def haiku(forward, x):
    """The same for a Haiku function."""
    network = hk.without_apply_rng(hk.transform(forward))
    params = filled(jax.eval_shape(network.init, KEY, x))

    def loss_fn(params, x):
        return score(network.apply(params, x))

    return loss_fn, params, (jnp.asarray(x),), float64(params)


def plain(forward, params, *args):
    """The same for `forward(params, *args)`."""

    def loss_fn(params, *args):
        return score(forward(params, *args))

    return loss_fn, params, tuple(map(jnp.asarray, args)), float64(params)


# ---------------------------------------------------------------------------------------------
# The layers in NumPy.
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# Linen.
# ---------------------------------------------------------------------------------------------


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


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), strides=2, padding="SAME")(x))
        x = nn.relu(nn.Conv(4, (2, 2), padding="VALID", use_bias=False)(x))
        return nn.Dense(2)(x.reshape(x.shape[0], -1))


@case("linen")
def linen_cnn():
    x = inputs(3, 5, 5, 2)
    loss_fn, params, args, p = linen(ConvNet(), x)
    first = convolve(x, p["Conv_0"]["kernel"], (1, 1), stride=2) + p["Conv_0"]["bias"]
    second = convolve(relu(first), p["Conv_1"]["kernel"])
    flat = relu(second).reshape(3, -1)
    expected = {
        "Conv_0/kernel": Record([x], "bxyi,__io", "Conv_0/bias", positions_of(first)),
        "Conv_1/kernel": Record([relu(first)], "bxyi,__io", None, positions_of(second)),
        "Dense_0/kernel": Record([flat], DENSE, "Dense_0/bias"),
    }
    return Model(loss_fn, params, args, expected, hand_score(affine(flat, p["Dense_0"])))


@case("linen")
def linen_conv_grouped_dilated():
    x = inputs(2, 5, 4, 4)
    model = nn.Conv(6, (2, 2), feature_group_count=2, kernel_dilation=2, padding="VALID")
    loss_fn, params, args, p = linen(model, x)
    out = convolve(x, p["kernel"], dilation=2, groups=2) + p["bias"]
    record = Record([by_output(x, 2, 6)], "bxyiO,__iO", "bias", positions_of(out))
    return Model(loss_fn, params, args, {"kernel": record}, hand_score(out))


class Separable(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (2, 2), feature_group_count=3, padding="VALID", name="depthwise")(x)
        return nn.Conv(2, (1, 1), name="pointwise")(nn.relu(x))


@case("linen")
def linen_conv_depthwise():
    x = inputs(2, 4, 3, 3)
    loss_fn, params, args, p = linen(Separable(), x)
    hidden = convolve(x, p["depthwise"]["kernel"], groups=3) + p["depthwise"]["bias"]
    out = convolve(relu(hidden), p["pointwise"]["kernel"]) + p["pointwise"]["bias"]
    n = positions_of(out)
    expected = {
        "depthwise/kernel": Record([by_output(x, 3, 6)], "bxyiO,__iO", "depthwise/bias", n),
        "pointwise/kernel": Record([relu(hidden)], "bxyi,__io", "pointwise/bias", n),
    }
    return Model(loss_fn, params, args, expected, hand_score(out))


@case("linen")
def linen_conv_1d():
    x = inputs(3, 5, 2)
    loss_fn, params, args, p = linen(nn.Conv(3, (3,)), x)
    out = convolve(x, p["kernel"], (1, 1)) + p["bias"]
    return Model(
        loss_fn, params, args, {"kernel": Record([x], "bxi,_io", "bias", 5)}, hand_score(out)
    )


@case("plain")
def plain_conv_causal():
    """Flax pads this input by an operation of its own: the map that is convolved has the zeros."""
    x = inputs(3, 5, 2)
    padded = np.pad(x, ((0, 0), (2, 0), (0, 0)))
    loss_fn, params, args, p = linen(nn.Conv(3, (3,), padding="CAUSAL"), x)
    out = convolve(x, p["kernel"], (2, 0)) + p["bias"]
    return Model(
        loss_fn, params, args, {"kernel": Record([padded], "bxi,_io", "bias", 5)}, hand_score(out)
    )


def spaced_out(x, stride):
    """`x` with `stride - 1` zeros between its positions."""
    spaced = np.zeros((len(x), *[(n - 1) * stride + 1 for n in x.shape[1:-1]], x.shape[-1]))
    spaced[(slice(None), *[slice(None, None, stride)] * (x.ndim - 2))] = x
    return spaced


@case("linen")
def linen_conv_transpose():
    """The feature map has no zeros between its positions, and the output is larger."""
    x = inputs(2, 3, 2, 2)
    loss_fn, params, args, p = linen(nn.ConvTranspose(3, (3, 3), strides=(2, 2)), x)
    out = convolve(spaced_out(x, 2), p["kernel"], (2, 1)) + p["bias"]
    assert positions_of(out) == 24
    return Model(
        loss_fn, params, args, {"kernel": Record([x], "bxyi,__io", "bias", 24)}, hand_score(out)
    )


@case("linen")
def linen_conv_transpose_flipped():
    """With the kernel of the convolution whose gradient it is: flipped, `(k, k, out, in)`."""
    x = inputs(2, 3, 2, 2)
    loss_fn, params, args, p = linen(nn.ConvTranspose(3, (3, 3), transpose_kernel=True), x)
    out = convolve(x, np.swapaxes(p["kernel"][::-1, ::-1], -1, -2), (1, 1)) + p["bias"]
    return Model(
        loss_fn, params, args, {"kernel": Record([x], "bxyi,__oi", "bias", 6)}, hand_score(out)
    )


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


@case("linen", {"blocks/norm_1/scale": "`mul`", "blocks/norm_2/scale": "`mul`"})
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


@case("linen", whole=False)
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


# ---------------------------------------------------------------------------------------------
# Plain JAX.
# ---------------------------------------------------------------------------------------------


@case("jax")
def plain_dict():
    """With a penalty on the weights, which is no use as a kernel."""

    def forward(p, x):
        out = jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
        return out + 1e-2 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))

    x = inputs(3, 4)
    loss_fn, params, args, p = plain(forward, weights(w1=(4, 5), b1=(5,), w2=(5, 2), b2=(2,)), x)
    hidden = np.tanh(x @ p["w1"] + p["b1"])
    out = hidden @ p["w2"] + p["b2"] + 1e-2 * sum((leaf**2).sum() for leaf in p.values())
    expected = {"w1": Record([x], DENSE, "b1"), "w2": Record([hidden], DENSE, "b2")}
    return Model(loss_fn, params, args, expected, hand_score(out))


@case("jax")
def plain_list_of_tuples():
    def forward(layers, x):
        *hidden, (w, b) = layers
        for wi, bi in hidden:
            x = jnp.maximum(jnp.dot(x, wi) + bi, 0)
        return jnp.dot(x, w) + b

    x = inputs(3, 4)
    shapes = [[(4, 3), (3,)], [(3, 5), (5,)], [(5, 2), (2,)]]
    params = filled([tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in pair) for pair in shapes])
    loss_fn, params, args, p = plain(forward, params, x)
    expected, hidden = {}, x
    for i, (w, b) in enumerate(p):
        hidden = relu(hidden) if i else hidden
        expected[f"{i}/0"] = Record([hidden], DENSE, f"{i}/1")
        hidden = hidden @ w + b
    return Model(loss_fn, params, args, expected, hand_score(hidden))


def one_layer(forward, by_hand, axes, *, x=None, calls=None, **shapes):
    """A case of one kernel `w`, with the bias `b` if there is one."""
    x = inputs(3, 4) if x is None else x
    params = weights(**shapes)
    loss_fn, params, args, p = plain(forward, params, x)
    record = Record([x] if calls is None else calls, axes, "b" if "b" in shapes else None)
    return Model(loss_fn, params, args, {"w": record}, hand_score(by_hand(p, x)))


@case("jax")
def plain_einsum():
    return one_layer(
        lambda p, x: jnp.einsum("bi,oi->bo", x, p["w"]),
        lambda p, x: x @ p["w"].T,
        TORCH_DENSE,
        w=(5, 4),
    )


@case("jax")
def plain_einsum_kernel_first():
    return one_layer(
        lambda p, x: jnp.einsum("hio,bhi->obh", p["w"], x),
        lambda p, x: np.einsum("hio,bhi->obh", p["w"], x),
        "bHi,Hio",
        x=inputs(3, 2, 4),
        w=(2, 4, 5),
    )


@case("jax")
def plain_transposed():
    return one_layer(
        lambda p, x: x @ p["w"].T + p["b"],
        lambda p, x: x @ p["w"].T + p["b"],
        TORCH_DENSE,
        w=(5, 4),
        b=(5,),
    )


@case("jax")
def plain_reshaped():
    """A kernel with axes for heads, flattened for one product."""
    return one_layer(
        lambda p, x: (x @ p["w"].reshape(4, 6)).reshape(3, 2, 3) + p["b"],
        lambda p, x: np.einsum("bi,iho->bho", x, p["w"]) + p["b"],
        "bi,iho",
        w=(4, 2, 3),
        b=(2, 3),
    )


@case("jax")
def plain_kernels_joined():
    """Two kernels side by side in one product."""

    def forward(p, x):
        return x @ jnp.concatenate([p["w1"], p["w2"]], 1) + jnp.concatenate([p["b1"], p["b2"]])

    x = inputs(3, 4)
    shapes = {"w1": (4, 2), "b1": (2,), "w2": (4, 3), "b2": (3,)}
    loss_fn, params, args, p = plain(forward, weights(**shapes), x)
    out = np.concatenate([x @ p["w1"] + p["b1"], x @ p["w2"] + p["b2"]], 1)
    expected = {"w1": Record([x], DENSE, "b1"), "w2": Record([x], DENSE, "b2")}
    return Model(loss_fn, params, args, expected, hand_score(out))


@case("jax")
def plain_kernel_split():
    """Halves of one kernel that meet different inputs: its columns have statistics of their own."""

    def forward(p, x):
        return x @ p["w"][:, :3] + jnp.tanh(x) @ p["w"][:, 3:]

    x = inputs(3, 4)
    return one_layer(
        forward,
        lambda p, x: x @ p["w"][:, :3] + np.tanh(x) @ p["w"][:, 3:],
        "biO,iO",
        calls=[np.stack([x] * 3 + [np.tanh(x)] * 3, -1)],
        x=x,
        w=(4, 6),
    )


def layers_in_one_array(forward):
    """A case of two layers whose kernels are stacked in `w`."""
    x = inputs(3, 4)
    loss_fn, params, args, p = plain(forward, weights(w=(2, 4, 4)), x)
    hidden = [x]
    for w in p["w"]:
        hidden.append(np.tanh(hidden[-1] @ w))
    record = Record([np.stack(hidden[:-1])], "Lbi,Lio")
    return Model(loss_fn, params, args, {"w": record}, hand_score(hidden[-1]))


@case("jax")
def plain_stack_indexed():
    """Taken out by a Python loop."""

    def forward(p, x):
        for i in range(2):
            x = jnp.tanh(x @ p["w"][i])
        return x

    return layers_in_one_array(forward)


@case("jax")
def plain_stack_indexed_in_a_loop():
    """Taken out at an index that is known only when it runs."""

    def forward(p, x):
        return lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ p["w"][i]), x)

    return layers_in_one_array(forward)


@case("jax", rounding=2.0**-7)
def plain_half_precision():
    """Kernel and inputs are cast; the statistics are those of inputs in 8 bits of mantissa."""

    def forward(p, x):
        product = x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
        return product + p["b"].astype(jnp.bfloat16)

    return one_layer(forward, lambda p, x: x @ p["w"] + p["b"], DENSE, w=(4, 5), b=(5,))


@case("jax")
def plain_vdot():
    """One unit, whose kernel is a vector."""
    return one_layer(
        lambda p, x: jax.vmap(lambda row: jnp.vdot(p["w"], row) + p["b"])(x),
        lambda p, x: x @ p["w"] + p["b"],
        "bi,i",
        w=(4,),
        b=(),
    )


@case("jax")
def plain_vmap_over_examples():
    return one_layer(
        lambda p, x: jax.vmap(lambda row: p["w"] @ row + p["b"])(x),
        lambda p, x: x @ p["w"].T + p["b"],
        TORCH_DENSE,
        w=(5, 4),
        b=(5,),
    )


@case("jax")
def plain_ensemble():
    """On inputs that the members share, the first kernels are one kernel with more outputs."""

    def forward(p, x):
        def member(p):
            return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

        return jax.vmap(member)(p)

    x = inputs(3, 4)
    shapes = {"w1": (2, 4, 3), "b1": (2, 3), "w2": (2, 3, 2), "b2": (2, 2)}
    loss_fn, params, args, p = plain(forward, weights(**shapes), x)
    hidden = np.tanh(np.einsum("bi,eio->ebo", x, p["w1"]) + p["b1"][:, None])
    out = np.einsum("ebi,eio->ebo", hidden, p["w2"]) + p["b2"][:, None]
    expected = {"w1": Record([x], "bi,eio", "b1"), "w2": Record([hidden], "Ebi,Eio", "b2")}
    return Model(loss_fn, params, args, expected, hand_score(out))


@case("jax", {"w": "tied"})
def plain_gradient_in_the_loss():
    """The kernel meets inputs along one axis and, backwards, cotangents along the other."""

    def forward(p, x):
        return jax.vmap(jax.grad(lambda row: jnp.sum(jnp.sin(p["w"] @ row))))(x) @ p["out"]

    x = inputs(3, 4)
    loss_fn, params, args, p = plain(forward, weights(w=(5, 4), out=(4, 2)), x)
    gradient = np.cos(x @ p["w"].T) @ p["w"]
    expected = {"out": Record([gradient], DENSE)}
    return Model(loss_fn, params, args, expected, hand_score(gradient @ p["out"]))


@case("jax")
def plain_jit():
    @jax.jit
    def layer(w, b, x):
        return jax.nn.relu(x @ w + b)

    return one_layer(
        lambda p, x: layer(p["w"], p["b"], x),
        lambda p, x: relu(x @ p["w"] + p["b"]),
        DENSE,
        w=(4, 5),
        b=(5,),
    )


@case("jax")
def plain_checkpoint():
    def forward(p, x):
        layer = jax.checkpoint(lambda w, b, x: jnp.tanh(x @ w + b))
        return layer(p["w2"], p["b2"], layer(p["w1"], p["b1"], x))

    x = inputs(3, 4)
    loss_fn, params, args, p = plain(forward, weights(w1=(4, 3), b1=(3,), w2=(3, 2), b2=(2,)), x)
    hidden = np.tanh(x @ p["w1"] + p["b1"])
    expected = {"w1": Record([x], DENSE, "b1"), "w2": Record([hidden], DENSE, "b2")}
    return Model(loss_fn, params, args, expected, hand_score(np.tanh(hidden @ p["w2"] + p["b2"])))


@case("jax")
def plain_custom_derivatives():
    """Activations with a `custom_jvp` or a `custom_vjp`."""

    @jax.custom_vjp
    def clip_gradient(x):
        return x

    clip_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))

    def forward(p, x):
        hidden = clip_gradient(jax.nn.gelu(x @ p["w1"]))
        return jax.nn.relu(hidden @ p["w2"]) @ p["w3"]

    x = inputs(3, 4)
    loss_fn, params, args, p = plain(forward, weights(w1=(4, 3), w2=(3, 3), w3=(3, 2)), x)
    first = gelu(x @ p["w1"])
    second = relu(first @ p["w2"])
    expected = {
        name: Record([call], DENSE) for name, call in (("w1", x), ("w2", first), ("w3", second))
    }
    return Model(loss_fn, params, args, expected, hand_score(second @ p["w3"]))


@case("jax")
def plain_custom_vjp_layer():
    """A product that defines its own derivative, by the usual formula."""

    @jax.custom_vjp
    def layer(w, x):
        return x @ w

    layer.defvjp(lambda w, x: (x @ w, (w, x)), lambda res, g: (res[1].T @ g, g @ res[0].T))
    return one_layer(lambda p, x: layer(p["w"], x), lambda p, x: x @ p["w"], DENSE, w=(4, 5))


@case("jax")
def plain_scan_over_layers():
    def forward(p, x):
        def layer(x, own):
            return jnp.tanh(x @ own["w"] + own["b"]), None

        return lax.scan(layer, x, p)[0]

    x = inputs(3, 4)
    loss_fn, params, args, p = plain(forward, weights(w=(3, 4, 4), b=(3, 4)), x)
    hidden = [x]
    for w, b in zip(p["w"], p["b"], strict=True):
        hidden.append(np.tanh(hidden[-1] @ w + b))
    record = Record([np.stack(hidden[:-1])], "L...i,Lio", "b")
    return Model(loss_fn, params, args, {"w": record}, hand_score(hidden[-1]))


@case("jax")
def plain_scan_of_scan():
    """Two levels of stacked layers, rematerialized, beside a weight that all of them share."""

    def forward(p, x):
        @jax.checkpoint
        def inner(x, w):
            return jnp.tanh(x @ w + jnp.sin(x @ p["shared"])), None

        return lax.scan(lambda x, w: lax.scan(inner, x, w), x, p["w"])[0]

    x = inputs(2, 3)
    loss_fn, params, args, p = plain(forward, weights(w=(2, 2, 3, 3), shared=(3, 3)), x)
    seen = [x]
    for w in p["w"].reshape(4, 3, 3):
        seen.append(np.tanh(seen[-1] @ w + np.sin(seen[-1] @ p["shared"])))
    expected = {
        "w": Record([np.stack(seen[:-1]).reshape(2, 2, 2, 3)], "KLbi,KLio"),
        "shared": Record(seen[:-1], DENSE),
    }
    return Model(loss_fn, params, args, expected, hand_score(seen[-1]))


@case("jax")
def plain_recurrent():
    """Weights that a scan over time closes over, and a loop of a fixed number of steps."""

    def forward(p, x):
        def step(h, x):
            return jnp.tanh(x @ p["wx"] + h @ p["wh"] + p["b"]), None

        h, _ = lax.scan(step, jnp.zeros((x.shape[0], 3)), jnp.swapaxes(x, 0, 1))
        return lax.fori_loop(0, 2, lambda _, h: jnp.sin(h @ p["wo"]), h)

    x = inputs(3, 4, 2)
    shapes = {"wx": (2, 3), "wh": (3, 3), "b": (3,), "wo": (3, 3)}
    loss_fn, params, args, p = plain(forward, weights(**shapes), x)
    cell = lambda h, x: [np.tanh(x @ p["wx"] + h[-1] @ p["wh"] + p["b"])]  # noqa: E731
    before, after = unrolled(cell, x, 3)
    again = np.sin(after[-1] @ p["wo"])
    # The bias is added to the sum of both products: it centers neither alone.
    expected = {
        "wx": Record(over_time(x), DENSE),
        "wh": Record(before, DENSE),
        "wo": Record([after[-1], again], DENSE),
    }
    return Model(loss_fn, params, args, expected, hand_score(np.sin(again @ p["wo"])))


@case("jax")
def plain_cond():
    """A kernel in the branch that is taken and one in the other, which sees nothing."""

    def forward(p, x, flag):
        hidden = jnp.tanh(x @ p["w"] + p["b"])
        return lax.cond(flag, lambda h: h @ p["taken"], lambda h: (2 * h) @ p["other"], hidden)

    x = inputs(3, 4)
    shapes = {"w": (4, 3), "b": (3,), "taken": (3, 2), "other": (3, 2)}
    loss_fn, params, args, p = plain(forward, weights(**shapes), x, True)
    hidden = np.tanh(x @ p["w"] + p["b"])
    expected = {
        "w": Record([x], DENSE, "b"),
        "taken": Record([hidden], DENSE),
        "other": Record([], DENSE),
    }
    return Model(loss_fn, params, args, expected, hand_score(hidden @ p["taken"]))


@case("jax")
def plain_cond_both():
    """One kernel in both branches: only the branch that is taken counts."""

    def forward(p, x, flag):
        return lax.cond(flag, lambda x: x @ p["w"], lambda x: jnp.sin(3 * x) @ p["w"], x)

    x = inputs(3, 4)
    loss_fn, params, args, p = plain(forward, weights(w=(4, 3)), x, False)
    seen = np.sin(3 * x.astype(np.float64))
    return Model(loss_fn, params, args, {"w": Record([seen], DENSE)}, hand_score(seen @ p["w"]))


def nchw_convolve(x, kernel, **keywords):
    """`convolve` of channels first by `(o, i, *window)`."""
    kernel = np.moveaxis(np.moveaxis(kernel, 0, -1), 0, -2)
    return np.moveaxis(convolve(np.moveaxis(x, 1, -1), kernel, **keywords), -1, 1)


@case("jax")
def plain_conv_oihw():
    def forward(p, x):
        out = lax.conv_general_dilated(
            x, p["w"], (2, 2), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        return out + p["b"][:, None, None]

    x = np.moveaxis(inputs(2, 5, 5, 3), -1, 1)
    loss_fn, params, args, p = plain(forward, weights(w=(4, 3, 3, 3), b=(4,)), x)
    out = nchw_convolve(x, p["w"], stride=2) + p["b"][:, None, None]
    return Model(loss_fn, params, args, {"w": Record([x], "bixy,oi__", "b", 4)}, hand_score(out))


@case("jax")
def plain_conv_over_examples():
    """`vmap` over examples, and a kernel for each of two groups of channels."""

    def forward(p, x):
        def one(image):
            return lax.conv_general_dilated(
                image[None],
                p["w"],
                (1,),
                [(1, 1)],
                dimension_numbers=("NWC", "WIO", "NWC"),
                feature_group_count=2,
            )[0]

        return jax.vmap(one)(x)

    x = inputs(3, 4, 4)
    loss_fn, params, args, p = plain(forward, weights(w=(3, 2, 6)), x)
    out = convolve(x, p["w"], (1, 1), groups=2)
    record = Record([by_output(x, 2, 6)], "bxiO,_iO", None, 4)
    return Model(loss_fn, params, args, {"w": record}, hand_score(out))


@case("jax")
def plain_conv_circular():
    """The feature map is the padded one: that it was padded, no convolution shows."""

    def forward(p, x):
        around = jnp.concatenate([x[:, -1:], x, x[:, :1]], 1)
        return lax.conv_general_dilated(
            around, p["w"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )

    x = inputs(3, 5, 2)
    around = np.concatenate([x[:, -1:], x, x[:, :1]], 1)
    loss_fn, params, args, p = plain(forward, weights(w=(3, 2, 3)), x)
    record = Record([around], "bxi,_io", None, 5)
    return Model(loss_fn, params, args, {"w": record}, hand_score(convolve(around, p["w"])))


@case("jax", {"w1": "`mul` changes it"})
def plain_scaled():
    x = inputs(3, 4)
    forward = lambda p, x: jnp.tanh(x @ (0.5 * p["w1"])) @ p["w2"]  # noqa: E731
    loss_fn, params, args, p = plain(forward, weights(w1=(4, 3), w2=(3, 2)), x)
    hidden = np.tanh(x @ (0.5 * p["w1"]))
    expected = {"w2": Record([hidden], DENSE)}
    return Model(loss_fn, params, args, expected, hand_score(hidden @ p["w2"]))


@case("jax", {"w1": "`div` changes it"})
def plain_weight_norm():
    x = inputs(3, 4)

    def forward(p, x):
        return jnp.tanh(x @ (p["w1"] / jnp.linalg.norm(p["w1"], axis=0))) @ p["w2"]

    loss_fn, params, args, p = plain(forward, weights(w1=(4, 3), w2=(3, 2)), x)
    hidden = np.tanh(x @ (p["w1"] / np.linalg.norm(p["w1"], axis=0)))
    expected = {"w2": Record([hidden], DENSE)}
    return Model(loss_fn, params, args, expected, hand_score(hidden @ p["w2"]))


@case("jax", {"tied": "tied"})
def plain_tied():
    """A kernel that meets its inputs along either axis: no statistics fit both."""
    x = inputs(3, 4)
    forward = lambda p, x: jnp.tanh(x @ p["tied"]) @ p["tied"].T @ p["w"]  # noqa: E731
    loss_fn, params, args, p = plain(forward, weights(tied=(4, 3), w=(4, 2)), x)
    hidden = np.tanh(x @ p["tied"]) @ p["tied"].T
    expected = {"w": Record([hidden], DENSE)}
    return Model(loss_fn, params, args, expected, hand_score(hidden @ p["w"]))


@case("jax", {"left": "another parameter", "right": "another parameter"})
def plain_low_rank():
    """A kernel that is a product of two parameters, neither of which multiplies an input."""
    x = inputs(3, 4)
    forward = lambda p, x: jnp.tanh(x @ (p["left"] @ p["right"])) @ p["w"]  # noqa: E731
    loss_fn, params, args, p = plain(forward, weights(left=(4, 2), right=(2, 3), w=(3, 2)), x)
    hidden = np.tanh(x @ (p["left"] @ p["right"]))
    expected = {"w": Record([hidden], DENSE)}
    return Model(loss_fn, params, args, expected, hand_score(hidden @ p["w"]))


@case("jax", {"embed": "`gather` looks"})
def plain_embedding():
    tokens = np.array([[0, 5, 2], [1, 2, 2]])
    forward = lambda p, tokens: p["embed"][tokens] @ p["out"] + p["b"]  # noqa: E731
    loss_fn, params, args, p = plain(forward, weights(embed=(6, 3), out=(3, 2), b=(2,)), tokens)
    embedded = p["embed"][tokens]
    expected = {"out": Record([embedded], DENSE, "b")}
    return Model(loss_fn, params, args, expected, hand_score(embedded @ p["out"] + p["b"]))


@case("jax", {"tied": "`gather` looks"})
def plain_tied_embedding():
    """Looked up at one end and multiplied with at the other."""
    tokens = np.array([[0, 5, 2], [1, 2, 2]])
    forward = lambda p, tokens: jnp.tanh(p["tied"][tokens] @ p["w"]) @ p["tied"].T  # noqa: E731
    loss_fn, params, args, p = plain(forward, weights(tied=(6, 3), w=(3, 3)), tokens)
    embedded = p["tied"][tokens]
    out = np.tanh(embedded @ p["w"]) @ p["tied"].T
    return Model(loss_fn, params, args, {"w": Record([embedded], DENSE)}, hand_score(out))


# ---------------------------------------------------------------------------------------------
# NNX.
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# Equinox: kernels are `(out, in)` and `(out, in, *window)`, and models see one example.
# ---------------------------------------------------------------------------------------------


def linear(x, layer):
    return x @ layer.weight.T + (0.0 if layer.bias is None else layer.bias)


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


# ---------------------------------------------------------------------------------------------
# Haiku.
# ---------------------------------------------------------------------------------------------


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
