"""Hidden variables and a network on which `test_theorems_*.py` test what the papers state.

"Ye" is "Preconditioning for Accelerated Gradient Descent Optimization and Regularization", "JMLR"
is Lange, Helfrich, Ye, "Batch Normalization Preconditioning for Neural Network Training". JMLR
Propositions 6 (a count of operations) and Lemma 8 (inside Proposition 9) have no test of their
own; Proposition 7 is in `test_bnp.py`.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from bnp_optax.diagnostics import extended_inputs
from support import oracles

seeds = st.integers(0, 2**31 - 1)
properties = settings(max_examples=60, deadline=None)
logarithms = st.lists(st.floats(-8, 8), min_size=12, max_size=12).map(np.array)


def hidden(seed, rows=30, columns=5, spread=2.0, shift=3.0):
    """Hidden variables whose columns differ in mean and, by orders of magnitude, in spread."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(columns, columns)) + 2 * np.eye(columns)
    scale = 10.0 ** rng.uniform(-spread / 2, spread / 2, columns)
    return (rng.normal(size=(rows, columns)) @ mix + shift * rng.normal(size=columns)) * scale


def centered(h):
    """H^ U = [e, H - e mu^T]."""
    return np.asarray(extended_inputs(h)) @ oracles.centering_matrix(h.mean(axis=0))


def normalized(h):
    """G^ = H^ U D."""
    return centered(h) @ oracles.scaling_matrix(h.var(axis=0))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4, param_dtype=float)(x))
        return nn.Dense(3, param_dtype=float)(x)


def dense_problem(seed):
    """Cross-entropy of a network, and the diagonal of S for the first layer's units."""
    rng = np.random.default_rng(seed)
    x, y = jnp.asarray(hidden(seed, rows=12, columns=3)), jnp.asarray(rng.integers(0, 3, 12))
    params = Net().init(jax.random.key(seed), x)["params"]
    # So small that no unit is saturated.
    params["Dense_0"]["kernel"] = 0.5 * params["Dense_0"]["kernel"] / jnp.std(x, 0)[:, None]

    def of_one(logits, label):
        return jax.nn.logsumexp(logits) - logits[label]

    def loss_fn(params, x):
        return jnp.mean(jax.vmap(of_one)(Net().apply({"params": params}, x), y))

    def curvatures(unit):
        activations = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None]
        last = params["Dense_1"]

        def of_activation(a, row, label):
            row = nn.tanh(row.at[unit].set(a))
            return of_one(row @ last["kernel"] + last["bias"], label)

        second = jax.vmap(jax.grad(jax.grad(of_activation)))
        return np.asarray(second(activations[:, unit], activations, y)) / len(x)

    return loss_fn, params, x, curvatures


def patches(h, k):
    """The matrix of (18): a row for each output position, columns in the kernel's order."""
    n, r, s, c = h.shape
    m = (k - 1) // 2
    padded = np.pad(h, ((0, 0), (m, m), (m, m), (0, 0)))
    taps = itertools.product(range(k), range(k))
    blocks = [padded[:, t : t + r, a : a + s].reshape(n * r * s, c) for t, a in taps]
    return np.concatenate(blocks, axis=1)
