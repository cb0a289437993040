"""Batch normalization on ordinary least squares: what the slides state, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnp_optax
from bnp_optax.diagnostics import (
    LeastSquares,
    bngd,
    bnp_gd,
    condition_number,
    convergence_factor,
    gd,
    least_squares,
    optimal_learning_rate,
    random_least_squares,
    sweep,
)

DIMENSION = 6


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def random_problem(seed=0, dimension=DIMENSION, condition=20.0):
    return random_least_squares(jax.random.key(seed), dimension, condition)


def normalized_loss(a, w, x, y):
    """J(a, w) on data, by the network's own formula: a linear unit with batch normalization."""
    outputs = x @ w
    return 0.5 * jnp.mean((y - a * outputs / jnp.sqrt(jnp.mean(outputs**2))) ** 2)


def data(seed=0, rows=40):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, DIMENSION)) * np.linspace(0.2, 2.0, DIMENSION)
    x = x - x.mean(axis=0)
    y = x @ rng.normal(size=DIMENSION) + 0.3 * rng.normal(size=rows)
    return jnp.asarray(x), jnp.asarray(y)


def test_moments_and_excess_are_those_of_the_data():
    x, y = data()
    problem = least_squares(x + 5.0, y)
    np.testing.assert_allclose(problem.hessian, np.asarray(x).T @ x / 40, atol=1e-12)
    best = np.linalg.lstsq(np.asarray(x), np.asarray(y), rcond=None)[0]
    np.testing.assert_allclose(problem.solution, best, rtol=1e-9)
    w = jnp.arange(6.0)
    loss, least = (0.5 * np.mean((y - x @ v) ** 2) for v in (w, best))
    assert float(problem.excess(w)) == pytest.approx(loss - least)


@pytest.mark.parametrize("rates", [(0.3, 1.0), (2.0, 0.4), (50.0, 0.9)])
def test_bngd_is_gradient_descent_on_a_unit_with_batch_normalization(rates):
    """The update of the slides against automatic differentiation of J on data."""
    rate, scale_rate = rates
    x, y = data()
    problem = least_squares(x, y)
    start = jnp.asarray(np.random.default_rng(1).normal(size=DIMENSION))
    a, w = jnp.asarray(0.7), start
    losses = []
    for _ in range(5):
        losses.append(normalized_loss(a, w, x, y))
        g_a, g_w = jax.grad(normalized_loss, argnums=(0, 1))(a, w, x, y)
        a, w = a - scale_rate * g_a, w - rate * g_w
    run = bngd(problem, rate, start, 5, a=0.7, scale_rate=scale_rate)
    np.testing.assert_allclose(run.w, w, rtol=1e-9)
    assert float(run.a) == pytest.approx(float(a), rel=1e-9)
    least = 0.5 * jnp.mean((y - x @ problem.solution) ** 2)
    np.testing.assert_allclose(run.excess[:-1], np.array(losses) - least, rtol=1e-8)
    assert float(run.norm[-1]) == pytest.approx(float(jnp.linalg.norm(w)))


def test_gd_and_bnp_against_explicit_matrices():
    problem, start = random_problem()
    hessian, g = np.asarray(problem.hessian), np.asarray(problem.correlation)
    for method, p in ((gd, np.eye(DIMENSION)), (bnp_gd, np.diag(np.diag(hessian) ** -0.5))):
        w = np.asarray(start)
        for _ in range(7):
            w = w - 0.4 * p @ p.T @ (hessian @ w - g)
        run = method(problem, 0.4, start, 7)
        np.testing.assert_allclose(run.w, w, rtol=1e-12)
        error = w - np.linalg.solve(hessian, g)
        assert float(run.excess[-1]) == pytest.approx(0.5 * error @ hessian @ error)
        assert run.excess.shape == run.norm.shape == (8,)


def test_bnp_is_the_preconditioner_of_the_library():
    """On data of mean 0, a layer without a bias: D = 1 / rms of the inputs."""
    x, y = data()

    def loss_fn(params):
        return 0.5 * jnp.mean((x @ params["kernel"][:, 0] - y) ** 2)

    start = jnp.asarray(np.random.default_rng(1).normal(size=DIMENSION))
    params = {"kernel": start[:, None]}
    mean = jnp.mean(x, 0)[:, None]
    stats = bnp_optax.LayerStats(
        mean,
        jnp.var(x, 0)[:, None],
        mean**2,
        jnp.asarray(40.0),
        bnp_optax.Layer("kernel", None, (-2,)),
    )
    exact = bnp_optax.bnp_precondition(decay=0.0, eps_rel=0.0, eps_abs=0.0, scale=False)
    tx = optax.chain(exact, optax.sgd(0.5))
    state = tx.init(params)
    for _ in range(5):
        grads = jax.grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, layer_stats={"kernel": stats})
        params = jax.tree.map(jnp.add, params, updates)
    expected = bnp_gd(least_squares(x, y), 0.5, start, 5).w
    np.testing.assert_allclose(params["kernel"][:, 0], expected, rtol=1e-5)


