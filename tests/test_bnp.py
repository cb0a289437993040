"""Batch normalization preconditioning against the float64 oracles of `oracles.py`.

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
import oracles
import pytest
from oracles import Conv, Dense, Options

import bnp_optax

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


# ---------------------------------------------------------------------------------------------
# Algorithms 2 and 3.
# ---------------------------------------------------------------------------------------------


# The others run below with every option, the default ones among them.
@pytest.mark.parametrize("name", [n for n in CASES if n not in {*WIDE, *ONE_EXAMPLE}])
def test_preconditioned_gradients_follow_the_algorithms(name):
    assert_follows_the_oracle(name, {}, jit=True)


@pytest.mark.parametrize(
    "name", ["dense", "dense_one_example", "conv_grouped", "conv_without_bias"]
)
def test_preconditioned_gradients_follow_the_algorithms_when_the_statistics_move_fast(name):
    assert_follows_the_oracle(name, {"decay": 0.3}, jit=True)


def test_one_example_takes_the_variance_about_the_running_mean_before_its_update():
    model = nn.Dense(2)
    xs = [jnp.full((1, 1), value) for value in (4.0, 10.0)]
    params = random_params(model, xs[0])
    loss_and_grad = bnp_optax.value_and_grad(lambda p, x: jnp.sum(model.apply({"params": p}, x)))
    tx = bnp_optax.bnp_precondition(decay=0.5, eps_rel=0.0, eps_abs=0.0, scale=False)
    state = tx.init(params)
    # mu: 0 -> 2 -> 6. sigma^2: 1 -> (1 + 4^2)/2 = 8.5 -> (8.5 + (10 - 2)^2)/2 = 36.25.
    for x, mean, var in zip(xs, (2.0, 6.0), (8.5, 36.25), strict=True):
        _, grads, stats = loss_and_grad(params, x)
        updates, state = tx.update(grads, state, params, layer_stats=stats)
        want = float(x[0, 0] - mean) / var
        assert_close(updates["kernel"], np.full((1, 2), want), MATRIX_RTOL)
        assert_close(updates["bias"], np.full(2, 1 - want * mean), MATRIX_RTOL)


def test_the_bias_step_uses_the_updated_kernel_gradient():
    # By hand, with mean 3 and variance 4: G_w = (7 - 3*2)/4 = 1/4 and G_b = 2 - 3/4, where the raw
    # G_w would give 2 - 3*7.
    x = jnp.array([[1.0], [5.0]])
    model = nn.Dense(1)
    params = random_params(model, x)
    _, _, stats = bnp_optax.value_and_grad(lambda p: jnp.sum(model.apply({"params": p}, x)))(params)
    tx = bnp_optax.bnp_precondition(decay=0.0, eps_rel=0.0, eps_abs=0.0)
    grads = {"kernel": jnp.array([[7.0]]), "bias": jnp.array([2.0])}
    updates, _ = tx.update(grads, tx.init(params), params, layer_stats=stats)
    assert_close(updates["kernel"], [[0.25]], MATRIX_RTOL)
    assert_close(updates["bias"], [1.25], MATRIX_RTOL)


def test_the_relative_floor_is_that_of_each_group():
    x = np.random.default_rng(0).normal(size=(8, 5, 5, 4)).astype(np.float32)
    x *= np.array([1.0, 1.0, 1e3, 1e3], np.float32)
    model = nn.Conv(4, (3, 3), feature_group_count=2)
    params = random_params(model, x)
    tx = bnp_optax.bnp_precondition(decay=0.0)

    @jax.jit
    def update(x):
        _, _, stats = bnp_optax.value_and_grad(lambda p: model.apply({"params": p}, x).sum())(
            params
        )
        ones = jax.tree.map(jnp.ones_like, params)
        return tx.update(ones, tx.init(params), params, layer_stats=stats)[0]

    updates = [update(x * np.array([1, 1, s, s], np.float32)) for s in (1.0, 100.0)]
    first, second = (np.asarray(u["kernel"]) for u in updates)
    np.testing.assert_array_equal(first[..., :2], second[..., :2])
    assert np.linalg.norm(second[..., 2:]) < 0.1 * np.linalg.norm(first[..., 2:])


# ---------------------------------------------------------------------------------------------
# P as a matrix.
# ---------------------------------------------------------------------------------------------

MATRIX_CASES = [
    "dense",
    "dense_one_output",
    "dense_one_input",
    "dense_without_bias",
    "conv",
    "conv_grouped",
    "conv_depthwise_multiplier",
    "conv_without_bias",
    "conv_grouped_without_bias",
    "conv_1d",
]


@functools.cache
def prepared(name):
    """`bnp(decay=0.5)`, its state after three steps, the oracle's P of a unit, a random tree."""
    case, params, _, target_shape = setting(name)
    (layer,) = case.layers
    preconditioner, options = bnp_optax.bnp(decay=0.5), Options(decay=0.5)
    state, running = preconditioner.init(params), {}
    update = jax.jit(preconditioner.update)
    for step in range(3):
        x, y = drifting_inputs(case.shape, step), targets(target_shape, step)
        _, grads, stats = captured(name)(params, x, y)
        state = update(grads, state, params, layer_stats=stats)
        running, _ = oracles.bnp_step([layer], running, params, x, y, options)
    seen = oracles.gradients([layer], params, x, y)["a"]
    kernel = params["a"]["kernel"]
    rows = math.prod(case.shape[:-1]) if isinstance(layer, Dense) else case.shape[0]
    fan_in = math.prod(kernel.shape[:-1])
    q2 = oracles.scale_squared(fan_in, rows, seen.positions, options)
    matrix = functools.partial(
        oracles.unit_matrix,
        running["a"],
        kernel_shape=kernel.shape,
        has_bias="bias" in params["a"],
        q2=q2,
        options=options,
    )
    rng = np.random.default_rng(5)
    tree = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    return preconditioner, state, matrix, tree


