"""The statements of the papers, each as a test, in float64.

"Ye" is "Preconditioning for Accelerated Gradient Descent Optimization and Regularization", "JMLR"
is Lange, Helfrich, Ye, "Batch Normalization Preconditioning for Neural Network Training". JMLR
Propositions 6 (a count of operations) and Lemma 8 (inside Proposition 9) have no test of their
own; Proposition 7 is in `test_bnp.py`.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.optimize
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import bnp_optax
from bnp_optax import diagnostics
from bnp_optax.diagnostics import condition_number, extended_inputs

seeds = st.integers(0, 2**31 - 1)
properties = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def hidden(seed, rows=30, columns=5, spread=2.0, shift=3.0):
    """Hidden variables whose columns differ in mean and, by orders of magnitude, in spread."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(columns, columns)) + 2 * np.eye(columns)
    scale = 10.0 ** rng.uniform(-spread / 2, spread / 2, columns)
    return (rng.normal(size=(rows, columns)) @ mix + shift * rng.normal(size=columns)) * scale


def centered(h):
    """H^ U = [e, H - e mu^T]."""
    return np.asarray(extended_inputs(h)) @ oracles.centering_matrix(h.mean(axis=0))


def normalized(h):
    """G^ = H^ U D."""
    return centered(h) @ oracles.scaling_matrix(h.var(axis=0))


def positive_definite(rng, n, decades):
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    return q * 10.0 ** rng.uniform(-decades, 0, n) @ q.T


# ---------------------------------------------------------------------------------------------
# Convergence: Ye Theorem 1 and (4), (5); JMLR Theorem 1.
# ---------------------------------------------------------------------------------------------


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
        P = bnp_optax.bnp(decay=0.0, eps_rel=0.0, eps_abs=0.0, scale=False)
        mean = jnp.mean(h[:, 1:], 0)[:, None]
        stats = bnp_optax.LayerStats(
            mean, jnp.var(h[:, 1:], 0)[:, None], mean**2, jnp.asarray(40.0), "kernel", "bias",
            (-2,), 1
        )  # fmt: skip
        state = P.update(best, P.init(best), best, layer_stats={"kernel": stats})

        def lifted(function):
            return lambda v: jax.flatten_util.ravel_pytree(function(state, unravel(v)))[0]

        apply, transpose = lifted(P.apply), lifted(P.apply_transpose)
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


# ---------------------------------------------------------------------------------------------
# Scaling: Ye Theorem 2, JMLR Lemma A1 (van der Sluis).
# ---------------------------------------------------------------------------------------------


def best_scaling(matrix, starts=3):
    """A local minimum over diagonal D_0 of kappa(A D_0), by its logarithms."""

    def kappa(log_scale):
        return np.log(np.linalg.cond(matrix * np.exp(log_scale)))

    norms = -np.log(np.linalg.norm(matrix, axis=0))
    rng = np.random.default_rng(0)
    tries = [norms, *(norms + rng.normal(size=norms.size) for _ in range(starts - 1))]
    options = {"maxiter": 600, "xatol": 1e-6, "fatol": 1e-8}
    found = (
        scipy.optimize.minimize(kappa, x, method="Nelder-Mead", options=options).fun for x in tries
    )
    return np.exp(min(found))


@settings(max_examples=12, deadline=None)
@given(seed=seeds, columns=st.integers(2, 4))
def test_ye_theorem_2_scaling_to_one_norm_is_nearly_optimal(seed, columns):
    """Ye Thm 2, JMLR Lemma A1: kappa(A D) <= sqrt(n) min over diagonal D_0 of kappa(A D_0).

    D_0 must be invertible, which the papers leave unsaid: with a single nonzero entry, A D_0 has
    one nonzero singular value and by JMLR's definition kappa = 1.
    """
    matrix = hidden(seed, rows=12, columns=columns)
    scaled = matrix / np.linalg.norm(matrix, axis=0)
    optimum = best_scaling(matrix)
    assert np.linalg.cond(scaled) <= np.sqrt(columns) * optimum * (1 + 1e-9)
    # The minimum was looked for in earnest: it is not above what the theorem's D attains.
    assert optimum <= np.linalg.cond(scaled) * (1 + 1e-9)
    single = np.eye(columns)[0]
    assert condition_number(matrix * single) == 1.0


