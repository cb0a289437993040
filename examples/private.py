"""Differentially private training in z: each example's gradient is clipped and noised there.

P standardizes what each layer sees, in the gradients alone, and may not look at the private
examples. Here it looks at draws from a normal distribution, whose mean and variance are released
once with noise of their own; public examples would do as well. All that follows from what was
released costs no more privacy, so hidden layers are covered too.

    python examples/private.py

Needs scikit-learn, for the digits that come with it, and scipy.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import gammaln, logsumexp
from sklearn.datasets import load_digits

import bnp_optax

N, BATCH, CAPACITY, DELTA = 1400, 64, 128, 1e-4
CLIP, NOISE = 1.0, 1.0
# Of the release: a digit's (x, x^2), pixels from 0 to 1, and the noise on the sum of them.
ROW_CLIP, ROW_NOISE = 6.0, 6.0
LEARNING_RATE = 3e-3


class Network(nn.Module):
    """One hidden layer."""

    @nn.compact
    def __call__(self, x):
        """Logits."""
        return nn.Dense(10)(nn.relu(nn.Dense(32)(x)))


def loss_fn(params, x, y, weight):
    """Loss of one example; of weight 0 if there is none."""
    logits = Network().apply({"params": params}, x)
    return weight * optax.softmax_cross_entropy_with_integer_labels(logits, y)


def looked_at(params, x):
    """Any scalar of the network, for the statistics of its layers' inputs."""
    return jnp.mean(Network().apply({"params": params}, x))


def spent(steps):
    """Epsilon of all steps and the release, by Renyi divergences (Mironov et al., 2019)."""
    q, found = BATCH / N, []
    for order in range(2, 128):
        k = np.arange(order + 1)
        terms = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
        terms = terms + (order - k) * math.log1p(-q) + k * math.log(q)
        step = logsumexp(terms + k * (k - 1) / (2 * NOISE**2)) / (order - 1)
        total = steps * step + order / (2 * ROW_NOISE**2)
        found.append(total + math.log1p(-1 / order) - math.log(DELTA * order) / (order - 1))
    return min(found)


def released_moments(x, random):
    """Mean and variance of the private pixels, with noise."""
    rows = np.concatenate([x, x**2], axis=1)
    rows *= np.minimum(1.0, ROW_CLIP / np.linalg.norm(rows, axis=1, keepdims=True))
    noisy = rows.sum(axis=0) + random.normal(0.0, ROW_CLIP * ROW_NOISE, rows.shape[1])
    mean, square = np.split(noisy / len(x), 2)
    return mean, np.maximum(square - mean**2, 0.0)


def make_step(images, labels, bnp, tx):
    """One step of DP-Adam in z."""

    @jax.jit
    def step(params, seen, state, reference, key):
        # Poisson sampling, as the accountant has it; rows of -1 are no examples.
        enters = jax.random.bernoulli(key, BATCH / N, (N,))
        (rows,) = jnp.nonzero(enters, size=CAPACITY, fill_value=-1)
        batch = images[rows], labels[rows], (rows >= 0).astype(jnp.float32)
        gradients = jax.vmap(jax.grad(loss_fn), (None, 0, 0, 0))(params, *batch)
        # P, from what may be looked at.
        _, _, stats = bnp_optax.value_and_grad(looked_at)(params, reference)
        seen = bnp.update(params, seen, params, layer_stats=stats)
        P = bnp.operator(seen)
        # Clipped, noised and optimized in z.
        updates, state = tx.update(jax.vmap(P.transpose)(gradients), state)
        return optax.apply_updates(params, P.mv(updates)), seen, state

    return step


def main(steps=600, seed=0):
    """Train, print, and return the accuracy and what it cost."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    x, y = x[order] / 16.0, y[order]
    images, labels = jnp.asarray(x[:N], jnp.float32), jnp.asarray(y[:N])

    random = np.random.default_rng(seed)
    mean, var = released_moments(x[:N], random)
    reference = jnp.asarray(mean + np.sqrt(var) * random.normal(size=(256, 64)), jnp.float32)

    params = Network().init(jax.random.key(seed), images[:1])["params"]
    bnp = bnp_optax.bnp(eps_rel=0.3, eps_abs=1e-8, shrinkage=10.0, scale_bias=True)  # bnp_adam's
    tx = optax.chain(
        optax.contrib.differentially_private_aggregate(CLIP, NOISE, jax.random.key(seed + 1)),
        optax.scale(CAPACITY / BATCH),  # it divides by the rows, examples or not
        optax.adam(LEARNING_RATE),
    )
    seen, state = bnp.init(params), tx.init(params)
    step = make_step(images, labels, bnp, tx)
    for key in jax.random.split(jax.random.key(seed + 2), steps):
        params, seen, state = step(params, seen, state, reference, key)

    logits = Network().apply({"params": params}, jnp.asarray(x[N:], jnp.float32))
    accuracy = float(np.mean(np.argmax(logits, axis=1) == y[N:]))
    found = {"accuracy": accuracy, "epsilon": float(spent(steps))}
    print("accuracy {accuracy:.3f} at epsilon {epsilon:.2f}".format(**found), f"delta {DELTA:g}")
    return found


if __name__ == "__main__":
    main()
