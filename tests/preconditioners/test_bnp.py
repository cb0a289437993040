"""Batch normalization preconditioning against the float64 oracles of `oracles.py`."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.bnp_cases import (
    CASES,
    MATRIX_RTOL,
    ONE_EXAMPLE,
    WIDE,
    assert_close,
    assert_follows_the_oracle,
    assert_trees_close,
    assert_trees_equal,
    captured,
    drifting_inputs,
    random_params,
    setting,
    targets,
    train,
)
from support.oracles import Dense, Options

import bnp_optax

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
    """P of `bnp(decay=0.5)` after three steps, the oracle's of a unit, and a random tree."""
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
    return preconditioner.operator(state), matrix, tree


def by_unit(matrix, tree):
    kernel, bias = oracles.by_unit(matrix, tree["a"]["kernel"], tree["a"].get("bias"))
    return {"a": {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}}


@pytest.mark.parametrize("name", MATRIX_CASES)
def test_mv_multiplies_by_p(name):
    P, matrix, tree = prepared(name)
    assert_trees_close(jax.jit(P.mv)(tree), by_unit(matrix, tree), MATRIX_RTOL)


@pytest.mark.parametrize("name", MATRIX_CASES)
def test_transpose_multiplies_by_p_transposed(name):
    P, matrix, tree = prepared(name)
    want = by_unit(lambda unit: matrix(unit).T, tree)
    assert_trees_close(jax.jit(P.transpose)(tree), want, MATRIX_RTOL)


@pytest.mark.parametrize("name", MATRIX_CASES)
def test_solve_multiplies_by_the_inverse_of_p(name):
    P, matrix, tree = prepared(name)
    want = by_unit(lambda unit: np.linalg.inv(matrix(unit)), tree)
    assert_trees_close(jax.jit(P.solve)(tree), want, MATRIX_RTOL)


@pytest.mark.parametrize("name", MATRIX_CASES)
def test_gram_multiplies_by_p_p_transposed(name):
    P, matrix, tree = prepared(name)
    want = by_unit(lambda unit: matrix(unit) @ matrix(unit).T, tree)
    assert_trees_close(jax.jit(P.gram)(tree), want, MATRIX_RTOL)


@pytest.mark.parametrize("name", MATRIX_CASES)
def test_mv_undoes_solve(name):
    P, _, tree = prepared(name)
    z = jax.jit(P.solve)(tree)
    assert_trees_close(jax.jit(P.mv)(z), tree, MATRIX_RTOL)
    assert not np.allclose(z["a"]["kernel"], tree["a"]["kernel"], rtol=0.01)


@pytest.mark.parametrize("name", ["dense", "conv_grouped"])
def test_transpose_is_the_adjoint(name):
    P, _, z = prepared(name)
    g = jax.tree.map(lambda leaf: jnp.cos(3 * leaf), z)

    def dot(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return sum(np.vdot(np.float64(x), np.float64(y)) for x, y in pairs)

    left = dot(jax.jit(P.mv)(z), g)
    right = dot(z, jax.jit(P.transpose)(g))
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
