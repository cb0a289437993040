"""`whiten` against dense matrices in float64, and what it is for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quick_jit import jit
from support.whiten_cases import (
    CASES,
    SEEDS,
    Case,
    assert_close,
    assert_is,
    draw,
    moments,
    preconditioner,
    run,
    settled,
)

import bnp_optax
from bnp_optax import bnp, whiten
from bnp_optax.diagnostics import condition_number


@functools.cache
def state_of(name, exponent, damping, by_names=False):
    case = CASES[name]
    layers = None if by_names else case.layers()
    whitening = whiten(exponent=exponent, damping=damping, refresh_every=1, layers=layers)
    return whitening.operator(run(case, whitening, SEEDS))


@pytest.mark.parametrize(("exponent", "damping"), [(0.25, 0.1), (0.5, 0.0), (0.4, 1.0)])
@pytest.mark.parametrize("name", CASES)
def test_dense_matrices(name, exponent, damping):
    case = CASES[name]
    mean, covariance = moments(case, SEEDS)
    P = state_of(name, exponent, damping)
    assert_is(P, preconditioner(mean, covariance, exponent, damping), case, case.params)


@pytest.mark.parametrize("name", [n for n in CASES if n != "stacked_without_bias"])
def test_names_tell_as_much_as_find_layers(name):
    case = CASES[name]
    found, named = state_of(name, 0.25, 0.1), state_of(name, 0.25, 0.1, by_names=True)
    for one, two in zip(*(jax.tree.leaves(P.mv(case.params)) for P in (found, named)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_names_do_not_tell_of_layers_stacked_without_a_bias():
    case = CASES["stacked_without_bias"]
    with pytest.raises(ValueError, match=r"names and shapes do not tell.*find_layers"):
        run(case, whiten(), SEEDS[:1])


def extended(name, seed):
    case = CASES[name]
    rows = case.rows(np.asarray(case.batch(seed), np.float64))
    return np.concatenate([np.ones((*rows.shape[:2], 1)), rows], axis=2)


@pytest.mark.parametrize("name", ["dense", "attention", "grouped_convolution", "stacked"])
def test_full_whitening_has_condition_number_one(name):
    """kappa(H^ P) = 1 at exponent 1/2, without damping, when all that counts is the batch."""
    case = CASES[name]
    whitening = whiten(exponent=0.5, damping=0.0, decay=0.0, layers=case.layers())
    state = run(case, whitening, SEEDS[-1:])
    rows = extended(name, SEEDS[-1])
    before = [condition_number(block) for block in rows]
    P = whitening.operator(state)
    for i, block in enumerate(rows):
        matrix = dense(P, case)[i]
        assert condition_number(block @ matrix) < 1.0 + 1e-4 < before[i]


def dense(P, case):
    """P of each block as a matrix: what it makes of units that are columns of the identity."""
    size = case.units(case.params).shape[1]
    flat, rebuild = jax.flatten_util.ravel_pytree(case.params)
    columns = []
    place = case.units(rebuild(jnp.arange(flat.size, dtype=jnp.float32)))
    for row in range(size):
        z = np.zeros(flat.size, np.float32)
        z[place[:, row].astype(int)] = 1.0
        columns.append(case.units(P.mv(rebuild(jnp.asarray(z))))[:, :, 0])
    return np.stack(columns, axis=2)


def exact(**options):
    """Of the running statistics of one batch alone."""
    return whiten(exponent=0.5, damping=0.0, decay=0.0, **options)


def test_a_diagonal_covariance_makes_it_bnp():
    """With exponent 1/2 and no damping, and BNP without floors."""
    signs = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)])
    x = jnp.asarray(signs * [0.5, 2.0, 10.0] + [1.0, -3.0, 2.0], jnp.float32)
    case = CASES["dense"]
    params = {"kernel": draw(1, 3, 2), "bias": draw(2, 2)}
    diagonal = bnp(decay=0.0, eps_rel=0.0, eps_abs=0.0, scale=False)
    state, grads = settled(exact(), case.loss, params, x, 1)
    _, _, stats = bnp_optax.value_and_grad(case.loss)(params, x)
    theirs = diagonal.update(grads, diagonal.init(params), params, layer_stats=stats)
    P, D = exact().operator(state), diagonal.operator(theirs)
    for name in ("mv", "transpose", "solve", "gram"):
        one, two = (getattr(of, name)(params) for of in (P, D))
        jax.tree.map(lambda a, b: assert_close(np.asarray(a), np.asarray(b), 1e-5), one, two)


def test_without_decay_the_last_batch_is_all_that_counts():
    case = CASES["dense"]
    whitening = exact(refresh_every=1)
    P = whitening.operator(run(case, whitening, SEEDS))
    mean, covariance = moments(case, SEEDS[-1:], decay=0.0)
    assert_is(P, preconditioner(mean, covariance, 0.5, 0.0), case, case.params, 1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_full_whitening_does_not_see_a_linear_map_of_the_inputs(seed):
    """p = W A^-1 on inputs A h: a step of M moves the outputs as one on inputs h does."""
    rng = np.random.default_rng(seed)
    left, _, right = np.linalg.svd(rng.normal(size=(4, 4)))
    A = left * np.exp(rng.uniform(-1.5, 1.5, 4)) @ right
    shift = rng.normal(size=4) * 3
    h = np.asarray(draw(seed % 1000, 50, 4), np.float64)
    W, b = rng.normal(size=(4, 2)), rng.normal(size=2)
    mapped = h @ A.T + shift
    V = np.linalg.solve(A.T, W)
    settings = [(h, W, b), (mapped, V, b - shift @ V)]
    moved = []
    for x, kernel, bias in settings:
        params = {
            "kernel": jnp.asarray(kernel, jnp.float32),
            "bias": jnp.asarray(bias, jnp.float32),
        }
        x32 = jnp.asarray(x, jnp.float32)
        _, grads, stats = VALUE_AND_GRAD(params, x32)
        state = UPDATE(grads, WHITENING.init(params), stats)
        step = jax.tree.map(
            lambda a: np.asarray(a, np.float64), WHITENING.operator(state).gram(grads)
        )
        moved.append(x @ step["kernel"] + step["bias"])
    assert_close(moved[1], moved[0], 5e-3)


WHITENING = exact(refresh_every=1)


VALUE_AND_GRAD = jit(bnp_optax.value_and_grad(CASES["dense"].loss, second_moments=True))


UPDATE = jit(lambda grads, state, stats: WHITENING.update(grads, state, layer_stats=stats))


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_inputs_far_from_zero_are_whitened_as_well(offset):
    case, params = CASES["dense"], CASES["dense"].params
    x = jnp.asarray(np.asarray(draw(0, 200, 5), np.float64) + offset, jnp.float32)
    whitening = whiten(damping=0.0, refresh_every=1, decay=0.0)
    _, grads, stats = bnp_optax.value_and_grad(case.loss, second_moments=True)(params, x)
    state = whitening.update(grads, whitening.init(params), params, layer_stats=stats)
    want = np.cov(np.asarray(x, np.float64).T, bias=True)
    assert_close(np.asarray(state.covariance["kernel"]), want, 1e-3)
    # And later, when mu has come near.
    slow = whiten(decay=0.9, refresh_every=50)
    state, _ = settled(slow, case.loss, params, x, 400)
    assert_close(np.asarray(state.covariance["kernel"]), want, 2e-3)


@pytest.mark.parametrize("name", ["dense", "no_bias", "attention", "grouped_convolution"])
def test_low_rank_of_full_rank_is_the_whole_covariance(name):
    case, seed = CASES[name], SEEDS[0]
    options = {"refresh_every": 1, "decay": 0.0, "layers": case.layers()}
    low = whiten(max_fan_in=1, rank=64, **options)
    state = run(case, low, [seed])
    mean, covariance = moments(case, [seed], decay=0.0)
    matrix = preconditioner(mean, covariance, 0.25, 0.1)
    assert_is(low.operator(state), matrix, case, case.params, 1e-4)


def test_leading_eigenvectors_and_the_mean_of_the_rest():
    """Of 20 inputs with three directions of large variance, and rank 3."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    sizes = np.concatenate([[300.0, 90.0, 40.0], rng.uniform(0.5, 1.5, 17)])
    rows = rng.normal(size=(400, 20)) * np.sqrt(sizes) @ basis.T + 2.0
    case = Case(
        {"kernel": draw(1, 20, 3), "bias": draw(2, 3)},
        CASES["dense"].apply,
        (400, 20),
        lambda x: x[None],
        lambda w: w[None],
    )
    low = whiten(max_fan_in=8, rank=3, refresh_every=1, decay=0.0)
    state, _ = settled(low, case.loss, case.params, jnp.asarray(rows, jnp.float32), 10)
    covariance = np.cov(np.asarray(rows, np.float32).astype(np.float64).T, bias=True)
    values, vectors = np.linalg.eigh(covariance)
    flat = np.where(np.arange(20) < 17, values[:17].mean(), values)
    matrix = preconditioner(rows.mean(0)[None], (vectors * flat @ vectors.T)[None], 0.25, 0.1)
    assert_is(low.operator(state), matrix, case, case.params, 2e-3)
    assert state.vectors["kernel"].shape == (20, 3)
