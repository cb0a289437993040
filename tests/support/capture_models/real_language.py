"""Recurrent and convolutional text models, taggers, translation with shared embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from support.capture_models import real_cases
from support.capture_models.by_hand import lstm_cell
from support.capture_models.real_cases import (
    cross_entropy,
    linen_model,
    real,
    recorded,
    variables,
    whole_numbers,
)
from support.capture_models.record import DENSE, Record

LOOKUP = r"gather|look|embedding"


def tokens_of(batch, length=4, below=6, seed=2):
    return whole_numbers(batch, length, below=below, seed=seed)


def lstm_by_hand(p, name, x, states=None, reverse=False):
    """Records of an `OptimizedLSTMCell` along the time axis, its outputs and its last states."""
    features = p["hi"]["bias"].shape[0]
    states = [np.zeros((len(x), features))] * 2 if states is None else states
    cell, before, outputs = lstm_cell(p), [], []
    steps = list(np.swapaxes(np.asarray(x, np.float64), 0, 1))
    for row in steps[::-1] if reverse else steps:
        before.append(states[-1])
        states = cell(states, row)
        outputs.append(states[-1])
    records = {
        f"{name}/{gate}/kernel": Record(
            before if gate.startswith("h") else steps,
            DENSE,
            f"{name}/{gate}/bias" if "bias" in layer else None,
        )
        for gate, layer in p.items()
    }
    outputs = outputs[::-1] if reverse else outputs
    return records, np.stack(outputs, 1), states


class Seq2seq(nn.Module):
    """Flax's example: one LSTM encodes characters, another decodes with teacher forcing."""

    @nn.compact
    def __call__(self, encoder_inputs, decoder_inputs):
        encoder = nn.RNN(nn.OptimizedLSTMCell(3, name="encoder"), return_carry=True)
        carry, _ = encoder(encoder_inputs)
        return nn.RNN(DecoderCell(3, 5, name="decoder"))(decoder_inputs, initial_carry=carry)


class DecoderCell(nn.RNNCellBase):
    features: int
    vocabulary: int

    @nn.compact
    def __call__(self, carry, x):
        carry, y = nn.OptimizedLSTMCell(self.features, name="lstm")(carry, x)
        return carry, nn.Dense(self.vocabulary, name="projection")(y)

    def initialize_carry(self, rng, shape):
        return nn.OptimizedLSTMCell(self.features).initialize_carry(rng, shape)

    @property
    def num_feature_axes(self):
        return 1


@real()
def flax_seq2seq(batch):
    source, target = tokens_of(batch, below=5), tokens_of(batch, 3, 5, seed=3)
    one_hot = np.eye(5, dtype=np.float32)
    model, args = Seq2seq(), (one_hot[source], one_hot[target])
    params, _ = variables(model, *args)
    p = real_cases.float64(params)
    records, _, states = lstm_by_hand(p["encoder"], "encoder", args[0])
    more, outputs, _ = lstm_by_hand(p["decoder"]["lstm"], "decoder/lstm", args[1], states)
    projection = {"decoder/projection/kernel": Record([outputs], DENSE, "decoder/projection/bias")}
    logits = outputs @ p["decoder"]["projection"]["kernel"] + p["decoder"]["projection"]["bias"]

    def loss_fn(params, *args):
        return cross_entropy(model.apply({"params": params}, *args), target)

    args = tuple(map(jnp.asarray, args))
    return real_cases.RealModel(
        loss_fn, params, args, records | more | projection, float(cross_entropy(logits, target))
    )


class TextClassifier(nn.Module):
    """Flax's SST-2 example: embedding, LSTMs in both directions, attention, classifier."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(6, 4, name="embedder")(tokens)
        cells = [nn.OptimizedLSTMCell(3, name=name) for name in ("forward", "backward")]
        x = nn.Bidirectional(*map(nn.RNN, cells))(x)
        keys = nn.tanh(nn.Dense(4, use_bias=False, name="keys")(x))
        energy = nn.Dense(1, use_bias=False, name="energy")(keys)
        context = jnp.sum(nn.softmax(energy, 1) * x, 1)
        hidden = nn.tanh(nn.Dense(5, name="hidden")(context))
        return nn.Dense(2, name="logits")(hidden)


@real({"embedder/embedding": LOOKUP})
def flax_sst2(batch):
    tokens, model = tokens_of(batch), TextClassifier()
    params, _ = variables(model, tokens)
    p = real_cases.float64(params)
    embedded = p["embedder"]["embedding"][tokens]
    forward, *outputs = lstm_by_hand(p["forward"], "forward", embedded)
    backward, *others = lstm_by_hand(p["backward"], "backward", embedded, reverse=True)
    case = linen_model(
        model,
        tokens,
        objective=cross_entropy,
        targets=(whole_numbers(batch, below=2),),
        skip="forward|backward",
        more=forward | backward,
        wide=False,
    )
    both = np.concatenate([outputs[0], others[0]], -1)
    np.testing.assert_allclose(case.expected["keys/kernel"].calls[0], both, atol=1e-6)
    return case


class FeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1])(nn.relu(nn.Dense(6)(x)))


class EncoderLayer(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False)(y, mask=mask)
        return x + FeedForward(name="mlp")(nn.LayerNorm()(x))


class DecoderLayer(nn.Module):
    @nn.compact
    def __call__(self, x, encoded, causal, mask):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False, name="own")(y, mask=causal)
        y = nn.LayerNorm()(x)
        cross = nn.MultiHeadDotProductAttention(2, use_bias=False, name="cross")
        x = x + cross(y, encoded, mask=mask)
        return x + FeedForward(name="mlp")(nn.LayerNorm()(x))


def sinusoids(length, width):
    angles = np.arange(length)[:, None] / 1e4 ** (np.arange(width // 2) * 2 / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32)


class Translation(nn.Module):
    """Flax's WMT example: one table embeds both languages and gives the logits."""

    @nn.compact
    def __call__(self, source, target):
        embed = nn.Embed(6, 4, name="shared_embedding")
        mask = nn.make_attention_mask(source > 0, source > 0)
        encoded = embed(source) + sinusoids(source.shape[1], 4)
        encoded = EncoderLayer(name="encoder")(encoded, mask)
        encoded = nn.LayerNorm(name="encoder_norm")(encoded)
        shifted = jnp.pad(target, ((0, 0), (1, 0)))[:, :-1]
        y = embed(shifted) + sinusoids(target.shape[1], 4)
        causal = nn.make_causal_mask(target)
        cross_mask = nn.make_attention_mask(target > 0, source > 0)
        y = DecoderLayer(name="decoder")(y, encoded, causal, cross_mask)
        return embed.attend(nn.LayerNorm(name="decoder_norm")(y)) / np.sqrt(4)


