"""`whiten` of layers that are wider than `max_fan_in`, from sketches of their second moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quick_jit import jit
from support.sketch_cases import K, explicit, nystrom
from support.whiten_cases import (
    Case,
    assert_close,
    assert_is,
    draw,
    moments,
    preconditioner,
    trained,
)

import bnp_optax
from bnp_optax import whiten

N, RANK, SEEDS = 70, 8, (10, 11, 12, 13, 14)


def _dense(p, x):
    y = x @ p["kernel"]
    return y + p["bias"][None] if "bias" in p else y


def case_of(kind, n_rows=30):
    if kind == "stacked":
        return Case(
            {"kernel": draw(1, 2, N, 3), "bias": draw(2, 2, 3)},
            lambda p, x: jax.vmap(jnp.dot)(x, p["kernel"]) + p["bias"][:, None],
            (2, n_rows, N),
            lambda x: x,
            lambda w: w,
            lambda b: b[:, None],
        )
    bias = {} if kind == "no_bias" else {"bias": draw(2, 3)}
    params = {"kernel": draw(1, N, 3)} | bias
    return Case(params, _dense, (n_rows, N), lambda x: x[None], lambda w: w[None])


KINDS = ("dense", "no_bias", "stacked")


def capture(case, fan_in=32):
    return jit(
        bnp_optax.value_and_grad(case.loss, second_moments=True, second_moment_fan_in=fan_in)
    )


def run(case, whitening, seeds, fan_in=32):
    value_and_grad, state = capture(case, fan_in), whitening.init(case.params)
    update = jit(lambda grads, state, stats: whitening.update(grads, state, layer_stats=stats))
    for seed in seeds:
        _, grads, stats = value_and_grad(case.params, case.batch(seed))
        state = update(grads, state, stats)
    return state


def wide(case, **options):
    return whiten(**{"max_fan_in": 32, "rank": RANK, "layers": case.layers()} | options)


def truncated(approximation, covariance):
    """The approximation, and in all other directions the mean of the eigenvalues that it lacks."""
    values, vectors = np.linalg.eigh(approximation)
    values, vectors = values[-RANK:], vectors[:, -RANK:]
    rest = (np.trace(covariance) - values.sum()) / (N - RANK)
    return vectors * (values - rest) @ vectors.T + rest * np.eye(N)


@functools.cache
def dense_matrices(kind, exponent, damping):
    case = case_of(kind)
    mean, covariance = moments(case, SEEDS)
    approximate = np.stack([truncated(nystrom(c, RANK), c) for c in covariance])
    return preconditioner(mean, approximate, exponent, damping)


@pytest.mark.parametrize("fan_in", [32, 1024])
@pytest.mark.parametrize(("exponent", "damping"), [(0.25, 0.1), (0.5, 0.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_matrices(kind, exponent, damping, fan_in):
    """P, its transpose, inverse and square, of sketches as of matrices that are sketched here."""
    case = case_of(kind)
    whitening = wide(case, exponent=exponent, damping=damping, refresh_every=1)
    P = whitening.operator(run(case, whitening, SEEDS, fan_in))
    assert_is(P, dense_matrices(kind, exponent, damping), case, case.params, 2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_covariance_of_low_rank_is_whitened_exactly(kind):
    """Of 7 rows, which span no more than RANK - 1 directions."""
    case = case_of(kind, n_rows=RANK - 1)
    whitening = wide(case, decay=0.0, refresh_every=1)
    P = whitening.operator(run(case, whitening, SEEDS[:1]))
    mean, covariance = moments(case, SEEDS[:1], decay=0.0)
    want = preconditioner(mean, covariance, 0.25, 0.1) @ case.units(case.params)
    assert_close(case.units(P.mv(case.params)), want, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_batch_enters(kind):
    """Also between refreshes, at the rate of all."""
    case = case_of(kind)
    whitening = wide(case, decay=0.5, refresh_every=1000)
    state = run(case, whitening, SEEDS)
    _, covariance = moments(case, SEEDS, decay=0.5)
    got = np.asarray(state.covariance["kernel"]).reshape(-1, K + 1, N)
    assert_close(got, explicit(covariance), 1e-5)
    assert state.vectors["kernel"].shape[-2:] == (N, RANK)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_statistics_that_are_not_finite_do_not_enter(bad):
    case = case_of("dense")
    whitening = wide(case)
    state = run(case, whitening, SEEDS)
    x = case.batch(1).at[3, 2].set(bad)
    _, grads, stats = capture(case)(case.params, x)
    after = whitening.update(grads, state, layer_stats=stats)
    # The eigenvectors are those after the fourth.
    assert after.numbers["kernel"].tolist() == [4, 5, 1]
    for name in ("mean", "covariance", "vectors", "values"):
        np.testing.assert_array_equal(
            getattr(after, name)["kernel"], getattr(state, name)["kernel"]
        )


@pytest.mark.parametrize("fan_in", [32, 1024])
@pytest.mark.parametrize("make", [bnp_optax.whiten_adam, bnp_optax.whiten_muon])
def test_training_with_microbatches_is_training_with_their_union(make, fan_in):
    case = case_of("dense")
    x = jnp.concatenate([case.batch(seed) + seed for seed in range(4)])
    value_and_grad = capture(case, fan_in)

    tx = make(0.01, refresh_every=1, max_fan_in=32, rank=RANK)
    parts = trained(case, value_and_grad, bnp_optax.multi_steps(tx, 4), jnp.split(x, 4) * 2)
    whole = trained(case, value_and_grad, tx, [x] * 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), parts, whole)


def test_statistics_travel_as_a_gradient():
    """Through `drop_in`, whose vector has whatever `LayerStats` has."""
    case = case_of("dense")
    tx, x = bnp_optax.whiten_adam(max_fan_in=32, rank=RANK), case.batch(0)
    options = {"second_moments": True, "second_moment_fan_in": 32}
    loss_fn, wrapped, wrapping = bnp_optax.drop_in(case.loss, case.params, tx, x, **options)
    got, _ = wrapping.update(jax.grad(loss_fn)(wrapped, x), wrapping.init(wrapped), wrapped)
    _, grads, stats = capture(case)(case.params, x)
    want, _ = tx.update(grads, tx.init(case.params), case.params, layer_stats=stats)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        bnp_optax.bare_params(got),
        want,
    )


def test_a_sketch_for_a_whole_covariance_is_refused():
    case = case_of("dense")
    with pytest.raises(ValueError) as caught:
        run(case, whiten(layers=case.layers()), SEEDS[:1])
    message = str(caught.value)
    assert "`kernel` is a sketch of 31 products, but `whiten` keeps it whole" in message
    assert "second_moment_fan_in=70" in message


def test_more_eigenvectors_than_products_are_refused():
    case = case_of("dense")
    whitening = wide(case, rank=60)
    with pytest.raises(ValueError, match="sketch of 31 products, but `whiten` keeps it in 60 prod"):
        run(case, whitening, SEEDS[:1])
    # The matrix will do.
    state = run(case, whitening, SEEDS[:1], fan_in=1024)
    assert state.vectors["kernel"].shape == (N, 60)


def test_the_state_is_small():
    params = {"kernel": jnp.ones((3000, 2)), "bias": jnp.ones(2)}
    state = jax.eval_shape(whiten().init, params)
    sizes = {name: getattr(state, name)["kernel"].shape for name in state._fields[:-1]}
    assert sizes["covariance"] == (K + 1, 3000)
    assert sizes["vectors"] == (3000, 16)
    assert sizes["values"] == (17,)
