"""Networks that see two views, and discriminators with constrained kernels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from support.capture_models.real_cases import (
    filled,
    inputs,
    muted,
    real,
    recorded,
    under,
    variables,
)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), name="conv")(x)).mean((1, 2))
        return nn.Dense(4, name="out")(nn.relu(nn.Dense(5, name="hidden")(x)))


class Predictor(nn.Module):
    @nn.compact
    def __call__(self, z):
        return nn.Dense(4, name="out")(nn.relu(nn.Dense(3, name="hidden")(z)))


def cosine(a, b):
    a, b = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    return jnp.mean(jnp.sum(a * b, -1))


def networks():
    encoder, predictor = Encoder(), Predictor()
    x = jnp.zeros((1, 4, 4, 2))
    params, _ = variables(encoder, x)
    head, _ = variables(predictor, jnp.zeros((1, 4)))

    def encode(params, x):
        with under("encoder"):
            return encoder.apply({"params": params["encoder"]}, x)

    def predict(params, z):
        with under("predictor"):
            return predictor.apply({"params": params["predictor"]}, z)

    return encode, predict, {"encoder": params, "predictor": head}


def two_views(batch):
    return inputs(batch, 4, 4, 2), inputs(batch, 4, 4, 2, seed=7)


@real()
def simsiam(batch):
    """Both views go through the predictor, so all rows have a derivative."""
    encode, predict, params = networks()

    def loss_fn(params, one, other):
        z1, z2 = encode(params, one), encode(params, other)
        p1, p2 = predict(params, z1), predict(params, z2)
        stop = jax.lax.stop_gradient
        return -0.5 * (cosine(p1, stop(z2)) + cosine(p2, stop(z1)))

    return recorded(loss_fn, params, *two_views(batch))


@real()
def simsiam_one_sided(batch):
    """The second view is a target alone: its rows do not count."""
    encode, predict, params = networks()

    def loss_fn(params, one, other):
        prediction = predict(params, encode(params, one))
        with muted():
            target = encode(params, other)
        return -cosine(prediction, jax.lax.stop_gradient(target))

    return recorded(loss_fn, params, *two_views(batch))


@real()
def byol(batch):
    """Targets come from a moving average of the parameters, an argument."""
    encode, predict, params = networks()

    def loss_fn(params, target_params, one, other):
        losses = []
        for online, target in ((one, other), (other, one)):
            with muted():
                projection = jax.lax.stop_gradient(encode(target_params, target))
            losses.append(2 - 2 * cosine(predict(params, encode(params, online)), projection))
        return sum(losses)

    return recorded(loss_fn, params, filled(params, seed=5), *two_views(batch))


@real()
def siamese_contrastive(batch):
    encode, _, params = networks()

    def loss_fn(params, one, other, same):
        distance = jnp.linalg.norm(encode(params, one) - encode(params, other), axis=-1)
        return jnp.mean(same * distance**2 + (1 - same) * nn.relu(2.0 - distance) ** 2)

    same = np.arange(batch, dtype=np.float32) % 2
    return recorded(loss_fn, {"encoder": params["encoder"]}, *two_views(batch), same)


@real()
def simclr(batch):
    """Both views in one batch."""
    encode, _, params = networks()

    def loss_fn(params, one, other):
        z = encode(params, jnp.concatenate([one, other]))
        z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
        logits = z @ z.T - 1e3 * jnp.eye(len(z))
        positives = jnp.roll(jnp.arange(len(z)), len(one))
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(z)), positives] + 0.1 * z[:, 0])

    return recorded(loss_fn, {"encoder": params["encoder"]}, *two_views(batch))


class WeightNormDiscriminator(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.leaky_relu(nn.WeightNorm(nn.Dense(4, name="normed"))(x))
        return nn.Dense(1, name="out")(x)


class SpectralNormDiscriminator(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            dense = nn.Dense(4, name=f"normed_{i}")
            x = nn.leaky_relu(nn.SpectralNorm(dense)(x, update_stats=True))
        return nn.Dense(1, name="out")(x)


def hinge(real_logits, fake_logits):
    return jnp.mean(nn.relu(1 - real_logits)) + jnp.mean(nn.relu(1 + fake_logits))


@real({"normed/kernel": r"`(mul|div)`|normali|reparam|tied"})
def weight_norm_discriminator(batch):
    model = WeightNormDiscriminator()
    x, fake = inputs(batch, 5), inputs(batch, 5, seed=8)
    params, _ = variables(model, x)

    def loss_fn(params, x, fake):
        return hinge(*(model.apply({"params": params}, images) for images in (x, fake)))

    return recorded(loss_fn, params, x, fake, skip="normed")


@real({f"normed_{i}/kernel": r"`(mul|div)`|normali|reparam|tied" for i in range(2)})
def spectral_norm_discriminator(batch):
    """The estimates of the largest singular values come back beside the loss."""
    model = SpectralNormDiscriminator()
    x, fake = inputs(batch, 5), inputs(batch, 5, seed=8)
    params, state = variables(model, x)

    def loss_fn(params, state, x, fake):
        def judge(state, images):
            return model.apply({"params": params, **state}, images, mutable=["batch_stats"])

        real_logits, state = judge(state, x)
        fake_logits, state = judge(state, fake)
        return hinge(real_logits, fake_logits), state

    return recorded(loss_fn, params, state, x, fake, has_aux=True, skip="normed")
