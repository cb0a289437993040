"""What every transformation promises inside the wrappers of Optax."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from support.contract_problems import (
    PRECONDITIONING,
    READY_MADE,
    REGULARIZING,
    Problem,
    assert_close,
    assert_same,
    avals,
    bnp_states,
    descent,
    forward_regularization,
    make,
    on_every_problem,
    on_every_transformation,
    on_every_tree,
    problem_of,
    regularization_in_z,
    run,
    sgd_l1,
)

import bnp_optax
from bnp_optax import LayerStats, bnp, bnp_precondition, precondition


@on_every_problem
def test_chain_and_named_chain(name: str, kind: str) -> None:
    tx, problem = make(name), problem_of(kind)
    expected = optax.tree.scale(-0.5, run(tx, problem)[0])
    chained = optax.chain(optax.identity(), tx, optax.scale(-0.5))
    named = optax.named_chain(("tx", tx), ("scale", optax.scale(-0.5)))
    assert_close(run(chained, problem)[0], expected)
    assert_close(run(named, problem)[0], expected)


def without(tree: Any, hidden: Callable[[str, str], bool]) -> Any:
    """`tree`, of the structure of `Net`'s parameters, less the leaves that `hidden` names."""
    return {
        layer: {leaf: x for leaf, x in leaves.items() if not hidden(layer, leaf)}
        for layer, leaves in tree.items()
    }


HIDDEN = {
    "kernel": lambda layer, leaf: (layer, leaf) == ("Conv_0", "kernel"),
    "bias": lambda layer, leaf: (layer, leaf) == ("Dense_1", "bias"),
    "layer": lambda layer, leaf: layer == "Conv_0",
    "everything": lambda layer, leaf: True,
}


def part_of(problem: Problem, hidden: Callable[[str, str], bool]) -> Problem:
    """`problem`, of `Net`, less the leaves that `hidden` names, in its statistics too."""

    def prune(stats: dict[str, LayerStats]) -> dict[str, LayerStats]:
        kept = {k: s for k, s in stats.items() if not hidden(*k.split("/"))}
        return {
            k: dataclasses.replace(s, layer=dataclasses.replace(s.layer, bias=None))
            if s.layer.bias and hidden(*s.layer.bias.split("/"))
            else s
            for k, s in kept.items()
        }

    steps = [
        (without(grads, hidden), extra | {"layer_stats": prune(extra["layer_stats"])})
        for grads, extra in problem.steps
    ]
    return problem._replace(params=without(problem.params, hidden), steps=steps)


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
@on_every_transformation
def test_masked_is_the_same_on_a_tree_without_the_leaf(name: str, hidden: Any) -> None:
    problem = problem_of("net")
    mask = {
        layer: {leaf: not hidden(layer, leaf) for leaf in leaves}
        for layer, leaves in problem.params.items()
    }
    expected, _ = run(make(name), part_of(problem, hidden))
    updates, _ = run(optax.masked(make(name), mask), problem)
    assert_close([without(step, hidden) for step in updates], expected)
    for step, (grads, _) in zip(updates, problem.steps, strict=True):
        for layer, leaves in step.items():
            for leaf, update in leaves.items():
                assert not hidden(layer, leaf) or update is grads[layer][leaf]


@on_every_transformation
def test_partition_with_a_transformation_for_each_label(name: str) -> None:
    problem = problem_of("net")
    labels = {layer: layer.partition("_")[0] for layer in problem.params}
    parted = optax.partition({"Conv": make(name), "Dense": make(name)}, labels)
    updates, state = run(parted, problem)
    # Curvature between the parts is none of either's, and each has one q for its own layers.
    if name in REGULARIZING or name.startswith("bnp_sgd"):
        convs, _ = run(make(name), part_of(problem, lambda layer, leaf: labels[layer] != "Conv"))
        denses, _ = run(make(name), part_of(problem, lambda layer, leaf: labels[layer] != "Dense"))
        drop_empty = [
            {layer: conv[layer] or dense[layer] for layer in labels}
            for conv, dense in zip(convs, denses, strict=True)
        ]
        assert_close(updates, drop_empty)
    else:
        assert_close(updates, run(make(name), problem)[0])
    assert len(bnp_states(state)) == (2 if name in PRECONDITIONING else 0)


def preconditioned_by_rms(decay: Any, eps: Any) -> optax.GradientTransformationExtraArgs:
    return precondition(bnp_optax.rms(decay, eps))


