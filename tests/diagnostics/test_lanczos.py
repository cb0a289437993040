"""The extreme eigenvalues of Hessians by Lanczos, against those of the dense ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.diagnostics_problems import (
    CNN,
    MLP,
    bnp_state,
    dense_hessian,
    dense_preconditioner,
    problem,
)

import bnp_optax
from bnp_optax import diagnostics

RNG = np.random.default_rng(0)


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


@pytest.mark.optimized
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