logarithms = st.lists(st.floats(-8, 8), min_size=12, max_size=12).map(np.array)


@properties
@given(seed=seeds, columns=st.integers(2, 6), logs=logarithms)
def test_ye_theorem_2_against_any_scaling_of_columns(seed, columns, logs):
    """Ye Thm 2 for columns, with any D_0 in place of the best."""
    matrix = hidden(seed, rows=12, columns=columns)
    scaled = matrix / np.linalg.norm(matrix, axis=0)
    bound = np.sqrt(columns) * np.linalg.cond(matrix * np.exp(logs[:columns]))
    assert np.linalg.cond(scaled) <= bound * (1 + 1e-9)


@properties
@given(seed=seeds, columns=st.integers(2, 6), logs=logarithms)
def test_ye_theorem_2_against_any_scaling_of_rows(seed, columns, logs):
    """Ye Thm 2 as printed: rows of a matrix of full column rank, with the factor sqrt(m)."""
    matrix = np.random.default_rng(seed).normal(size=(12, columns)) * np.exp(logs)[::-1, None]
    scaled = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    bound = np.sqrt(12) * np.linalg.cond(matrix * np.exp(logs)[:, None])
    assert np.linalg.cond(scaled) <= bound * (1 + 1e-9)


# ---------------------------------------------------------------------------------------------
# The form of the Hessian: Ye Theorem 3, JMLR Proposition 2, Theorem 3 and Proposition 9.
# ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4, param_dtype=float)(x))
        return nn.Dense(3, param_dtype=float)(x)


def dense_problem(seed):
    """Cross-entropy of a network, and the diagonal of S for the first layer's units."""
    rng = np.random.default_rng(seed)
    x, y = jnp.asarray(hidden(seed, rows=12, columns=3)), jnp.asarray(rng.integers(0, 3, 12))
    params = Net().init(jax.random.key(seed), x)["params"]
    # So small that no unit is saturated.
    params["Dense_0"]["kernel"] = 0.5 * params["Dense_0"]["kernel"] / jnp.std(x, 0)[:, None]

    def of_one(logits, label):
        return jax.nn.logsumexp(logits) - logits[label]

    def loss_fn(params, x):
        return jnp.mean(jax.vmap(of_one)(Net().apply({"params": params}, x), y))

    def curvatures(unit):
        activations = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None]
        last = params["Dense_1"]

        def of_activation(a, row, label):
            row = nn.tanh(row.at[unit].set(a))
            return of_one(row @ last["kernel"] + last["bias"], label)

        second = jax.vmap(jax.grad(jax.grad(of_activation)))
        return np.asarray(second(activations[:, unit], activations, y)) / len(x)

    return loss_fn, params, x, curvatures


def exact_bnp(loss_fn, params, *args):
    """P = U D of the batch at hand, without floors or q."""
    P = bnp_optax.bnp(decay=0.0, eps_rel=0.0, eps_abs=0.0, scale=False)
    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, *args)
    return P, P.update(grads, P.init(params), params, layer_stats=stats)


