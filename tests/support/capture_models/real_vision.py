"""Image classifiers, autoencoders and segmentation."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from support.capture_models.real_cases import (
    array,
    classified,
    cross_entropy,
    dense,
    dense_shapes,
    filled,
    inputs,
    linen_model,
    normalize,
    over_examples,
    real,
    recorded,
    squared_error,
    variables,
    whole_numbers,
)


class CNN(nn.Module):
    """Flax's MNIST example."""

    @nn.compact
    def __call__(self, x):
        for features in (3, 4):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(5)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3)(x)


@real()
def mnist_cnn(batch):
    return classified(CNN(), inputs(batch, 8, 8, 1))


class VAE(nn.Module):
    """Flax's VAE example, whose layers are made by `setup` and in methods other than `__call__`."""

    def setup(self):
        self.encode_1, self.encode_mean, self.encode_logvar = nn.Dense(5), nn.Dense(2), nn.Dense(2)
        self.decode_1, self.decode_2 = nn.Dense(5), nn.Dense(6)

    def __call__(self, x, key):
        hidden = nn.relu(self.encode_1(x))
        mean, logvar = self.encode_mean(hidden), self.encode_logvar(hidden)
        noise = jax.random.normal(key, logvar.shape, jnp.float32)
        return self.generate(mean + noise * jnp.exp(0.5 * logvar), sigmoid=False), mean, logvar

    def generate(self, z, sigmoid=True):
        x = self.decode_2(nn.relu(self.decode_1(z)))
        return nn.sigmoid(x) if sigmoid else x


@real()
def flax_vae(batch):
    x, model, key = inputs(batch, 6), VAE(), jax.random.key(4)
    params, _ = variables(model, x, key)

    def loss_fn(params, x, key):
        logits, mean, logvar = model.apply({"params": params}, x, key)
        targets = nn.sigmoid(x)
        reconstruction = jnp.sum(nn.softplus(logits) - targets * logits, -1)
        divergence = -0.5 * jnp.sum(1 + logvar - mean**2 - jnp.exp(logvar), -1)
        return jnp.mean(reconstruction) + jnp.mean(divergence)

    return recorded(loss_fn, params, x, key)


class Autoencoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(3, (3, 3), strides=2, name="encode")(x))
        code = nn.Dense(4, name="to_code")(y.reshape(x.shape[0], -1))
        y = nn.relu(nn.Dense(y[0].size, name="from_code")(code)).reshape(y.shape)
        y = nn.relu(nn.ConvTranspose(3, (3, 3), strides=(2, 2), name="decode")(y))
        return nn.Conv(x.shape[-1], (3, 3), padding="VALID", name="out")(jnp.pad(y, EDGE))


EDGE = ((0, 0), (1, 1), (1, 1), (0, 0))


@real()
def convolutional_autoencoder(batch):
    x = inputs(batch, 4, 4, 2)
    return linen_model(Autoencoder(), x, objective=squared_error, targets=(x,))


class EncoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(6)(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y)


