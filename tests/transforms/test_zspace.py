"""What works in p works in z unchanged: every inner transformation sees a problem in z."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax import in_zspace

RNG = np.random.default_rng(0)
HESSIAN = (lambda a: a @ a.T / 4 + 0.5 * np.eye(4))(RNG.normal(size=(4, 4)))
POINT = RNG.normal(size=4)
DIAGONAL = np.array([3.0, 0.2, 1.0, 0.5])  # of P


def fixed(diagonal=DIAGONAL):
    """A preconditioner that does not change: p = diagonal * z."""

    def column(x):
        return jnp.asarray(diagonal, x.dtype).reshape(-1, *(1,) * (x.ndim - 1))

    class Columns(bnp_optax.Operator):
        def mv(self, z):
            return jax.tree.map(lambda x: x * column(x), z)

        transpose = mv

        def solve(self, p):
            return jax.tree.map(lambda x: x / column(x), p)

    return bnp_optax.Preconditioner(
        init=lambda params: (),
        update=lambda grads, state, params, **extra: state,
        operator=lambda state: Columns(),
    )


def loss_p(p):
    return 0.5 * jnp.einsum("i,ij,j", p, jnp.asarray(HESSIAN, p.dtype), p)


def loss_z(z):
    return loss_p(jnp.asarray(DIAGONAL, z.dtype) * z)


def run(tx, loss_fn, x, steps=5, **functions):
    """Parameters after some steps."""
    x = jnp.asarray(x, jnp.float32)
    state = tx.init(x)

    @jax.jit
    def step(x, state):
        extra = {name: make(loss_fn) for name, make in functions.items()}
        updates, state = tx.update(jax.grad(loss_fn)(x), state, x, **extra)
        return optax.apply_updates(x, updates), state

    for _ in range(steps):
        x, state = step(x, state)
    return np.asarray(x, np.float64)


def sam(**options):
    return optax.contrib.sam(
        optax.sgd(0.05),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.1)),
        sync_period=2,
        opaque_mode=True,
        **options,
    )


GRAD_FN = {"grad_fn": lambda loss_fn: lambda p, i=0: jax.grad(loss_fn)(p)}
REGULARIZED = {
    mode: lambda mode=mode: optax.chain(
        bnp_optax.gradient_regularization(0.1, mode=mode, radius=0.1), optax.sgd(0.05)
    )
    for mode in ("exact", "forward")
}
INNER = {
    "sgd": (lambda: optax.sgd(0.05), {}),
    "momentum": (lambda: optax.sgd(0.05, 0.9, nesterov=True), {}),
    "adam": (lambda: optax.adam(0.05), {}),
    "adamw": (lambda: optax.adamw(0.05, weight_decay=0.1), {}),
    "lion": (lambda: optax.lion(0.05), {}),
    "schedule": (lambda: optax.adam(optax.linear_schedule(0.1, 0.01, 4)), {}),
    "inject_hyperparams": (lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.05), {}),
    "inject_hyperparams of a schedule": (
        lambda: optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.1, 0.01, 4)),
        {},
    ),
    "clipped": (lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.05)), {}),
    "noisy_sgd": (lambda: optax.noisy_sgd(0.05, key=3), {}),
    "sam": (sam, GRAD_FN),
    "MultiSteps": (lambda: optax.MultiSteps(optax.adam(0.05), 2).gradient_transformation(), {}),
    "L1": (
        lambda: optax.chain(optax.sgd(0.05), bnp_optax.proximal_l1(0.5, 0.05, lambda p: True)),
        {},
    ),
    "regularized, grad_fn": (REGULARIZED["exact"], GRAD_FN),
    "regularized, value_fn": (REGULARIZED["exact"], {"value_fn": lambda loss_fn: loss_fn}),
    "regularized, forward": (REGULARIZED["forward"], GRAD_FN),
    "line search": (
        lambda: optax.chain(optax.sgd(0.5), optax.scale_by_backtracking_linesearch(10)),
        {
            "value_fn": lambda loss_fn: loss_fn,
            "value": lambda loss_fn: None,
            "grad": lambda loss_fn: None,
        },
    ),
}


@pytest.mark.parametrize("name", [name for name in INNER if name != "line search"])
def test_running_in_z_is_running_on_the_loss_of_z(name):
    """in_zspace(opt, P) on L(p) is opt on L(P z), brought back to p = P z."""
    make, functions = INNER[name]
    in_z = run(in_zspace(make(), fixed()), loss_p, POINT, **functions)
    on_z = run(make(), loss_z, POINT / DIAGONAL, **functions)
    np.testing.assert_allclose(in_z, DIAGONAL * on_z, rtol=1e-4, atol=1e-6)
    in_p = run(make(), loss_p, POINT, **functions)
    assert np.abs(in_z - in_p).max() > 1e-3


def test_a_line_search_in_z_sees_value_and_gradient_of_z():
    make = INNER["line search"][0]

    def searched(tx, loss_fn, x):
        x = jnp.asarray(x, jnp.float32)
        state = tx.init(x)
        for _ in range(4):
            value, grad = jax.value_and_grad(loss_fn)(x)
            updates, state = tx.update(grad, state, x, value=value, grad=grad, value_fn=loss_fn)
            x = optax.apply_updates(x, updates)
        return np.asarray(x)

    in_z = searched(in_zspace(make(), fixed()), loss_p, POINT)
    on_z = searched(make(), loss_z, POINT / DIAGONAL)
    np.testing.assert_allclose(in_z, DIAGONAL * on_z, rtol=1e-4, atol=1e-6)


def test_clipping_in_z_bounds_the_norm_of_z():
    tx = in_zspace(optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0)), fixed())
    p = jnp.asarray(POINT, jnp.float32)
    updates, _ = tx.update(100 * jax.grad(loss_p)(p), tx.init(p), p)
    assert np.linalg.norm(updates / DIAGONAL) == pytest.approx(0.1, rel=1e-5)
    assert np.linalg.norm(updates) != pytest.approx(0.1, rel=1e-2)


def test_sam_in_z_is_the_step_of_dense_algebra():
    """P(-lr g_z(z + rho g_z/|g_z|)) with g_z = P grad L(P z): the ball is one in z."""
    rho, learning_rate = 0.1, 0.05
    got = run(in_zspace(sam(), fixed()), loss_p, POINT, steps=1, **GRAD_FN)
    z = POINT / DIAGONAL
    gradient = DIAGONAL * (HESSIAN @ (DIAGONAL * z))
    # `optax.contrib.sam` ascends by the adversary's step along the normalized gradient.
    up = z + rho * gradient / np.linalg.norm(gradient)
    expected = POINT - learning_rate * DIAGONAL**2 * (HESSIAN @ (DIAGONAL * up))
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_muon_in_z_is_muon_of_the_mapped_matrix():
    matrix = {"kernel": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)}

    def loss(p, scale):
        return jnp.sum(jnp.sin(jnp.asarray(scale[:, None], jnp.float32) * p["kernel"]) ** 2)

    def steps(tx, loss_fn, params):
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
            params = optax.apply_updates(params, updates)
        return np.asarray(params["kernel"])

    muon = optax.contrib.muon(0.01)
    in_z = steps(in_zspace(muon, fixed()), lambda p: loss(p, np.ones(4)), matrix)
    z = {"kernel": matrix["kernel"] / DIAGONAL[:, None].astype(np.float32)}
    on_z = steps(muon, lambda z: loss(z, DIAGONAL), z)
    np.testing.assert_allclose(in_z, DIAGONAL[:, None] * on_z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dimension", [0, 1])
def test_noisy_sgd_in_z_is_preconditioned_langevin_dynamics(dimension):
    """On a Gaussian target, the stationary covariance is that of the discretized dynamics in z.

    With loss p'Hp/2, steps z - lr (P H P z + xi), xi of variance s^2, have in the eigenbasis of
    A = P H P the variance lr s^2 / (a (2 - lr a)). Checked over many chains within four standard
    errors of a sample variance.
    """
    learning_rate, n_chains, n_steps = 0.05, 4000, 400
    hessian = np.diag([1.0, 30.0]) + 0.5
    diagonal = 1 / np.sqrt(np.diag(hessian))
    transformed = diagonal[:, None] * hessian * diagonal[None]
    tx = in_zspace(
        optax.chain(optax.add_noise(eta=1.0, gamma=0.0, key=1), optax.sgd(learning_rate)),
        fixed(diagonal),
    )
    a, q = np.linalg.eigh(transformed)
    variance = q @ np.diag(learning_rate / (a * (2 - learning_rate * a))) @ q.T
    expected = diagonal[:, None] * variance * diagonal[None]
    # One array of all chains: rows are the coordinates of p, columns the chains.
    chains = jnp.zeros((2, n_chains))

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jnp.asarray(hessian, jnp.float32) @ p, state, p)
        return (p + updates, state), None

    (p, _), _ = jax.jit(
        lambda: jax.lax.scan(step, (chains, tx.init(chains)), None, length=n_steps)
    )()
    got = np.var(np.asarray(p, np.float64)[dimension])
    error = expected[dimension, dimension] * np.sqrt(2 / n_chains)
    assert abs(got - expected[dimension, dimension]) < 4 * error
    # Without the preconditioner the steep coordinate's variance is 30 times further from it.
    assert 0.5 < got * hessian[dimension, dimension] / (learning_rate / 2) < 2.5


@pytest.mark.parametrize("kind", ["grad_fn", "value_fn"])
def test_multi_steps_around_a_regularizer_in_z(kind):
    """The function of the emitting microbatch serves; the accumulated gradient is regularized."""
    inner = optax.chain(bnp_optax.gradient_regularization(0.1), optax.sgd(0.05))
    multi = optax.MultiSteps(in_zspace(inner, fixed()), every_k_schedule=2)
    p = jnp.asarray(POINT, jnp.float32)
    function = {"grad_fn": jax.grad(loss_p), "value_fn": loss_p}[kind]
    state = multi.init(p)
    first, state = multi.update(jax.grad(loss_p)(p), state, p, **{kind: function})
    np.testing.assert_array_equal(first, np.zeros(4))
    second, state = multi.update(jax.grad(loss_p)(p), state, p, **{kind: function})
    m = DIAGONAL**2
    gradient = HESSIAN @ POINT
    expected = -0.05 * m * (gradient + 0.2 * HESSIAN @ (m * gradient))
    np.testing.assert_allclose(second, expected, rtol=1e-4)


def test_what_follows_a_proximal_step_undoes_its_zeros():
    """Why `proximal_l1` is last: a rate after it shrinks the step to the threshold."""
    everything = lambda params: True  # noqa: E731
    last = optax.chain(optax.sgd(0.1), bnp_optax.proximal_l1(10.0, 0.1, everything))
    not_last = optax.chain(last, optax.scale(0.5))
    zeros = [(run(tx, loss_p, POINT, steps=3) == 0).sum() for tx in (last, not_last)]
    assert zeros[0] == 4
    assert zeros[1] == 0


def test_the_derivative_in_z_is_at_the_parameters_and_elsewhere_where_asked():
    """The shortcut for the Hessian product holds at z alone; other points go the long way."""
    seen = {}

    def spy(updates, state, params=None, *, grad_fn, **extra):
        tx = bnp_optax.gradient_regularization(0.1)
        here, _ = tx.update(updates, tx.init(params), params, grad_fn=grad_fn)
        elsewhere, _ = tx.update(updates, tx.init(params), params + 1.0, grad_fn=grad_fn)
        seen.update(here=here, elsewhere=elsewhere)
        return updates, state

    cubic = lambda p: jnp.sum(p**3)  # noqa: E731
    inner = optax.GradientTransformationExtraArgs(lambda params: (), spy)
    p = jnp.asarray(POINT, jnp.float32)
    tx = in_zspace(inner, fixed())
    tx.update(jax.grad(cubic)(p), tx.init(p), p, grad_fn=jax.grad(cubic))
    gradient = DIAGONAL * 3 * POINT**2
    for name, point in (("here", POINT), ("elsewhere", POINT + DIAGONAL)):
        hessian = DIAGONAL**2 * 6 * point
        np.testing.assert_allclose(seen[name], gradient + 0.2 * hessian * gradient, rtol=1e-4)
