"""Layers for `whiten`, with the rows that they meet and their units as columns of matrices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg

import bnp_optax
from support.quick_jit import jit


def draw(seed, *shape):
    """Correlated rows, none of mean 0."""
    x = np.random.default_rng(seed).normal(size=shape) + 1.5
    return jnp.asarray(x + 0.7 * np.roll(x, 1, -1), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer.

    Attributes:
      params: With a leaf `kernel`, and `bias` or none.
      apply: The layer, of parameters and inputs.
      shape: Of the inputs.
      rows: The inputs as rows, (blocks, N, n).
      columns: A kernel as (blocks, n, m), and back.
      bias_columns: A bias as (blocks, 1, m).
    """

    params: dict[str, Any]
    apply: Callable[..., jax.Array]
    shape: tuple[int, ...]
    rows: Callable[[np.ndarray], np.ndarray]
    columns: Callable[[np.ndarray], np.ndarray]
    bias_columns: Callable[[np.ndarray], np.ndarray] = lambda b: b.reshape(1, 1, -1)

    def loss(self, params, x):
        return jnp.mean((self.apply(params, x) - 1.0) ** 2)

    def batch(self, seed):
        return draw(seed, *self.shape)

    def layers(self):
        return bnp_optax.find_layers(self.loss, self.params, self.batch(0))

    def units(self, tree):
        """Bias and weights of the units as columns, (blocks, 1 + n, m); weights alone without."""
        columns = self.columns(np.asarray(tree["kernel"], np.float64))
        if "bias" not in tree:
            return columns
        bias = self.bias_columns(np.asarray(tree["bias"], np.float64))
        return np.concatenate([bias, columns], axis=1)


def _dense(p, x):
    y = x @ p["kernel"]
    return y + p["bias"][None] if "bias" in p else y