@pytest.mark.parametrize("unit", [0, 3])
def test_jmlr_proposition_2_dense_hessian(unit):
    """JMLR Prop. 2, Ye Thm 3: the Hessian in [b, w] is H^^T S H^ with diagonal S."""
    loss_fn, params, x, curvatures = dense_problem(0)
    h = np.asarray(extended_inputs(x))
    got = diagnostics.unit_hessian(loss_fn, params, "Dense_0/kernel", unit, x)
    expected = h.T @ np.diag(curvatures(unit)) @ h
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("unit", [0, 3])
def test_jmlr_theorem_3_preconditioned_hessian(unit):
    """JMLR Thm 3: with BNP it is G^^T S G^, where G^ = [e, (h - mu) / sigma]."""
    loss_fn, params, x, curvatures = dense_problem(0)
    P, state = exact_bnp(loss_fn, params, x)
    g = normalized(np.asarray(x))
    np.testing.assert_allclose(g[:, 1:].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(g[:, 1:].std(0), 1)
    got = diagnostics.unit_hessian(
        loss_fn, params, "Dense_0/kernel", unit, x, preconditioner=P, state=state
    )
    # The library keeps statistics in float32.
    expected = g.T @ np.diag(curvatures(unit)) @ g
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def patches(h, k):
    """The matrix of (18): a row for each output position, columns in the kernel's order."""
    n, r, s, c = h.shape
    m = (k - 1) // 2
    padded = np.pad(h, ((0, 0), (m, m), (m, m), (0, 0)))
    taps = itertools.product(range(k), range(k))
    blocks = [padded[:, t : t + r, a : a + s].reshape(n * r * s, c) for t, a in taps]
    return np.concatenate(blocks, axis=1)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_jmlr_proposition_9_hessian_of_a_convolution(preconditioned):
    """JMLR Prop. 9: the Hessian in an output channel's [b, w] is H^^T S H^.

    H^ holds a patch for every example and output position; S is block diagonal, with a dense block
    for every example. With BNP it is (H^ P)^T S (H^ P).
    """
    rng = np.random.default_rng(0)
    shape, channel = (3, 4, 5, 2), 1
    x = jnp.asarray(rng.normal(size=shape) * [0.2, 4.0] + [1.0, -3.0])
    conv = nn.Conv(3, (3, 3), param_dtype=float)
    params = conv.init(jax.random.key(1), x)["params"]
    mix = jnp.asarray(rng.normal(size=(4 * 5 * 3, 2)))

    def of_one(a):
        return jnp.sum(jnp.tanh(a.ravel() @ mix) ** 2)

    def loss_fn(params, x):
        return jnp.mean(jax.vmap(of_one)(conv.apply({"params": params}, x)))

    a = conv.apply({"params": params}, x)
    s = np.zeros((60, 60))
    for j in range(3):

        def of_channel(v, j=j):
            return of_one(a[j].at[:, :, channel].set(v.reshape(4, 5)))

        block = jax.hessian(of_channel)(a[j, :, :, channel].ravel())
        s[20 * j : 20 * (j + 1), 20 * j : 20 * (j + 1)] = block / 3
    h = np.asarray(extended_inputs(patches(np.asarray(x), 3)))
    options = {}
    if preconditioned:
        P, state = exact_bnp(loss_fn, params, x)
        options = {"preconditioner": P, "state": state}
        mean, var = (np.tile(moment, 9) for moment in oracles.input_moments(x))
        h = h @ oracles.centering_matrix(mean) @ oracles.scaling_matrix(var)
    got = diagnostics.unit_hessian(loss_fn, params, "kernel", channel, x, **options)
    expected = h.T @ s @ h
    rtol = 1e-4 if preconditioned else 1e-10
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=0.1 * rtol * np.abs(expected).max())
    assert np.abs(s - np.diag(np.diag(s))).max() > 0.1 * np.abs(s).max()


# ---------------------------------------------------------------------------------------------
# Centering and scaling of H^: JMLR Theorem 4 (Ye Theorem 4) and what follows it.
# ---------------------------------------------------------------------------------------------


@properties
@given(seed=seeds, columns=st.integers(1, 7), shift=st.floats(0, 100))
def test_jmlr_theorem_4_centering_never_harms(seed, columns, shift):
    """JMLR Thm 4: kappa(H^ U) <= kappa(H^)."""
    h = hidden(seed, columns=columns, shift=shift)
    before = np.linalg.cond(np.asarray(extended_inputs(h)))
    assume(before < 1e10)
    assert np.linalg.cond(centered(h)) <= before * (1 + 1e-9)


@properties
@given(seed=seeds, columns=st.integers(1, 7))
def test_jmlr_theorem_4_is_strict(seed, columns):
    """JMLR Thm 4: strictly less if mu is not orthogonal to the principal component."""
    h = hidden(seed, columns=columns, spread=1.0)
    mean = h.mean(axis=0)
    principal = np.linalg.eigh(np.cov(h.T).reshape(columns, columns))[1][:, -1]
    assume(abs(mean @ principal) > 0.1)
    before, after = np.linalg.cond(np.asarray(extended_inputs(h))), np.linalg.cond(centered(h))
    assert after < before * (1 - 1e-6)


