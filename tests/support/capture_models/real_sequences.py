"""State space models, recurrent networks, causal convolutions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from support.capture_models import real_cases
from support.capture_models.by_hand import gru_cell, lstm_cell, over_time, unrolled
from support.capture_models.real_cases import (
    array,
    dense,
    dense_shapes,
    filled,
    inputs,
    linen_model,
    normalize,
    note,
    real,
    recorded,
    scan,
    score,
    squared_error,
    variables,
)
from support.capture_models.record import DENSE, Record


@real({"A_log": ".+"})
def mamba(batch):
    """A gated block: a causal depthwise convolution, then a scan whose step depends on the data."""

    def mix(p, x):
        a = -jnp.exp(p["A_log"])
        dt, b, c = jnp.split(dense(p, "x_proj", x), [1, 3], -1)
        dt = jax.nn.softplus(dense(p, "dt_proj", dt))

        def step(h, now):
            x, dt, b, c = now
            h = h * jnp.exp(dt[..., None] * a) + (dt * x)[..., None] * b[:, None]
            return h, jnp.einsum("bdn,bn->bd", h, c)

        start = jnp.zeros((x.shape[0], *a.shape), x.dtype)
        over = [jnp.swapaxes(value, 0, 1) for value in (x, dt, b, c)]
        return jnp.swapaxes(lax.scan(step, start, over)[1], 0, 1) + p["D"] * x

    def loss_fn(p, x):
        y, gate = jnp.split(dense(p, "in_proj", normalize(x) * p["norm"]), 2, -1)
        note("conv/w", y, "bxiO,_iO", "conv/b", y.shape[1], (y.shape[2], y.shape[2]))
        numbers = ("NWC", "WIO", "NWC")
        y = lax.conv_general_dilated(
            y,
            p["conv"]["w"],
            (1,),
            [(1, 0)],
            dimension_numbers=numbers,
            feature_group_count=y.shape[2],
        )
        y = mix(p, jax.nn.silu(y + p["conv"]["b"]))
        return score(x + dense(p, "out_proj", y * jax.nn.silu(gate)))

    sizes = {"in_proj": (4, 12), "x_proj": (6, 5), "out_proj": (6, 4)}
    shapes = {name: dense_shapes(*size, bias=False)[0] for name, size in sizes.items()}
    shapes |= {"dt_proj": dense_shapes(1, 6)[0], "conv": {"w": array(2, 1, 6), "b": array(6)}}
    shapes |= {"A_log": array(6, 2), "D": array(6), "norm": array(4)}
    return recorded(loss_fn, filled(shapes), inputs(batch, 5, 4))


class Forecast(nn.Module):
    cell: nn.RNNCellBase

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="head")(nn.RNN(self.cell, name="rnn")(x)[:, -1])


def forecast(batch, cell, by_hand, n_states):
    """`nn.RNN` of a cell, and a head on the last output."""
    x, y, model = inputs(batch, 4, 2), inputs(batch, 1, seed=3), Forecast(cell)
    params, _ = variables(model, x)
    p = real_cases.float64(params)
    before, after = unrolled(by_hand(p["cell"]), x, 3, n_states)
    records = {
        f"cell/{name}/kernel": Record(
            before if name.startswith("h") else over_time(x),
            DENSE,
            f"cell/{name}/bias" if "bias" in layer else None,
        )
        for name, layer in p["cell"].items()
    }
    keywords = {"skip": "cell|rnn", "more": records, "wide": False}
    case = linen_model(model, x, objective=squared_error, targets=(y,), **keywords)
    np.testing.assert_allclose(case.expected["head/kernel"].calls[0], after[-1], atol=1e-6)
    return case


@real()
def gru_forecast(batch):
    return forecast(batch, nn.GRUCell(3), gru_cell, 1)


@real()
def lstm_forecast(batch):
    return forecast(batch, nn.OptimizedLSTMCell(3), lstm_cell, 2)


@real()
def lstm_in_arrays(batch):
    """One kernel for all gates, which multiplies inputs and states side by side."""

    def loss_fn(p, x):
        def step(states, x):
            h, c = states
            gates = dense(p, "gates", jnp.concatenate([x, h], -1))
            i, f, g, o = jnp.split(gates, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = (jnp.zeros((x.shape[0], 3), x.dtype),) * 2
        outputs = scan(step, start, jnp.swapaxes(x, 0, 1))[1]
        return score(dense(p, "head", outputs))

    shapes = {"gates": dense_shapes(5, 12)[0], "head": dense_shapes(3, 2)[0]}
    return recorded(loss_fn, filled(shapes), inputs(batch, 4, 2))


@real()
def gru_in_arrays(batch):
    """PyTorch's layout: three gates in a kernel, `(out, in)`, a bias of each of the products."""

    def loss_fn(p, x):
        def step(h, x):
            note("w_ih", x, "...i,oi", "b_ih")
            note("w_hh", h, "...i,oi", "b_hh")
            from_x = jnp.split(x @ p["w_ih"].T + p["b_ih"], 3, -1)
            from_h = jnp.split(h @ p["w_hh"].T + p["b_hh"], 3, -1)
            r, z = (jax.nn.sigmoid(a + b) for a, b in zip(from_x[:2], from_h[:2], strict=True))
            n = jnp.tanh(from_x[2] + r * from_h[2])
            h = (1 - z) * n + z * h
            return h, h

        start = jnp.zeros((x.shape[0], 3), x.dtype)
        last, _ = scan(step, start, jnp.swapaxes(x, 0, 1))
        return score(dense(p, "head", last))

    shapes = {"w_ih": array(9, 2), "w_hh": array(9, 3), "b_ih": array(9), "b_hh": array(9)}
    shapes |= {"head": dense_shapes(3, 2)[0]}
    return recorded(loss_fn, filled(shapes), inputs(batch, 4, 2))


