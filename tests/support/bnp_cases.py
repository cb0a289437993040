"""Networks to train with the library and with the float64 oracles of `oracles.py`, and comparison.

Errors are norm-wise, per array: ||got - want|| <= rtol ||want|| in the Euclidean norm, and also
max |got - want| <= rtol max |want| entry by entry. An entry-wise relative error would ask for
digits that float32 gradients do not have where G_w - mu G_b cancels.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bnp_optax
from support import oracles
from support.oracles import Conv, Dense, Options

# Ten times stricter than the 1e-3 that the library promises for preconditioned gradients. Observed
# errors stay below 1e-5: rounding of float32 gradients, times mean / standard deviation of the
# inputs (up to 10 here).
RTOL = 1e-4
# P, its transpose and its inverse applied once to given numbers: a few dozen float32 roundings.
# Observed errors are about 2e-7.
MATRIX_RTOL = 3e-6
N_STEPS = 7


def assert_close(got, want, rtol=RTOL, name=""):
    """Norm-wise and entry-wise closeness of one array, as the module's docstring says."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, name
    error = got - want
    assert np.linalg.norm(error) <= rtol * np.linalg.norm(want), name
    assert np.abs(error).max() <= rtol * np.abs(want).max(), name


def assert_trees_close(got, want, rtol=RTOL):
    got, want = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want)
    assert [path for path, _ in got] == [path for path, _ in want]
    for (path, a), (_, b) in zip(got, want, strict=True):
        assert_close(a, b, rtol, jax.tree_util.keystr(path))


def assert_trees_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def all_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Module:
    """One layer of a test network: the oracle's description and what else Linen wants to know."""

    layer: Dense | Conv
    features: int
    window: tuple[int, ...] = ()
    bias: bool = True


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and the shape of its input."""

    modules: tuple[Module, ...]
    shape: tuple[int, ...]

    @property
    def layers(self):
        return [module.layer for module in self.modules]


class Network(nn.Module):
    """The chain of layers that `oracles.gradients` differentiates."""

    modules: tuple[Module, ...]

    @nn.compact
    def __call__(self, x):
        for index, module in enumerate(self.modules):
            layer = module.layer
            if index:
                x = nn.relu(x)
                if isinstance(layer, Dense) and isinstance(self.modules[index - 1].layer, Conv):
                    x = x.reshape(len(x), -1)
            if isinstance(layer, Dense):
                x = nn.Dense(module.features, use_bias=module.bias, name=layer.name)(x)
            else:
                x = nn.Conv(
                    module.features,
                    module.window,
                    strides=layer.stride,
                    padding=layer.padding,
                    kernel_dilation=layer.dilation,
                    feature_group_count=layer.groups,
                    use_bias=module.bias,
                    name=layer.name,
                )(x)
        return x


def one(layer, features, window=(), *, shape, bias=True):
    return Case((Module(layer, features, window, bias),), shape)


CASES = {
    "dense": one(Dense("a"), 4, shape=(16, 6)),
    "dense_wide": one(Dense("a"), 3, shape=(5, 20)),
    "dense_one_output": one(Dense("a"), 1, shape=(8, 5)),
    "dense_one_input": one(Dense("a"), 3, shape=(8, 1)),
    "dense_on_sequences": one(Dense("a"), 4, shape=(3, 5, 6)),
    "dense_without_bias": one(Dense("a"), 4, shape=(12, 6), bias=False),
    "dense_one_example": one(Dense("a"), 4, shape=(1, 6)),
    "dense_one_example_without_bias": one(Dense("a"), 4, shape=(1, 6), bias=False),
    "conv": one(Conv("a"), 5, (3, 3), shape=(4, 7, 6, 3)),
    "conv_wide": one(Conv("a"), 5, (3, 3), shape=(2, 3, 3, 8)),
    "conv_one_example": one(Conv("a"), 5, (3, 3), shape=(1, 7, 6, 3)),
    "conv_strided": one(Conv("a", stride=2), 5, (3, 3), shape=(8, 7, 6, 3)),
    "conv_dilated": one(Conv("a", dilation=2), 5, (3, 3), shape=(4, 7, 6, 3)),
    "conv_valid": one(Conv("a", padding="VALID"), 5, (3, 3), shape=(8, 7, 6, 3)),
    "conv_valid_strided_oblong": one(
        Conv("a", padding="VALID", stride=2), 5, (4, 2), shape=(3, 8, 7, 3)
    ),
    "conv_grouped": one(Conv("a", groups=2), 6, (3, 3), shape=(4, 5, 6, 4)),
    "conv_grouped_strided": one(Conv("a", groups=3, stride=2), 6, (3, 3), shape=(4, 5, 6, 6)),
    "conv_depthwise": one(Conv("a", groups=4), 4, (3, 3), shape=(4, 5, 6, 4)),
    "conv_depthwise_multiplier": one(Conv("a", groups=3), 6, (3, 3), shape=(4, 5, 6, 3)),
    "conv_without_bias": one(Conv("a"), 5, (3, 3), shape=(4, 7, 6, 3), bias=False),
    "conv_grouped_without_bias": one(
        Conv("a", groups=2), 6, (3, 3), shape=(4, 5, 6, 4), bias=False
    ),
    "conv_1d": one(Conv("a"), 4, (3,), shape=(4, 9, 3)),
    "conv_3d": one(Conv("a"), 4, (2, 3, 2), shape=(3, 3, 4, 5, 2)),
    "mlp": Case(
        (Module(Dense("a"), 7), Module(Dense("b"), 5, bias=False), Module(Dense("c"), 3)), (12, 6)
    ),
    "cnn": Case(
        (
            Module(Conv("a"), 4, (3, 3)),
            Module(Conv("b", stride=2, groups=2), 6, (3, 3)),
            Module(Dense("c"), 3),
        ),
        (4, 6, 6, 3),
    ),
}

# More inputs than examples, where q counts.
WIDE = ["dense_wide", "conv_wide"]
ONE_EXAMPLE = ["dense_one_example", "dense_one_example_without_bias", "conv_one_example"]


def drifting_inputs(shape, step, seed=0):
    """A batch whose feature means and scales differ by feature and move with every step."""
    rng = np.random.default_rng((seed, step))
    feature = np.arange(shape[-1])
    mean = 3 * np.sin(1.3 * feature + 0.7 * step) + 0.4 * step
    scale = 4.0 ** np.cos(feature + 0.2 * step) * (1 + 0.3 * step)
    return (mean + scale * rng.normal(size=shape)).astype(np.float32)


def random_params(model, x, seed=2):
    """Normal parameters: kernels of variance 1 / fan-in, biases of variance 1/4."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]

    def draw(leaf):
        scale = math.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.5
        return jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree.map(draw, shapes)