def by_unit(matrix, tree):
    kernel, bias = oracles.by_unit(matrix, tree["a"]["kernel"], tree["a"].get("bias"))
    return {"a": {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}}


@pytest.mark.parametrize("name", MATRIX_CASES)
def test_apply_multiplies_by_p(name):
    preconditioner, state, matrix, tree = prepared(name)
    assert_trees_close(
        jax.jit(preconditioner.apply)(state, tree), by_unit(matrix, tree), MATRIX_RTOL
    )


@pytest.mark.parametrize("name", MATRIX_CASES)
def test_apply_transpose_multiplies_by_p_transposed(name):
    preconditioner, state, matrix, tree = prepared(name)
    want = by_unit(lambda unit: matrix(unit).T, tree)
    assert_trees_close(jax.jit(preconditioner.apply_transpose)(state, tree), want, MATRIX_RTOL)


@pytest.mark.parametrize("name", MATRIX_CASES)
def test_solve_multiplies_by_the_inverse_of_p(name):
    preconditioner, state, matrix, tree = prepared(name)
    want = by_unit(lambda unit: np.linalg.inv(matrix(unit)), tree)
    assert_trees_close(jax.jit(preconditioner.solve)(state, tree), want, MATRIX_RTOL)


@pytest.mark.parametrize("name", MATRIX_CASES)
def test_gram_multiplies_by_p_p_transposed(name):
    preconditioner, state, matrix, tree = prepared(name)
    want = by_unit(lambda unit: matrix(unit) @ matrix(unit).T, tree)
    assert_trees_close(jax.jit(preconditioner.gram)(state, tree), want, MATRIX_RTOL)


@pytest.mark.parametrize("name", MATRIX_CASES)
def test_apply_undoes_solve(name):
    preconditioner, state, _, tree = prepared(name)
    z = jax.jit(preconditioner.solve)(state, tree)
    assert_trees_close(jax.jit(preconditioner.apply)(state, z), tree, MATRIX_RTOL)
    assert not np.allclose(z["a"]["kernel"], tree["a"]["kernel"], rtol=0.01)


