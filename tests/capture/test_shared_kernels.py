"""A kernel that is used more than once: every call's rows count, or the kernel is not covered."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.capture_checks import assert_rows, capture, normal

import bnp_optax

X, Y, Z = normal(0, 6, 4) + 1.0, normal(1, 5, 3), 3.0 * normal(2, 7, 4) - 1.0
W, V, B = normal(3, 4, 4), normal(4, 4, 2), normal(5, 4)
STEPS = normal(6, 5, 6, 3)  # Time, batch, features.


@pytest.fixture(autouse=True)
def broadcasting():
    """As users add biases."""
    with jax.numpy_rank_promotion("allow"):
        yield


def square(y):
    return jnp.mean(y**2)


# No loss here takes a derivative, so no product is one of a derivative.


def twice(p):
    return square(jnp.tanh(X @ p["w"]) @ p["w"] @ p["v"])


def twice_rows(p):
    return [X, jnp.tanh(X @ p["w"])]


def without_a_bias_elsewhere(p):
    return square(jnp.tanh(X @ p["w"] + p["b"])) + square(jnp.tanh(Z @ p["w"]))


def linear_in_one_place(p):
    return square(jnp.tanh(X @ p["w"])) + jnp.sum(Z @ p["w"])


def both_rows(p):
    return [X, Z]


def residual(p):
    h, rows = X, []
    for _ in range(3):
        rows.append(h)
        h = h + jnp.tanh(h @ p["w"])
    return square(h @ p["v"]), rows


@pytest.mark.parametrize(
    ("loss_fn", "rows"),
    [
        (twice, twice_rows),
        (without_a_bias_elsewhere, both_rows),
        (linear_in_one_place, both_rows),
        (lambda p: residual(p)[0], lambda p: residual(p)[1]),
    ],
    ids=["twice", "without a bias elsewhere", "linear in one place", "residual"],
)
def test_rows_of_all_calls(loss_fn, rows):
    params = {"w": W, "v": V, "b": B}
    assert_rows(capture(loss_fn, params)["w"], jnp.concatenate(rows(params)))


@pytest.mark.parametrize("is_first_learned", [False, True])
def test_unrolled_recurrent_network_as_a_scanned_one(is_first_learned):
    params = {"a": W, "in": normal(7, 3, 4), "out": V, "first": B}

    def step(p, h, x):
        return h @ p["a"] + x @ p["in"]

    def first(p):
        start = p["first"] if is_first_learned else jnp.zeros(4)
        return jnp.broadcast_to(start, (6, 4))

    def unrolled(p):
        h = first(p)
        for x in STEPS:
            h = step(p, h, x)
        return square(jnp.tanh(h) @ p["out"])

    def scanned(p):
        h, _ = lax.scan(lambda h, x: (step(p, h, x), None), first(p), STEPS)
        return square(jnp.tanh(h) @ p["out"])

    of_unrolled, of_scanned = capture(unrolled, params), capture(scanned, params)
    assert_rows(of_unrolled["in"], STEPS.reshape(-1, 3))
    # Zeros are no rows where they are known to be.
    n_rows = 30 if is_first_learned else of_unrolled["a"].count
    assert of_unrolled["a"].count == n_rows >= 24
    if is_first_learned:
        np.testing.assert_allclose(of_unrolled["a"].mean, of_scanned["a"].mean, rtol=1e-5)
        np.testing.assert_allclose(of_unrolled["a"].var, of_scanned["a"].var, rtol=1e-5)


def test_learned_latents():
    """As of a Perceiver: a parameter is copied along the batch and goes through the layer."""
    params = {"latents": normal(8, 3, 4), "w": W}

    def loss_fn(p):
        latents = jnp.broadcast_to(p["latents"], (6, 3, 4))
        return square(jnp.tanh(latents @ p["w"]) * jnp.tanh(X @ p["w"])[:, None])

    rows = jnp.concatenate([jnp.tile(params["latents"], (6, 1)), X])
    assert_rows(capture(loss_fn, params)["w"], rows)


def test_penalties_on_products_of_kernels_are_no_rows():
    def loss_fn(p):
        orthogonal = square(p["w"].T @ p["w"] - jnp.eye(4))
        near = p["w"] - np.ones((4, 4), np.float32)
        path = jnp.sum(jnp.abs(p["w"]) @ jnp.abs(p["v"]))
        return square(jnp.tanh(X @ p["w"]) @ p["v"]) + orthogonal + jnp.vdot(near, near) + path

    stats = capture(loss_fn, {"w": W, "v": V})
    assert_rows(stats["w"], X)
    assert_rows(stats["v"], jnp.tanh(X @ W))


class Twice(nn.Module):
    """The second call's input is the first one's result."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, use_bias=False, name="dense")
        return dense(dense(x))


class AfterProjection(nn.Module):
    """The padding of a convolution is no input of it, whatever comes before."""

    padding: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, use_bias=False, name="dense")(x)
        return nn.Conv(2, (4,), padding=self.padding, name="conv")(x[..., :3])


def test_linen_layer_of_a_bias_free_layers_result():
    params = Twice().init(jax.random.key(0), X)["params"]
    stats = capture(lambda p: square(jnp.tanh(Twice().apply({"params": p}, X))), params)
    assert_rows(stats["dense/kernel"], jnp.concatenate([X, X @ params["dense"]["kernel"]]))


@pytest.mark.parametrize("padding", ["CAUSAL", "CIRCULAR"])
def test_padding_after_a_bias_free_layer(padding):
    model, x = AfterProjection(padding), normal(9, 2, 6, 3) + 1.0
    params = model.init(jax.random.key(0), x)["params"]
    stats = capture(lambda p: square(model.apply({"params": p}, x)), params)
    h = (x @ params["dense"]["kernel"])[..., :3].reshape(-1, 3)
    np.testing.assert_allclose(stats["conv/kernel"].mean.ravel(), h.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["conv/kernel"].var.ravel(), h.var(0), rtol=1e-5)


# A use that cannot be measured makes the kernel one that is not covered.


def chosen_by_cond(p, flag):
    return Z @ lax.cond(flag, lambda w: w, lambda w: 2 * w, p["w"])


def mapped(p, flag):
    return Z @ lax.map(lambda row: 2 * row, p["w"])


@jax.jit
def _get(stack, i):
    return lax.dynamic_index_in_dim(stack, i, 0, keepdims=False)


def got_by_a_jitted_function(p, flag):
    return Z @ _get(p["w"][None], flag.astype(int) * 0)


@pytest.mark.parametrize(
    ("function", "reason"),
    [(chosen_by_cond, "cond"), (mapped, "scan"), (got_by_a_jitted_function, "jit")],
)
def test_use_of_what_a_function_returns(function, reason):
    def loss_fn(p, flag):
        return square(jnp.tanh(X @ p["w"]) @ p["v"]) + square(jnp.tanh(function(p, flag)))

    params, flag = {"w": W, "v": V}, jnp.asarray(True)
    assert set(capture(loss_fn, params, flag)) == {"v"}
    summary = bnp_optax.summarize(loss_fn, params, flag)
    assert summary.uncovered["w"] == f"`{reason}` changes it before it meets the inputs"


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this JAX has no mutable arrays")
def test_layer_whose_result_goes_through_a_mutable_array():
    def loss_fn(p):
        ref = jax.new_ref(jnp.zeros((6, 4)))
        ref[...] = jnp.tanh(X @ p["w"])
        return square(ref[...] @ p["v"])

    stats = capture(loss_fn, {"w": W, "v": V})
    assert_rows(stats["w"], X)
    assert_rows(stats["v"], jnp.tanh(X @ W))
