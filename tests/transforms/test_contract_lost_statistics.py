"""Wrappers of Optax that lose the statistics: facts that the user can be told."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from support.contract_problems import (
    N_STEPS,
    PRECONDITIONING,
    REGULARIZING,
    Problem,
    assert_close,
    bnp_states,
    make,
    net_loss,
    problem_of,
    run,
    seen,
)

import bnp_optax
from bnp_optax import bnp_precondition

LOSING = {
    "multi_steps_in_a_chain": lambda tx: optax.chain(optax.MultiSteps(tx, 2)),
    "multi_steps_transformation_in_a_chain": lambda tx: optax.chain(
        optax.MultiSteps(tx, 2).gradient_transformation()
    ),
    "galore": lambda tx: optax.contrib.galore(1e-3, rank=1, base_optimizer=tx),
    "plain_transformation_in_a_chain": lambda tx: optax.chain(
        optax.GradientTransformation(tx.init, tx.update)
    ),
}


@pytest.mark.parametrize("name", list(dict.fromkeys([*PRECONDITIONING, *REGULARIZING])))
@pytest.mark.parametrize("wrap", LOSING.values(), ids=LOSING)
def test_wrapper_that_drops_layer_stats_is_an_error(wrap: Any, name: str) -> None:
    problem = problem_of("net")
    wrapped = wrap(make(name))
    state = wrapped.init(problem.params)
    grads, extra = problem.steps[0]
    with pytest.raises(
        ValueError, match=r"`layer_stats` was left out|Gradient regularization needs"
    ):
        wrapped.update(grads, state, problem.params, **extra)


REFUSING = {
    "lookahead": lambda tx: optax.lookahead(tx, sync_period=2, slow_step_size=0.5),
    "sam": lambda tx: optax.contrib.sam(tx, optax.sgd(0.01)),
    "split_real_and_imaginary": optax.contrib.split_real_and_imaginary,
}


@pytest.mark.parametrize("wrap", REFUSING.values(), ids=REFUSING)
def test_wrapper_that_refuses_layer_stats_raises_type_error(wrap: Any) -> None:
    problem = problem_of("net")
    wrapped = wrap(bnp_optax.bnp_sgd(0.1))
    params = optax.LookaheadParams.init_synced(problem.params)
    params = params if wrap is REFUSING["lookahead"] else problem.params
    state = wrapped.init(params)
    grads, extra = problem.steps[0]
    with pytest.raises(TypeError, match="unexpected keyword argument 'layer_stats'"):
        wrapped.update(grads, state, params, **extra)


LINE_SEARCHES = {
    "backtracking": lambda: optax.scale_by_backtracking_linesearch(3),
    "zoom": lambda: optax.scale_by_zoom_linesearch(3),
}


@pytest.mark.parametrize("search", LINE_SEARCHES.values(), ids=LINE_SEARCHES)
def test_line_search_wants_a_value_fn_that_takes_layer_stats(search: Any) -> None:
    problem = problem_of("net")
    tx = optax.chain(bnp_optax.bnp_sgd(1.0), search())
    grads, extra = problem.steps[0]
    state = tx.init(problem.params)
    loss = functools.partial(net_loss, batch=problem.batches[0])
    value = loss(problem.params)

    def tolerant(params: Any, layer_stats: Any = None) -> jax.Array:
        del layer_stats
        return loss(params)

    extra = {"layer_stats": extra["layer_stats"], "value": value, "grad": grads}
    with pytest.raises(TypeError, match="layer_stats"):
        tx.update(grads, state, problem.params, value_fn=loss, **extra)
    updates, state = tx.update(grads, state, problem.params, value_fn=tolerant, **extra)
    assert loss(optax.apply_updates(problem.params, updates)) < value
    assert seen(state) == {1.0}


def test_multi_steps_in_a_chain_is_mended_by_saying_that_it_takes_extra_arguments() -> None:
    problem = problem_of("net")
    multi_steps = optax.MultiSteps(bnp_optax.bnp_sgd(0.1), 1)
    mended = optax.chain(
        optax.GradientTransformationExtraArgs(multi_steps.init, multi_steps.update)
    )
    with jax.disable_jit():
        updates, _ = run(mended, problem)
    assert_close(updates, run(bnp_optax.bnp_sgd(0.1), problem)[0])


@pytest.mark.parametrize("name", PRECONDITIONING)
def test_multi_steps_keeps_only_the_statistics_of_the_last_microbatch(name: str) -> None:
    problem = problem_of("net")
    wrapped = optax.MultiSteps(make(name), N_STEPS)
    with jax.disable_jit():
        updates, state = run(wrapped, problem)
    mean = jax.tree.map(lambda *g: sum(g) / N_STEPS, *[grads for grads, _ in problem.steps])
    expected, inner = make(name).update(
        mean, make(name).init(problem.params), problem.params, **problem.steps[-1][1]
    )
    assert_close(updates[-1], expected, rtol=1e-4)
    assert_close(bnp_states(state), bnp_states(inner))


def full_batch(problem: Problem) -> tuple[jax.Array, Any, Any]:
    batch = problem.batches.reshape(-1, *problem.batches.shape[2:])
    return jax.jit(bnp_optax.value_and_grad(net_loss))(problem.params, batch)


def average_of_microbatches(problem: Problem) -> tuple[jax.Array, Any, Any]:
    evaluate = jax.jit(bnp_optax.value_and_grad(net_loss))
    parts = [evaluate(problem.params, batch) for batch in problem.batches]
    return jax.tree.map(lambda *xs: sum(xs) / len(xs), *parts)


def optax_microbatch(problem: Problem) -> tuple[jax.Array, Any, Any]:
    evaluate = optax.microbatching.microbatch(
        bnp_optax.value_and_grad(net_loss),
        argnums=1,
        microbatch_size=problem.batches.shape[1],
        accumulator=optax.microbatching.AccumulationType.RUNNING_MEAN,
    )
    batch = problem.batches.reshape(-1, *problem.batches.shape[2:])
    return jax.jit(evaluate)(problem.params, batch)


needs_microbatching = pytest.mark.skipif(
    not hasattr(optax, "microbatching"), reason="this Optax has no microbatching"
)


@pytest.mark.parametrize(
    "accumulate",
    [average_of_microbatches, pytest.param(optax_microbatch, marks=needs_microbatching)],
)
def test_averaged_layer_stats_give_the_step_of_the_full_batch(accumulate: Any) -> None:
    problem = problem_of("net")
    n_microbatches, size = problem.batches.shape[:2]
    loss, grads, stats = full_batch(problem)
    mean_loss, mean_grads, mean_stats = accumulate(problem)
    assert_close((mean_loss, mean_grads), (loss, grads), rtol=1e-4)
    for layer, expected in stats.items():
        averaged = mean_stats[layer]
        assert_close(averaged.mean, expected.mean, rtol=1e-4)
        assert_close(averaged.total_variance, expected.total_variance, rtol=1e-4)
        assert float(averaged.batch_size) == size
    # The average of the counts is that of a microbatch: the size of the batch is for us to say.
    for tx in (
        bnp_precondition(batch_size=n_microbatches * size),
        bnp_optax.bnp_adam(1e-3, batch_size=n_microbatches * size),
    ):
        state = tx.init(problem.params)
        one = tx.update(grads, state, problem.params, layer_stats=stats)
        two = tx.update(mean_grads, state, problem.params, layer_stats=mean_stats)
        assert_close(two, one, rtol=1e-3, atol=1e-5)


def test_an_optimizer_in_z_inside_another_is_told_to_take_one():
    params = {"kernel": jnp.ones((3, 2))}

    def loss_fn(p):
        return jnp.mean((jnp.arange(6.0).reshape(2, 3) @ p["kernel"]) ** 2)

    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
    tx = bnp_optax.in_zspace(bnp_optax.bnp_adam(1e-3), bnp_optax.bnp())
    with pytest.raises(ValueError, match=r"left out.*take one `in_zspace`.*`bnp_optax\.compose`"):
        tx.update(grads, tx.init(params), params, layer_stats=stats)
    both = bnp_optax.compose(bnp_optax.bnp(), bnp_optax.rms())
    composed = bnp_optax.in_zspace(optax.sgd(1e-3), both)
    composed.update(grads, composed.init(params), params, layer_stats=stats)
