"""Inputs and variables for the benchmarks' networks and normalizations, and comparison."""

import jax
import jax.numpy as jnp
import numpy as np

EPS = 1e-5
SHAPE_IDS = ["dense", "images"]
IMAGES = (4, 32, 32, 3)
# Compilation is most of the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def draw(shape, seed=0):
    """Rows that are neither centered nor of one scale."""
    rng = np.random.default_rng(seed)
    scale, shift = rng.uniform(0.5, 3, shape[-1]), rng.normal(size=shape[-1])
    return (shift + scale * rng.normal(size=shape)).astype(np.float32)


def affine(variables, seed=9):
    """The variables with other scales and biases, and these in float64."""
    rng = np.random.default_rng(seed)
    gamma, beta = rng.normal(1, 0.3, 8), rng.normal(size=8)
    params = {"scale": jnp.array(gamma, jnp.float32), "bias": jnp.array(beta, jnp.float32)}
    return {**variables, "params": params}, gamma, beta


def train(module, variables, x):
    y, state = module.apply(variables, x, train=True, mutable=["batch_stats"])
    return np.asarray(y), {**variables, **state}


def close(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def initial(model, x):
    """Variables like the initial ones; these would take as long to compile as the network."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        if path[-1].key in ("kernel", "embedding"):
            fan_in = np.prod(shape.shape[-4:-1])
            return jnp.array(rng.normal(0, fan_in**-0.5, shape.shape), shape.dtype)
        ones = path[-1].key in ("scale", "var", "deviation", "square")
        return jnp.full(shape.shape, ones, shape.dtype)

    return jax.tree.map_with_path(leaf, jax.eval_shape(model.init, jax.random.key(0), x))