@pytest.mark.parametrize("name", ["dense", "conv_grouped"])
def test_transpose_is_the_adjoint(name):
    preconditioner, state, _, z = prepared(name)
    g = jax.tree.map(lambda leaf: jnp.cos(3 * leaf), z)

    def dot(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return sum(np.vdot(np.float64(x), np.float64(y)) for x, y in pairs)

    left = dot(jax.jit(preconditioner.apply)(state, z), g)
    right = dot(z, jax.jit(preconditioner.apply_transpose)(state, g))
    assert left == pytest.approx(right, rel=1e-4)


# ---------------------------------------------------------------------------------------------
# Proposition 7.
# ---------------------------------------------------------------------------------------------


def normalized(h, statistics):
    """B_{0,1}(h) with given statistics, through which no gradient passes, and no epsilon."""
    mean, std = map(jax.lax.stop_gradient, statistics)
    return (h - mean) / std


def batch_statistics(h):
    axes = tuple(range(h.ndim - 1))
    return h.mean(axes, keepdims=True), h.std(axes, keepdims=True)


class Chain(nn.Module):
    """Layers with a softplus between them, which leaves no input of zero variance."""

    features: tuple[int, ...]
    window: tuple[int, ...] = ()
    batch_norm: bool = False

    @nn.compact
    def __call__(self, h):
        for index, features in enumerate(self.features):
            if index:
                h = nn.softplus(h)
            statistics = batch_statistics(h)
            self.sow("intermediates", f"statistics_{index}", statistics)
            if self.batch_norm:
                h = normalized(h, statistics)
            name = f"layer_{index}"
            if self.window:
                h = nn.Conv(features, self.window, padding="VALID", name=name)(h)
            else:
                h = nn.Dense(features, name=name)(h)
        return h


def folded(params, statistics):
    """W_hat = W diag(1/sigma_H), b_hat = b - W diag(mu_H/sigma_H) of every layer."""
    result = {}
    for name, layer in params.items():
        kernel, bias = (np.asarray(layer[key], np.float64) for key in ("kernel", "bias"))
        mean, std = (np.asarray(s, np.float64).ravel() for s in statistics[name])
        kernel = kernel / std[:, None]
        inputs = tuple(range(kernel.ndim - 1))
        result[name] = {"kernel": kernel, "bias": bias - (mean[:, None] * kernel).sum(inputs)}
    return result


@pytest.mark.parametrize(
    ("features", "window", "shape"),
    [((7, 6, 3), (), (24, 5)), ((4, 3), (3, 3), (6, 9, 8, 2))],
    ids=["dense", "conv_valid"],
)
def test_a_sgd_step_of_batch_norm_is_a_bnp_step_of_the_folded_network(features, window, shape):
    bn, plain = Chain(features, window, batch_norm=True), Chain(features, window)
    x = jnp.asarray(drifting_inputs(shape, 2))
    params = random_params(bn, x)
    output, sown = jax.jit(functools.partial(bn.apply, mutable="intermediates"))(
        {"params": params}, x
    )
    statistics = {
        f"layer_{i}": sown["intermediates"][f"statistics_{i}"][0] for i in range(len(features))
    }
    vanilla = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), folded(params, statistics))
    assert_close(jax.jit(plain.apply)({"params": vanilla}, x), output)

    def loss_of(model):
        y = targets(output.shape, 0)
        return lambda p: jnp.mean((model.apply({"params": p}, x) - y) ** 2)

    tx = bnp_optax.bnp_precondition(decay=0.0, eps_rel=0.0, eps_abs=0.0, scale=False)
    _, grads, stats = jax.jit(bnp_optax.value_and_grad(loss_of(plain)))(vanilla)
    updates, _ = jax.jit(tx.update)(grads, tx.init(vanilla), vanilla, layer_stats=stats)
    # Folding is linear in the parameters, so the two networks' steps must fold onto one another.
    assert_trees_close(updates, folded(jax.jit(jax.grad(loss_of(bn)))(params), statistics))


