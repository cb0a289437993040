"""Transformer blocks: products by einsum, stacked layers, experts, attention between sequences."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from support.capture_models import real_cases
from support.capture_models.by_hand import attend, gelu, layer_norm, stack
from support.capture_models.real_cases import (
    array,
    cross_entropy,
    dense,
    dense_shapes,
    filled,
    inputs,
    linen_model,
    normalize,
    note,
    over_examples,
    real,
    recorded,
    scan,
    score,
    squared_error,
    variables,
    whole_numbers,
)
from support.capture_models.record import DENSE, Record, hand_score

LOOKUP = r"gather|look|embedding"


class Einsum(nn.Module):
    """Gemma's: the parameter is called `w`."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        w = self.param("w", nn.initializers.normal(), self.shape)
        left, right = equation.split("->")[0].split(",")
        result = equation.split("->")[1]
        kept = "".join(label for label in left if label in right or label not in result)
        note("/".join((*self.path, "w")), x, f"...{kept.lower()},{right.lower()}")
        return jnp.einsum(equation, x, w)


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * (1 + scale)


class GemmaBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = RMSNorm(name="pre_attention_norm")(x)
        queries = Einsum((2, 4, 4), name="q_einsum")("BTD,NDH->BTNH", y) / 2
        keys, values = Einsum((2, 1, 4, 4), name="kv_einsum")("BSD,CKDH->CBSKH", y)
        keys, values = (jnp.repeat(a, 2, 2) for a in (keys, values))
        logits = 50 * jnp.tanh(jnp.einsum("BTNH,BSNH->BNTS", queries, keys) / 50)
        mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        odds = jax.nn.softmax(jnp.where(mask, logits, -1e9))
        mixed = jnp.einsum("BNTS,BSNH->BTNH", odds, values)
        out = Einsum((2, 4, 4), name="attn_vec_einsum")("BTNH,NHD->BTD", mixed)
        x = x + RMSNorm(name="post_attention_norm")(out)
        return x + FeedForward(name="mlp")(RMSNorm(name="pre_ffw_norm")(x))


class FeedForward(nn.Module):
    """GeGLU, both of whose kernels are in one array."""

    @nn.compact
    def __call__(self, x):
        name = "/".join(self.path)
        gating = self.param("gating_einsum", nn.initializers.normal(), (2, 4, 6))
        linear = self.param("linear", nn.initializers.normal(), (6, 4))
        note(f"{name}/gating_einsum", jnp.stack([x, x]), "C...d,Cdf")
        hidden = nn.gelu(x @ gating[0]) * (x @ gating[1])
        return note(f"{name}/linear", hidden) @ linear


class Gemma(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        table = self.param("input_embedding", nn.initializers.normal(), (6, 4))
        x = table[tokens] * 2.0
        x = GemmaBlock(name="layer_0")(x)
        return 30 * jnp.tanh(RMSNorm(name="final_norm")(x) @ table.T / 30)


@real({"input_embedding": LOOKUP})
def gemma(batch):
    tokens = whole_numbers(batch, 4, below=6)
    return linen_model(Gemma(), tokens, objective=cross_entropy, targets=(tokens,))


@real({"wte": LOOKUP, "wpe": ".+"})
def nano_gpt(batch):
    """In arrays, the table tied to the output, the positions' rows cut from a longer table."""

    def one(p, tokens, n_heads=2):
        x = p["wte"][tokens] + p["wpe"][: len(tokens)]
        for i, block in enumerate(p["blocks"]):
            y = normalize(x) * block["ln1"]
            qkv = dense(p, f"blocks/{i}/attn", y)
            q, k, v = (a.reshape(len(tokens), n_heads, -1) for a in jnp.split(qkv, 3, -1))
            logits = jnp.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
            logits = jnp.where(jnp.tril(jnp.ones(logits.shape[1:], bool)), logits, -1e9)
            mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(logits), v).reshape(x.shape)
            x = x + dense(p, f"blocks/{i}/proj", mixed)
            y = jax.nn.gelu(dense(p, f"blocks/{i}/fc", normalize(x) * block["ln2"]))
            x = x + dense(p, f"blocks/{i}/out", y)
        return normalize(x) @ p["wte"].T

    def loss_fn(p, tokens):
        logits = over_examples(lambda row: one(p, row))(tokens)
        return cross_entropy(logits[:, :-1], tokens[:, 1:])

    sizes = {"attn": (4, 12), "proj": (4, 4), "fc": (4, 6), "out": (6, 4)}
    block = {name: dense_shapes(*size)[0] for name, size in sizes.items()}
    block |= {"ln1": array(4), "ln2": array(4)}
    shapes = {"wte": array(6, 4), "wpe": array(5, 4), "blocks": [block, block]}
    return recorded(loss_fn, filled(shapes), whole_numbers(batch, 4, below=6))