# ---------------------------------------------------------------------------------------------
# The slides' summary: convergence, rate, robustness to learning rates and to dimension.
# ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    log_rate=st.floats(-2, 4),
    scale_rate=st.floats(0.05, 1.0),
    a=st.floats(-2, 2),
)
def test_w_never_gets_shorter(seed, log_rate, scale_rate, a):
    """A step of w is orthogonal to w: ||w||^2 grows by the square of the step."""
    problem, start = random_problem(seed % 20)
    run = bngd(problem, 10.0**log_rate, start, 50, a=a, scale_rate=scale_rate)
    norms = np.asarray(run.norm)
    assert (norms[1:] >= norms[:-1] * (1 - 1e-14)).all()
    step = bngd(problem, 10.0**log_rate, start, 1, a=a, scale_rate=scale_rate).w - start
    assert abs(float(step @ start)) <= 1e-9 * float(jnp.linalg.norm(step)) + 1e-15
    expected = np.sqrt(norms[0] ** 2 + float(step @ step))
    assert norms[1] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale_rate", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("rate", [1e-2, 1.0, 1e2, 1e3])
def test_bngd_converges_for_any_rate(rate, scale_rate):
    """ "Arbitrary eps provided eps_a <= 1": to the solution, from random starts."""
    steps = 30_000 if rate in (1.0, 1e2) else 300_000
    for seed in range(3):
        problem, start = random_problem(seed)
        run = bngd(problem, rate, start, steps, scale_rate=scale_rate)
        assert run.excess[-1] < 1e-8 * problem.excess(jnp.zeros(DIMENSION))


@pytest.mark.parametrize("rate", [1e4, 1e6, 1e8])
def test_bngd_recovers_from_rates_that_are_far_too_large(rate):
    """The first steps overshoot; then w is about as long as they are, and all steps are small."""
    for seed in range(3):
        problem, start = random_problem(seed)
        run = bngd(problem, rate, start, 5000)
        assert run.norm[1] > 10 * run.norm[0]
        assert (jnp.diff(run.excess[100:]) < 1e-15).all()
        assert run.excess[-1] < run.excess[100]


def test_bngd_needs_a_rate_of_a_below_two():
    """The bound on eps_a: a itself is gradient descent with curvature 1. Above 2 it diverges."""
    problem, start = random_problem()
    assert bngd(problem, 1.0, start, 2000, scale_rate=1.0).excess[-1] < 1e-6
    assert not bngd(problem, 1.0, start, 2000, scale_rate=2.2).excess[-1] < 1.0


def test_gd_converges_for_small_rates_only():
    problem, start = random_problem()
    bound = 2 / np.linalg.eigvalsh(problem.hessian)[-1]
    assert gd(problem, 0.98 * bound, start, 5000).excess[-1] < 1e-12
    assert gd(problem, 1.02 * bound, start, 5000).excess[-1] > 1e12