def preconditioned_by_adagrad(eps: Any) -> optax.GradientTransformationExtraArgs:
    return precondition(bnp_optax.adagrad(eps))


INJECTED = {
    "bnp_precondition": (bnp_precondition, {"decay": 0.9, "eps_rel": 1e-3, "eps_abs": 1e-5}),
    "bnp_sgd": (bnp_optax.bnp_sgd, {"learning_rate": 0.1, "decay": 0.9}),
    "bnp_sgd_momentum": (bnp_optax.bnp_sgd, {"learning_rate": 0.1, "momentum": 0.9}),
    "bnp_adam": (bnp_optax.bnp_adam, {"learning_rate": 0.1, "b1": 0.8, "decay": 0.9}),
    "bnp_adamw": (bnp_optax.bnp_adamw, {"learning_rate": 0.1, "weight_decay": 0.1}),
    "zspace_weight_decay": (bnp_optax.zspace_weight_decay, {"weight_decay": 0.1}),
    "pspace_weight_decay": (bnp_optax.pspace_weight_decay, {"weight_decay": 0.1}),
    "gradient_regularization": (bnp_optax.gradient_regularization, {"strength": 0.1}),
    "gradient_regularization_forward": (
        functools.partial(bnp_optax.gradient_regularization, mode="forward"),
        {"strength": 0.1, "radius": 0.5},
    ),
    "zspace_grad_reg": (
        functools.partial(bnp_optax.zspace_grad_reg, preconditioner=bnp()),
        {"strength": 0.1},
    ),
    "proximal_l1": (bnp_optax.proximal_l1, {"strength": 0.5, "learning_rate": 0.1}),
    "adam_l1": (bnp_optax.adam_l1, {"learning_rate": 0.1, "l1": 0.1, "b1": 0.8, "b2": 0.99}),
    "precondition_rms": (preconditioned_by_rms, {"decay": 0.9, "eps": 1e-3}),
    "precondition_adagrad": (preconditioned_by_adagrad, {"eps": 0.1}),
}


@pytest.mark.parametrize("kind", ["tuple", "net"])
@pytest.mark.parametrize("injected", INJECTED)
def test_inject_hyperparams_changes_nothing(injected: str, kind: str) -> None:
    factory, options = INJECTED[injected]
    updates, state = run(optax.inject_hyperparams(factory)(**options), problem_of(kind))
    expected, inner = run(factory(**options), problem_of(kind))
    assert_close(updates, expected)
    assert_close(state.inner_state, inner)
    assert set(options) <= set(state.hyperparams)


@pytest.mark.parametrize("injected", INJECTED)
def test_injected_hyperparameters_may_be_set_and_traced(injected: str) -> None:
    factory, options = INJECTED[injected]
    problem = problem_of("net")
    tx = optax.inject_hyperparams(factory)(**options)
    grads, extra = problem.steps[0]

    def first_updates(hyperparams: dict[str, jax.Array]) -> Any:
        state = tx.init(problem.params)
        state = state._replace(hyperparams=state.hyperparams | hyperparams)
        return tx.update(grads, state, problem.params, **extra)[0]

    halved = {name: 0.5 * value for name, value in options.items()}
    updates = first_updates(jax.tree.map(jnp.float32, halved))
    expected, _ = run(factory(**halved), problem._replace(steps=problem.steps[:1]))
    assert_close(updates, expected[0])
    assert avals(jax.eval_shape(first_updates, halved)) == avals(updates)


SCHEDULES = {
    "bnp_sgd": ("learning_rate", "decay"),
    "bnp_adam": ("learning_rate", "decay"),
    "gradient_regularization": ("strength",),
    "adam_l1": ("learning_rate", "l1"),
}


@pytest.mark.parametrize("injected", SCHEDULES)
def test_injected_schedules_follow_the_count(injected: str) -> None:
    factory, _ = INJECTED[injected]
    problem = problem_of("net")
    schedules = {
        option: lambda count, i=i: 0.1 * (count + i + 1.0)
        for i, option in enumerate(SCHEDULES[injected])
    }
    tx = optax.inject_hyperparams(factory)(**schedules)
    state = tx.init(problem.params)
    for count, (grads, extra) in enumerate(problem.steps):
        _, state = tx.update(grads, state, problem.params, **extra)
        for i, option in enumerate(SCHEDULES[injected]):
            assert state.hyperparams[option] == pytest.approx(0.1 * (count + i + 1))


