"""`whiten` against dense matrices in float64, and what it is for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from quick_jit import jit
from whiten_cases import CASES, Case, draw, moments, preconditioner, run

import bnp_optax
from bnp_optax import bnp, whiten
from bnp_optax.diagnostics import condition_number

SEEDS = (10, 11, 12)


def assert_close(got, want, tolerance):
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def assert_is(P, matrix, case, tree, tolerance=2e-5):
    """P, its transpose, inverse and square are those of `matrix`."""
    columns = case.units(tree)
    parts = {
        "mv": matrix,
        "transpose": np.swapaxes(matrix, 1, 2),
        "solve": np.linalg.inv(matrix),
        "gram": matrix @ np.swapaxes(matrix, 1, 2),
    }
    for name, part in parts.items():
        assert_close(case.units(getattr(P, name)(tree)), part @ columns, tolerance)


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


def settled(whitening, loss_fn, params, x, n=40):
    """The state when the same batch has come so often that the start is forgotten."""
    _, grads, stats = jit(bnp_optax.value_and_grad(loss_fn, second_moments=True))(params, x)

    def step(state, _):
        return whitening.update(grads, state, layer_stats=stats), None

    many = jit(lambda state: jax.lax.scan(step, state, None, n)[0])
    return many(whitening.init(params)), grads


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


# Wide layers.


@pytest.mark.parametrize("name", ["dense", "no_bias", "attention", "grouped_convolution"])
def test_low_rank_of_full_rank_is_the_whole_covariance(name):
    case, seed = CASES[name], SEEDS[0]
    options = {"refresh_every": 1, "decay": 0.0, "layers": case.layers()}
    low = whiten(max_fan_in=1, rank=64, **options)
    state = run(case, low, [seed])
    assert isinstance(state.covariance["kernel"], optax.MaskedNode)
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


def test_a_wide_layer_forgets_at_the_rate_of_the_others():
    """Between refreshes nothing enters but mu; the batch of a refresh weighs as much as all."""
    case = CASES["no_bias"]
    low = whiten(max_fan_in=1, refresh_every=4, decay=0.5)
    state = run(case, low, (10, 11, 12, 13))
    # Refreshes after 1, 2 and 4: rates 1/2, then 1/2, then 1 - (1/2)^2.
    first = moments(case, [10], 0.5)[1][0]
    rows = [np.asarray(case.batch(seed), np.float64) for seed in (11, 13)]
    second = 0.5 * first + 0.5 * rows[0].T @ rows[0] / 30
    want = 0.25 * second + 0.75 * rows[1].T @ rows[1] / 30
    vectors, values = state.vectors["kernel"], state.values["kernel"][:-1]
    assert_close(np.asarray(vectors * values[None] @ vectors.T), want, 1e-4)


# When.


def test_decomposed_after_1_2_4_8_and_multiples_of_the_period():
    case = CASES["dense"]
    whitening = whiten(refresh_every=10)
    state, due = whitening.init(case.params), []
    value_and_grad = jit(bnp_optax.value_and_grad(case.loss, second_moments=True))
    update = jit(lambda grads, state, stats: whitening.update(grads, state, layer_stats=stats))
    for step in range(1, 32):
        _, grads, stats = value_and_grad(case.params, case.batch(step))
        new = update(grads, state, stats)
        if not np.array_equal(new.values["kernel"], state.values["kernel"]):
            due.append(step)
        state = new
    assert due == [1, 2, 4, 8, 10, 20, 30]


def test_the_decomposition_is_in_a_branch():
    """A step in between does not pay for it."""
    case, whitening = CASES["dense"], whiten()
    _, grads, stats = bnp_optax.value_and_grad(case.loss, second_moments=True)(
        case.params, case.batch(0)
    )
    jaxpr = jax.make_jaxpr(lambda s: whitening.update(grads, s, layer_stats=stats))(
        whitening.init(case.params)
    )
    assert not any(eqn.primitive.name == "eigh" for eqn in jaxpr.jaxpr.eqns)
    assert "eigh" in str(jaxpr)


def test_the_identity_before_the_first_statistics():
    case, whitening = CASES["dense"], whiten()
    P = whitening.operator(whitening.init(case.params))
    for part in ("mv", "transpose", "solve", "gram"):
        got = getattr(P, part)(case.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, case.params)


def test_without_statistics_nothing_moves():
    case, whitening = CASES["dense"], whiten()
    state = run(case, whitening, SEEDS)
    assert whitening.update(case.params, state, layer_stats=None) is state


@pytest.mark.parametrize("max_fan_in", [1024, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_statistics_that_are_not_finite_do_not_enter(bad, max_fan_in):
    case = CASES["dense"]
    whitening = whiten(max_fan_in=max_fan_in)
    state = run(case, whitening, SEEDS)
    x = case.batch(1).at[3, 2].set(bad)
    _, grads, stats = bnp_optax.value_and_grad(case.loss, second_moments=True)(case.params, x)
    after = whitening.update(grads, state, layer_stats=stats)
    _, entered, rejected = after.numbers["kernel"]
    assert (entered, rejected) == (3, 1)
    for name in ("mean", "vectors", "values"):
        np.testing.assert_array_equal(
            getattr(after, name)["kernel"], getattr(state, name)["kernel"]
        )


def test_dead_inputs_have_finite_updates():
    case = CASES["dense"]
    x = jnp.zeros((30, 5)).at[:, 0].set(1.0)
    whitening = whiten(damping=0.0, exponent=0.5, decay=0.5, refresh_every=3)
    state, grads = settled(whitening, case.loss, case.params, x, 200)
    P = whitening.operator(state)
    for part in (P.mv, P.transpose, P.gram, P.solve):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(part(grads)))


# What holds it.


def test_float32_under_bfloat16_parameters():
    case = CASES["dense"]
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), case.params)
    whitening = whiten()
    state = run(case, whitening, SEEDS, params=params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    z = whitening.operator(state).solve(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(z)} == {jnp.dtype("bfloat16")}


def test_muon_in_bfloat16_is_the_same_up_to_rounding():
    case, tx = CASES["dense"], bnp_optax.whiten_muon(0.003)
    value_and_grad = jit(bnp_optax.value_and_grad(case.loss, second_moments=True))
    given = []
    for seed in SEEDS:
        # Of full rank, which those of the loss are hardly where inputs are far from 0.
        draws = iter(jax.random.split(jax.random.key(seed)))
        grads = {n: jax.random.normal(next(draws), p.shape) for n, p in case.params.items()}
        given.append((grads, value_and_grad(case.params, case.batch(seed))[2]))

    def updates(dtype):
        params, found = optax.tree.cast(case.params, dtype), []
        state = tx.init(params)
        for grads, stats in given:
            step, state = tx.update(optax.tree.cast(grads, dtype), state, params, layer_stats=stats)
            found.append(optax.tree.cast(step, "float32"))
        return found

    for step, want in zip(updates("bfloat16"), updates("float32"), strict=True):
        atol = 0.02 * float(optax.tree.norm(want))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), step, want)  # noqa: B023


def test_tree_map_params_finds_what_belongs_to_parameters():
    case = CASES["dense"]
    tx = bnp_optax.whiten_adam()
    state = tx.init(case.params)
    marked = optax.tree.map_params(
        tx, lambda _: "of a parameter", state, transform_non_params=lambda _: None
    )
    assert marked.preconditioner.covariance["kernel"] == "of a parameter"
    assert marked.preconditioner.hyper is None


@pytest.mark.parametrize("make", [bnp_optax.whiten_adam, bnp_optax.whiten_muon])
def test_training_with_microbatches_is_training_with_their_union(make):
    case = CASES["dense"]
    x = jnp.concatenate([case.batch(seed) + seed for seed in range(4)])
    value_and_grad = jit(bnp_optax.value_and_grad(case.loss, second_moments=True))

    def trained(tx, batches):
        params, state = case.params, tx.init(case.params)
        for batch in batches:
            _, grads, stats = value_and_grad(params, batch)
            updates, state = tx.update(grads, state, params, layer_stats=stats)
            params = optax.apply_updates(params, updates)
        return params

    tx = make(0.01, refresh_every=1)
    parts = trained(bnp_optax.multi_steps(tx, 4), jnp.split(x, 4) * 2)
    whole = trained(tx, [x] * 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), parts, whole)


def test_averaged_statistics_are_those_of_the_union():
    case, whitening = CASES["dense"], whiten(refresh_every=1)
    parts = [case.batch(seed) + seed for seed in range(4)]
    value_and_grad = jit(bnp_optax.value_and_grad(case.loss, second_moments=True))
    every = [value_and_grad(case.params, x)[2] for x in parts]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *every)
    whole = value_and_grad(case.params, jnp.concatenate(parts))[2]
    one, two = (
        whitening.update(case.params, whitening.init(case.params), layer_stats=stats)
        for stats in (mean, whole)
    )
    assert_close(np.asarray(one.covariance["kernel"]), np.asarray(two.covariance["kernel"]), 1e-4)


def test_second_moments_alone_will_do():
    """As from another source: without the covariance, M2 - mu mu^T is taken."""
    case, whitening = CASES["dense"], whiten(refresh_every=1)
    _, _, stats = bnp_optax.value_and_grad(case.loss, second_moments=True)(
        case.params, case.batch(0)
    )
    bare = dataclasses.replace(stats["kernel"], covariance=None, rows_mean=None)
    one, two = (
        whitening.update(case.params, whitening.init(case.params), layer_stats={"kernel": of})
        for of in (bare, stats["kernel"])
    )
    assert_close(np.asarray(one.covariance["kernel"]), np.asarray(two.covariance["kernel"]), 1e-5)


def explicit_mesh():
    explicit = (jax.sharding.AxisType.Explicit,)
    return jax.make_mesh((2,), ("model",), devices=jax.devices()[:2], axis_types=explicit)


def test_a_kernel_sharded_along_its_inputs_is_refused_by_name():
    mesh = explicit_mesh()
    with jax.set_mesh(mesh):
        kernel = jax.device_put(draw(0, 4, 2), NamedSharding(mesh, PartitionSpec("model")))
        with pytest.raises(ValueError, match="`kernel` is sharded along its axis 0 over `model`"):
            whiten().init({"kernel": kernel})


def test_a_kernel_sharded_along_its_outputs_is_whitened():
    mesh, case, whitening = explicit_mesh(), CASES["dense"], whiten(refresh_every=1)
    params = {"kernel": draw(1, 5, 4), "bias": draw(2, 4)}
    want = run(case, whitening, SEEDS, params=params)
    want = whitening.operator(want).gram(params)
    with jax.set_mesh(mesh):
        specs = {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")}
        params = {n: jax.device_put(p, NamedSharding(mesh, specs[n])) for n, p in params.items()}
        P = whitening.operator(run(case, whitening, SEEDS, params=params))
        got = P.gram(params)
    assert got["kernel"].sharding.spec == specs["kernel"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got, want)


def test_state_sharding_replicates_it():
    specs = {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")}
    found = bnp_optax.state_sharding(bnp_optax.whiten_adam(), CASES["dense"].params, specs)
    assert set(jax.tree.leaves(found.preconditioner)) == {PartitionSpec()}
    assert found.inner[0][0].mu == specs


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exponent": -0.5}, "`exponent` must be finite and >= 0, got -0.5"),
        ({"damping": -1.0}, "`damping` must be finite and >= 0, got -1.0"),
        ({"decay": 1.5}, "`decay` must lie in [0, 1), got 1.5"),
        ({"refresh_every": 0}, "`refresh_every` must be an integer > 0"),
        ({"rank": 2.5}, "`rank` must be an integer > 0"),
        ({"max_fan_in": 0}, "`max_fan_in` must be an integer > 0"),
        ({"layers": ["a"]}, "`layers` must be a dict of `Layer`"),
    ],
)
def test_options_out_of_their_range(options, message):
    with pytest.raises(ValueError) as caught:
        whiten(**options)
    assert message in str(caught.value)


def test_no_second_moments():
    case, whitening = CASES["dense"], whiten()
    _, grads, stats = bnp_optax.value_and_grad(case.loss)(case.params, case.batch(0))
    with pytest.raises(ValueError) as caught:
        whitening.update(grads, whitening.init(case.params), layer_stats=stats)
    assert "`whiten` needs the second moment of the inputs of `kernel`" in str(caught.value)
    assert "value_and_grad(loss_fn, second_moments=True)" in str(caught.value)


def test_no_statistics():
    case, whitening = CASES["dense"], whiten()
    with pytest.raises(ValueError, match="`layer_stats` was left out"):
        whitening.update(case.params, whitening.init(case.params))


def test_second_moments_of_another_network():
    case, whitening = CASES["dense"], whiten()
    _, grads, stats = bnp_optax.value_and_grad(case.loss, second_moments=True)(
        case.params, case.batch(0)
    )
    wrong = dataclasses.replace(stats["kernel"], second_moment=jnp.eye(3))
    with pytest.raises(ValueError, match=r"has shape \(3, 3\); expected \(5, 5\)"):
        whitening.update(grads, whitening.init(case.params), layer_stats={"kernel": wrong})


def test_the_state_of_another_network():
    case, whitening = CASES["dense"], whiten()
    P = whitening.operator(whitening.init({"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}))
    with pytest.raises(ValueError, match="4 inputs for `kernel` of fan-in 5"):
        P.mv(case.params)
    _, grads, stats = bnp_optax.value_and_grad(case.loss, second_moments=True)(
        case.params, case.batch(0)
    )
    other = whitening.init({"other": case.params})
    with pytest.raises(ValueError, match="state of `whiten` was made for `other/kernel`"):
        whitening.update(grads, other, layer_stats=stats)


def test_bnp_and_whiten_of_one_layer_in_multi_steps():
    both = bnp_optax.in_zspace(optax.sgd(0.1), bnp_optax.compose(whiten(), bnp()))
    with pytest.raises(ValueError, match="`kernel` is preconditioned by `bnp` and by `whiten`"):
        bnp_optax.multi_steps(both, 2).init(CASES["dense"].params)