@real()
def low_rank_adapters(batch):
    """LoRA: the base is an argument, the adapters' products are of products."""

    def loss_fn(adapters, base, x, y):
        for i, layer in enumerate(base):
            down = note(f"{i}/a", x) @ adapters[i]["a"]
            x = x @ layer["w"] + layer["b"] + 2.0 * (note(f"{i}/b", down) @ adapters[i]["b"])
            x = jnp.tanh(x) if i < len(base) - 1 else x
        return squared_error(x, y)

    adapters = [{"a": array(4, 2), "b": array(2, 5)}, {"a": array(5, 2), "b": array(2, 3)}]
    base = filled(dense_shapes(4, 5, 3), seed=3)
    return recorded(loss_fn, filled(adapters), base, inputs(batch, 4), inputs(batch, 3))


class Block(nn.Module):
    """For `nn.scan`, which hands it nothing beside what it carries."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="norm_1")(x)
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=4, name="attention")(y)
        y = nn.gelu(nn.Dense(5, name="up")(nn.LayerNorm(name="norm_2")(x)))
        return x + nn.Dense(4, name="down")(y), None


class Stacked(nn.Module):
    """With a layer axis at `axis` of each parameter."""

    axis: int

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return nn.Dense(2, name="head")(blocks(name="blocks")(x, None)[0])


def stacked_transformer(batch, axis):
    x, model = inputs(batch, 4, 4), Stacked(axis)
    params, _ = variables(model, x)
    p = real_cases.float64(params)
    layers, hidden = [], x.astype(np.float64)
    for depth in range(3):
        take = functools.partial(np.take, indices=depth, axis=axis)
        block = jax.tree.map(take, p["blocks"])
        normed = layer_norm(hidden, **block["norm_1"], eps=1e-6)
        records, mixed = attend(normed, block["attention"], "blocks/attention/")
        hidden = hidden + mixed
        normed = layer_norm(hidden, **block["norm_2"], eps=1e-6)
        wide = gelu(normed @ block["up"]["kernel"] + block["up"]["bias"])
        records["blocks/up/kernel"] = Record([normed], DENSE, "blocks/up/bias")
        records["blocks/down/kernel"] = Record([wide], DENSE, "blocks/down/bias")
        layers.append(records)
        hidden = hidden + wide @ block["down"]["kernel"] + block["down"]["bias"]
    expected = stack(layers)
    if axis == 1:  # The layer's axis comes second in the kernels.
        for name, record in expected.items():
            left, right = record.axes.split(",")
            axes = f"{left},{right[1]}L{right[2:]}"
            expected[name] = Record(record.calls, axes, record.bias)
    loss = hand_score(hidden @ p["head"]["kernel"] + p["head"]["bias"])
    expected["head/kernel"] = Record([hidden], DENSE, "head/bias")

    def loss_fn(params, x):
        return score(model.apply({"params": params}, x))

    return real_cases.RealModel(loss_fn, params, (jnp.asarray(x),), expected, loss)


@real()
def scanned_transformer(batch):
    return stacked_transformer(batch, 0)


@real()
def scanned_transformer_axis_1(batch):
    return stacked_transformer(batch, 1)


@real()
def scanned_transformer_in_arrays(batch):
    """Layers stacked in every array, as MaxText and others do it, rematerialized."""

    def block(x, p):
        y = normalize(x) * p["norm"]
        heads = [jnp.einsum("btd,dnh->btnh", y, p[name]) for name in ("q", "k", "v")]
        odds = jax.nn.softmax(jnp.einsum("bqnh,bknh->bnqk", *heads[:2]))
        mixed = jnp.einsum("bnqk,bknh->bqnh", odds, heads[2])
        x = x + jnp.einsum("btnh,nhd->btd", mixed, p["o"])
        y = normalize(x)
        hidden = jax.nn.silu(y @ p["gate"]) * (y @ p["up"])
        return x + hidden @ p["down"], {"o": mixed, "gate": y, "up": y, "down": hidden}

    def loss_fn(p, x):
        step = jax.checkpoint(lambda x, own: (block(x, own)[0], None))
        return score(jax.lax.scan(step, x, p["layers"])[0] @ p["head"])

    def watch(p, x):
        calls = []
        for i in range(2):
            own = jax.tree.map(lambda leaf: leaf[i], p["layers"])  # noqa: B023
            first = normalize(x) * own["norm"]
            x, seen = block(x, own)
            calls.append(seen | dict.fromkeys("qkv", first))
        for name, axes in AXES.items():
            note(f"layers/{name}", jnp.stack([seen[name] for seen in calls]), axes)
        return score(note("head", x) @ p["head"])

    shapes = {"q": (4, 2, 2), "k": (4, 2, 2), "v": (4, 2, 2), "o": (2, 2, 4), "norm": (4,)}
    shapes |= {"gate": (4, 5), "up": (4, 5), "down": (5, 4)}
    layers = {name: array(2, *shape) for name, shape in shapes.items()}
    params = filled({"layers": layers, "head": array(4, 3)})
    return recorded(loss_fn, params, inputs(batch, 4, 4), watch=watch)


AXES = dict.fromkeys(("q", "k", "v"), "L...d,Ldnh") | {"o": "L...nh,Lnhd"}
AXES |= dict.fromkeys(("gate", "up", "down"), "L...i,Lio")


class CrossAttention(nn.Module):
    """A Perceiver's: latent vectors that are parameters ask the inputs."""

    @nn.compact
    def __call__(self, x):
        latents = self.param("latents", nn.initializers.normal(), (3, 4))
        latents = jnp.broadcast_to(latents, (x.shape[0], 3, 4))
        cross = nn.MultiHeadDotProductAttention(2, qkv_features=6, out_features=4, name="cross")
        y = latents + cross(nn.LayerNorm()(latents), nn.LayerNorm()(x))
        own = nn.MultiHeadDotProductAttention(2, name="own")(nn.LayerNorm()(y))
        return nn.Dense(2, name="head")((y + own).mean(1))