def test_jmlr_theorem_4_without_its_conditions():
    """Where JMLR Thm 4 promises no strict inequality: mu = 0, or mu orthogonal to x_max."""
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    h = signs * [10.0, 1.0, 0.1]
    for mean in ([0.0, 0.0, 0.0], [0.0, 0.3, 0.0]):
        before = np.linalg.cond(np.asarray(extended_inputs(h + mean)))
        assert np.linalg.cond(centered(h + mean)) == pytest.approx(before, rel=1e-12)
    moved = h + np.array([0.3, 0.0, 0.0])
    before = np.linalg.cond(np.asarray(extended_inputs(moved)))
    assert np.linalg.cond(centered(moved)) < before * (1 - 1e-6)


@properties
@given(seed=seeds, columns=st.integers(1, 6), logs=logarithms)
def test_jmlr_theorem_4_normalizing_is_within_the_root_of_the_best(seed, columns, logs):
    """JMLR Thm 4: kappa(G^) <= sqrt(n + 1) kappa(H^ U D_0) for any invertible diagonal D_0."""
    h = hidden(seed, columns=columns, spread=4.0)
    other = centered(h) * np.exp(logs[: columns + 1])
    bound = np.sqrt(columns + 1) * np.linalg.cond(other)
    assert np.linalg.cond(normalized(h)) <= bound * (1 + 1e-9)


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_jmlr_theorem_4_with_property_a_normalizing_is_best(seed):
    """JMLR, after Thm 4: with Property A the root drops out. Two inputs always have it."""
    h = hidden(seed, columns=2)
    best = best_scaling(centered(h))
    assert np.linalg.cond(normalized(h)) == pytest.approx(best, rel=1e-5)


@properties
@given(seed=seeds, columns=st.integers(1, 6))
def test_jmlr_kappa_of_d_bounds_the_gain(seed, columns):
    """JMLR, after Thm 4: kappa(H^ U) <= kappa(G^) kappa(D), so that kappa(H^)^2 may fall by
    kappa(D)^2; with uncorrelated inputs and mean 0 it falls by exactly that.
    """
    h = hidden(seed, columns=columns, spread=4.0)
    d = np.concatenate([[1.0], 1 / h.std(axis=0)])
    kappa_d = d.max() / d.min()
    assert np.linalg.cond(centered(h)) <= np.linalg.cond(normalized(h)) * kappa_d * (1 + 1e-9)
    q, _ = np.linalg.qr(h - h.mean(axis=0))
    uncorrelated = q * h.std(axis=0) * np.sqrt(len(h))
    before = np.linalg.cond(np.asarray(extended_inputs(uncorrelated)))
    after = np.linalg.cond(normalized(uncorrelated))
    assert before / after == pytest.approx(kappa_d, rel=1e-6)


# ---------------------------------------------------------------------------------------------
# Norms and products: JMLR Propositions 5, 10 and 11.
# ---------------------------------------------------------------------------------------------

ENTRIES = {
    "normal": lambda rng, size: rng.normal(size=size),
    "uniform": lambda rng, size: rng.uniform(-np.sqrt(3), np.sqrt(3), size),
    "exponential": lambda rng, size: rng.exponential(size=size) - 1,
}


def norms_of_g(entries, rows, columns, repeats=8):
    """||[e, G]|| / (q sqrt(N)) for independent G."""
    rng = np.random.default_rng(0)
    q = np.sqrt(max(columns / rows, 1.0))
    found = []
    for _ in range(repeats):
        g = entries(rng, (rows, columns))
        # As in the paper, e is orthogonal to G: ||[e, G]|| = max(sqrt(N), ||G||).
        found.append(max(np.sqrt(rows), np.linalg.norm(g, 2)) / (q * np.sqrt(rows)))
    return np.mean(found)


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("rows", [8, 60])
def test_jmlr_proposition_5_the_norm_does_not_grow_with_the_width(name, rows):
    """JMLR Prop. 5: E||(1/q) [e, G]|| <= C sqrt(N), C independent of n.

    For normal entries C = 2, as E||G|| <= sqrt(N) + sqrt(n). The statement asks for unit variance
    alone and its proof takes E max_i ||g_i||^2 for E ||g_i||^2. It needs more, such as a finite
    fourth moment: see the next test.
    """
    constant = 2.0 if name != "exponential" else 2.5
    sizes = [norms_of_g(ENTRIES[name], rows, columns) for columns in (3, 10, 100, 1000)]
    assert max(sizes) <= constant
    without_q = norms_of_g(ENTRIES[name], rows, 1000) * np.sqrt(1000 / rows)
    assert without_q > 2 * constant or rows == 60