@real()
def linear_recurrent_unit(batch):
    """A diagonal recurrence by an associative scan between two products."""

    def loss_fn(p, x):
        decay = jnp.exp(-jnp.exp(p["log_decay"]))
        u = dense(p, "inward", x)

        def combine(one, other):
            return one[0] * other[0], one[1] * other[0] + other[1]

        decays = jnp.broadcast_to(decay, u.shape)
        states = lax.associative_scan(combine, (decays, u), axis=1)[1]
        y = jax.nn.gelu(dense(p, "outward", states)) + p["skip"] * x
        return score(dense(p, "head", jnp.mean(y, 1)))

    shapes = {"inward": dense_shapes(3, 5, bias=False)[0], "outward": dense_shapes(5, 3)[0]}
    shapes |= {"head": dense_shapes(3, 2)[0], "log_decay": array(5), "skip": array(3)}
    return recorded(loss_fn, filled(shapes), inputs(batch, 4, 3))


class WaveNet(nn.Module):
    """Flax pads before a causal convolution: its statistics are of the map before."""

    @nn.compact
    def __call__(self, x):
        x, skips = nn.Conv(4, (2,), padding="CAUSAL", name="front")(x), 0.0
        for i in range(2):
            keywords = {"padding": "CAUSAL", "kernel_dilation": 2**i}
            gate = nn.sigmoid(nn.Conv(4, (2,), name=f"gate_{i}", **keywords)(x))
            y = gate * nn.tanh(nn.Conv(4, (2,), name=f"filter_{i}", **keywords)(x))
            skips += nn.Conv(3, (1,), name=f"skip_{i}")(y)
            x += nn.Conv(4, (1,), name=f"residual_{i}")(y) if i == 0 else 0.0
        return nn.Conv(5, (1,), name="out")(nn.relu(skips))


@real()
def wavenet(batch):
    return linen_model(WaveNet(), inputs(batch, 6, 2))


@real()
def wavenet_in_arrays(batch):
    """The convolution itself pads, at the front."""

    def conv(p, name, x, dilation):
        note(f"{name}/w", x, "bxi,_io", f"{name}/b", x.shape[1])
        out = lax.conv_general_dilated(
            x,
            p[name]["w"],
            (1,),
            [(dilation, 0)],
            rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return out + p[name]["b"]

    def loss_fn(p, x):
        x = conv(p, "front", x, 1)
        y = jax.nn.sigmoid(conv(p, "gate", x, 2)) * jnp.tanh(conv(p, "filter", x, 2))
        return score(dense(p, "out", x + dense(p, "residual", y)))

    shapes = {"front": {"w": array(2, 2, 4), "b": array(4)}}
    shapes |= {name: {"w": array(2, 4, 4), "b": array(4)} for name in ("gate", "filter")}
    shapes |= {"residual": dense_shapes(4, 4)[0], "out": dense_shapes(4, 3)[0]}
    return recorded(loss_fn, filled(shapes), inputs(batch, 6, 2))


class Periodic(nn.Module):
    """A surrogate of a field on a torus."""

    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Conv(4, (3, 3), padding="CIRCULAR", name="first")(x))
        y = nn.gelu(nn.Conv(4, (3, 3), padding="CIRCULAR", kernel_dilation=2, name="second")(y))
        return x + nn.Conv(x.shape[-1], (1, 1), name="last")(y)


@real()
def periodic_field(batch):
    return linen_model(Periodic(), inputs(batch, 5, 5, 2))


class TemporalConvolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            y = nn.Conv(3, (3,), padding="CAUSAL", kernel_dilation=2**i, name=f"first_{i}")(x)
            y = nn.Conv(3, (3,), padding="CAUSAL", name=f"second_{i}")(nn.relu(y))
            x = nn.relu(nn.Conv(3, (1,), name=f"match_{i}")(x) + y)
        return nn.Dense(2, name="head")(x[:, -1])


@real()
def temporal_convolution(batch):
    return linen_model(TemporalConvolution(), inputs(batch, 6, 2))