@real({"latents": ".+"}, optional=["cross/query/kernel"])
def perceiver(batch):
    return linen_model(CrossAttention(), inputs(batch, 5, 3))


@real()
def mixture_of_experts(batch):
    """Of the Switch Transformer: tokens go to the experts' slots by an einsum, and back."""

    def loss_fn(p, x):
        tokens = x.reshape(-1, x.shape[-1])
        gates = jax.nn.softmax(dense(p, "router", tokens))
        chosen = jax.nn.one_hot(jnp.argmax(gates, -1), 3)
        place = jnp.cumsum(chosen, 0) * chosen
        slot = jnp.sum(place, -1).astype(int) - 1
        dispatch = chosen[..., None] * jax.nn.one_hot(slot, 4)[:, None]
        slots = note("w1", jnp.einsum("tec,td->ecd", dispatch, tokens), "E...i,Eio", "b1")
        hidden = jax.nn.relu(jnp.einsum("ecd,edf->ecf", slots, p["w1"]) + p["b1"][:, None])
        note("w2", hidden, "E...i,Eio")
        out = jnp.einsum("ecf,efd->ecd", hidden, p["w2"])
        combine = dispatch * jnp.sum(gates * chosen, -1)[:, None, None]
        y = x + jnp.einsum("tec,ecd->td", combine, out).reshape(x.shape)
        balance = 3 * jnp.sum(jnp.mean(chosen, 0) * jnp.mean(gates, 0))
        return score(dense(p, "head", y)) + 1e-2 * balance

    shapes = {"router": dense_shapes(4, 3, bias=False)[0], "head": dense_shapes(4, 2)[0]}
    shapes |= {"w1": array(3, 4, 5), "b1": array(3, 5), "w2": array(3, 5, 4)}
    return recorded(loss_fn, filled(shapes), inputs(batch, 4, 4))


@real()
def universal_transformer(batch):
    """One block that a scan repeats, so that each of its kernels sees every depth's inputs."""

    def loss_fn(p, x):
        def step(x, _):
            q, k, v = jnp.split(dense(p, "qkv", normalize(x)), 3, -1)
            mixed = jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v
            return x + jnp.tanh(dense(p, "out", mixed)), None

        return score(dense(p, "head", scan(step, x, length=3)[0]))

    sizes = {"qkv": (4, 12), "out": (4, 4), "head": (4, 2)}
    shapes = {name: dense_shapes(*size)[0] for name, size in sizes.items()}
    return recorded(loss_fn, filled(shapes), inputs(batch, 3, 4))
