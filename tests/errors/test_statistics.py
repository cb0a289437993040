"""Bad statistics and options: what the user gets, and that the message says what to do."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.error_cases import (
    FIRST,
    SECOND,
    Net,
    Step,
    assert_same,
    for_each_factory,
    says,
    step_of,
)

import bnp_optax
from bnp_optax import LayerStats, bnp, bnp_precondition, in_zspace


@pytest.fixture(scope="module")
def step() -> Step:
    return step_of(Net())


# Statistics.


@for_each_factory
def test_layer_stats_left_out(step: Step, factory: Any) -> None:
    pattern = says(
        "`layer_stats` was left out",
        f"`{FIRST}`, `{SECOND}`",
        "bnp_optax.value_and_grad(loss_fn)",
        "tx.update(grads, state, params, layer_stats=stats)",
        "`layer_stats=None` reuses",
    )
    with pytest.raises(ValueError, match=pattern):
        step.update(factory())


def test_layer_stats_of_none_reuse_the_running_ones(step: Step) -> None:
    # P = I before the first statistics.
    assert_same(step.update(bnp_precondition(), layer_stats=None), step.grads)


@pytest.mark.parametrize("jit", [False, True])
@for_each_factory
def test_layer_stats_without_a_covered_layer(step: Step, factory: Any, jit: bool) -> None:
    update = jax.jit(step.update, static_argnums=0) if jit else step.update
    pattern = says(
        f"`{SECOND}` is to be preconditioned",
        f"has none for it, but `{FIRST}`",
        "bnp_optax.summarize(loss_fn, params, ...)",
        "`layers=bnp_optax.find_layers(loss_fn, params, ...)`",
    )
    with pytest.raises(ValueError, match=pattern):
        update(factory(), layer_stats={FIRST: step.stats[FIRST]})


def test_layer_stats_for_no_layer_at_all(step: Step) -> None:
    with pytest.raises(ValueError, match=says(f"`{FIRST}` is to be", "has none for it", "none")):
        step.update(bnp_precondition(), layer_stats={})


def test_layer_stats_with_something_else_for_a_layer(step: Step) -> None:
    with pytest.raises(ValueError, match=says(f"`{FIRST}`", "needs `LayerStats`", "float")):
        step.update(bnp_precondition(), layer_stats=step.stats | {FIRST: 1.0})


@pytest.mark.parametrize("kind", [list, tuple, "LayerStats", "result"])
@for_each_factory
def test_layer_stats_that_are_no_dict(step: Step, factory: Any, kind: Any) -> None:
    stats = {
        "LayerStats": step.stats[FIRST],
        "result": (jnp.ones(()), step.grads, step.stats),
        list: list(step.stats.values()),
        tuple: tuple(step.stats),
    }[kind]
    pattern = says(
        "`layer_stats` must be a dict of `LayerStats`",
        f"got {type(stats).__name__}",
        "loss, grads, stats = bnp_optax.value_and_grad",
    )
    with pytest.raises(ValueError, match=pattern):
        step.update(factory(), layer_stats=stats)


def of_another_layer(stats: dict[str, LayerStats]) -> dict[str, LayerStats]:
    return {FIRST: stats[SECOND], SECOND: stats[FIRST]}


def with_an_extra_axis(stats: dict[str, LayerStats]) -> dict[str, LayerStats]:
    return jax.tree.map(lambda x: jnp.stack([x, x]), stats)


def with_another_variance(stats: dict[str, LayerStats]) -> dict[str, LayerStats]:
    return stats | {FIRST: dataclasses.replace(stats[FIRST], var=jnp.ones((1, 1)))}


@pytest.mark.parametrize(
    ("spoil", "came"),
    [
        (of_another_layer, "mean (3, 1), var (3, 1), sq_mean (3, 1)"),
        (with_an_extra_axis, "mean (2, 4, 1), var (2, 4, 1), sq_mean (2, 4, 1)"),
        (with_another_variance, "mean (4, 1), var (1, 1), sq_mean (4, 1)"),
    ],
)
@for_each_factory
def test_layer_stats_whose_shapes_do_not_fit(
    step: Step, factory: Any, spoil: Any, came: str
) -> None:
    pattern = says(
        f"The statistics of `{FIRST}`",
        came,
        "expected one shape with 2 axes that broadcasts against the kernel's (4, 2)",
        "Capture them with the parameters that are optimized",
    )
    with pytest.raises(ValueError, match=pattern):
        step.update(factory(), layer_stats=spoil(step.stats))


@for_each_factory
def test_layer_stats_for_a_leaf_that_the_updates_have_not(step: Step, factory: Any) -> None:
    pattern = says(
        "`layer_stats` has `elsewhere/kernel`, which the updates have not",
        f"their leaves are `Dense_0/bias`, `{FIRST}`",
        "Capture and optimize the same tree",
    )
    with pytest.raises(ValueError, match=pattern):
        step.update(factory(), layer_stats=step.stats | {"elsewhere/kernel": step.stats[FIRST]})


@for_each_factory
def test_flatten_hides_the_layers(step: Step, factory: Any) -> None:
    pattern = says(f"`{FIRST}`", "which the updates have not", "`optax.flatten`")
    with pytest.raises(ValueError, match=pattern):
        step.update(optax.flatten(factory()), layer_stats=step.stats)


def test_layer_stats_for_a_leaf_that_is_no_kernel(step: Step) -> None:
    pattern = says(
        "`layer_stats` has `Dense_0/bias`, which is not named `kernel`",
        "`layers=bnp_optax.find_layers(loss_fn, params, ...)`",
    )
    with pytest.raises(ValueError, match=pattern):
        step.update(
            bnp_precondition(), layer_stats=step.stats | {"Dense_0/bias": step.stats[FIRST]}
        )


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("field", ["mean", "var", "sq_mean", "count"])
def test_statistics_that_are_not_finite_do_not_enter(step: Step, field: str, value: float) -> None:
    tx = bnp_precondition()
    _, state = tx.update(step.grads, tx.init(step.params), step.params, layer_stats=step.stats)
    broken = dataclasses.replace(
        step.stats[FIRST], **{field: jnp.full_like(getattr(step.stats[FIRST], field), value)}
    )
    updates, after = tx.update(
        step.grads, state, step.params, layer_stats=step.stats | {FIRST: broken}
    )
    assert_same(after.moments["Dense_0"], state.moments["Dense_0"])
    counted = [numbers[1:3].tolist() for numbers in jax.tree.leaves(after.numbers)]
    assert counted == [[1, 1], [2, 0]]
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


# Hyper-parameters.

FRACTION = "must lie in [0, 1)"
NON_NEGATIVE = "must be finite and >= 0"
POSITIVE = "must be finite and > 0"


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("decay", 1.0, FRACTION),
        ("decay", 1.5, FRACTION),
        ("decay", -0.1, FRACTION),
        ("decay", float("nan"), FRACTION),
        ("decay", np.float32(1.5), FRACTION),
        ("eps_rel", -1e-3, NON_NEGATIVE),
        ("eps_rel", float("inf"), NON_NEGATIVE),
        ("eps_abs", -1e-3, NON_NEGATIVE),
        ("eps_abs", float("nan"), NON_NEGATIVE),
        ("batch_size", 0, POSITIVE),
        ("batch_size", -8, POSITIVE),
    ],
)
@for_each_factory
def test_option_out_of_range(factory: Any, option: str, value: Any, accepted: str) -> None:
    with pytest.raises(ValueError, match=says(f"`{option}` {accepted}, got {value}")):
        factory(**{option: value})


@pytest.mark.parametrize("value", ["rows", None])
@for_each_factory
def test_variance_of_no_known_kind(factory: Any, value: Any) -> None:
    pattern = says("`variance` must be one of 'auto', 'batch', 'running'; got", repr(value))
    with pytest.raises(ValueError, match=pattern):
        factory(variance=value)


@pytest.mark.parametrize(
    "make",
    [
        bnp_optax.zspace_weight_decay,
        bnp_optax.pspace_weight_decay,
        lambda value: bnp_optax.bnp_adamw(1e-3, weight_decay=value),
    ],
    ids=["zspace", "pspace", "bnp_adamw"],
)
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_weight_decay_out_of_range(make: Any, value: float) -> None:
    with pytest.raises(ValueError, match=says(f"`weight_decay` {NON_NEGATIVE}, got {value}")):
        make(value)


@pytest.mark.parametrize(
    ("make", "option", "value", "accepted"),
    [
        (bnp_optax.bnp_sgd, "learning_rate", -0.1, "finite and >= 0, got -0.1"),
        (bnp_optax.bnp_adam, "learning_rate", float("nan"), "finite and >= 0, got nan"),
        (bnp_optax.bnp_adamw, "learning_rate", -1, "finite and >= 0, got -1"),
        (bnp_optax.bnp_sgd, "momentum", 1.5, r"lie in [0, 1), got 1.5"),
        (bnp_optax.bnp_adam, "b1", 2.0, r"lie in [0, 1), got 2.0"),
        (bnp_optax.bnp_adamw, "b2", 1, r"lie in [0, 1), got 1"),
        (bnp_optax.bnp_adam, "eps", -1e-8, "finite and >= 0, got -1e-08"),
    ],
)
def test_hyper_parameter_out_of_range(make: Any, option: str, value: Any, accepted: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"`{option}` must ") + ".*") as caught:
        make(**({"learning_rate": 0.1} | {option: value}))
    assert accepted in str(caught.value)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: bnp_optax.precondition(bnp), "`bnp`"),
        (lambda: in_zspace(bnp(), optax.adam(1e-3)), "`GradientTransformationExtraArgs`"),
    ],
)
def test_something_else_than_a_preconditioner(make: Callable[[], Any], got: str) -> None:
    expected = f"`preconditioner` must be a `Preconditioner`, such as `bnp()`; got {got}."
    with pytest.raises(ValueError, match=re.escape(expected)):
        make()


@pytest.mark.parametrize("option", ["decay", "eps_rel", "eps_abs", "batch_size"])
def test_traced_options_are_not_looked_at(step: Step, option: str) -> None:
    def update(value: jax.Array) -> Any:
        return step.update(bnp_precondition(**{option: value}), layer_stats=step.stats)

    assert_same(jax.eval_shape(update, 0.5), jax.eval_shape(lambda: step.grads))


@pytest.mark.parametrize("name", ["zspace_weight_decay", "pspace_weight_decay"])
def test_a_traced_weight_decay_is_not_looked_at(step: Step, name: str) -> None:
    def update(value: jax.Array) -> Any:
        return step.update(getattr(bnp_optax, name)(value))

    assert_same(jax.eval_shape(update, -0.5), jax.eval_shape(lambda: step.grads))


@pytest.mark.parametrize("name", ["zspace_weight_decay", "pspace_weight_decay"])
def test_weight_decay_needs_params(step: Step, name: str) -> None:
    tx = getattr(bnp_optax, name)(0.1)
    with pytest.raises(ValueError, match=says("not passing `params` when calling `update`")):
        tx.update(step.grads, tx.init(step.params))
