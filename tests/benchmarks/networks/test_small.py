"""The benchmarks' small networks: shapes, initial kernels, and pooling against Flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.benchmark_network_cases import IMAGES, QUICK, draw

from benchmarks.networks.paper_cnn import PaperCNN, pool
from benchmarks.networks.small import CNN, MLP


def test_paper_cnn_has_the_tutorial_s_shapes_and_glorot_kernels():
    params = jax.jit(PaperCNN().init, compiler_options=QUICK)(
        jax.random.key(0, impl="rbg"), jnp.zeros(IMAGES)
    )["params"]
    expected = {
        "Conv_0": (3, 3, 3, 32),
        "Conv_1": (3, 3, 32, 64),
        "Conv_2": (3, 3, 64, 32),
        "Dense_0": (512, 64),
        "Dense_1": (64, 10),
    }
    assert {name: layer["kernel"].shape for name, layer in params.items()} == expected
    for layer in params.values():
        *window, fan_in, fan_out = layer["kernel"].shape
        bound = np.sqrt(6 / (np.prod(window) * (fan_in + fan_out)))
        assert 0.95 * bound < np.abs(layer["kernel"]).max() <= bound
        assert not np.any(layer["bias"])


def test_kernels_of_small_networks_can_be_chosen():
    for model in (MLP((4,)), CNN()):
        plain, ones = (
            jax.jit(m.init, compiler_options=QUICK)(
                jax.random.key(0, impl="rbg"), jnp.zeros((1, 4, 4, 1))
            )["params"]
            for m in (model, model.clone(kernel_init=nn.initializers.ones))
        )
        assert jax.tree.structure(plain) == jax.tree.structure(ones)
        for layer in ones.values():
            np.testing.assert_array_equal(layer["kernel"], 1.0)


@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (2, 7, 5, 3), (1, 2, 3, 1)])
def test_pooling_is_flax_s(shape):
    x, weights = jnp.array(draw(shape)), jnp.array(draw((8, *shape[-1:])))

    def loss_fn(x, pool):
        y = pool(x)
        return jnp.sum(y * jnp.resize(weights, y.shape)), y

    def flax_pool(x):
        return nn.max_pool(x, (2, 2), (2, 2))

    (_, y), grad = jax.value_and_grad(loss_fn, has_aux=True)(x, pool)
    (_, expected), expected_grad = jax.value_and_grad(loss_fn, has_aux=True)(x, flax_pool)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(grad, expected_grad)