def _grouped(p, x):
    y = jax.lax.conv_general_dilated(
        x,
        p["kernel"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    return y + p["bias"][None, None, None]


def _groups_of_patches(x):
    h = np.stack([x[:, i : i + 2, j : j + 2] for i in range(2) for j in range(2)], axis=1)
    h = h.reshape(-1, 4, 2, 2)  # Rows, places, groups, channels of a group.
    return np.moveaxis(h, 2, 0).reshape(2, len(h), 8)


CASES = {
    "dense": Case(
        {"kernel": draw(1, 5, 3), "bias": draw(2, 3)},
        _dense,
        (30, 5),
        lambda x: x[None],
        lambda w: w[None],
    ),
    "no_bias": Case(
        {"kernel": draw(1, 5, 3)}, _dense, (30, 5), lambda x: x[None], lambda w: w[None]
    ),
    "attention": Case(
        {"kernel": draw(1, 2, 3, 4), "bias": draw(2, 4)},
        lambda p, x: jnp.einsum("bhd,hdo->bo", x, p["kernel"]) + p["bias"][None],
        (30, 2, 3),
        lambda x: x.reshape(1, -1, 6),
        lambda w: w.reshape(1, 6, 4),
    ),
    "queries": Case(
        {"kernel": draw(1, 5, 2, 3), "bias": draw(2, 2, 3)},
        lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["kernel"]) + p["bias"][None],
        (30, 5),
        lambda x: x[None],
        lambda w: w.reshape(1, 5, 6),
    ),
    "grouped_convolution": Case(
        {"kernel": draw(1, 2, 2, 2, 6), "bias": draw(2, 6)},
        _grouped,
        (10, 3, 3, 4),
        _groups_of_patches,
        lambda w: np.moveaxis(w.reshape(8, 2, 3), 1, 0),
        lambda b: b.reshape(2, 1, 3),
    ),
    # With more outputs than inputs S is formed.
    "grouped_more_outputs": Case(
        {"kernel": draw(1, 1, 1, 2, 6), "bias": draw(2, 6)},
        _grouped,
        (10, 3, 3, 4),
        lambda x: np.moveaxis(x.reshape(-1, 2, 2), 1, 0),
        lambda w: np.moveaxis(w.reshape(2, 2, 3), 1, 0),
        lambda b: b.reshape(2, 1, 3),
    ),
    "stacked_more_outputs": Case(
        {"kernel": draw(1, 2, 3, 4), "bias": draw(2, 2, 4)},
        lambda p, x: jax.vmap(jnp.dot)(x, p["kernel"]) + p["bias"][:, None],
        (2, 30, 3),
        lambda x: x,
        lambda w: w,
        lambda b: b[:, None],
    ),
    "stacked": Case(
        {"kernel": draw(1, 2, 4, 3), "bias": draw(2, 2, 3)},
        lambda p, x: jax.vmap(jnp.dot)(x, p["kernel"]) + p["bias"][:, None],
        (2, 30, 4),
        lambda x: x,
        lambda w: w,
        lambda b: b[:, None],
    ),
    "stacked_without_bias": Case(
        {"kernel": draw(1, 2, 4, 3)},
        lambda p, x: jax.vmap(jnp.dot)(x, p["kernel"]),
        (2, 30, 4),
        lambda x: x,
        lambda w: w,
    ),
}


def moments(case, seeds, decay=0.99):
    """The running mean and covariance in float64, (blocks, n) and (blocks, n, n)."""
    first = case.rows(np.asarray(case.batch(seeds[0]), np.float64))
    n_blocks, _, n = first.shape
    mean, second = np.zeros((n_blocks, n)), np.tile(np.eye(n), (n_blocks, 1, 1))
    for t, seed in enumerate(seeds):
        rows = case.rows(np.asarray(case.batch(seed), np.float64))
        keep = min(decay, 1 - 1 / (t + 2))
        mean = keep * mean + (1 - keep) * rows.mean(1)
        new = np.swapaxes(rows, 1, 2) @ rows / rows.shape[1]
        second = keep * second + (1 - keep) * new
    if "bias" not in case.params:
        return None, second
    return mean, second - mean[:, :, None] * mean[:, None, :]


def preconditioner(mean, covariance, exponent, damping):
    """P of each block, dense."""
    result = []
    for i, c in enumerate(covariance):
        n = len(c)
        damped = c + damping * np.trace(c) / n * np.eye(n)
        root = np.real(scipy.linalg.fractional_matrix_power(damped, -exponent))
        if mean is None:
            result.append(root)
            continue
        shift = np.eye(n + 1)
        shift[0, 1:] = -mean[i]
        result.append(shift @ scipy.linalg.block_diag(1.0, root))
    return np.stack(result)


def run(case, whitening, seeds, layers=None, params=None):
    """The state after one batch for each seed."""
    params = case.params if params is None else params
    state = whitening.init(params)
    value_and_grad = bnp_optax.value_and_grad(case.loss, second_moments=True)
    for seed in seeds:
        _, grads, stats = value_and_grad(params, case.batch(seed))
        state = whitening.update(grads, state, params, layer_stats=stats)
    return state


SEEDS = (10, 11, 12)


def assert_close(got, want, tolerance):
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def settled(whitening, loss_fn, params, x, n=40):
    """The state when the same batch has come so often that the start is forgotten."""
    value_and_grad = bnp_optax.value_and_grad(
        loss_fn, second_moments=True, second_moment_rows=len(x)
    )
    _, grads, stats = jit(value_and_grad)(params, x)

    def step(state, _):
        return whitening.update(grads, state, layer_stats=stats), None

    many = jit(lambda state: jax.lax.scan(step, state, None, n)[0])
    return many(whitening.init(params)), grads


def assert_is(P, matrix, case, tree, tolerance=2e-5):
    """P, its transpose, inverse and square are those of `matrix`."""
    columns = case.units(tree)
    parts = {
        "mv": matrix,
        "transpose": np.swapaxes(matrix, 1, 2),
        "solve": np.linalg.inv(matrix),
        "gram": matrix @ np.swapaxes(matrix, 1, 2),
    }
    for name, part in parts.items():
        assert_close(case.units(getattr(P, name)(tree)), part @ columns, tolerance)


def trained(case, value_and_grad, tx, batches):
    """The parameters after a step on each batch."""
    params, state = case.params, tx.init(case.params)
    for batch in batches:
        _, grads, stats = value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, layer_stats=stats)
        params = optax.apply_updates(params, updates)
    return params
