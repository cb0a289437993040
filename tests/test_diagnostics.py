"""Diagnostics against dense float64 matrices in NumPy."""

import builtins
import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnp_optax
from bnp_optax import diagnostics

RNG = np.random.default_rng(0)
ROW = diagnostics.LayerReport("kernel", 2, 1, 1, 1.0, 1.0, 1.0, 1.0, 1.0)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


class MLP(nn.Module):
    features: tuple[int, ...] = (4, 3)
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        for features in self.features[:-1]:
            x = nn.tanh(nn.Dense(features, use_bias=self.bias, param_dtype=float)(x))
        return nn.Dense(self.features[-1], use_bias=self.bias, param_dtype=float)(x)


class CNN(nn.Module):
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), feature_group_count=self.groups, param_dtype=float)(x)
        return nn.Dense(2, param_dtype=float)(nn.tanh(x).mean((1, 2)))


def problem(model, shape, seed=0):
    """A loss, parameters away from any minimum, and the arguments of the loss."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=shape) * rng.uniform(0.3, 3.0, shape[-1]) + 1.5)
    params = jax.eval_shape(model.init, jax.random.key(seed), x)["params"]
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.5), params)
    outputs = jax.eval_shape(model.apply, {"params": params}, x)
    y = jnp.asarray(rng.normal(size=outputs.shape))

    def loss_fn(params, x, y):
        error = model.apply({"params": params}, x) - y
        return jnp.mean(jnp.sum(error**2, axis=-1) + 0.1 * jnp.sum(error**4, axis=-1))

    return loss_fn, params, (x, y)


def dense_hessian(loss_fn, params, args):
    """The whole Hessian by reverse- over reverse-mode, and the flat parameters' functions."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.jit(jax.jacrev(jax.grad(lambda v: loss_fn(unravel(v), *args))))(flat)
    return np.asarray(hessian), unravel


def dense_preconditioner(preconditioner, state, params):
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def column(e):
        return jax.flatten_util.ravel_pytree(preconditioner.apply(state, unravel(e)))[0]

    return np.asarray(jax.jit(jax.vmap(column, out_axes=1))(jnp.eye(flat.size)))


def bnp_state(loss_fn, params, args, preconditioner):
    _, grads, stats = jax.jit(bnp_optax.value_and_grad(loss_fn))(params, *args)
    return preconditioner.update(grads, preconditioner.init(params), params, layer_stats=stats)


# ---------------------------------------------------------------------------------------------
# Condition numbers and extended inputs.
# ---------------------------------------------------------------------------------------------

orthogonal = functools.lru_cache(
    lambda n, seed: np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
)


