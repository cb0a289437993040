"""`whiten`: when it decomposes, what holds its state, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.quick_jit import jit
from support.whiten_cases import (
    CASES,
    SEEDS,
    assert_close,
    draw,
    run,
    settled,
    trained,
)

import bnp_optax
from bnp_optax import bnp, whiten
from bnp_optax._explicit import replicated


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

    tx = make(0.01, refresh_every=1)
    parts = trained(case, value_and_grad, bnp_optax.multi_steps(tx, 4), jnp.split(x, 4) * 2)
    whole = trained(case, value_and_grad, tx, [x] * 2)
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


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("n_outputs", [4, 6])
def test_a_sharded_kernel_is_whitened(n_outputs, axis):
    mesh, whitening = explicit_mesh(), whiten(refresh_every=1)

    def apply(p, x):
        # FSDP: the loss gathers kernels.
        kernel, bias = jax.tree.map(replicated, (p["kernel"], p["bias"]))
        return x @ kernel + bias[None]

    case = dataclasses.replace(CASES["dense"], apply=apply, shape=(30, 6))
    params = {"kernel": draw(1, 6, n_outputs), "bias": draw(2, n_outputs)}
    want = whitening.operator(run(case, whitening, SEEDS, params=params))
    spec = [PartitionSpec("model", None), PartitionSpec(None, "model")][axis]
    specs = {"kernel": spec, "bias": PartitionSpec(*spec[1:])}
    with jax.set_mesh(mesh):
        sharded = {n: jax.device_put(p, NamedSharding(mesh, specs[n])) for n, p in params.items()}
        P = whitening.operator(run(case, whitening, SEEDS, params=sharded))
        for what in ("mv", "transpose", "solve", "gram"):
            got, expected = getattr(P, what)(sharded), getattr(want, what)(params)
            assert jax.typeof(got["kernel"]).sharding.spec == spec
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-4, 1e-5), got, expected)


def test_state_sharding_replicates_it():
    specs = {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")}
    found = bnp_optax.state_sharding(bnp_optax.whiten_adam(), CASES["dense"].params, specs)
    assert set(jax.tree.leaves(found.preconditioner)) == {PartitionSpec()}
    assert found.inner[0].mu == specs


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
    both = optax.chain(bnp_optax.precondition(whiten()), bnp_optax.precondition(bnp()))
    with pytest.raises(ValueError, match="`kernel` is preconditioned by `bnp` and by `whiten`"):
        bnp_optax.multi_steps(both, 2).init(CASES["dense"].params)