# ---------------------------------------------------------------------------------------------
# Options.
# ---------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"decay": 0.0},
    {"decay": 0.5},
    {"decay": 0.999},
    {"eps_rel": 0.0},
    {"eps_rel": 0.3},
    {"eps_abs": 0.0},
    {"eps_abs": 2.0},
    {"scale": False},
    {"warm_start": True},
    {"variance": "running"},
    {"variance": "batch"},
    {"batch_size": 1.0},
    {"batch_size": 1000},
    {"decay": 0.6, "eps_rel": 0.1, "eps_abs": 0.5, "warm_start": True, "batch_size": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_options_enter_where_the_algorithms_have_them(name, options):
    assert_follows_the_oracle(name, options)


@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.parametrize("variance", ["auto", "batch", "running"])
@pytest.mark.parametrize("name", ONE_EXAMPLE)
def test_variance_option_with_one_example(name, variance, warm_start):
    # A warm start's first mean is the one example itself, about which its gradient is exactly 0.
    options = {"variance": variance, "warm_start": warm_start}
    assert_follows_the_oracle(name, options, first=int(warm_start))


def test_auto_takes_the_variance_about_the_running_mean_for_one_row_alone():
    auto, running, batch = (
        [u for *_, u in train("dense", bnp_optax.bnp_precondition(variance=variance))]
        for variance in ("auto", "running", "batch")
    )
    assert_trees_equal(auto, batch)
    assert not np.allclose(auto[-1]["a"]["kernel"], running[-1]["a"]["kernel"], rtol=0.01)


def test_warm_start_takes_the_statistics_of_the_first_batch():
    case, params, _, target_shape = setting("dense")
    x, y = drifting_inputs(case.shape, 4), targets(target_shape, 4)
    _, grads, stats = captured("dense")(params, x, y)
    updates = [
        tx.update(grads, tx.init(params), params, layer_stats=stats)[0]
        for tx in (
            bnp_optax.bnp_precondition(warm_start=True),
            bnp_optax.bnp_precondition(decay=0.0),
        )
    ]
    assert_trees_close(*updates, MATRIX_RTOL)


def test_warm_start_with_one_row_takes_the_square_for_its_variance():
    x = jnp.array([[3.0, -5.0]])
    model = nn.Dense(1)
    params = random_params(model, x)
    _, _, stats = bnp_optax.value_and_grad(lambda p: jnp.sum(model.apply({"params": p}, x)))(params)
    tx = bnp_optax.bnp_precondition(warm_start=True, eps_rel=0.0, eps_abs=0.0, scale=False)
    grads = {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}
    updates, _ = tx.update(grads, tx.init(params), params, layer_stats=stats)
    assert_close(updates["kernel"], [[1 / 9], [1 / 25]], MATRIX_RTOL)


@pytest.mark.parametrize(
    ("name", "captured_layers"), [("mlp", "all"), ("mlp", "chosen"), ("cnn", "chosen")]
)
def test_layers_outside_the_chosen_ones_pass_through_unchanged(name, captured_layers):
    case, params, loss_fn, target_shape = setting(name)
    x, y = drifting_inputs(case.shape, 0), targets(target_shape, 0)
    layers = bnp_optax.find_layers(loss_fn, params, jnp.asarray(x), jnp.asarray(y))
    assert set(layers) == {"a/kernel", "b/kernel", "c/kernel"}
    chosen = {key: layer for key, layer in layers.items() if key != "b/kernel"}
    capture = None if captured_layers == "all" else chosen
    loss_and_grad = jax.jit(bnp_optax.value_and_grad(loss_fn, layers=capture))
    tx = bnp_optax.bnp_precondition(layers=chosen)
    state, running, update = tx.init(params), {}, jax.jit(tx.update)
    for step in range(2):
        x, y = drifting_inputs(case.shape, step), targets(target_shape, step)
        _, grads, stats = loss_and_grad(params, x, y)
        assert set(stats) == set(layers if capture is None else chosen)
        updates, state = update(grads, state, params, layer_stats=stats)
        running, want = oracles.bnp_step(case.layers, running, params, x, y)
        assert_trees_equal(updates["b"], grads["b"])
        for layer in ("a", "c"):
            assert_trees_close(updates[layer], want[layer])


def test_all_layers_passed_explicitly_change_nothing():
    name = "conv_grouped"
    case, params, loss_fn, target_shape = setting(name)
    x, y = drifting_inputs(case.shape, 0), targets(target_shape, 0)
    layers = bnp_optax.find_layers(loss_fn, params, jnp.asarray(x), jnp.asarray(y))
    explicit, found = (
        [u for *_, u in train(name, bnp_optax.bnp_precondition(layers=choice))]
        for choice in (layers, None)
    )
    assert_trees_close(explicit, found, MATRIX_RTOL)


# ---------------------------------------------------------------------------------------------
# Bad numbers, and no statistics.
# ---------------------------------------------------------------------------------------------


def stepped(name, init, update, n_steps=2):
    """The state after some steps, and gradients and statistics for one more."""
    case, params, _, target_shape = setting(name)
    state = init(params)
    for step in range(n_steps + 1):
        x, y = drifting_inputs(case.shape, step), targets(target_shape, step)
        _, grads, stats = captured(name)(params, x, y)
        if step < n_steps:
            _, state = update(grads, state, params, layer_stats=stats)
    return params, state, grads, stats


def spoiled(stats, how):
    """Statistics of the layer `a` with one bad number, or of no rows at all."""
    layer = stats["a/kernel"]
    if how == "no rows":
        empty = jax.tree.map(jnp.zeros_like, layer)
        return stats | {"a/kernel": empty}
    value, field = how.split()
    array = getattr(layer, field)
    array = array.ravel().at[0].set(float(value)).reshape(array.shape)
    return stats | {"a/kernel": dataclasses.replace(layer, **{field: array})}


FIELDS = ["mean", "var", "sq_mean", "count"]
BAD = [*(f"{value} {field}" for value in ("nan", "inf") for field in FIELDS), "0 count", "no rows"]


@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize("name", ["dense", "conv_grouped", "dense_without_bias"])
def test_bad_statistics_do_not_enter_the_running_ones(name, how):
    init, update = transformation()
    params, state, grads, stats = stepped(name, init, update)
    updates, after = update(grads, state, params, layer_stats=spoiled(stats, how))
    reused, _ = update(grads, state, params, layer_stats=None)
    assert_trees_equal(after, state)
    assert_trees_equal(updates, reused)
    assert all_finite(updates)


@pytest.mark.parametrize("how", BAD)
def test_bad_statistics_of_one_layer_leave_the_others_alone(how):
    init, update = transformation()
    params, state, grads, stats = stepped("mlp", init, update)
    good, _ = update(grads, state, params, layer_stats=stats)
    updates, _ = update(grads, state, params, layer_stats=spoiled(stats, how))
    for layer in ("b", "c"):
        assert_trees_equal(updates[layer], good[layer])
    assert not np.array_equal(updates["a"]["kernel"], good["a"]["kernel"])


@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize("warm_start", [False, True])
def test_training_goes_on_after_a_bad_first_batch(warm_start, how):
    init, update = transformation(warm_start=warm_start)
    params, state, grads, stats = stepped("dense", init, update, n_steps=0)
    after_bad = update(grads, state, params, layer_stats=spoiled(stats, how))[1]
    updates, _ = update(grads, after_bad, params, layer_stats=stats)
    want, _ = update(grads, state, params, layer_stats=stats)
    assert_trees_equal(updates, want)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_with_a_bad_number_does_not_enter_the_running_statistics(value):
    case, params, _, target_shape = setting("mlp")
    init, update = transformation()
    _, state, grads, _ = stepped("mlp", init, update)
    x = drifting_inputs(case.shape, 3)
    x[0, 0] = value
    _, _, stats = captured("mlp")(params, x, targets(target_shape, 3))
    _, after = update(grads, state, params, layer_stats=stats)
    assert_trees_equal(after, state)


@pytest.mark.parametrize("decay", [0.99, 0.0])
@pytest.mark.parametrize(
    "name", ["dense", "dense_one_example", "dense_without_bias", "conv_depthwise"]
)
@pytest.mark.parametrize("constant", [0.0, 3.0, 1e4])
def test_inputs_without_variance_give_finite_updates(name, decay, constant):
    case, params, _, target_shape = setting(name)
    init, update = transformation(decay=decay)
    state = init(params)
    x = np.full(case.shape, constant, np.float32)
    for step in range(2):
        _, grads, stats = captured(name)(params, x, targets(target_shape, step))
        updates, state = update(grads, state, params, layer_stats=stats)
        assert all_finite(updates)
        assert all_finite(state)


def test_one_dead_input_gives_finite_updates():
    case, params, _, target_shape = setting("dense")
    x = drifting_inputs(case.shape, 0)
    x[:, 2] = 0.0
    init, update = transformation(decay=0.0)
    y = targets(target_shape, 0)
    _, grads, stats = captured("dense")(params, x, y)
    updates, _ = update(grads, init(params), params, layer_stats=stats)
    _, want = oracles.bnp_step(case.layers, {}, params, x, y, Options(decay=0.0))
    np.testing.assert_array_equal(updates["a"]["kernel"][2], 0.0)
    assert_trees_close(updates, want)


@pytest.mark.parametrize("name", ["dense", "conv_grouped", "conv_without_bias"])
def test_zero_gradients_give_zero_updates(name):
    init, update = transformation()
    params, state, grads, stats = stepped(name, init, update)
    zeros = jax.tree.map(jnp.zeros_like, grads)
    updates, _ = update(zeros, state, params, layer_stats=stats)
    assert_trees_equal(updates, zeros)


@pytest.mark.parametrize("name", ["dense", "conv_grouped", "conv_without_bias", "mlp"])
def test_no_statistics_leave_the_state_and_still_precondition(name):
    init, update = transformation(decay=0.5)
    params, state, grads, _ = stepped(name, init, update)
    updates, after = update(grads, state, params, layer_stats=None)
    assert_trees_equal(after, state)

    case, _, _, target_shape = setting(name)
    running, options = {}, Options(decay=0.5)
    for step in range(2):
        x, y = drifting_inputs(case.shape, step), targets(target_shape, step)
        running, _ = oracles.bnp_step(case.layers, running, params, x, y, options)
    # With decay 1, the oracle's step moves nothing and preconditions with what is there.
    x, y = drifting_inputs(case.shape, 2), targets(target_shape, 2)
    _, want = oracles.bnp_step(case.layers, running, params, x, y, Options(decay=1.0))
    assert_trees_close(updates, want)


# ---------------------------------------------------------------------------------------------
# Stacked layers.
# ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer that keeps its input's shape, with an output that is neither centered nor scaled."""

    kind: str

    @nn.compact
    def __call__(self, x, _):
        features = x.shape[-1]
        bias = not self.kind.endswith("without_bias")
        if self.kind.startswith("dense"):
            y = nn.Dense(features, use_bias=bias, name="layer")(x)
        else:
            groups = 2 if self.kind.startswith("conv_grouped") else 1
            y = nn.Conv(
                features,
                (3, 3),
                feature_group_count=groups,
                use_bias=bias,
                name="layer",
            )(x)
        return nn.relu(1.7 * y), None


class Scanned(nn.Module):
    kind: str
    depth: int

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
        )
        return stack(self.kind, name="stack")(x, None)[0]