def test_jmlr_proposition_5_needs_more_than_a_variance():
    """JMLR Prop. 5 is false for entries of unit variance with an infinite fourth moment.

    With P(|g| > t) = (t_0 / t)^2.5, the largest of N n entries alone is about (N n)^0.4, which
    outgrows sqrt(n) at N = n. (For real data ||column||^2 = N rules out most of this.)
    """

    def heavy(rng, size):
        sign = rng.choice([-1.0, 1.0], size)
        return sign * (1 + rng.pareto(2.5, size)) / np.sqrt(2.5 / 0.5)

    means = [norms_of_g(heavy, n, n, repeats=60) for n in (4, 32, 256)]
    assert means[1] > 1.4 * means[0]
    assert means[2] > 1.4 * means[1]


@properties
@given(
    seed=seeds,
    r=st.integers(2, 7),
    s=st.integers(2, 7),
    m=st.integers(0, 2),
    constant=st.booleans(),
)
def test_jmlr_proposition_10_mean_over_the_feature_map(seed, r, s, m, constant):
    """JMLR Prop. 10: |mu(t, a, p) - mu(p)| <= (k-1) (1/2r + 1/2s - (k-1)/4rs) max |h|.

    Attained at the corners of the kernel where h is constant. It needs (k - 1) / 2 <= r, s.
    """
    k = 2 * m + 1
    shape = (2, r, s, 1)
    h = np.ones(shape) if constant else np.random.default_rng(seed).normal(size=shape)
    exact = patches(h, k).mean(axis=0)
    errors = np.abs(exact - h.mean())
    bound = (k - 1) * (1 / (2 * r) + 1 / (2 * s) - (k - 1) / (4 * r * s)) * np.abs(h).max()
    assert errors.max() <= bound + 1e-12
    if constant:
        assert errors[0] == pytest.approx(bound)


def test_jmlr_proposition_10_needs_a_map_half_as_large_as_the_kernel():
    """JMLR Prop. 10 is false for k = 5 on one pixel: the bound is 0, the error |h|."""
    k, r, s = 5, 1, 1
    assert (k - 1) * (1 / (2 * r) + 1 / (2 * s) - (k - 1) / (4 * r * s)) == 0
    assert patches(np.ones((1, r, s, 1)), k).mean(axis=0)[0] == 0


@properties
@given(
    seed=seeds,
    rows=st.integers(1, 8),
    columns=st.integers(1, 8),
    rank=st.integers(1, 8),
    decades=st.floats(0, 2),
)
def test_jmlr_proposition_11_condition_of_the_product(seed, rows, columns, rank, decades):
    """JMLR Prop. 11: kappa(H^^T S H^) <= kappa(H^)^2 kappa(S), for H^ of any shape and rank."""
    rng = np.random.default_rng(seed)
    rank = min(rank, rows, columns)
    h = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
    s = positive_definite(rng, rows, decades)
    assume(condition_number(h) < 1e4)
    bound = condition_number(h) ** 2 * condition_number(s, symmetric=True)
    assert condition_number(h.T @ s @ h, symmetric=True) <= bound * (1 + 1e-6)


def test_jmlr_proposition_11_products_of_rectangles_have_no_such_bound():
    """JMLR, before Prop. 11: kappa(A B) <= kappa(A) kappa(B) fails for rectangular matrices."""
    a = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    b = np.array([[1.0, 0.0], [0.0, 0.1], [0.0, np.sqrt(0.99)]])
    assert condition_number(a) * condition_number(b) == pytest.approx(1.0)
    assert condition_number(a @ b) == pytest.approx(10.0)


# ---------------------------------------------------------------------------------------------
# Normalizations as preconditioners: Ye, "Normalization Methods as Preconditioning"; JMLR 3.5.
# ---------------------------------------------------------------------------------------------

