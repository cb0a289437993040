"""Kernels that are changed on their way to the inputs: right statistics, or a reason for none."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from support.capture_checks import (
    X,
    assert_covered_or_said,
    assert_nothing_is_lost,
    assert_rows,
    normal,
)

import bnp_optax.flax_nnx

HEAD = normal(11, 2, 1)
PARAMS = {
    "w": normal(1, 3, 2),
    "b": normal(2, 2),
    "gain": normal(3, 2) + 1,
    "other": normal(4, 3, 2),
    "down": normal(5, 3, 1),
    "up": normal(6, 1, 2),
    "square": normal(7, 3, 3),
    "head": HEAD,
}
MASK = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])


def standardized(w):
    return (w - w.mean(0, keepdims=True)) / (w.std(0, keepdims=True) + 1e-3)


def normalized(w):
    return w / jnp.linalg.norm(w, axis=0, keepdims=True)


def spectral(w):
    return w / jnp.linalg.svd(w, compute_uv=False)[0]


def rounded(w):
    """Fake quantization with a straight-through gradient."""
    return w + jax.lax.stop_gradient(jnp.round(8 * w) / 8 - w)


@jax.custom_vjp
def rounded_by_rule(w):
    return jnp.round(8 * w) / 8


rounded_by_rule.defvjp(lambda w: (rounded_by_rule(w), None), lambda _, g: (g,))


# Each entry of what meets the inputs depends on several entries of the parameter, or on several
# parameters: preconditioning by the statistics of the inputs would be of something else.
MIXING = {
    "standardized": lambda p: standardized(p["w"]),
    "normalized": lambda p: normalized(p["w"]),
    "weight normalization": lambda p: normalized(p["w"]) * p["gain"][None],
    "spectral norm": lambda p: spectral(p["w"]),
    "centered": lambda p: p["w"] - p["w"].mean(0, keepdims=True),
    "softmax": lambda p: jax.nn.softmax(p["w"], 0),
    "summed along": lambda p: jnp.cumsum(p["w"], 0),
    "reversed and added": lambda p: p["w"] + p["w"][::-1],
    "Fourier coefficients": lambda p: jnp.fft.irfft(jnp.fft.rfft(p["w"], axis=0), 3, axis=0),
}
# Entry by entry, so that the statistics are those of the inputs if the kernel is covered at all.
BY_ENTRY = {
    "squared": lambda p: jnp.square(p["w"]),
    "positive": lambda p: jax.nn.softplus(p["w"]),
    "rounded": lambda p: rounded(p["w"]),
    "rounded by a rule of its own": lambda p: rounded_by_rule(p["w"]),
    "clipped": lambda p: jnp.clip(p["w"], -0.1, 0.1),
    "masked": lambda p: p["w"] * MASK,
    "masked by where": lambda p: jnp.where(MASK > 0, p["w"], 0.0),
    "scaled by a learned gain": lambda p: p["w"] * p["gain"][None],
    "shifted by a constant": lambda p: p["w"] + 0.1,
    "with noise": lambda p: p["w"] + 0.1 * normal(8, 3, 2),
    "with dropout": lambda p: nn.Dropout(0.5, deterministic=False).apply(
        {}, p["w"], rngs={"dropout": jax.random.key(0)}
    ),
}
SCALED = {
    "divided": lambda p: jax.tree.map(lambda a: a / 8, p)["w"],
    "NTK": lambda p: p["w"] / jnp.sqrt(3.0),
    "NTK, a Python number": lambda p: p["w"] * 3**-0.5,
    "negative": lambda p: -p["w"],
    "a constant array": lambda p: p["w"] * jnp.full((3, 2), 0.5),
    "scaled after the cast": lambda p: p["w"].astype(jnp.float16).astype(jnp.float32) * 0.5,
}
SEVERAL = {
    "low rank": (lambda p: p["down"] @ p["up"], ("down", "up")),
    "LoRA": (lambda p: p["w"] + p["down"] @ p["up"], ("w", "down", "up")),
    "residual of kernels": (lambda p: p["w"] + p["other"], ("w", "other")),
    "mixture": (lambda p: 0.3 * p["w"] + 0.7 * p["other"], ("w", "other")),
    "product of a square one": (lambda p: p["square"] @ p["w"], ("square", "w")),
    "hypernetwork": (lambda p: p["w"] * jnp.tanh(p["other"]), ("w", "other")),
}


def loss_with(kernel):
    def loss_fn(p, x):
        h = jnp.tanh(x @ kernel(p) + p["b"][None])
        return jnp.mean((h @ p["head"] - 1) ** 2)

    return loss_fn


def hidden(kernel):
    return jnp.tanh(X @ kernel(PARAMS) + PARAMS["b"][None])


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_entries_is_not_covered_with_a_reason(name):
    stats, reasons = assert_nothing_is_lost(loss_with(MIXING[name]), PARAMS, X)
    assert reasons["w"]
    assert "w" not in stats
    assert_rows(stats["head"], hidden(MIXING[name]))


@pytest.mark.parametrize("name", [*BY_ENTRY, *SCALED])
def test_what_changes_each_entry_has_right_statistics_or_a_reason(name):
    kernel = (BY_ENTRY | SCALED)[name]
    stats, reasons = assert_nothing_is_lost(loss_with(kernel), PARAMS, X)
    assert_covered_or_said(stats, reasons, "w", X)
    assert_rows(stats["head"], hidden(kernel))


@pytest.mark.parametrize("name", SEVERAL)
def test_kernels_of_several_parameters(name):
    kernel, parts = SEVERAL[name]
    stats, reasons = assert_nothing_is_lost(loss_with(kernel), PARAMS, X)
    for part in parts:
        if PARAMS[part].shape == (3, 2):
            assert_covered_or_said(stats, reasons, part, X)
        else:
            # Its inputs are another parameter.
            assert reasons[part]
            assert part not in stats
    assert_rows(stats["head"], hidden(kernel))


def test_a_low_rank_pair_that_the_rows_pass_one_by_one():
    """`(x @ down) @ up` has no such trouble."""
    loss_fn = lambda p, x: jnp.mean((x @ p["down"] @ p["up"] + p["b"][None]) ** 2)  # noqa: E731
    stats, _ = assert_nothing_is_lost(loss_fn, PARAMS, X)
    assert_rows(stats["down"], X)
    assert_rows(stats["up"], X @ PARAMS["down"])


def test_a_constant_matrix_before_the_inputs():
    """Nothing tells it from data: as in a graph network without features, it is the inputs."""
    constant = normal(9, 3, 3)
    loss_fn = loss_with(lambda p: constant @ p["w"])
    stats, reasons = assert_nothing_is_lost(loss_fn, PARAMS, X)
    assert_covered_or_said(stats, reasons, "w", constant)


# Linen.


def overriding(change):
    """A Dense layer that changes its kernel where it makes it."""

    class Changed(nn.Dense):
        def param(self, name, *args, **kwargs):
            value = super().param(name, *args, **kwargs)
            return change(value) if name == "kernel" else value

    return Changed(2, name="changed")


def mapping(change):
    def on_kernels(variables):
        return jax.tree.map(lambda a: change(a) if a.ndim > 1 else a, variables)

    return nn.map_variables(nn.Dense, "params", on_kernels, init=True)(2, name="changed")


class Linen(nn.Module):
    make: object
    change: object

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="head")(jnp.tanh(self.make(self.change)(x)))


LINEN_MIXING = {
    "standardized": standardized,
    "normalized": normalized,
    "centered": lambda w: w - w.mean(0, keepdims=True),
}
LINEN_BY_ENTRY = {
    "rounded": rounded,
    "rounded by a rule of its own": rounded_by_rule,
    "masked": lambda w: w * MASK,
    "scaled": lambda w: w / 8,
    "squared": jnp.square,
}


def linen_case(make, change):
    model = Linen(make, change)
    params = model.init(jax.random.key(0), X)["params"]
    return lambda p, x: jnp.mean((model.apply({"params": p}, x) - 1) ** 2), params


@pytest.mark.parametrize("name", LINEN_MIXING)
@pytest.mark.parametrize("make", [overriding, mapping])
def test_linen_layers_whose_kernel_is_mixed_are_not_covered(make, name):
    loss_fn, params = linen_case(make, LINEN_MIXING[name])
    stats, reasons = assert_nothing_is_lost(loss_fn, params, X)
    assert reasons["changed/kernel"]
    assert "changed/kernel" not in stats
    assert stats["head/kernel"].count == 16


@pytest.mark.parametrize("name", LINEN_BY_ENTRY)
@pytest.mark.parametrize("make", [overriding, mapping])
def test_linen_layers_whose_entries_are_changed(make, name):
    loss_fn, params = linen_case(make, LINEN_BY_ENTRY[name])
    stats, reasons = assert_nothing_is_lost(loss_fn, params, X)
    assert_covered_or_said(stats, reasons, "changed/kernel", X)
    assert stats["head/kernel"].count == 16


@pytest.mark.parametrize("make", [overriding, mapping])
def test_a_linen_kernel_in_another_order_meets_the_features_in_that_order(make):
    """Kernel row i meets feature 2 - i."""
    loss_fn, params = linen_case(make, lambda w: w[::-1])
    stats, reasons = assert_nothing_is_lost(loss_fn, params, X)
    assert_covered_or_said(stats, reasons, "changed/kernel", X[:, ::-1])


@pytest.mark.parametrize(
    "norm", [nn.WeightNorm, lambda layer: nn.SpectralNorm(layer, collection_name="stats")]
)
def test_linen_normalizations_of_weights(norm):
    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = norm(nn.Dense(2, name="changed"))
            args = {} if isinstance(layer, nn.WeightNorm) else {"update_stats": False}
            return nn.Dense(1, name="head")(jnp.tanh(layer(x, **args)))

    model = Normalized()
    variables = model.init(jax.random.key(0), X)
    params = variables.pop("params")
    loss_fn = lambda p, x: jnp.mean((model.apply({"params": p, **variables}, x) - 1) ** 2)  # noqa: E731
    stats, reasons = assert_nothing_is_lost(loss_fn, params, X)
    assert reasons["changed/kernel"]
    assert stats["head/kernel"].count == 16


@pytest.mark.parametrize("scale", [8.0, 0.5])
def test_parameters_of_a_linen_model_scaled_at_use(scale):
    """All of them by one constant, the bias too: the count is not to suffer."""
    model = nn.Dense(2)
    params = {"kernel": normal(2, 3, 2), "bias": normal(3, 2)}

    def loss_fn(p, x):
        p = jax.tree.map(lambda a: a / scale, p)
        return jnp.mean(model.apply({"params": p}, x) ** 2)

    stats, reasons = assert_nothing_is_lost(loss_fn, params, X)
    assert_covered_or_said(stats, reasons, "kernel", X)


def test_nnx_low_rank_layers():
    """LoRA beside a frozen or trained base."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.LoRALinear(3, 2, lora_rank=1, rngs=rngs), nnx.Linear(2, 1, rngs=rngs)
    )
    first = model.layers[0]
    loss_fn = lambda model, x: jnp.mean((model(x) - 1) ** 2)  # noqa: E731
    _, _, stats = bnp_optax.flax_nnx.value_and_grad(loss_fn)(model, X)
    assert_rows(stats["layers/0/kernel"], X)
    assert_rows(stats["layers/1/kernel"], first(X))
    captured = bnp_optax.flax_nnx.value_and_grad(loss_fn, wrt=nnx.LoRAParam)
    _, _, stats = captured(model, X)
    assert_rows(stats["layers/0/lora/lora_a"], X)
    assert_rows(stats["layers/0/lora/lora_b"], X @ first.lora.lora_a[...])