class Unrolled(nn.Module):
    kind: str
    depth: int

    @nn.compact
    def __call__(self, x):
        for index in range(self.depth):
            x, _ = Block(self.kind, name=f"block_{index}")(x, None)
        return x


def last_updates(model, params, batches, explicit):
    """The updates of the last of a few steps at the same parameters."""

    def loss_fn(params, x, y):
        return jnp.mean((model.apply({"params": params}, x) - y) ** 2)

    layers = bnp_optax.find_layers(loss_fn, params, *batches[0]) if explicit else None
    tx = bnp_optax.bnp_precondition(decay=0.8, layers=layers)

    @jax.jit
    def step(state, params, x, y):
        _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, x, y)
        return tx.update(grads, state, params, layer_stats=stats)

    state = tx.init(params)
    for x, y in batches:
        updates, state = step(state, params, x, y)
    return updates


@pytest.mark.parametrize("kind", ["dense", "dense_without_bias", "conv_grouped"])
def test_layers_stacked_by_scan_equal_the_layers_one_by_one(kind):
    depth, shape = 2, (6, 4) if kind.startswith("dense") else (3, 4, 5, 4)
    scanned, unrolled = Scanned(kind, depth), Unrolled(kind, depth)
    stacked = random_params(scanned, drifting_inputs(shape, 0))
    batches = [
        (jnp.asarray(drifting_inputs(shape, step)), jnp.asarray(targets(shape, step)))
        for step in range(3)
    ]

    def unstacked(tree):
        blocks = tree["stack"]
        return {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(depth)}

    one_by_one = last_updates(unrolled, unstacked(stacked), batches, explicit=False)
    # Without `layers`, the state of a grouped convolution takes its shape at the first step.
    for explicit in (False, True) if kind == "conv_grouped" else (False,):
        updates = last_updates(scanned, stacked, batches, explicit)
        assert_trees_close(unstacked(updates), one_by_one)


