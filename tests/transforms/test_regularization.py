"""Regularizers in p and in z, against dense float64 algebra with explicit P and Hessian."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnp_optax

RNG = np.random.default_rng(0)
HESSIAN = (lambda a: a @ a.T / 6 + 0.3 * np.eye(6))(RNG.normal(size=(6, 6)))
POINT = RNG.normal(size=6)


def quadratic(p):
    w = p["w"]
    return 0.5 * jnp.einsum("i,ij,j", w, jnp.asarray(HESSIAN, w.dtype), w)


def tree(v):
    return {"w": jnp.asarray(v, jnp.float32)}


def update(tx, p=POINT, steps=1, **extra):
    """The update at `p`, after `steps` - 1 others at the same place."""
    p = tree(p)
    state = tx.init(p)
    for _ in range(steps):
        updates, state = tx.update(jax.grad(quadratic)(p), state, p, **extra)
    return np.asarray(updates["w"], np.float64)


GRADIENT = HESSIAN @ POINT
LENGTH = np.linalg.norm(GRADIENT)
# A diagonal preconditioner that knows its matrix: AdaGrad's after one step from 0.1.
ADAGRAD = bnp_optax.adagrad(eps=0.0)
P = np.diag((0.1 + GRADIENT**2) ** -0.25)
M = P @ P.T
GRAD_FN = jax.grad(quadratic)


def hessian_product(norm, matrix, length):
    product = HESSIAN @ matrix @ GRADIENT
    return 2 * product if norm == "squared" else product / length


@pytest.mark.parametrize("mode", ["exact", "forward", "backward"])
@pytest.mark.parametrize("norm", ["squared", "l2"])
@pytest.mark.parametrize("source", ["grad_fn", "value_fn"])
def test_gradient_regularization_in_p(norm, mode, source):
    """Ye (11). On a quadratic the finite differences are exact but for rounding."""
    tx = bnp_optax.gradient_regularization(0.3, norm=norm, mode=mode, radius=0.1)
    got = update(tx, **{source: GRAD_FN if source == "grad_fn" else quadratic})
    expected = GRADIENT + 0.3 * hessian_product(norm, np.eye(6), LENGTH)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["exact", "forward", "backward"])
@pytest.mark.parametrize("norm", ["squared", "l2"])
def test_gradient_regularization_in_z(norm, mode):
    """Ye (12), as a transformation of its own, preconditioned, and inside z-space."""
    options = {"norm": norm, "mode": mode, "radius": 0.1}
    length = np.linalg.norm(P.T @ GRADIENT)
    expected = GRADIENT + 0.3 * hessian_product(norm, M, length)
    alone = bnp_optax.zspace_grad_reg(0.3, ADAGRAD, **options)
    np.testing.assert_allclose(update(alone, grad_fn=GRAD_FN), expected, rtol=1e-4, atol=1e-5)
    in_z = bnp_optax.in_zspace(
        optax.chain(bnp_optax.gradient_regularization(0.3, **options), optax.sgd(0.1)), ADAGRAD
    )
    got = update(in_z, grad_fn=GRAD_FN)
    np.testing.assert_allclose(got, -0.1 * M @ expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(update(in_z, value_fn=quadratic), got, rtol=1e-5, atol=1e-6)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(5)(x)))


def network(seed=0):
    model, x = Net(), jax.random.normal(jax.random.key(seed), (16, 3)) * 4 + 2
    params = model.init(jax.random.key(1), x)["params"]

    def loss_fn(params):
        return jnp.mean((model.apply({"params": params}, x) - 1.0) ** 2)

    return loss_fn, params


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_z_forms_agree_for_bnp(momentum):
    """in_zspace(chain(reg, opt), P) = chain(zspace_grad_reg(P), precondition(P), opt)."""
    loss_fn, params = network()
    preconditioner = bnp_optax.bnp(decay=0.5)
    optimizer = optax.sgd(0.05, momentum)
    in_z = bnp_optax.in_zspace(
        optax.chain(bnp_optax.gradient_regularization(0.1), optimizer), preconditioner
    )
    in_p = optax.chain(
        bnp_optax.zspace_grad_reg(0.1, preconditioner),
        bnp_optax.precondition(preconditioner),
        optimizer,
    )
    plain = optax.chain(bnp_optax.precondition(preconditioner), optimizer)
    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
    results = [
        tx.update(grads, tx.init(params), params, layer_stats=stats, **extra)[0]
        for tx, extra in (
            (in_z, {"grad_fn": jax.grad(loss_fn)}),
            (in_p, {"grad_fn": jax.grad(loss_fn)}),
            (plain, {}),
        )
    ]
    for a, b, without in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        assert np.abs(a - without).max() > 1e-3 * np.abs(without).max()


def test_forward_l2_with_strength_equal_to_the_radius_is_sam():
    loss_fn, params = network()
    rho = 0.05
    tx = bnp_optax.gradient_regularization(rho, norm="l2", mode="forward", radius=rho)
    grads = jax.grad(loss_fn)(params)
    got, _ = tx.update(grads, tx.init(params), params, grad_fn=jax.grad(loss_fn))
    up = jax.tree.map(lambda p, g: p + rho * g / optax.tree.norm(grads), params, grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        got,
        jax.grad(loss_fn)(up),
    )


def test_forward_l2_is_the_penalty_of_zhao_et_al():
    """(1 - alpha) grad L(p) + alpha grad L(p + r g / ||g||), strength = alpha r."""
    loss_fn, params = network()
    alpha, r = 0.8, 0.1
    tx = bnp_optax.gradient_regularization(alpha * r, norm="l2", mode="forward", radius=r)
    grads = jax.grad(loss_fn)(params)
    got, _ = tx.update(grads, tx.init(params), params, grad_fn=jax.grad(loss_fn))
    up = jax.tree.map(lambda p, g: p + r * g / optax.tree.norm(grads), params, grads)
    expected = jax.tree.map(lambda g, h: (1 - alpha) * g + alpha * h, grads, jax.grad(loss_fn)(up))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


@pytest.mark.parametrize("mode", ["exact", "forward"])
@pytest.mark.parametrize("norm", ["squared", "l2"])
def test_at_a_zero_gradient_nothing_is_added(norm, mode):
    tx = bnp_optax.gradient_regularization(0.3, norm=norm, mode=mode)
    np.testing.assert_array_equal(update(tx, p=np.zeros(6), grad_fn=GRAD_FN), np.zeros(6))


def test_strength_may_be_a_schedule():
    warm_up = optax.linear_schedule(0.0, 0.3, transition_steps=3)
    tx = bnp_optax.gradient_regularization(warm_up)
    np.testing.assert_allclose(update(tx, grad_fn=GRAD_FN), GRADIENT, rtol=1e-5)
    expected = GRADIENT + 0.2 * hessian_product("squared", np.eye(6), LENGTH)
    np.testing.assert_allclose(update(tx, steps=3, grad_fn=GRAD_FN), expected, rtol=1e-4)


def test_a_finite_difference_takes_one_evaluation():
    calls = []

    def grad_fn(p):
        calls.append(1)
        return GRAD_FN(p)

    update(bnp_optax.gradient_regularization(0.3, mode="forward"), grad_fn=grad_fn)
    assert len(calls) == 1


def test_l2_in_p_and_in_z():
    """Ye (9): decay of p. Ye (10), with the plus sign: M (grad + 2 lambda p)."""
    step = optax.sgd(0.1)
    in_z = optax.chain(bnp_optax.precondition(ADAGRAD), bnp_optax.zspace_weight_decay(0.4), step)
    np.testing.assert_allclose(update(in_z), -0.1 * (M @ GRADIENT + 0.4 * POINT), rtol=1e-5)
    inside = bnp_optax.in_zspace(optax.chain(bnp_optax.zspace_weight_decay(0.4), step), ADAGRAD)
    np.testing.assert_allclose(update(inside), update(in_z), rtol=1e-5)
    # AdaGrad's P is made of the gradient that reaches it, so P is taken from the decayed one.
    in_p = optax.chain(bnp_optax.pspace_weight_decay(0.4), bnp_optax.precondition(ADAGRAD), step)
    decayed = GRADIENT + 0.4 * POINT
    expected = -0.1 * decayed / np.sqrt(0.1 + decayed**2)
    np.testing.assert_allclose(update(in_p), expected, rtol=1e-5)


def soft(v, threshold):
    return np.sign(v) * np.maximum(np.abs(v) - threshold, 0.0)


def test_proximal_l1_in_p():
    tx = optax.chain(optax.sgd(0.1), bnp_optax.proximal_l1(3.0, 0.1, mask=lambda p: {"w": True}))
    expected = soft(POINT - 0.1 * GRADIENT, 0.3)
    got = tree(POINT)["w"] + jnp.asarray(update(tx), jnp.float32)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert (got == 0).any()
    np.testing.assert_array_equal(np.asarray(got == 0), expected == 0)


def test_proximal_l1_in_z_thresholds_at_strength_times_rate_times_p_ii():
    inner = optax.chain(optax.sgd(0.1), bnp_optax.proximal_l1(4.0, 0.1, mask=lambda p: {"w": True}))
    tx = bnp_optax.in_zspace(inner, ADAGRAD)
    expected = soft(POINT - 0.1 * M @ GRADIENT, 4.0 * 0.1 * np.diag(P))
    got = tree(POINT)["w"] + jnp.asarray(update(tx), jnp.float32)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert 0 < (got == 0).sum() < 6
    np.testing.assert_array_equal(np.asarray(got == 0), expected == 0)


@pytest.mark.parametrize("jit", [False, True])
def test_zeros_are_exact_through_bnp_and_stay(jit):
    loss_fn, params = network()
    inner = optax.chain(optax.sgd(0.05), bnp_optax.proximal_l1(0.2, 0.05))
    tx = bnp_optax.in_zspace(inner, bnp_optax.bnp(decay=0.9))

    def step(params, state):
        _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, layer_stats=stats)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    state, zeros = tx.init(params), 0
    for _ in range(30 if jit else 5):
        params, state = step(params, state)
        kernels = [params[name]["kernel"] for name in params]
        zeros = sum(int((kernel == 0).sum()) for kernel in kernels)
        tiny = sum(int((jnp.abs(kernel) < 1e-7).sum()) for kernel in kernels)
        assert tiny == zeros
    assert zeros >= 1
    assert all((params[name]["bias"] != 0).any() for name in params)


def test_adam_l1_without_l1_is_adam():
    ours, adam = bnp_optax.adam_l1(0.01, 0.0), optax.adam(0.01)
    np.testing.assert_allclose(update(ours, steps=5), update(adam, steps=5), rtol=1e-4)


scales = st.lists(st.floats(-3, 3), min_size=6, max_size=6).map(lambda e: 10.0 ** np.array(e))


def scaled_updates(make, s):
    """Updates of the problem in p and of that in q = S p, brought back to p."""

    def in_q(q):
        return quadratic({"w": q["w"] / jnp.asarray(s, jnp.float32)})

    def one(loss_fn, p):
        tx = make()
        return tx.update(jax.grad(loss_fn)(p), tx.init(p), p, grad_fn=jax.grad(loss_fn))[0]["w"]

    return np.asarray(one(quadratic, tree(POINT))), np.asarray(one(in_q, tree(POINT * s))) / s


def invariant_preconditioner():
    """P = diag(1 / |g|)^(1/2), which absorbs a scaling only in part, squared: P = diag(1 / |g|)."""
    root = bnp_optax.rms(decay=0.0, eps=0.0)

    class Square(bnp_optax.Operator):
        def __init__(self, root):
            self.mv = self.transpose = lambda z: root.mv(root.mv(z))
            self.solve = lambda p: root.solve(root.solve(p))

        mv = transpose = solve = None

    return root._replace(operator=lambda state: Square(root.operator(state)))


REGULARIZERS = {
    "weight decay": lambda: bnp_optax.zspace_weight_decay(0.1),
    "gradient": lambda: bnp_optax.gradient_regularization(0.1),
    "L1": lambda: optax.chain(
        optax.scale(-0.1), bnp_optax.proximal_l1(0.1, 0.1, mask=lambda p: {"w": True})
    ),
}


@pytest.mark.parametrize("name", REGULARIZERS)
@settings(max_examples=20, deadline=None)
@given(s=scales)
def test_in_z_nothing_depends_on_the_scale_of_p(name, s):
    """P = diag(1 / |g|) absorbs S: q = S p has gradients S^-1 g and so P_q = S P."""
    one, two = scaled_updates(
        lambda: bnp_optax.in_zspace(REGULARIZERS[name](), invariant_preconditioner()), s
    )
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize("name", REGULARIZERS)
def test_in_p_the_result_depends_on_the_scale_of_p(name):
    one, two = scaled_updates(
        lambda: optax.chain(
            REGULARIZERS[name](), bnp_optax.precondition(invariant_preconditioner())
        ),
        np.array([10.0, 0.1, 1.0, 3.0, 0.3, 1.0]),
    )
    assert np.abs(one - two).max() > 0.01 * np.abs(one).max()


@pytest.mark.parametrize("make", [bnp_optax.gradient_regularization, bnp_optax.proximal_l1])
def test_strength_below_zero(make):
    extra = {"learning_rate": 0.1} if make is bnp_optax.proximal_l1 else {}
    with pytest.raises(ValueError, match=r"`strength` must be finite and >= 0, got -0\.1"):
        make(-0.1, **extra)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("norm", "l1", "`norm` must be one of 'squared', 'l2'; got 'l1'"),
        ("mode", "central", "`mode` must be one of 'exact', 'forward', 'backward'; got 'central'"),
        ("radius", 0.0, "`radius` must be finite and > 0, got 0.0"),
    ],
)
def test_options_of_gradient_regularization(option, value, message):
    with pytest.raises(ValueError, match=message):
        bnp_optax.gradient_regularization(0.1, **{option: value})


@pytest.mark.parametrize(
    "tx", [bnp_optax.gradient_regularization(0.1), bnp_optax.zspace_grad_reg(0.1, ADAGRAD)]
)
def test_grad_fn_left_out(tx):
    with pytest.raises(ValueError, match=r"Add it: `tx\.update\(grads, state, params, grad_fn="):
        update(tx)
    with pytest.raises(ValueError, match="needs `params`"):
        tx.update(tree(GRADIENT), tx.init(tree(POINT)), grad_fn=GRAD_FN)


def test_proximal_l1_needs_params():
    tx = bnp_optax.proximal_l1(0.1, 0.1)
    with pytest.raises(ValueError, match="`proximal_l1` needs `params`"):
        tx.update(tree(GRADIENT), tx.init(tree(POINT)))