def contraction(run, start, stop):
    """Factor by which the error, the root of the excess, shrinks in a step."""
    excess = np.asarray(run.excess)
    return (excess[stop] / excess[start]) ** (0.5 / (stop - start))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rates_of_convergence_are_linear(seed):
    """GD by (kappa - 1) / (kappa + 1) at its best; BNGD by as much in one span as in the next."""
    problem, start = random_problem(seed)
    values = np.linalg.eigvalsh(problem.hessian)
    factor = float(convergence_factor(condition_number(problem.hessian, symmetric=True)))
    rate = optimal_learning_rate(values[0], values[-1])
    stop = int(6 / (1 - factor))
    got = contraction(gd(problem, rate, start, stop), stop // 2, stop)
    assert got == pytest.approx(factor, rel=1e-3)
    run = bngd(problem, 0.3, start, 4 * stop)
    second, third = (contraction(run, i * stop, (i + 1) * stop) for i in (1, 2))
    assert third == pytest.approx(second, abs=0.3 * (1 - second))
    assert third < 1


def test_bngd_can_be_faster_than_gd():
    """ "Linear (can be faster)": it can, on some problems by much, at the best rates of both."""
    ratios = []
    for seed in range(6):
        problem, start = random_problem(seed)
        values = np.linalg.eigvalsh(problem.hessian)
        best_gd = gd(problem, optimal_learning_rate(values[0], values[-1]), start, 200).excess[-1]
        at = jax.vmap(bngd, in_axes=(None, 0, None, None))
        excess = at(problem, 10.0 ** jnp.arange(-2, 2, 0.1), start, 200).excess[:, -1]
        ratios.append(float(np.nanmin(excess) / best_gd))
    assert np.min(ratios) < 1e-3
    # Not always: the slides say no more.
    assert np.max(ratios) > 0.1


def decades(ratios, step, bound=1e-6):
    """Median over problems of the width of the rates that reach `bound`, in decades."""
    return np.median((ratios < bound).sum(axis=-1) * step, axis=-1)


@pytest.fixture(scope="module")
def wide_sweep():
    with jax.enable_x64(True):
        return sweep((4, 16, 64), 10.0 ** np.arange(-4, 5, 0.125), 1000, num_problems=5)


def test_bngd_works_over_more_decades_of_rates_than_gd(wide_sweep):
    """ "Small range of eps" against "wide range of eps"."""
    of_gd, of_bngd = decades(wide_sweep.gd, 0.125), decades(wide_sweep.bngd, 0.125)
    assert (of_bngd > 1.5 * of_gd).all()
    # GD overflows above its bound; BNGD is finite and below the start at every rate.
    rates = wide_sweep.learning_rates
    assert np.isinf(wide_sweep.gd[..., rates > 3]).all()
    assert np.isfinite(wide_sweep.bngd).all()


def test_the_range_of_bngd_grows_with_the_dimension_and_that_of_gd_hardly(wide_sweep):
    """ "No effect" against "the higher the better", for solutions of random entries of size 1."""
    of_gd, of_bngd = decades(wide_sweep.gd, 0.125), decades(wide_sweep.bngd, 0.125)
    assert (np.diff(of_bngd) >= 0.5).all()
    assert np.ptp(of_gd) <= 0.5


def test_bnp_is_faster_than_gd_on_the_same_problems(wide_sweep):
    """At its best rate: scaling the inputs is what this problem lacks."""
    best = {name: getattr(wide_sweep, name).min(axis=-1) for name in ("gd", "bnp")}
    assert (best["bnp"] < 1e-6 * best["gd"]).all()


def test_sweep_holds_the_runs_of_the_methods():
    rates = [0.3, 5.0]
    result = sweep((3, 5), rates, 40, num_problems=2, condition=7.0, scale_rate=0.6)
    assert result.gd.shape == result.bngd.shape == result.bnp.shape == (2, 2, 2)
    keys = jax.random.split(jax.random.key(0), 2)
    problem, start = random_least_squares(keys[1], 5, 7.0)
    for j, rate in enumerate(rates):
        for got, run in (
            (result.gd, gd(problem, rate, start, 40)),
            (result.bnp, bnp_gd(problem, rate, start, 40)),
            (result.bngd, bngd(problem, rate, start, 40, scale_rate=0.6)),
        ):
            expected = run.excess[-1] / problem.excess(start)
            assert got[1, 1, j] == pytest.approx(float(expected), rel=1e-6)


# ---------------------------------------------------------------------------------------------
# Bad input.
# ---------------------------------------------------------------------------------------------

PROBLEM = LeastSquares(np.eye(2), np.ones(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gd(PROBLEM, 0.0, np.ones(2), 3), "`learning_rate` must be finite and > 0, got 0"),
        (lambda: bnp_gd(PROBLEM, -1.0, np.ones(2), 3), "`learning_rate` must .*got -1"),
        (lambda: bngd(PROBLEM, -1.0, np.ones(2), 3), "`learning_rate` must .*got -1"),
        (lambda: bngd(PROBLEM, 1.0, np.ones(2), 3, scale_rate=0.0), "`scale_rate` must .*got 0"),
        (lambda: bngd(PROBLEM, 1.0, np.zeros(2), 3), "`w` must not be 0"),
        (lambda: sweep([3], [1.0, 0.0], 3), "`learning_rates` must .*got 0"),
        (lambda: sweep([0], [1.0], 3), "`dimension` and `condition` must be >= 1, got 0 and 100"),
        (lambda: least_squares(np.ones((3, 2)), np.ones(2)), r"each of the 3 rows.*got \(2,\)"),
        (lambda: least_squares(np.full((3, 2), np.nan), np.ones(3)), "`x` must be finite"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