# ---------------------------------------------------------------------------------------------
# Averages over shards.
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "conv", "conv_grouped", "mlp"])
def test_average_over_two_half_batches_has_the_variance_of_the_whole(name):
    case, params, _, target_shape = setting(name)
    x, y = drifting_inputs(case.shape, 1), targets(target_shape, 1)
    half = len(x) // 2
    x[:half] += 2.0
    halves = [captured(name)(params, *pair)[2] for pair in _split(x, y)]
    average = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    _, _, whole = captured(name)(params, x, y)
    for key, stats in whole.items():
        assert_close(average[key].mean, stats.mean, 1e-5, key)
        assert_close(average[key].total_variance, stats.total_variance, 1e-4, key)
        assert float(jnp.max(average[key].total_variance - average[key].var)) > 0.1


def _split(x, y):
    half = len(x) // 2
    return (x[:half], y[:half]), (x[half:], y[half:])


@pytest.mark.parametrize("name", ["dense", "conv", "conv_grouped", "dense_without_bias"])
def test_pmean_over_shards_gives_the_step_of_the_whole_batch(name):
    case, params, loss_fn, target_shape = setting(name)

    def sharded(params, x, y):
        _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, x, y)
        return jax.lax.pmean((grads, stats), "shards")

    over_shards = jax.jit(
        jax.vmap(sharded, in_axes=(None, 0, 0), out_axes=None, axis_name="shards")
    )
    # The count of a shard is that of its own examples: `batch_size` tells N of the whole.
    init, update = transformation(decay=0.5, batch_size=case.shape[0])
    state, running = init(params), {}
    for step in range(3):
        x, y = drifting_inputs(case.shape, step), targets(target_shape, step)
        x[: len(x) // 2] += 2.0
        grads, stats = over_shards(params, *(a.reshape(2, -1, *a.shape[1:]) for a in (x, y)))
        updates, state = update(grads, state, params, layer_stats=stats)
        running, want = oracles.bnp_step(case.layers, running, params, x, y, Options(decay=0.5))
        assert_trees_close(updates, want)
