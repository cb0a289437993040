"""The benchmarks' networks: every normalization runs, every kernel is found."""

import functools

import jax
import jax.numpy as jnp
import pytest
from support.benchmark_network_cases import IMAGES, QUICK, draw, initial

import bnp_optax
from benchmarks.networks.paper_cnn import PaperCNN
from benchmarks.networks.resnet import CifarResNet, ResNet18
from benchmarks.networks.small import CNN, MLP, Norm, convolve_patches
from benchmarks.networks.transformer import CharTransformer
from bnp_optax._tree import KERNEL, is_named, named_leaves

NORMS: tuple[Norm, ...] = ("none", "batch", "layer", "group", "renorm", "four")

NETWORKS = {
    "mlp": (lambda norm: MLP((8,), norm=norm), (4, 6, 5)),
    "cnn": (lambda norm: CNN(norm=norm, convolution=convolve_patches), (4, 8, 8, 3)),
    "paper cnn": (
        lambda norm: PaperCNN((4, 8, 4), 8, norm=norm, convolution=convolve_patches),
        (4, 22, 22, 3),
    ),
    "resnet": (lambda norm: CifarResNet(8, norm=norm), (4, 8, 8, 3)),
    "preactivation": (
        lambda norm: CifarResNet(8, norm=norm, preactivation=True, shortcut="projection"),
        (4, 8, 8, 3),
    ),
    "resnet-18": (lambda norm: ResNet18(4, 10, norm), IMAGES),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_run_with_every_normalization(name, norm):
    make, shape = NETWORKS[name]
    model, x = make(norm), jnp.array(draw(shape))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(variables, x):
        logits, state = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, model.apply({**variables, **state}, x), state

    *both, state = run(initial(model, x), x)
    for logits in both:
        assert logits.shape == (shape[0], 10)
        assert jnp.all(jnp.isfinite(logits))
        assert logits.std() > 1e-6
    assert bool(jax.tree.leaves(state)) == (norm in ("batch", "renorm", "four"))


MODELS = {
    **{name: (make("none"), shape) for name, (make, shape) in NETWORKS.items()},
    "pad": (CifarResNet(14, preactivation=True), (4, 8, 8, 3)),
    "transformer": (CharTransformer(11, width=8, heads=2), None),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kernel_of_an_unnormalized_network_is_found_with_its_bias(name):
    model, shape = MODELS[name]
    x = jnp.zeros((4, 5), jnp.int32) if shape is None else jnp.zeros(shape)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]

    def loss_fn(params):
        return jnp.mean(model.apply({"params": params}, x, train=True) ** 2)

    layers = bnp_optax.find_layers(loss_fn, params)
    assert set(layers) == {leaf for leaf in named_leaves(params) if is_named(leaf, KERNEL)}
    assert all(layer.bias for layer in layers.values())