@settings(max_examples=30, deadline=None)
@given(
    exponents=st.lists(st.floats(-3, 3), min_size=1, max_size=6),
    extra=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_condition_number_is_the_ratio_of_the_nonzero_singular_values(exponents, extra):
    sizes = 10.0 ** np.array(exponents)
    matrix = np.zeros((len(sizes) + extra[0], len(sizes) + extra[1]))
    matrix[: len(sizes), : len(sizes)] = np.diag(sizes)
    matrix = orthogonal(matrix.shape[0], 0) @ matrix @ orthogonal(matrix.shape[1], 1)
    expected = sizes.max() / sizes.min()
    assert diagnostics.condition_number(matrix) == pytest.approx(expected, rel=1e-7)
    assert diagnostics.condition_number(matrix.T) == pytest.approx(expected, rel=1e-7)


def test_condition_number_of_an_indefinite_symmetric_matrix():
    q = orthogonal(4, 3)
    matrix = q @ np.diag([-5.0, 2.0, 0.5, 0.0]) @ q.T
    assert diagnostics.condition_number(matrix, symmetric=True) == pytest.approx(10.0)
    assert diagnostics.condition_number(matrix) == pytest.approx(10.0)


def test_what_counts_as_zero_follows_the_dtype_of_the_matrix():
    matrix = np.diag([1.0, 1e-4, 1e-9])
    assert diagnostics.condition_number(matrix) == pytest.approx(1e9)
    assert diagnostics.condition_number(matrix.astype(np.float32)) == pytest.approx(1e4)
    assert diagnostics.condition_number(jnp.asarray(matrix, jnp.float32)) == pytest.approx(1e4)
    assert diagnostics.condition_number(np.diag([4, 2, 0])) == 2.0


@pytest.mark.parametrize("symmetric", [False, True])
def test_condition_number_under_jit(symmetric):
    matrix = jnp.asarray(orthogonal(3, 1) @ np.diag([6.0, 3.0, 0.0]) @ orthogonal(3, 1).T)
    under_jit = jax.jit(functools.partial(diagnostics.condition_number, symmetric=symmetric))
    assert float(under_jit(matrix)) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_extended_inputs_have_a_one_in_front(shape):
    h = RNG.normal(size=shape)
    got = diagnostics.extended_inputs(h)
    assert got.shape == (*shape[:-1], shape[-1] + 1)
    np.testing.assert_array_equal(got[..., 0], np.ones(shape[:-1]))
    np.testing.assert_allclose(got[..., 1:], h, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: np.ones(3), r"`matrix` must be a matrix .* got an array of shape \(3,\)"),
        (lambda: np.ones((2, 0)), r"rows and columns, got an array of shape \(2, 0\)"),
        (lambda: np.array([[1.0, np.nan], [np.inf, 0]]), "finite, but 2 of its 4 entries are not"),
        (lambda: np.zeros((2, 2)), "`matrix` is zero: it has no nonzero singular value"),
    ],
)
def test_condition_number_of_no_matrix(call, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.condition_number(call())


def test_hessians_are_square():
    with pytest.raises(ValueError, match=r"square and symmetric.*got shape \(2, 3\)"):
        diagnostics.condition_number(np.ones((2, 3)), symmetric=True)


def test_extended_inputs_of_a_number():
    with pytest.raises(ValueError, match=r"`h` must have the inputs .* got the scalar 2\.0"):
        diagnostics.extended_inputs(2.0)


# ---------------------------------------------------------------------------------------------
# Unit Hessians.
# ---------------------------------------------------------------------------------------------


def unit_indices(params, name, unit):
    """Places of [b, w] of a unit among the flat parameters."""
    places, _ = jax.flatten_util.ravel_pytree(params)
    _, unravel = jax.flatten_util.ravel_pytree(params)
    places = unravel(jnp.arange(places.size, dtype=places.dtype))[name]
    bias = [int(places["bias"][unit])] if "bias" in places else []
    return bias + np.asarray(places["kernel"])[..., unit].ravel().astype(int).tolist()


CASES = {
    "dense": (MLP(), (7, 5), "Dense_0", 2),
    "last": (MLP(), (7, 5), "Dense_1", 0),
    "one_unit": (MLP((4, 1)), (7, 5), "Dense_1", 0),
    "no_bias": (MLP(bias=False), (7, 5), "Dense_0", 3),
    "conv": (CNN(), (3, 5, 6, 2), "Conv_0", 1),
    "grouped": (CNN(groups=2), (3, 5, 6, 4), "Conv_0", 3),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("x64")
def test_unit_hessian_is_a_block_of_the_dense_one(name):
    model, shape, layer, unit = CASES[name]
    loss_fn, params, args = problem(model, shape)
    hessian, _ = dense_hessian(loss_fn, params, args)
    places = unit_indices(params, layer, unit)
    got = diagnostics.unit_hessian(loss_fn, params, f"{layer}/kernel", unit, *args)
    assert np.abs(got).max() > 1e-3
    np.testing.assert_allclose(got, hessian[np.ix_(places, places)], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("x64")
def test_unit_hessian_in_z_is_a_block_of_the_dense_one(name):
    model, shape, layer, unit = CASES[name]
    loss_fn, params, args = problem(model, shape)
    P = bnp_optax.bnp(decay=0.5)
    state = bnp_state(loss_fn, params, args, P)
    hessian, _ = dense_hessian(loss_fn, params, args)
    p = dense_preconditioner(P, state, params)
    places = unit_indices(params, layer, unit)
    got = diagnostics.unit_hessian(
        loss_fn, params, f"{layer}/kernel", unit, *args, preconditioner=P, state=state
    )
    expected = (p.T @ hessian @ p)[np.ix_(places, places)]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("x64")
def test_unit_hessian_with_many_inputs_is_found_in_parts():
    loss_fn, params, args = problem(MLP((3, 2)), (6, 70))
    hessian, _ = dense_hessian(loss_fn, params, args)
    places = unit_indices(params, "Dense_0", 1)
    got = diagnostics.unit_hessian(loss_fn, params, "Dense_0/kernel", 1, *args)
    np.testing.assert_allclose(got, hessian[np.ix_(places, places)], rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_unit_hessian_under_jit_and_with_integers_among_the_params():
    loss_fn, params, (x, y) = problem(MLP(), (7, 5))
    expected = diagnostics.unit_hessian(loss_fn, params, "Dense_0/kernel", 1, x, y)

    @jax.jit
    def under_jit(params, x, y):
        tree = params | {"step": jnp.asarray(3)}
        assert loss_fn(tree, x, y).shape == ()
        return diagnostics.unit_hessian(loss_fn, tree, "Dense_0/kernel", 1, x, y)

    np.testing.assert_allclose(under_jit(params, x, y), expected, rtol=1e-12)


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda layer, h, _: (nn.tanh(layer(h)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return layers(nn.Dense(3, param_dtype=float), x, None)[0]


@pytest.mark.usefixtures("x64")
def test_units_of_stacked_layers_are_counted_through():
    loss_fn, params, args = problem(Stacked(), (6, 3))
    (name,) = params
    hessian, _ = dense_hessian(loss_fn, params, args)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    places = unravel(jnp.arange(flat.size, dtype=flat.dtype))[name]
    first, unit = 1, 2
    chosen = [places["bias"][first, unit], *places["kernel"][first, :, unit]]
    chosen = np.asarray(chosen).astype(int)
    got = diagnostics.unit_hessian(loss_fn, params, f"{name}/kernel", first * 3 + unit, *args)
    np.testing.assert_allclose(got, hessian[np.ix_(chosen, chosen)], rtol=1e-10, atol=1e-12)


def test_layers_name_kernels_of_other_names():
    def loss_fn(params, x):
        return jnp.mean((x @ params["weight"] + params["shift"][None]) ** 2)

    x = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)
    params = {"weight": jnp.ones((3, 2)), "shift": jnp.zeros(2)}
    model = nn.Dense(2)
    found = bnp_optax.find_layers(
        lambda p: model.apply({"params": p}, x).sum(), model.init(jax.random.key(0), x)["params"]
    )
    layer = dataclasses.replace(found["kernel"], kernel="weight", bias="shift")
    got = diagnostics.unit_hessian(loss_fn, params, "weight", 1, x, layers={"weight": layer})
    h = diagnostics.extended_inputs(x)
    np.testing.assert_allclose(got, h.T @ h / 5, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"no leaf named `kernel`.*it has `shift`, `weight`"):
        diagnostics.unit_hessian(loss_fn, params, "weight", 1, x)


@pytest.mark.parametrize(
    ("path", "unit", "message"),
    [
        ("Dense_9/kernel", 0, "'Dense_9/kernel'.*names no layer.*`Dense_0/kernel`, `Dense_1/kern"),
        ("Dense_0/bias", 0, "'Dense_0/bias'.*names no layer"),
        ("Dense_0/kernel", 4, r"`unit` must lie in \[0, 4\).*`Dense_0/kernel`; got 4"),
        ("Dense_0/kernel", -1, r"`unit` must lie in \[0, 4\).*got -1"),
    ],
)
def test_no_such_unit(path, unit, message):
    loss_fn, params, args = problem(MLP(), (7, 5))
    with pytest.raises(ValueError, match=message):
        diagnostics.unit_hessian(loss_fn, params, path, unit, *args)


@pytest.mark.parametrize("function", ["unit_hessian", "hessian_extremes", "report"])
def test_preconditioner_and_state_come_together(function):
    loss_fn, params, args = problem(MLP(), (7, 5))
    unit = ("Dense_0/kernel", 0) if function == "unit_hessian" else ()
    call = functools.partial(getattr(diagnostics, function), loss_fn, params, *unit, *args)
    P = bnp_optax.bnp()
    with pytest.raises(ValueError, match="`preconditioner` was given without `state`"):
        call(preconditioner=P)
    with pytest.raises(ValueError, match="`state` was given without `preconditioner`"):
        call(state=P.init(params))
    with pytest.raises(ValueError, match="must be a `Preconditioner`"):
        call(preconditioner=optax.sgd(0.1), state=P.init(params))


# ---------------------------------------------------------------------------------------------
# kappa(D).
# ---------------------------------------------------------------------------------------------


def kappa_of_d(running, has_bias, options):
    sigma = np.sqrt(oracles.floored(running.var, options))
    d = np.concatenate([np.ones(int(has_bias)), 1 / sigma])
    return d.max() / d.min()


def hidden_inputs(params, x):
    layer = jax.tree.map(np.asarray, params["Dense_0"])
    bias = layer.get("bias", 0.0)
    return {
        "Dense_0/kernel": np.asarray(x),
        "Dense_1/kernel": np.tanh(np.asarray(x) @ layer["kernel"] + np.asarray(bias)),
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.usefixtures("x64")
def test_conditioning_is_that_of_the_matrix_d(bias, scale):
    loss_fn, params, (x, y) = problem(MLP(bias=bias), (7, 5))
    options = oracles.Options(decay=0.25, eps_rel=1e-3, eps_abs=1e-6, scale=scale)
    P = bnp_optax.bnp(decay=0.25, eps_rel=1e-3, eps_abs=1e-6, scale=scale)
    got = diagnostics.conditioning(bnp_state(loss_fn, params, (x, y), P))
    hidden = hidden_inputs(params, x)
    assert got.keys() == hidden.keys()
    for name, h in hidden.items():
        grad_w = np.zeros((h.shape[1], 2))
        grad_b = np.zeros(2) if bias else None
        start = oracles.initial(h.shape[1])
        running, _, _ = oracles.algorithm_2(start, h, grad_w, grad_b, options)
        expected = kappa_of_d(running, bias, options)
        assert expected > 1.1
        assert float(got[name]) == pytest.approx(expected, rel=1e-5)


def train_state(params, tx):
    return bnp_optax.TrainState.create(apply_fn=lambda: None, params=params, tx=tx)


WRAPPERS = {
    "alias": (lambda: bnp_optax.bnp_sgd(0.1), None),
    "in_zspace": (lambda: bnp_optax.bnp_adam(0.1), None),
    "chain": (lambda: optax.chain(optax.clip(1.0), bnp_optax.bnp_sgd(0.1)), None),
    "masked": (
        lambda: optax.masked(
            bnp_optax.bnp_sgd(0.1), {"Dense_0": True, "Dense_1": False}
        ),
        ["Dense_0/kernel"],
    ),
    "partition": (
        lambda: optax.partition(
            {"a": bnp_optax.bnp_sgd(0.1), "b": bnp_optax.bnp_sgd(0.2)},
            {"Dense_0": "a", "Dense_1": "b"},
        ),
        None,
    ),
    "compose": (
        lambda: bnp_optax.in_zspace(
            optax.sgd(0.1), bnp_optax.compose(bnp_optax.bnp(), bnp_optax.rms())
        ),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_conditioning_finds_the_state_and_works_under_jit(name):
    make, layers = WRAPPERS[name]
    loss_fn, params, args = problem(MLP(), (7, 5))
    expected = diagnostics.conditioning(bnp_state(loss_fn, params, args, bnp_optax.bnp()))
    tx = make()
    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, *args)
    if layers:
        stats = {key: stats[key] for key in layers}
    _, state = tx.update(grads, tx.init(params), params, layer_stats=stats)
    got = jax.jit(diagnostics.conditioning)(state)
    assert sorted(got) == sorted(layers or expected)
    for key, value in got.items():
        assert value.shape == ()
        assert float(value) == pytest.approx(float(expected[key]), rel=1e-5)


def test_conditioning_of_a_train_state_that_has_seen_nothing_is_one():
    _, params, _ = problem(MLP(), (7, 5))
    state = train_state(params, bnp_optax.bnp_sgd(0.1))
    got = diagnostics.conditioning(state)
    assert {name: float(value) for name, value in got.items()} == {
        "Dense_0/kernel": 1.0,
        "Dense_1/kernel": 1.0,
    }


def test_conditioning_of_stacked_layers_and_groups_is_that_of_the_worst():
    """Each layer or group has a D of its own: ratios across them do not count."""
    ones = np.ones((2, 1, 3))
    sigma = np.array([[1.0, 2.0, 8.0], [1000.0, 1000.0, 2000.0]])[..., None]
    state = bnp_optax.BNPState(
        mean={"kernel": jnp.zeros((2, 3, 1)), "bias": jnp.zeros(())},
        var={"kernel": jnp.asarray(sigma**2), "bias": jnp.ones(())},
        scale={"kernel": jnp.asarray(0.5 / sigma), "bias": jnp.asarray(0.5 * ones)},
        seen={"kernel": jnp.ones(()), "bias": jnp.zeros(())},
    )
    # The bias's 1 is an entry of D too: 1/1 to 1/8, and 1 to 1/2000.
    assert float(diagnostics.conditioning(state)["kernel"]) == pytest.approx(2000.0)
    scale = {"kernel": jnp.asarray((0.5 / sigma).transpose(2, 1, 0)[None])}
    grouped = bnp_optax.BNPState({"kernel": jnp.zeros((1, 1, 3, 2))}, scale, scale, {})
    assert float(diagnostics.conditioning(grouped)["kernel"]) == pytest.approx(8.0)


def test_conditioning_without_a_bnp_state():
    with pytest.raises(ValueError, match="`state` holds no `BNPState`, got a `tuple`"):
        diagnostics.conditioning(optax.adam(0.1).init({"kernel": jnp.ones((2, 2))}))


# ---------------------------------------------------------------------------------------------
# Lanczos.
# ---------------------------------------------------------------------------------------------


def check_ends(got, eigenvalues, rtol=1e-3):
    largest = np.abs(eigenvalues).max()
    assert abs(float(got.min) - eigenvalues[0]) <= rtol * largest
    assert abs(float(got.max) - eigenvalues[-1]) <= rtol * largest
    # The residuals bound the distance to some eigenvalue, but for rounding.
    slack = 1e-5 * largest
    for value, residual in ((got.min, got.min_residual), (got.max, got.max_residual)):
        assert np.abs(eigenvalues - float(value)).min() <= float(residual) + slack


LANCZOS = {
    "mlp": (MLP((6, 3)), (20, 5)),
    "mlp_deep": (MLP((38, 16, 10)), (30, 28)),
    "cnn": (CNN(), (4, 8, 8, 3)),
}


@pytest.mark.parametrize("name", LANCZOS)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_extremes_are_those_of_the_dense_hessian(name, preconditioned):
    """In float32, against float64, with the defaults: to 1e-3 of the largest."""
    model, shape = LANCZOS[name]
    with jax.enable_x64(True):
        loss_fn, params, args = problem(model, shape)
        expected, _ = dense_hessian(loss_fn, params, args)
        P = bnp_optax.bnp(decay=0.5)
        state = bnp_state(loss_fn, params, args, P)
        if preconditioned:
            p = dense_preconditioner(P, state, params)
            expected = p.T @ expected @ p
    eigenvalues = np.linalg.eigvalsh(expected)
    assert eigenvalues[0] < -1e-3 * eigenvalues[-1]
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, args))
    options = {"preconditioner": P, "state": state} if preconditioned else {}
    got = diagnostics.hessian_extremes(loss_fn, single[0], *single[1], **options)
    assert got.max.dtype == jnp.float32
    check_ends(got, eigenvalues)


@pytest.mark.parametrize("num_lanczos", [1, 2, 5])
@pytest.mark.usefixtures("x64")
def test_few_products_give_bounds_that_hold_and_values_inside(num_lanczos):
    loss_fn, params, args = problem(MLP((6, 3)), (20, 5))
    hessian, _ = dense_hessian(loss_fn, params, args)
    eigenvalues = np.linalg.eigvalsh(hessian)
    got = diagnostics.hessian_extremes(loss_fn, params, *args, num_lanczos=num_lanczos)
    assert eigenvalues[0] <= got.min <= got.max <= eigenvalues[-1]
    assert got.max_residual > 1e-6
    for value, residual in ((got.min, got.min_residual), (got.max, got.max_residual)):
        assert np.abs(eigenvalues - float(value)).min() <= float(residual) * (1 + 1e-9)


@pytest.mark.usefixtures("x64")
def test_step_by_step_is_the_loop_of_matfree():
    from matfree import decomp

    from bnp_optax.diagnostics import lanczos

    matrix = RNG.normal(size=(30, 30))
    matrix = jnp.asarray(matrix + matrix.T)
    product = jax.tree_util.Partial(jnp.matmul, matrix)
    start = jnp.asarray(RNG.normal(size=30))
    one = lanczos._in_a_loop(decomp.tridiag_sym, 12, product, start)
    two = lanczos._step_by_step(product, start, 12)
    np.testing.assert_allclose(one.diagonal, two.diagonal, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(one.betas, two.betas, rtol=1e-9)


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("name", ["identity", "zero", "two values", "rank one"])
def test_invariant_subspaces(name, convolution):
    """Krylov spaces that end early: residuals of 0, and what rounding makes of them."""
    n = 40
    spectrum = {
        "identity": np.full(n, 3.0),
        "zero": np.zeros(n),
        "two values": np.repeat([-2.0, 5.0], n // 2),
        "rank one": np.r_[np.zeros(n - 1), 7.0],
    }[name]
    s = jnp.asarray(spectrum, jnp.float32)

    def loss_fn(w):
        if convolution:
            # The identity, by a convolution of width one.
            w = jax.lax.conv_general_dilated(w[None, None], jnp.ones((1, 1, 1)), (1,), "SAME")[0, 0]
        return 0.5 * jnp.sum(s * w**2)

    got = diagnostics.hessian_extremes(loss_fn, jnp.ones(n))
    scale = max(np.abs(spectrum).max(), 1e-30)
    assert abs(float(got.min) - spectrum.min()) <= 1e-5 * scale
    assert abs(float(got.max) - spectrum.max()) <= 1e-5 * scale
    assert max(got.min_residual, got.max_residual) <= 1e-5 * scale


def test_extremes_under_jit_and_with_any_key():
    loss_fn, params, args = problem(MLP((6, 3)), (20, 5))
    expected = diagnostics.hessian_extremes(loss_fn, params, *args)
    other = diagnostics.hessian_extremes(loss_fn, params, *args, key=jax.random.key(7))
    jitted = jax.jit(functools.partial(diagnostics.hessian_extremes, loss_fn))(params, *args)
    for got in (other, jitted):
        np.testing.assert_allclose(got[:2], expected[:2], rtol=1e-4)


def test_integer_leaves_and_bfloat16_kernels():
    s = jnp.array([-1.0, 2.0, 6.0])
    params = {"w": jnp.ones(3, jnp.bfloat16), "n": jnp.asarray(2), "b": jnp.ones(1)}

    def loss_fn(p):
        return 0.5 * p["n"] * jnp.sum(s * p["w"] ** 2) + jnp.sum(p["b"] ** 2)

    got = diagnostics.hessian_extremes(loss_fn, params)
    np.testing.assert_allclose(got[:2], [-2.0, 12.0], rtol=1e-5)
    assert got.max.dtype == jnp.float32


def test_hessian_that_is_not_finite():
    with pytest.raises(ValueError, match="Hessian of the loss is not finite at `params`"):
        diagnostics.hessian_extremes(lambda w: jnp.sum(jnp.sqrt(w)), jnp.zeros(3))


def test_no_products_and_no_parameters():
    with pytest.raises(ValueError, match="`num_lanczos` must be at least 1, got 0"):
        diagnostics.hessian_extremes(jnp.sum, jnp.ones(3), num_lanczos=0)
    with pytest.raises(ValueError, match=r"no floating-point leaf .* it has `n`"):
        diagnostics.hessian_extremes(lambda p: 0.0 * p["n"], {"n": jnp.asarray(1)})


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("matfree", lambda: diagnostics.hessian_extremes(jnp.sum, jnp.ones(3))),
        ("matplotlib", lambda: diagnostics.Report((ROW,)).figure()),
    ],
)
def test_extras_that_are_not_installed(module, call, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"needs {module}.*'bnp-optax\[diagnostics\]'"):
        call()


# ---------------------------------------------------------------------------------------------
# Learning rates.
# ---------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(a=st.floats(1e-3, 1e3), b=st.floats(1e-3, 1e3))
def test_optimal_rate_minimizes_the_larger_of_the_two_factors(a, b):
    lmin, lmax = sorted((a, b))
    rate = float(diagnostics.optimal_learning_rate(lmin, lmax))

    def factor(rate):
        return max(abs(1 - rate * lmin), abs(1 - rate * lmax))

    assert factor(rate) <= min(factor(0.99 * rate), factor(1.01 * rate)) + 1e-5
    kappa = lmax / lmin
    assert factor(rate) == pytest.approx((kappa - 1) / (kappa + 1), abs=1e-5)
    assert float(diagnostics.convergence_factor(kappa)) == pytest.approx(factor(rate), abs=1e-5)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.usefixtures("x64")
def test_training_is_stable_just_below_the_bound_and_not_above(preconditioned):
    """On a quadratic loss, where the bound is exact."""
    loss_fn, params, (x, y) = problem(MLP((3,)), (12, 5))

    def square(params, x, y):
        layer = params["Dense_0"]
        return jnp.mean((x @ layer["kernel"] + layer["bias"][None] - y) ** 2)

    P = bnp_optax.bnp()
    options = {}
    if preconditioned:
        state = bnp_state(loss_fn, params, (x, y), P)
        options = {"preconditioner": P, "state": state}
    bound = float(diagnostics.max_stable_learning_rate(square, params, x, y, **options))
    ends = diagnostics.hessian_extremes(square, params, x, y, **options)
    assert bound == pytest.approx(float(diagnostics.max_stable_learning_rate(ends.max)))

    @jax.jit
    def train(rate, params):
        def step(params, _):
            g = jax.grad(square)(params, x, y)
            if preconditioned:
                g = P.apply(state, P.apply_transpose(state, g))
            return jax.tree.map(lambda p, g: p - rate * g, params, g), None

        return square(jax.lax.scan(step, params, length=2000)[0], x, y)

    start = square(params, x, y)
    assert train(0.98 * bound, params) < start
    assert train(1.02 * bound, params) > 1e6 * start


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diagnostics.optimal_learning_rate(0.0, 1.0), "`lmin` must be a positive.*got 0.0"),
        (lambda: diagnostics.optimal_learning_rate(-1.0, 1.0), "`lmin` must be a pos.*got -1.0"),
        (lambda: diagnostics.optimal_learning_rate(jnp.asarray(-2.0), 1.0), "`lmin`.*got -2.0"),
        (lambda: diagnostics.optimal_learning_rate(1.0, math.inf), "`lmax` must be a pos.*got inf"),
        (lambda: diagnostics.optimal_learning_rate(3.0, 2.0), "lmin=3.0 and lmax=2.0: swap them"),
        (lambda: diagnostics.max_stable_learning_rate(0.0), "`lmax` must be a positive.*got 0.0"),
        (lambda: diagnostics.max_stable_learning_rate(math.nan), "`lmax` must be a pos.*got nan"),
        (lambda: diagnostics.max_stable_learning_rate(2.0, 3.0), "an eigenvalue alone"),
        (
            lambda: diagnostics.max_stable_learning_rate(lambda w: -jnp.sum(w**2), jnp.ones(2)),
            "`lmax` must be a positive, finite curvature, got -2.0",
        ),
        (lambda: diagnostics.convergence_factor(0.5), "`kappa` must be a condition .*got 0.5"),
        (lambda: diagnostics.convergence_factor(math.nan), "`kappa` must be .*got nan"),
    ],
)
def test_curvature_that_says_nothing(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_learning_rates_of_traced_curvatures():
    rate = jax.jit(diagnostics.optimal_learning_rate)(1.0, 3.0)
    assert float(rate) == 0.5
    assert float(jax.jit(diagnostics.convergence_factor)(3.0)) == 0.5
    assert float(jax.jit(diagnostics.max_stable_learning_rate)(4.0)) == 0.5


# ---------------------------------------------------------------------------------------------
# The report.
# ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_report_against_dense_matrices():
    loss_fn, params, args = problem(MLP((5, 3)), (20, 4))
    P = bnp_optax.bnp(decay=0.5)
    state = bnp_state(loss_fn, params, args, P)
    got = diagnostics.report(
        loss_fn, params, *args, preconditioner=P, state=state, max_units=3, num_lanczos=60
    )
    hessian, _ = dense_hessian(loss_fn, params, args)
    p = dense_preconditioner(P, state, params)
    kappas_d = diagnostics.conditioning(state)
    chosen = {"Dense_0": [0, 2, 4], "Dense_1": [0, 1, 2]}
    norms = []
    for row, (layer, units) in zip(got.layers, chosen.items(), strict=True):
        assert row.kernel == f"{layer}/kernel"
        assert (row.units, row.units_used) == (len(params[layer]["bias"]), 3)
        for matrix, kappa in (
            (hessian, row.kappa),
            (p.T @ hessian @ p, row.kappa_preconditioned),
        ):
            blocks = [matrix[np.ix_(i, i)] for i in (unit_indices(params, layer, u) for u in units)]
            expected = np.median([np.linalg.cond(block) for block in blocks])
            assert kappa == pytest.approx(expected, rel=1e-6)
        assert row.kappa_d == pytest.approx(float(kappas_d[row.kernel]))
        places = np.concatenate([unit_indices(params, layer, u) for u in range(row.units)])
        block = np.ix_(places, places)
        norms.append([np.linalg.norm(m[block], 2) for m in (hessian, p.T @ hessian @ p)])
    norms = np.array(norms)
    expected = norms / norms.sum(axis=0)
    np.testing.assert_allclose(got.shares, expected[:, 0], rtol=1e-6)
    np.testing.assert_allclose(got.shares_preconditioned, expected[:, 1], rtol=1e-6)


def test_report_is_printed_and_drawn():
    rows = (
        diagnostics.LayerReport("a/kernel", 12, 4, 2, 1234.5, 6.25, 9.0, 3.0, 1.0),
        diagnostics.LayerReport("b/kernel", 3000, 10, 0, math.nan, math.nan, 2.0, 1.0, 1.0),
    )
    got = diagnostics.Report(rows)
    assert str(got).splitlines() == [
        "kernel    fan-in  units    κ(H)      κ(PᵀHP)  κ(D)  share of H  of PᵀHP",
        "--------  ------  -------  --------  -------  ----  ----------  -------",
        "a/kernel  12      2 of 4   1.23e+03  6.25     9     75.0%       50.0%",
        "b/kernel  3000    0 of 10                     2     25.0%       50.0%",
    ]
    assert got.__rich__().row_count == 2
    left, right = got.figure().axes
    assert [len(bars) for bars in left.containers] == [2, 2, 2]
    assert [bar.get_width() for bar in right.containers[0]] == [75.0, 25.0]
    assert [label.get_text() for label in left.get_yticklabels()] == ["a/kernel", "b/kernel"]


def test_report_without_a_preconditioner_and_of_a_unit_that_is_off():
    """A ReLU that is never active has a Hessian of 0, which no condition number is of."""

    def loss_fn(params, x):
        hidden = nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
        return jnp.mean((hidden @ params["b"]["kernel"]) ** 2)

    rng = np.random.default_rng(0)
    params = {
        "a": {
            "kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
            "bias": jnp.array([1.0, -1e3]),
        },
        "b": {"kernel": jnp.asarray(rng.normal(size=(2, 1)), jnp.float32)},
    }
    x = jnp.asarray(rng.normal(size=(9, 3)), jnp.float32)
    got = diagnostics.report(loss_fn, params, x, max_fan_in=2)
    assert (got.layers[0].units_used, got.layers[1].units_used) == (0, 1)
    assert math.isnan(got.layers[0].kappa)
    got = diagnostics.report(loss_fn, params, x)
    assert (got.layers[0].units, got.layers[0].units_used) == (2, 1)
    assert math.isfinite(got.layers[0].kappa)
    assert math.isnan(got.layers[0].kappa_preconditioned)
    left, right = got.figure().axes
    assert (len(left.containers), len(right.containers)) == (1, 1)


def test_report_of_no_layer():
    with pytest.raises(ValueError, match=r"no leaf named `kernel` with two .* it has `w`"):
        diagnostics.report(lambda p: jnp.sum(p["w"]), {"w": jnp.ones(2)})
    loss_fn, params, args = problem(MLP(), (7, 5))
    with pytest.raises(ValueError, match="`max_units` must be at least 1, got 0"):
        diagnostics.report(loss_fn, params, *args, max_units=0)
