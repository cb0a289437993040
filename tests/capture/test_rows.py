"""Which rows count: those that the loss depends on through the kernel, as the kernel meets them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from support.capture_checks import (
    FRAMEWORKS,
    PARAMS,
    X,
    assert_covered_or_said,
    assert_nothing_is_lost,
    assert_rows,
    capture,
    normal,
)

import bnp_optax

OTHER = normal(1, 8, 3) * 3 - 1
BY_FRAMEWORK = pytest.mark.parametrize("framework", FRAMEWORKS)
stop = lax.stop_gradient


def params_of(framework):
    if framework == "nnx":
        return nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    return PARAMS


def stats_of(loss, framework, *args):
    """The statistics of the kernel of `f` in `loss(f, params, *args)`."""
    f = FRAMEWORKS[framework]
    loss_fn = lambda p, *args: loss(f, p, *args)  # noqa: E731
    return capture(loss_fn, params_of(framework), *args)["kernel"]


def far(y):
    return jnp.mean((y - 1) ** 2)


# Rows that the gradient does not come back through.


def target_network(f, p, x, y):
    """As in DQN: the target is computed with the same parameters, and held."""
    return jnp.mean((f(p, x).sum(0) - stop(f(p, y).sum(0))) ** 2)


def held_parameters(f, p, x, y):
    return jnp.mean((f(p, x).sum(0) - f(jax.tree.map(stop, p), y).sum(0)) ** 2)


def greedy_action(f, p, x, y):
    """Double DQN: the best action is an index."""
    best = jnp.argmax(f(p, y), 1)
    return jnp.mean(f(p, x)[:8, 0] * (1.0 + best))


def hard_mask(f, p, x, y):
    kept = f(p, y) > 0
    return jnp.mean(jnp.where(kept, f(p, x)[:8], 0.0) ** 2)


def rejected(f, p, x, y):
    """A step that is taken or not by what the network says of other rows."""
    return lax.cond(f(p, y).sum() > 0, far, lambda z: 2 * far(z), f(p, x))


def counted(f, p, x, y):
    right = (f(p, y) > 0).astype(jnp.int32).sum()
    return far(f(p, x)) * right


def sorted_by(f, p, x, y):
    order = jnp.argsort(f(p, y)[:, 0])
    return far(f(p, x)[:8][order] * jnp.arange(8.0)[:, None])


def finite(f, p, x, y):
    return jnp.where(jnp.isfinite(f(p, y)).all(), far(f(p, x)), 0.0)


def held_in_a_call(f, p, x, y):
    return far(f(p, x)) + jax.jit(lambda p, y: stop(far(f(p, y))))(p, y)


def held_in_a_scan(f, p, x, y):
    body = lambda total, row: (total + stop(far(f(p, row[None]))), None)  # noqa: E731
    return far(f(p, x)) + lax.scan(body, 0.0, y)[0]


def held_by_rule(f, p, x, y):
    """A function whose derivative its author says to be zero."""

    @jax.custom_vjp
    def held(z):
        return z

    held.defvjp(lambda z: (z, None), lambda _, g: (None,))
    return far(f(p, x)) + far(held(stop(f(p, y))))


HELD = [
    target_network,
    held_parameters,
    greedy_action,
    hard_mask,
    rejected,
    counted,
    sorted_by,
    finite,
    held_in_a_call,
    held_in_a_scan,
    held_by_rule,
]


@pytest.mark.parametrize("loss", HELD)
@BY_FRAMEWORK
def test_rows_that_no_gradient_comes_back_through_do_not_count(framework, loss):
    assert_rows(stats_of(loss, framework, X, OTHER), X)


@BY_FRAMEWORK
def test_an_adversarial_step_on_the_inputs(framework):
    """The clean rows are only there to find the step; what is learned from are the moved ones."""

    def step(f, p, x):
        return stop(jnp.sign(jax.grad(lambda x: far(f(p, x)))(x)))

    def loss(f, p, x):
        return far(f(p, x + 0.3 * step(f, p, x)))

    moved = X + 0.3 * step(FRAMEWORKS[framework], params_of(framework), X)
    assert_rows(stats_of(loss, framework, X), moved)


@BY_FRAMEWORK
def test_several_adversarial_steps_in_a_loop(framework):
    def moved(f, p, x):
        body = lambda _, x: x + 0.1 * jax.grad(lambda x: far(f(p, x)))(x)  # noqa: E731
        return lax.fori_loop(0, 3, body, x)

    def loss(f, p, x):
        return far(f(p, stop(moved(f, p, x))))

    rows = moved(FRAMEWORKS[framework], params_of(framework), X)
    assert_rows(stats_of(loss, framework, X), rows)


@BY_FRAMEWORK
def test_two_views_each_the_target_of_the_other(framework):
    """BYOL: both views are learned from once, whatever else is computed of them."""

    def loss(f, p, x, y):
        there = jnp.mean((f(p, x) - stop(f(p, y))) ** 2)
        return there + jnp.mean((f(p, y) - stop(f(p, x))) ** 2)

    other = normal(5, 16, 3) - 2
    assert_rows(stats_of(loss, framework, X, other), X, other)


@pytest.mark.parametrize("framework", ["linen", "plain"])
def test_a_generator_against_a_discriminator_that_is_held(framework):
    f = FRAMEWORKS[framework]
    params = {
        "generator": {"kernel": normal(6, 2, 3), "bias": normal(7, 3)},
        "critic": PARAMS,
    }
    make = {
        "linen": lambda p, z: nn.Dense(3).apply({"params": p}, z),
        "plain": FRAMEWORKS["plain"],
    }[framework]

    def loss_fn(p, z, real):
        fake = make(p["generator"], z)
        fooled = far(f(jax.tree.map(stop, p["critic"]), fake))
        return fooled + far(f(p["critic"], real)) - far(f(p["critic"], stop(fake)))

    z = normal(8, 16, 2)
    stats, _ = assert_nothing_is_lost(loss_fn, params, z, X)
    assert_rows(stats["generator/kernel"], z)
    # The fake rows are learned from where they are held, not where the critic is.
    assert_rows(stats["critic/kernel"], X, make(params["generator"], z))


@BY_FRAMEWORK
def test_rows_of_the_auxiliary_outputs_alone_do_not_count(framework):
    f = FRAMEWORKS[framework]

    def loss_fn(p, x, y):
        return far(f(p, x)), {"validation": far(f(p, y)), "outputs": f(p, y)}

    captured = bnp_optax.value_and_grad(loss_fn, has_aux=True)
    _, _, stats = captured(params_of(framework), X, OTHER)
    assert_rows(stats["kernel"], X)


@BY_FRAMEWORK
def test_different_rows_add_up(framework):
    """Also those that only the sign of a derivative distinguishes from unused ones."""

    def loss(f, p, x, y):
        return far(f(p, x)) - 0.5 * far(jnp.abs(f(p, y)))

    assert_rows(stats_of(loss, framework, X, OTHER), X, OTHER)


@pytest.mark.parametrize("framework", ["linen", "plain"])
def test_a_kernel_without_any_gradient_is_not_measured(framework):
    f = FRAMEWORKS[framework]
    params = {"frozen": PARAMS, "head": {"kernel": normal(3, 2, 2), "bias": normal(4, 2)}}
    loss_fn = lambda p, x: far(f(p["head"], stop(f(p["frozen"], x))))  # noqa: E731
    stats = capture(loss_fn, params, X)
    assert_rows(stats["head/kernel"], stop(f(PARAMS, X)))
    assert "frozen/kernel" not in stats or stats["frozen/kernel"].count == 0


# Casts that are more than casts.

CASTS = {
    "int": lambda a: a.astype(int).astype(jnp.float32),
    "int8": lambda a: a.astype(jnp.int8).astype(jnp.float32),
    "bool": lambda a: a.astype(bool).astype(jnp.float32),
}


@pytest.mark.parametrize("name", CASTS)
@BY_FRAMEWORK
def test_inputs_cast_to_whole_numbers_are_those_numbers(framework, name):
    x = 3 * X
    x = x.at[::2].set(0.0)
    loss = lambda f, p, x: far(f(p, CASTS[name](x)))  # noqa: E731
    assert_rows(stats_of(loss, framework, x), CASTS[name](x))


@pytest.mark.parametrize("name", CASTS)
def test_a_parameter_cast_to_whole_numbers_is_none(name):
    """It has no gradient there, and is not what meets the inputs."""

    def loss_fn(p, x):
        return far(x @ CASTS[name](8 * p["w"]) @ p["v"])

    params = {"w": normal(1, 3, 2) + 1, "v": normal(2, 2, 2)}
    summary = bnp_optax.summarize(loss_fn, params, X)
    assert summary.uncovered["w"]
    stats = capture(loss_fn, params, X)
    assert set(stats) == {"v"}
    assert_rows(stats["v"], X @ CASTS[name](8 * params["w"]))


def test_a_layer_before_a_cast_to_whole_numbers_has_no_gradient():
    def loss_fn(p, x):
        return far(whole(x @ p["w"]).astype(jnp.float32) @ p["v"] + p["b"][None])

    def whole(y):
        # Where tanh has all but reached 1, machines differ in whether it is 1.
        return (2.5 * jnp.tanh(y)).astype(int)

    params = {"w": 9 * normal(1, 3, 2), "v": normal(2, 2, 2), "b": normal(3, 2)}
    stats = capture(loss_fn, params, X)
    assert_rows(stats["v"], whole(X @ params["w"]))
    assert "w" not in stats or stats["w"].count == 0


def test_a_mask_of_the_kernel_itself():
    """`w * (w != 0)`, as pruning has it: the boolean is no view of the kernel."""

    def loss_fn(p, x):
        return far(x @ (p["w"] * p["w"].astype(bool)) + p["b"][None])

    params = {"w": normal(1, 3, 2).at[0].set(0.0), "b": normal(3, 2)}
    stats, reasons = assert_nothing_is_lost(loss_fn, params, X)
    assert_covered_or_said(stats, reasons, "w", X)


# Complex inputs of a real kernel.


def spectrum(x):
    return jnp.fft.rfft(x, axis=0)


def by_abs(y):
    return jnp.mean(jnp.abs(y) ** 2)


COMPLEX = {
    "cast by the product": lambda p, x: by_abs(spectrum(x) @ p["w"] + p["b"][None]),
    "cast before": lambda p, x: by_abs(spectrum(x) @ p["w"].astype(jnp.complex64) + p["b"][None]),
    "Linen": lambda p, x: by_abs(
        nn.Dense(2).apply({"params": {"kernel": p["w"], "bias": p["b"]}}, spectrum(x))
    ),
    "of two parts": lambda p, x: by_abs(spectrum(x) @ lax.complex(p["w"], p["i"])),
    "by einsum": lambda p, x: by_abs(jnp.einsum("ti,io->to", spectrum(x), p["w"])),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_inputs_have_a_variance_or_are_not_covered(name):
    def loss_fn(p, x):
        return COMPLEX[name](p, x) + far(x @ p["head"])

    params = {
        "w": normal(1, 3, 2),
        "i": normal(2, 3, 2),
        "b": normal(3, 2),
        "head": PARAMS["kernel"],
    }
    stats, reasons = assert_nothing_is_lost(loss_fn, params, X)
    assert_rows(stats["head"], X)
    for kernel in ("w", "i"):
        if kernel in stats:
            assert kernel not in reasons
            h = np.asarray(spectrum(X), np.complex128)
            expected = np.mean(np.abs(h - h.mean(0)) ** 2, 0)
            np.testing.assert_allclose(stats[kernel].var[:, 0], expected, rtol=1e-4)
