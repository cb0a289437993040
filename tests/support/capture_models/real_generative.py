"""Generative models, sets and graphs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from support.capture_models.real_cases import (
    array,
    classified,
    cross_entropy,
    dense,
    dense_shapes,
    filled,
    inputs,
    linen_model,
    mlp,
    muted,
    real,
    recorded,
    score,
    squared_error,
    variables,
    whole_numbers,
)


class Denoiser(nn.Module):
    """Of a diffusion model: what is known of time is added to every position."""

    @nn.compact
    def __call__(self, x, t):
        angles = t[:, None] * jnp.exp(-jnp.arange(2.0, dtype=x.dtype))
        time = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        time = nn.Dense(5, name="time_2")(nn.silu(nn.Dense(5, name="time_1")(time)))
        y = nn.Conv(4, (3, 3), name="in")(x)
        z = nn.Conv(4, (3, 3), name="first")(nn.silu(nn.GroupNorm(2)(y)))
        z = z + nn.Dense(4, name="time_projection")(nn.silu(time))[:, None, None]
        z = nn.Conv(4, (3, 3), name="second")(nn.silu(nn.GroupNorm(2)(z)))
        return nn.Conv(x.shape[-1], (3, 3), name="out")(nn.silu(y + z))


@real()
def diffusion(batch):
    x, noise = inputs(batch, 4, 4, 2), inputs(batch, 4, 4, 2, seed=3)
    t, model = np.linspace(0.2, 0.8, batch, dtype=np.float32), Denoiser()
    params, _ = variables(model, x, t)

    def loss_fn(params, x, noise, t):
        kept = jnp.cos(t * np.pi / 2)[:, None, None, None]
        mixed = kept * x + jnp.sqrt(1 - kept**2) * noise
        return squared_error(model.apply({"params": params}, mixed, t), noise)

    return recorded(loss_fn, params, x, noise, t)


@real()
def diffusion_transformer(batch):
    """DiT, in arrays: a projection of time scales, shifts and gates the block's products."""

    def loss_fn(p, x, t, noise):
        condition = jax.nn.silu(dense(p, "time", jnp.stack([jnp.sin(t), jnp.cos(t)], -1)))
        shift, scale, gate = jnp.split(dense(p, "modulation", condition)[:, None], 3, -1)
        tokens = dense(p, "patch", x) + p["pos"]
        y = dense(p, "up", tokens * (1 + scale) + shift)
        tokens = tokens + gate * dense(p, "down", jax.nn.gelu(y))
        return squared_error(dense(p, "final", tokens), noise)

    sizes = {"time": (2, 4), "modulation": (4, 12), "patch": (3, 4), "up": (4, 6)}
    sizes |= {"down": (6, 4), "final": (4, 3)}
    shapes = {name: dense_shapes(*size)[0] for name, size in sizes.items()}
    shapes |= {"pos": array(1, 5, 4)}
    t = np.linspace(0.2, 0.8, batch, dtype=np.float32)
    args = inputs(batch, 5, 3), t, inputs(batch, 5, 3, seed=3)
    return recorded(loss_fn, filled(shapes), *args)


@real()
def coupling_flow(batch):
    """RealNVP: each half decides how the other is scaled and shifted."""

    def loss_fn(p, x):
        log_det = 0.0
        for i in range(2):
            fixed, moved = jnp.split(x, 2, -1)
            log_scale, shift = jnp.split(mlp(p, f"flow_{i}", fixed), 2, -1)
            log_scale = jnp.tanh(log_scale)
            x = jnp.concatenate([moved * jnp.exp(log_scale) + shift, fixed], -1)
            log_det += jnp.sum(log_scale, -1)
        return jnp.mean(0.5 * jnp.sum(x**2, -1) - log_det)

    shapes = {f"flow_{i}": dense_shapes(2, 5, 4) for i in range(2)}
    return recorded(loss_fn, filled(shapes), inputs(batch, 4))


@real({"w1": "mul|mask", "w2": "mul|mask"})
def masked_autoregressive(batch):
    """MADE: kernels times masks, which are constants."""
    order = np.arange(3)
    first = (order[:, None] <= np.arange(6)[None] % 3).astype(np.float32)
    second = (np.arange(6)[:, None] % 3 < order[None]).astype(np.float32)

    def loss_fn(p, x):
        hidden = jax.nn.relu(x @ (p["w1"] * first) + p["b1"])
        mean = hidden @ (p["w2"] * second) + p["b2"]
        return jnp.mean((dense(p, "scale", x) + mean - x) ** 2)

    shapes = {"w1": array(3, 6), "b1": array(6), "w2": array(6, 3), "b2": array(3)}
    shapes |= {"scale": dense_shapes(3, 3)[0]}
    return recorded(loss_fn, filled(shapes), inputs(batch, 3))


class VectorQuantized(nn.Module):
    """VQ-VAE: the gradient passes straight through the code book."""

    @nn.compact
    def __call__(self, x):
        z = nn.Conv(3, (2, 2), strides=(2, 2), name="encode")(x)
        book = self.param("codebook", nn.initializers.normal(), (4, 3))
        distance = jnp.sum((z[..., None, :] - book) ** 2, -1)
        code = book[jnp.argmin(distance, -1)]
        commitment = squared_error(z, jax.lax.stop_gradient(code))
        commitment += squared_error(jax.lax.stop_gradient(z), code)
        straight = z + jax.lax.stop_gradient(code - z)
        out = nn.ConvTranspose(x.shape[-1], (2, 2), strides=(2, 2), name="decode")(straight)
        return squared_error(out, x) + commitment


