"""Learning rates by curvature: the best, the largest that is stable, and what each gains."""

import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.diagnostics_problems import MLP, bnp_state, problem

import bnp_optax
from bnp_optax import diagnostics


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
                g = P.operator(state).gram(g)
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