# Of one scalar, for which a schedule may stand.
SCALED = READY_MADE | {
    "adam_l1_by_l1": functools.partial(bnp_optax.adam_l1, 0.1),
    "gradient_regularization": bnp_optax.gradient_regularization,
    "gradient_regularization_forward": forward_regularization,
    "zspace_grad_reg": regularization_in_z,
    "proximal_l1": functools.partial(sgd_l1, learning_rate=0.1),
    "proximal_l1_by_learning_rate": sgd_l1,
    "zspace_weight_decay": bnp_optax.zspace_weight_decay,
    "pspace_weight_decay": bnp_optax.pspace_weight_decay,
}


@pytest.mark.parametrize("name", SCALED)
def test_a_constant_schedule_is_a_learning_rate(name: str) -> None:
    factory, problem = SCALED[name], problem_of("net")
    scheduled = factory(optax.constant_schedule(0.1))
    assert_close(run(scheduled, problem)[0], run(factory(0.1), problem)[0])


@on_every_problem
def test_apply_if_finite_skips_a_nan_gradient(name: str, kind: str) -> None:
    tx, problem = make(name), problem_of(kind)
    wrapped = optax.apply_if_finite(tx, max_consecutive_errors=3)
    first, second, third = problem.steps
    broken = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), second[0]), second[1]
    with jax.disable_jit():
        _, before = run(wrapped, problem._replace(steps=[first]))
        updates, after = run(wrapped, problem._replace(steps=[first, broken, third]))
    expected, _ = run(tx, problem._replace(steps=[first, third]))
    assert_same(updates[1], optax.tree.zeros_like(second[0]))
    assert_close([updates[0], updates[2]], expected)
    assert int(after.total_notfinite) == 1
    with jax.disable_jit():
        _, skipped = wrapped.update(broken[0], before, problem.params, **broken[1])
    assert_same(skipped.inner_state, before.inner_state)


@on_every_problem
def test_multi_steps_waits_and_then_steps(name: str, kind: str) -> None:
    tx, problem = make(name), problem_of(kind)
    wrapped = optax.MultiSteps(tx, 2)
    twice = problem._replace(steps=2 * problem.steps[:1])
    with jax.disable_jit():
        (waiting, stepped), state = run(wrapped, twice)
    assert_same(waiting, optax.tree.zeros_like(waiting))
    assert_close(stepped, run(tx, problem)[0][0])
    assert bool(wrapped.has_updated(state))


@on_every_tree
def test_schedule_free_starts_with_the_step_it_wraps(name: str, kind: str) -> None:
    problem = problem_of(kind)
    tx = descent(name)
    wrapped = optax.contrib.schedule_free(tx, learning_rate=0.1)
    updates, state = run(wrapped, problem)
    expected, inner = run(tx, problem)
    assert_close(updates[0], expected[0], rtol=1e-4)
    for one, two in zip(bnp_states(state), bnp_states(inner), strict=True):
        assert_close(one, two)


PASSING = {
    "selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=False),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: True),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: True),
    "with_extra_args_support": optax.with_extra_args_support,
    "ema": lambda tx: optax.chain(tx, optax.ema(0.9)),
    "mechanize": lambda tx: optax.contrib.mechanize(optax.chain(tx, optax.scale(-0.1))),
    "reduce_on_plateau": lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau()),
    "multi_steps_skipping": lambda tx: optax.MultiSteps(
        tx, 1, should_skip_update_fn=optax.skip_not_finite
    ),
}


@pytest.mark.parametrize("wrap", PASSING.values(), ids=PASSING)
def test_wrapper_passes_layer_stats_on(wrap: Any) -> None:
    problem = problem_of("net")
    with jax.disable_jit():
        _, state = run(wrap(bnp_precondition()), problem, {"value": jnp.ones(())})
    _, expected = run(bnp_precondition(), problem)
    (found,) = bnp_states(state)
    assert_close(found, expected)


@pytest.mark.parametrize("wrap", PASSING.values(), ids=PASSING)
def test_wrapper_passes_grad_fn_on(wrap: Any) -> None:
    tx = make("gradient_regularization")
    with jax.disable_jit():
        _, state = run(wrap(tx), problem_of("tuple"), {"value": jnp.ones(())})
    _, expected = run(tx, problem_of("tuple"))
    is_ours = lambda node: isinstance(node, type(expected))  # noqa: E731
    (found,) = filter(is_ours, jax.tree.leaves(state, is_leaf=is_ours))
    assert_same(found, expected)
