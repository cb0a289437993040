"""Decompositions of stacks: right in every mode of JAX, and on a CPU of one matrix at a time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.quick_jit import jit

import bnp_optax
from bnp_optax import decompositions

MODES = {
    "eager": lambda f: f,
    "jit": jit,
    "vmap": lambda f: jit(jax.vmap(f)),
    "vmap twice": lambda f: jit(jax.vmap(jax.vmap(f))),
    "cond": lambda f: jit(lambda m: jax.lax.cond(m[0, 0, 0, 0] > -9.0, jax.vmap(f), f, m)),
    "shard_map": lambda f: in_shard_map(f, True),
    "shard_map, check_vma=False": lambda f: in_shard_map(f, False),
    "explicit": lambda f: in_explicit_mesh(f),
}
FUNCTIONS = {"eigh": decompositions.eigh, "qr": decompositions.qr}


def in_shard_map(f, check_vma):
    """The last axis of the stack over eight devices."""
    mesh, spec = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), P(None, "data")
    mapped = jax.shard_map(
        jax.vmap(f), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
    )
    return jit(mapped)


def in_explicit_mesh(f):
    def called(m):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
        with jax.set_mesh(mesh):
            return jit(jax.vmap(f))(jax.device_put(m, NamedSharding(mesh, P())))

    return called


def stack(*shape):
    m = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return jnp.asarray(m @ m.swapaxes(-1, -2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_products_of_the_parts_are_the_matrices(name, mode):
    m = stack(2, 8, 6, 6)
    first, second = map(np.asarray, MODES[mode](FUNCTIONS[name])(m))
    orthonormal = second if name == "eigh" else first
    square = np.swapaxes(orthonormal, -1, -2) @ orthonormal
    np.testing.assert_allclose(square, np.broadcast_to(np.eye(6), m.shape), atol=1e-5)
    if name == "eigh":
        assert np.all(np.diff(first) >= 0.0)
        product = (second * first[..., None, :]) @ np.swapaxes(second, -1, -2)
    else:
        product = first @ second
    np.testing.assert_allclose(product, m, atol=2e-5)


def test_a_high_matrix_has_a_small_q():
    m = stack(3, 6, 6)[..., :2]
    q, r = decompositions.qr(m)
    assert (q.shape, r.shape) == ((3, 6, 2), (3, 2, 2))
    np.testing.assert_allclose(q @ r, m, atol=1e-5)


def kernels(function, *args, platform="cpu"):
    """Calls of LAPACK, or of its like, in the program for a platform."""
    text = jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return [
        line for line in text.splitlines() if re.search(r"custom_call @\w*(lapack|solver)", line)
    ]


def is_of_a_stack(kernel):
    return re.search(r"tensor<(\d+x){3,}", kernel) is not None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_matrix_at_a_time_on_a_cpu_alone(name):
    m, function = stack(2, 3, 6, 6), FUNCTIONS[name]
    for mode in (function, jax.vmap(function), jax.vmap(jax.vmap(function))):
        found = kernels(mode, m)
        assert found
        assert not any(map(is_of_a_stack, found))
        assert any(map(is_of_a_stack, kernels(mode, m, platform="cuda")))


@pytest.mark.parametrize("max_fan_in", [1024, 1])
def test_whiten_decomposes_one_matrix_at_a_time_on_a_cpu(max_fan_in):
    """Layers of one shape, stacked layers, and an ensemble of networks."""
    shapes = {"a": (48, 4), "b": (48, 4), "c": (3, 48, 4)}
    params = {
        name: {"kernel": jnp.ones(s), "bias": jnp.zeros((*s[:-2], 4))} for name, s in shapes.items()
    }

    def loss_fn(params, x):
        inputs = {"a": x, "b": x, "c": x[None] * jnp.arange(3.0)[:, None, None]}
        outputs = [
            inputs[name] @ p["kernel"] + p["bias"][..., None, :] for name, p in params.items()
        ]
        return sum(jnp.mean(y**2) for y in outputs)

    whitening = bnp_optax.whiten(max_fan_in=max_fan_in)

    def update(x):
        _, grads, stats = bnp_optax.value_and_grad(loss_fn, second_moments=True)(params, x)
        return whitening.update(grads, whitening.init(params), layer_stats=stats)

    found = kernels(jax.vmap(update), jnp.ones((2, 8, 48)))
    assert found
    assert not any(map(is_of_a_stack, found))


def test_a_derivative_through_steps_takes_the_decompositions_for_constants():
    params = {"kernel": stack(1, 4, 4)[0], "bias": jnp.zeros(4)}
    x = stack(1, 4, 4)[0] + 1.0
    tx = bnp_optax.whiten_adam(refresh_every=1)

    def loss_fn(params, x):
        return jnp.mean((x @ params["kernel"] + params["bias"][None] - 1.0) ** 2)

    def trained(size):
        def step(carry, _):
            params, state = carry
            _, grads, stats = bnp_optax.value_and_grad(loss_fn, second_moments=True)(
                params, size * x
            )
            updates, state = tx.update(grads, state, params, layer_stats=stats)
            return (jax.tree.map(jnp.add, params, updates), state), None

        (found, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=3)
        return loss_fn(found, x)

    sizes = jnp.array([1.0, 2.0])
    forward = jit(jax.vmap(jax.jacfwd(trained)))(sizes)
    backward = jit(jax.vmap(jax.grad(trained)))(sizes)
    assert np.all(np.abs(forward) > 1e-6)
    np.testing.assert_allclose(backward, forward, rtol=1e-2)