@real({"shared_embedding/embedding": LOOKUP})
def flax_wmt(batch):
    source, target = 1 + tokens_of(batch, below=5), 1 + tokens_of(batch, 3, 5, seed=3)
    return linen_model(Translation(), source, target, objective=cross_entropy, targets=(target,))


class LanguageModel(nn.Module):
    """Flax's LM1B example: every parameter is boxed with the names of its axes."""

    @nn.compact
    def __call__(self, tokens):
        def boxed(*names, init=nn.initializers.lecun_normal()):  # noqa: B008
            return nn.with_logical_partitioning(init, names)

        normal, zeros = nn.initializers.normal(1.0), nn.initializers.zeros
        x = nn.Embed(6, 4, embedding_init=boxed("vocab", "embed", init=normal))(tokens)
        table = self.param("positions", boxed(None, "embed", init=normal), (tokens.shape[1], 4))
        x = x + table
        y = nn.LayerNorm(scale_init=boxed("embed", init=nn.initializers.ones))(x)
        attention = nn.MultiHeadDotProductAttention(
            2, use_bias=False, kernel_init=boxed("embed", "kv")
        )
        x = x + attention(y, mask=nn.make_causal_mask(tokens))
        up = {"kernel_init": boxed("embed", "mlp"), "bias_init": boxed("mlp", init=zeros)}
        down = {"kernel_init": boxed("mlp", "embed"), "bias_init": boxed("embed", init=zeros)}
        y = nn.relu(nn.Dense(6, name="up", **up)(nn.LayerNorm()(x)))
        x = x + nn.Dense(4, name="down", **down)(y)
        head = {"kernel_init": boxed("embed", "vocab"), "bias_init": boxed("vocab", init=zeros)}
        return nn.Dense(6, name="logits", **head)(nn.LayerNorm()(x))


def lm1b(batch, unbox):
    tokens, model = tokens_of(batch), LanguageModel()
    params, _ = variables(model, tokens)
    assert any(isinstance(box, nn.Partitioned) for box in jax.tree.leaves(params, is_leaf=is_box))

    def loss_fn(params, tokens):
        params = nn.meta.unbox(params) if unbox else params
        logits = model.apply({"params": params}, tokens)
        return cross_entropy(logits[:, :-1], tokens[:, 1:])

    return recorded(loss_fn, params, tokens)


def is_box(leaf):
    return isinstance(leaf, nn.Partitioned)


@real({"Embed_0/embedding": LOOKUP})
def flax_lm1b(batch):
    return lm1b(batch, unbox=True)


@real({"Embed_0/embedding": LOOKUP})
def flax_lm1b_boxed(batch):
    """The model itself takes the values out of their boxes."""
    return lm1b(batch, unbox=False)


class Tagger(nn.Module):
    """Flax's part-of-speech example."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(6, 4, name="embed")(tokens)
        init = nn.initializers.normal(0.02)
        x = x + self.param("pos_embedding", init, (1, 5, 4))[:, : x.shape[1]]
        mask = nn.make_attention_mask(tokens > 0, tokens > 0)
        x = EncoderLayer(name="encoderblock_0")(x, mask)
        return nn.Dense(3, name="logits")(nn.LayerNorm(name="encoder_norm")(x))


@real({"embed/embedding": LOOKUP})
def flax_nlp_seq(batch):
    tokens = 1 + tokens_of(batch, below=5)
    tags = tokens_of(batch, below=3, seed=5)
    return linen_model(Tagger(), tokens, objective=cross_entropy, targets=(tags,))


class ConvolutionalText(nn.Module):
    """Kim's classifier: windows of several widths, each pooled over time."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(6, 4, name="embed")(tokens)
        windows = [nn.Conv(3, (width,), padding="VALID", name=f"width_{width}") for width in (2, 3)]
        pooled = [nn.relu(conv(x)).max(1) for conv in windows]
        return nn.Dense(2, name="logits")(jnp.concatenate(pooled, -1))


@real({"embed/embedding": LOOKUP})
def convolutional_text(batch):
    labels = whole_numbers(batch, below=2)
    return linen_model(
        ConvolutionalText(), tokens_of(batch, 5), objective=cross_entropy, targets=(labels,)
    )