NORMALIZATIONS = {
    "standardization": lambda x: (x.mean(0), x.std(0)),
    "min-max": lambda x: (x.min(0), x.max(0) - x.min(0)),
}


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_ye_normalized_inputs_precondition_the_first_layer(name):
    """Ye, "Input Data Normalization": the Hessian with (x - mu) / d in place of x is P^T H P.

    P = U D is that of (25) with the shift and the scale of the normalization; the network is the
    same function at p = P z. All columns of the extended inputs then have similar norms, which is
    nearly optimal by Theorem 2: sqrt(N) exactly, or sqrt(N) at most.
    """
    loss_fn, params, x, _ = dense_problem(2)
    shift, scale = (np.asarray(m) for m in NORMALIZATIONS[name](np.asarray(x)))
    p = oracles.centering_matrix(shift) @ oracles.scaling_matrix(scale**2)
    first = params["Dense_0"]
    z = np.linalg.solve(p, np.concatenate([first["bias"][None], first["kernel"]]))
    in_z = params | {"Dense_0": {"bias": jnp.asarray(z[0]), "kernel": jnp.asarray(z[1:])}}
    scaled = (x - shift[None]) / scale[None]
    np.testing.assert_allclose(loss_fn(in_z, scaled), loss_fn(params, x), rtol=1e-10)
    raw, normalized = np.asarray(extended_inputs(x)), np.asarray(extended_inputs(scaled))
    np.testing.assert_allclose(raw @ p, normalized, atol=1e-10)
    for unit in range(4):
        before = diagnostics.unit_hessian(loss_fn, params, "Dense_0/kernel", unit, x)
        after = diagnostics.unit_hessian(loss_fn, in_z, "Dense_0/kernel", unit, scaled)
        expected = p.T @ np.asarray(before) @ p
        np.testing.assert_allclose(after, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())
    norms = np.linalg.norm(normalized, axis=0) / np.sqrt(len(x))
    assert (norms <= 1 + 1e-12).all()
    if name == "standardization":
        np.testing.assert_allclose(norms, 1.0)
    else:
        assert norms.min() > 0.3
    assert np.linalg.cond(normalized) < 0.5 * np.linalg.cond(raw)


def layer_norm(h):
    """LayerNorm without its scale, its bias and its epsilon: each row to mean 0 and variance 1."""
    return (h - h.mean(axis=1, keepdims=True)) / h.std(axis=1, keepdims=True)


@properties
@given(seed=seeds, logs=logarithms)
def test_layer_norm_scales_the_rows_of_the_extended_inputs(seed, logs):
    """LayerNorm makes all rows of H^ as long as one another, whatever their size and mean.

    It is the row scaling of Ye Thm 2 after the rows are centered, so kappa is within sqrt(N) of
    the best over all sizes of the examples (on the directions that are left: the same number added
    to all weights of a unit changes nothing).
    """
    n, columns = 12, 4
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(n, columns))
    normal = layer_norm(h)
    np.testing.assert_allclose(layer_norm(h * np.exp(logs)[:, None] + logs[:, None]), normal)
    extended = np.asarray(extended_inputs(normal))
    np.testing.assert_allclose(np.linalg.norm(extended, axis=1), np.sqrt(columns + 1))
    np.testing.assert_allclose(extended @ [0, 1, 1, 1, 1], 0, atol=1e-10)
    directions = np.linalg.svd(np.ones((1, columns)))[2][1:].T
    left = h @ directions
    bound = np.sqrt(n) * np.linalg.cond(left * np.exp(logs)[:, None])
    assert condition_number(normal) <= bound * (1 + 1e-9)


def test_layer_norm_leaves_the_columns_to_batch_normalization():
    """JMLR 3.5: LayerNorm "can not address the ill-conditioning" over a batch, BNP after it can.

    Columns of other means and spreads keep them through LayerNorm.
    """
    rng = np.random.default_rng(0)
    h = rng.normal(size=(200, 6)) * [3.0, 1.0, 0.3, 0.1, 0.03, 0.01] + [5.0, -2.0, 0.0, 1.0, 0, 0]
    normal = layer_norm(h)[:, :-1]  # The last column is minus the sum of the others.
    kappa = np.linalg.cond(np.asarray(extended_inputs(normal)))
    assert kappa > 50
    assert np.linalg.cond(normalized(normal)) < 0.5 * kappa