class ViT(nn.Module):
    """Of vit_jax: patches by a convolution, a class token, a position table."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2, 2), strides=(2, 2), padding="VALID", name="embedding")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = self.param("cls", nn.initializers.zeros, (1, 1, x.shape[-1]))
        x = jnp.concatenate([jnp.tile(token, [x.shape[0], 1, 1]), x], 1)
        init = nn.initializers.normal(0.02)
        x = x + self.param("pos_embedding", init, (1, *x.shape[1:]))
        for i in range(2):
            x = EncoderBlock(name=f"encoderblock_{i}")(x)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="encoder_norm")(x)[:, 0])


@real()
def vit_class_token(batch):
    return classified(ViT(), inputs(batch, 4, 4, 2))


@real()
def vit_registers(batch):
    """Of DINOv2, in arrays: fused attention projections, layer scale, register tokens."""

    def block(p, x, n_heads=2):
        y = normalize(x) * p["norm1"] + p["norm1_b"]
        heads = dense(p, "qkv", y).reshape(*y.shape[:-1], 3, n_heads, -1)
        q, k, v = jnp.moveaxis(heads, -3, 0)
        odds = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", odds, v).reshape(x.shape)
        x = x + p["scale1"] * dense(p, "proj", mixed)
        y = jax.nn.gelu(dense(p, "fc1", normalize(x) * p["norm2"] + p["norm2_b"]))
        return x + p["scale2"] * dense(p, "fc2", y)

    def loss_fn(p, patches, labels):
        x = dense(p, "patch", patches)
        token = jnp.broadcast_to(p["cls"], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([token, x], 1) + p["pos"]
        registers = jnp.broadcast_to(p["registers"], (x.shape[0], *p["registers"].shape[1:]))
        x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], 1)
        x = block(p, x)
        return cross_entropy(dense(p, "head", normalize(x)[:, 0]), labels)

    layers = ("patch", (3, 4)), ("qkv", (4, 12)), ("proj", (4, 4)), ("fc1", (4, 6)), ("fc2", (6, 4))
    shapes = {name: dense_shapes(*sizes)[0] for name, sizes in (*layers, ("head", (4, 3)))}
    names = ("norm1", "norm1_b", "scale1", "norm2", "norm2_b", "scale2")
    shapes |= {name: array(4) for name in names}
    shapes |= {"cls": array(1, 1, 4), "pos": array(1, 5, 4), "registers": array(1, 2, 4)}
    labels = whole_numbers(batch, below=3)
    return recorded(loss_fn, filled(shapes), inputs(batch, 4, 3), labels)


@real()
def vit_without_patch_bias(batch):
    """A position table, square here, is added to the product itself: it is no bias."""

    def loss_fn(p, patches, labels):
        x = dense(p, "patch", patches) + p["pos"]
        x = x + dense(p, "mlp", normalize(x) * (1 + p["scale"]))
        return cross_entropy(dense(p, "head", jnp.mean(x, 1)), labels)

    sizes = {"patch": (3, 4), "mlp": (4, 4), "head": (4, 3)}
    shapes = {name: dense_shapes(*s, bias=name == "head")[0] for name, s in sizes.items()}
    shapes |= {"pos": array(1, 4, 4), "scale": array(4)}
    labels = whole_numbers(batch, below=3)
    return recorded(loss_fn, filled(shapes), inputs(batch, 4, 3), labels)


@real({"pos": ".+"})
def vit_per_example(batch):
    """The same for one image, under `vmap`."""

    def loss_fn(p, patches, labels):
        def one(patches):
            x = jnp.concatenate([p["cls"], dense(p, "patch", patches)])
            x = jnp.tanh(dense(p, "mix", (x + p["pos"]).T).T) + p["pos"]
            return dense(p, "head", x[0])

        return cross_entropy(over_examples(one)(patches), labels)

    shapes = {name: dense_shapes(*s)[0] for name, s in {"mix": (4, 4), "head": (4, 3)}.items()}
    shapes |= {"patch": dense_shapes(3, 4, bias=False)[0], "pos": array(4, 4), "cls": array(1, 4)}
    labels = whole_numbers(batch, below=3)
    return recorded(loss_fn, filled(shapes), inputs(batch, 3, 3), labels)


class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(4, (2, 2), strides=(2, 2), name="stem")(x))
        y = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
        y = nn.Dense(8, name="expand")(nn.LayerNorm()(y))
        y = nn.Dense(4, name="reduce")(nn.gelu(y))
        x = x + self.param("layer_scale", nn.initializers.constant(1e-2), (4,)) * y
        return nn.Dense(3, name="head")(nn.LayerNorm()(x.mean((1, 2))))


@real()
def convnext(batch):
    return classified(ConvNeXt(), inputs(batch, 6, 6, 2))


class MixerMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(5)(x)))


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2, 2), strides=(2, 2), name="stem")(x).reshape(x.shape[0], -1, 4)
        y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
        x = x + jnp.swapaxes(MixerMlp(name="token_mixing")(y), 1, 2)
        x = x + MixerMlp(name="channel_mixing")(nn.LayerNorm()(x))
        return nn.Dense(3, name="head")(nn.LayerNorm()(x).mean(1))


@real()
def mlp_mixer(batch):
    return classified(Mixer(), inputs(batch, 4, 6, 2))


class BasicBlock(nn.Module):
    """Of a residual network, without biases, downsampling."""

    norm: type[nn.Module]
    keywords: dict

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(4, (3, 3), strides=2, use_bias=False)(x)
        y = nn.relu(self.norm(**self.keywords)(y))
        y = self.norm(**self.keywords)(nn.Conv(4, (3, 3), use_bias=False)(y))
        shortcut = nn.Conv(4, (1, 1), strides=2, use_bias=False, name="shortcut")(x)
        return nn.relu(self.norm(**self.keywords)(shortcut) + y)


class ResNet(nn.Module):
    norm: type[nn.Module]
    keywords: dict

    @nn.compact
    def __call__(self, x):
        x = BasicBlock(self.norm, self.keywords)(nn.Conv(3, (3, 3), use_bias=False)(x))
        return nn.Dense(3)(x.mean((1, 2)))


@real()
def resnet_group_norm(batch):
    return classified(ResNet(nn.GroupNorm, {"num_groups": 2}), inputs(batch, 6, 6, 2))


@real()
def resnet_batch_norm(batch):
    """The running statistics are an argument and come back beside the loss."""
    x, labels = inputs(batch, 6, 6, 2), whole_numbers(batch, below=3)
    model = ResNet(nn.BatchNorm, {"use_running_average": False})
    params, state = variables(model, x)

    def loss_fn(params, state, x, labels):
        logits, state = model.apply({"params": params, **state}, x, mutable=["batch_stats"])
        return cross_entropy(logits, labels), state

    return recorded(loss_fn, params, state, x, labels, has_aux=True)


class MobileBlock(nn.Module):
    """Inverted residual with squeeze and excitation."""

    @nn.compact
    def __call__(self, x):
        y = nn.silu(nn.Conv(6, (1, 1), use_bias=False, name="expand")(x))
        y = nn.silu(nn.Conv(6, (3, 3), feature_group_count=6, use_bias=False, name="depthwise")(y))
        gate = nn.silu(nn.Conv(2, (1, 1), name="squeeze")(y.mean((1, 2), keepdims=True)))
        y = y * nn.sigmoid(nn.Conv(6, (1, 1), name="excite")(gate))
        return x + nn.Conv(x.shape[-1], (1, 1), use_bias=False, name="project")(y)


@real()
def mobile_block(batch):
    return linen_model(MobileBlock(), inputs(batch, 4, 4, 3))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        skip = nn.relu(nn.Conv(3, (3, 3), name="down_1")(x))
        y = nn.max_pool(skip, (2, 2), strides=(2, 2))
        y = nn.relu(nn.Conv(4, (3, 3), name="down_2")(y))
        y = nn.ConvTranspose(3, (2, 2), strides=(2, 2), name="up")(y)
        y = nn.relu(nn.Conv(3, (3, 3), name="merge")(jnp.concatenate([skip, y], -1)))
        return nn.Conv(2, (1, 1), name="out")(y)


@real()
def unet(batch):
    x, labels = inputs(batch, 4, 4, 2), whole_numbers(batch, 4, 4, below=2)
    return linen_model(UNet(), x, objective=cross_entropy, targets=(labels,))