@real({"codebook": ".+"})
def vector_quantized(batch):
    return linen_model(VectorQuantized(), inputs(batch, 4, 4, 2), objective=lambda loss: loss)


@real()
def generator_step(batch):
    """The discriminator's parameters are an argument; its kernels pass the gradient on."""

    def loss_fn(generator, discriminator, z):
        images = jnp.tanh(mlp(generator, "net", z, jax.nn.relu))
        hidden = jax.nn.leaky_relu(images @ discriminator[0]["w"] + discriminator[0]["b"])
        logits = hidden @ discriminator[1]["w"] + discriminator[1]["b"]
        return jnp.mean(jax.nn.softplus(-logits))

    generator = filled({"net": dense_shapes(3, 5, 4)})
    discriminator = filled(dense_shapes(4, 5, 1), seed=3)
    return recorded(loss_fn, generator, discriminator, inputs(batch, 3))


@real()
def wasserstein_critic(batch):
    """The penalty on the critic's slope has rows of its own, at points between."""

    def critic(p, x):
        return mlp(p, "net", x)[..., 0]

    def between(true, fake, mix):
        return mix[:, None] * true + (1 - mix[:, None]) * fake

    def loss_fn(p, true, fake, mix):
        values, slopes = jax.vmap(jax.value_and_grad(critic, 1), (None, 0))(
            p, between(true, fake, mix)
        )
        penalty = jnp.mean((jnp.linalg.norm(slopes, axis=-1) - 1) ** 2)
        drift = 1e-3 * jnp.mean(values**2)
        return jnp.mean(critic(p, fake)) - jnp.mean(critic(p, true)) + 10 * penalty + drift

    def watch(p, true, fake, mix):
        for rows in (true, fake, between(true, fake, mix)):
            critic(p, rows)
        with muted():
            return loss_fn(p, true, fake, mix)

    params = filled({"net": dense_shapes(3, 5, 4, 1)})
    mix = np.linspace(0.3, 0.7, batch, dtype=np.float32)
    args = inputs(batch, 3), inputs(batch, 3, seed=3), mix
    return recorded(loss_fn, params, *args, watch=watch)


class DeepSet(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        for i in range(2):
            x = nn.relu(nn.Dense(4, name=f"phi_{i}")(x))
        pooled = jnp.sum(x * mask[..., None], 1)
        return nn.Dense(2, name="rho_1")(nn.relu(nn.Dense(5, name="rho_0")(pooled)))


@real()
def deep_set(batch):
    """The elements of shorter sets are multiplied like all others."""
    mask = (np.arange(4) < 2 + np.arange(batch)[:, None] % 3).astype(np.float32)
    return linen_model(DeepSet(), inputs(batch, 4, 3), mask)


class PointNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4, name="shared_0")(x))
        x = nn.relu(nn.Dense(5, name="shared_1")(x)).max(1)
        return nn.Dense(3, name="head")(x)


@real()
def point_net(batch):
    return classified(PointNet(), inputs(batch, 6, 3))


class GraphNetwork(nn.Module):
    """Flax's OGB example: edges, then nodes, then graphs are updated by what surrounds them."""

    @nn.compact
    def __call__(self, nodes, edges, senders, receivers, graph_of):
        nodes = nn.Dense(4, name="embed_nodes")(nodes)
        edges = nn.Dense(4, name="embed_edges")(edges)
        for i in range(2):
            ends = nodes[senders], nodes[receivers]
            edges = edges + self.update(f"edge_{i}", edges, *ends)
            sent = jax.ops.segment_sum(edges, receivers, len(nodes))
            nodes = nn.LayerNorm()(nodes + self.update(f"node_{i}", nodes, sent))
        pooled = jax.ops.segment_sum(nodes, graph_of, self.n_graphs) / 3
        return nn.Dense(2, name="head")(pooled)

    def update(self, name, *parts):
        hidden = nn.relu(nn.Dense(5, name=f"{name}_hidden")(jnp.concatenate(parts, -1)))
        return nn.Dense(4, name=f"{name}_out")(hidden)

    n_graphs: int = 1


@real()
def flax_ogbg(batch):
    """Graphs of three nodes and four edges, side by side."""
    senders, receivers = (
        np.concatenate([np.array(ends) + 3 * i for i in range(batch)]).astype(np.int32)
        for ends in ([0, 1, 2, 0], [1, 2, 0, 2])
    )
    graph_of = np.repeat(np.arange(batch), 3).astype(np.int32)
    args = inputs(3 * batch, 3), inputs(4 * batch, 2), senders, receivers, graph_of
    labels = whole_numbers(batch, below=2)
    model = GraphNetwork(n_graphs=batch)
    return linen_model(model, *args, objective=cross_entropy, targets=(labels,))


@real()
def graph_attention(batch):
    """GAT on a batch of dense graphs, with vectors that score the two ends of an edge."""

    def loss_fn(p, x, adjacency):
        h = dense(p, "project", x)
        ends = dense(p, "from", h) + jnp.swapaxes(dense(p, "to", h), 1, 2)
        odds = jax.nn.softmax(jnp.where(adjacency, jax.nn.leaky_relu(ends), -1e9))
        return score(dense(p, "head", jax.nn.elu(odds @ h)))

    sizes = {"project": (3, 4), "from": (4, 1), "to": (4, 1), "head": (4, 2)}
    shapes = {name: dense_shapes(*size, bias=name == "head")[0] for name, size in sizes.items()}
    adjacency = np.eye(4, dtype=bool) | (np.random.default_rng(3).random((batch, 4, 4)) < 0.5)
    return recorded(loss_fn, filled(shapes), inputs(batch, 4, 3), adjacency)
