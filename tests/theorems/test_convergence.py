"""Convergence in float64: Ye Theorem 1 and (4), (5); JMLR Theorem 1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from support.theorem_cases import hidden

import bnp_optax
from bnp_optax import diagnostics
from bnp_optax.diagnostics import condition_number, extended_inputs

pytestmark = pytest.mark.usefixtures("x64")


def logistic():
    """A strongly convex loss that is not quadratic, its minimizer and its Hessian there."""
    rng = np.random.default_rng(1)
    h = jnp.asarray(extended_inputs(hidden(1, rows=40, columns=3, spread=0.5, shift=1.0)))
    y = jnp.asarray(rng.integers(0, 2, 40), float)

    def loss_fn(p):
        v = jnp.concatenate([p["bias"], p["kernel"][:, 0]])
        return jnp.mean(jnp.logaddexp(0.0, h @ v) - y * (h @ v)) + 0.01 * jnp.sum(v**2)

    params = {"bias": jnp.zeros(1), "kernel": jnp.zeros((3, 1))}
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    gradient, hessian = (f(lambda v: loss_fn(unravel(v))) for f in (jax.grad, jax.hessian))
    for _ in range(30):
        flat = flat - jnp.linalg.solve(hessian(flat), gradient(flat))
    assert float(jnp.linalg.norm(gradient(flat))) < 1e-14
    return loss_fn, unravel(flat), np.asarray(hessian(flat)), h


def observed_rate(step, distance, start, n_steps):
    """The factor by which the error shrinks in the last steps of an iteration."""
    start = jax.lax.fori_loop(0, n_steps, lambda _, p: step(p), start)
    end = jax.lax.fori_loop(0, 10, lambda _, p: step(p), start)
    return float((distance(end) / distance(start)) ** 0.1)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_ye_theorem_1_rate_at_the_optimal_step(preconditioned):
    """Ye Thm 1: near a minimizer, errors shrink by (kappa - 1) / (kappa + 1) at the optimal rate.

    With p = P z by BNP, the same in z with kappa(P^T H P), which is smaller.
    """
    loss_fn, best, hessian, h = logistic()
    flat, unravel = jax.flatten_util.ravel_pytree(best)
    p, apply, transpose = np.eye(4), lambda v: v, lambda v: v
    if preconditioned:
        bnp = bnp_optax.bnp(decay=0.0, eps_rel=0.0, eps_abs=0.0, scale=False)
        mean = jnp.mean(h[:, 1:], 0)[:, None]
        stats = bnp_optax.LayerStats(
            mean, jnp.var(h[:, 1:], 0)[:, None], mean**2, jnp.asarray(40.0),
            bnp_optax.Layer("kernel", "bias", (-2,)),
        )  # fmt: skip
        P = bnp.operator(bnp.update(best, bnp.init(best), best, layer_stats={"kernel": stats}))

        def lifted(function):
            return lambda v: jax.flatten_util.ravel_pytree(function(unravel(v)))[0]

        apply, transpose = lifted(P.mv), lifted(P.transpose)
        p = np.asarray(jax.vmap(apply, out_axes=1)(jnp.eye(4)))
    eigenvalues = np.linalg.eigvalsh(p.T @ hessian @ p)
    kappa = eigenvalues[-1] / eigenvalues[0]
    if preconditioned:
        assert kappa < 0.5 * condition_number(hessian, symmetric=True)
    rate = diagnostics.optimal_learning_rate(eigenvalues[0], eigenvalues[-1])
    factor = float(diagnostics.convergence_factor(kappa))
    gradient = jax.grad(lambda v: loss_fn(unravel(v)))

    def step(v, rate=rate):
        return v - rate * apply(transpose(gradient(v)))

    def distance(v):
        return jnp.linalg.norm(jnp.linalg.solve(p, v - flat))

    def rate_of(step, start):
        return observed_rate(step, distance, start, int(8 / (1 - factor)))

    start = flat + 1e-2 * apply(jnp.asarray([1.0, -2.0, 0.5, 1.5]))
    assert rate_of(step, start) == pytest.approx(factor, rel=1e-3)
    for other in (0.9, 1.1):
        # Any other rate is slower.
        slower = rate_of(functools.partial(step, rate=other * rate), start)
        assert slower > factor + 0.05 * (1 - factor)


def test_ye_theorem_1_bound_on_every_step():
    """Ye Thm 1, (2): ||p_{t+1} - p*|| <= (r + eps) ||p_t - p*|| for any rate, near p*."""
    loss_fn, best, hessian, _ = logistic()
    flat, unravel = jax.flatten_util.ravel_pytree(best)
    gradient = jax.jit(jax.grad(lambda v: loss_fn(unravel(v))))
    eigenvalues = np.linalg.eigvalsh(hessian)
    rng = np.random.default_rng(0)
    for fraction in (0.1, 0.7, 1.0, 1.05):
        rate = fraction * 2 / (eigenvalues[0] + eigenvalues[-1])
        r = np.abs(1 - rate * eigenvalues).max()
        for _ in range(20):
            error = 1e-5 * rng.normal(size=4)
            new = flat + error - rate * gradient(flat + error)
            assert jnp.linalg.norm(new - flat) <= (r + 1e-4) * np.linalg.norm(error)


def test_jmlr_theorem_1_scale_invariant_minimizers():
    """JMLR Thm 1: kappa* of a singular Hessian, by its smallest nonzero eigenvalue.

    f(x) = u relu(w^T x + b) is unchanged under (w, b, u) -> (t w, t b, u / t): the minimizers form
    a curve, the tangent of which is the null space of the Hessian. The distance to the curve
    shrinks by (kappa* - 1) / (kappa* + 1) at the rate that is optimal for the nonzero eigenvalues.
    """
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(50, 2)))
    best = jnp.asarray([1.0, -0.5, 0.8, 1.2])  # w, b, u; the targets are the network's own outputs

    def net(v):
        return v[3] * jax.nn.relu(x @ v[:2] + v[2])

    y = net(best)

    def loss_fn(v):
        return 0.5 * jnp.mean((net(v) - y) ** 2)

    def scaled(t):
        return jnp.concatenate([t * best[:3], best[3:] / t])

    assert float(loss_fn(scaled(1.7))) < 1e-28
    for t in (0.6, 1.0, 1.7):
        hessian = np.asarray(jax.hessian(loss_fn)(scaled(t)))
        tangent = np.asarray(jax.jacfwd(scaled)(t))
        size = np.linalg.norm(hessian, 2) * np.linalg.norm(tangent)
        assert np.linalg.norm(hessian @ tangent) < 1e-12 * size
        eigenvalues = np.linalg.eigvalsh(hessian)
        assert abs(eigenvalues[0]) < 1e-12 * eigenvalues[-1] < eigenvalues[1]
        assert condition_number(hessian) == pytest.approx(eigenvalues[-1] / eigenvalues[1])

    eigenvalues = np.linalg.eigvalsh(np.asarray(jax.hessian(loss_fn)(best)))
    rate = diagnostics.optimal_learning_rate(eigenvalues[1], eigenvalues[-1])
    factor = float(diagnostics.convergence_factor(condition_number(jax.hessian(loss_fn)(best))))

    def distance(v):
        def gap(t):
            return float(jnp.linalg.norm(v - scaled(t)))

        nearest = scipy.optimize.minimize_scalar(
            gap, bounds=(0.9, 1.1), options={"xatol": 1e-12}, method="bounded"
        )
        return nearest.fun

    def step(v):
        return v - rate * jax.grad(loss_fn)(v)

    # Along the curve nothing converges: the distance to `best` itself does not vanish.
    start = best + jnp.asarray([2e-3, 1e-3, -1e-3, 1e-3])
    got = observed_rate(step, distance, start, int(6 / (1 - factor)))
    assert got == pytest.approx(factor, abs=2e-3 * (1 - factor) + 1e-4)
    end = jax.lax.fori_loop(0, 2000, lambda _, v: step(v), start)
    assert distance(end) < 1e-7
    assert jnp.linalg.norm(end - best) > 1e-4