@functools.cache
def setting(name):
    """A case with its initial parameters, a loss of `(params, x, y)`, and the shape of y."""
    case = CASES[name]
    model = Network(case.modules)
    x = drifting_inputs(case.shape, 0)
    params = random_params(model, x)
    target_shape = jax.eval_shape(model.apply, {"params": params}, x).shape

    def loss_fn(params, x, y):
        return jnp.sum((model.apply({"params": params}, x) - y) ** 2) / (2 * len(x))

    return case, params, loss_fn, target_shape


def targets(shape, step, seed=1):
    return np.random.default_rng((seed, step)).normal(size=shape).astype(np.float32)


@functools.cache
def captured(name):
    _, _, loss_fn, _ = setting(name)
    return jax.jit(bnp_optax.value_and_grad(loss_fn))


@functools.cache
def transformation(**options):
    """`init` of `bnp_precondition(**options)` and its jitted `update`, compiled once."""
    tx = bnp_optax.bnp_precondition(**options)
    return tx.init, jax.jit(tx.update)


def train(name, tx, jit=False, n_steps=N_STEPS, learning_rate=1e-3):
    """Gradient descent with `tx`; yields the parameters and batch of each step, and its updates.

    `jit` compiles the step as a whole; otherwise its two halves run one by one, `tx` uncompiled.
    """
    case, params, loss_fn, target_shape = setting(name)

    def step(params, state, x, y):
        loss_and_grad = bnp_optax.value_and_grad(loss_fn) if jit else captured(name)
        _, grads, stats = loss_and_grad(params, x, y)
        return tx.update(grads, state, params, layer_stats=stats)

    state, step = tx.init(params), jax.jit(step) if jit else step
    for i in range(n_steps):
        x, y = drifting_inputs(case.shape, i), targets(target_shape, i)
        updates, state = step(params, state, x, y)
        yield params, x, y, updates
        params = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)


def assert_follows_the_oracle(name, options, jit=False, first=0):
    """`bnp_precondition(**options)` against the oracle, at every step from `first` on."""
    running, compared = {}, 0
    tx = bnp_optax.bnp_precondition(**options)
    for step, (params, x, y, updates) in enumerate(train(name, tx, jit)):
        running, want = oracles.bnp_step(
            CASES[name].layers, running, params, x, y, Options(**options)
        )
        if step >= first:
            assert_trees_close(updates, want)
            compared += 1
    assert compared >= 6
