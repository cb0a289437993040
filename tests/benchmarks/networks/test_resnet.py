"""The benchmarks' residual networks: their parameters, initial kernels, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.benchmark_network_cases import QUICK

from benchmarks.networks.resnet import CifarResNet, ResNet18
from bnp_optax._tree import KERNEL, is_named, named_leaves


def count(model, shape):
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))["params"]
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("preactivation", [False, True])
def test_resnet_110_has_he_s_parameters_and_biases(preactivation):
    convolutions = [(3, 16)] + 36 * [(16, 16)]
    convolutions += [(16, 32)] + 35 * [(32, 32)] + [(32, 64)] + 35 * [(64, 64)]
    assert len(convolutions) == 109
    biases = sum(out for _, out in convolutions)
    kernels = sum(9 * fan_in * out for fan_in, out in convolutions) + 64 * 10 + 10
    # Normalizations have the width of what they follow; before an activation, of what they precede.
    widths = [fan_in for fan_in, _ in convolutions[1:]] + [64] if preactivation else []
    scales = 2 * sum(widths or [out for _, out in convolutions])
    if not preactivation:
        assert round((kernels + scales) / 1e6, 2) == 1.73
    model = CifarResNet(norm="batch", preactivation=preactivation)
    assert count(model, (1, 32, 32, 3)) == kernels + biases + scales
    none = CifarResNet(norm="none", preactivation=preactivation)
    assert count(none, (1, 32, 32, 3)) == kernels + biases


def test_resnet_18_has_torchvision_s_parameters_and_biases():
    widths = [64, 64, 64, 64, 64]
    widths += [128] * 5 + [256] * 5 + [512] * 5  # Four convolutions and a projection each.
    assert count(ResNet18(norm="batch"), (1, 224, 224, 3)) == 11_689_512 + sum(widths)


def test_resnet_s_initial_kernels_are_he_normal_times_the_scale():
    model = CifarResNet(14, init_scale=0.1)
    init = jax.jit(model.init, compiler_options=QUICK)
    params = init(jax.random.key(0, impl="rbg"), jnp.zeros((1, 8, 8, 3)))["params"]
    for name, leaf in named_leaves(params).items():
        if not is_named(name, KERNEL):
            assert not np.any(leaf)
        elif leaf.size > 10_000:
            # The kernels of equal blocks are stacked along the first axis.
            fan_in = np.prod(leaf.shape[-4:-1])
            np.testing.assert_allclose(leaf.std(), 0.1 * np.sqrt(2 / fan_in), rtol=0.05)
            assert leaf.ndim == 4 or len(np.unique(leaf[:, 0, 0, 0, 0])) == leaf.shape[0]


@pytest.mark.parametrize("depth", [2, 18, 111])
def test_resnet_refuses_other_depths(depth):
    with pytest.raises(ValueError, match=rf"`depth` must be 6 n \+ 2.* got {depth}"):
        CifarResNet(depth).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_resnet_refuses_unknown_shortcuts():
    with pytest.raises(ValueError, match=r"`shortcut` must be one of .*'pad'.* got 'crop'"):
        CifarResNet(8, shortcut="crop").init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
