"""What every transformation promises, alone and under the transformations of JAX."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.contract_problems import (
    LEAFWISE,
    N_STEPS,
    PRECONDITIONING,
    READY_MADE,
    REGULARIZING,
    TRANSFORMATIONS,
    assert_close,
    assert_same,
    avals,
    bnp_states,
    counterpart,
    descent,
    forward_regularization,
    make,
    on_every_problem,
    on_every_transformation,
    on_every_tree,
    problem_of,
    run,
    seen,
    sgd_l1,
    training_step,
)

import bnp_optax
from bnp_optax import bnp, bnp_precondition, in_zspace, precondition

# Alone.


@on_every_transformation
def test_takes_extra_arguments(name: str) -> None:
    tx = make(name)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


@pytest.mark.parametrize("kind", ["array", "tuple"])
@on_every_transformation
def test_without_layers_is_its_optax_counterpart(name: str, kind: str) -> None:
    ours, _ = run(make(name), problem_of(kind))
    theirs, _ = run(counterpart(name), problem_of(kind))
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", LEAFWISE)
def test_leafwise_is_its_optax_counterpart_on_layers_too(name: str) -> None:
    ours, _ = run(make(name), problem_of("net"))
    assert_close(ours, run(counterpart(name), problem_of("net"))[0])


@pytest.mark.parametrize("name", PRECONDITIONING)
def test_with_layers_is_not_its_optax_counterpart(name: str) -> None:
    ours, state = run(make(name), problem_of("net"))
    plain = make("gradient_regularization") if name in REGULARIZING else counterpart(name)
    theirs, _ = run(plain, problem_of("net"))
    assert seen(state) == {N_STEPS}
    assert not np.allclose(ours[0]["Conv_0"]["kernel"], theirs[0]["Conv_0"]["kernel"], rtol=0.1)


def test_names_of_one_thing_agree() -> None:
    problem = problem_of("net")
    first = problem._replace(steps=problem.steps[:1])
    papers: dict[str, Any] = {"eps_rel": 1e-2, "eps_abs": 1e-4, "shrinkage": None}
    of_layers = papers | {"scale": True, "scale_bias": False}
    preconditioned = optax.tree.scale(-0.1, run(make("bnp_precondition"), first)[0])
    for momentum in (None, 0.9):
        sgd = bnp_optax.bnp_sgd(0.1, momentum, **of_layers)
        assert_close(run(sgd, first)[0], preconditioned, rtol=1e-4)
    assert_same(run(make("precondition"), problem), run(make("bnp_precondition"), problem))
    adam = bnp_optax.in_zspace(optax.adam(0.1), bnp())
    assert_same(run(bnp_optax.bnp_adam(0.1, **of_layers), problem), run(adam, problem))


def test_in_zspace_hands_on_the_extra_arguments_that_are_not_its_own() -> None:
    received = []

    def update_fn(
        updates: Any, state: Any, params: Any = None, *, grad_fn: Any, **extra: Any
    ) -> tuple[Any, Any]:
        received.append(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update_fn)
    run(in_zspace(inner, bnp()), problem_of("net"), {"value": 1.0, "key": "text"})
    assert received == N_STEPS * [{"value": 1.0, "key": "text"}]


@on_every_problem
def test_unknown_extra_arguments_change_nothing(name: str, kind: str) -> None:
    tx, problem = make(name), problem_of(kind)
    unknown = {"value": jnp.ones(()), "unknown": "text"}
    assert_same(run(tx, problem, unknown), run(tx, problem))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@on_every_tree
def test_keeps_dtypes_and_state_through_cond(name: str, kind: str, dtype: str) -> None:
    problem = problem_of(kind)
    with jax.enable_x64(dtype == "float64"):
        tx = make(name)
        (grads, extra), params = problem.steps[0], problem.params
        grads, params = optax.tree.cast((grads, params), dtype)
        state = tx.init(params)

        def step(flag: jax.Array) -> tuple[Any, Any]:
            return jax.lax.cond(
                flag,
                lambda: tx.update(grads, state, params, **extra),
                lambda: (optax.tree.zeros_like(grads), state),
            )

        updates, new_state = jax.eval_shape(step, True)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        assert avals(new_state) == avals(state)


# Gradients of `Net` are singular up to bfloat16's rounding, and which orthogonal matrix is nearest
# to a singular one is decided by rounding: `test_whiten.py` takes gradients of full rank.
@pytest.mark.parametrize("name", [name for name in TRANSFORMATIONS if name != "whiten_muon"])
def test_bfloat16_is_the_same_up_to_rounding(name: str) -> None:
    tx = make(name)
    problem = problem_of("net")
    steps = [(optax.tree.cast(grads, "bfloat16"), extra) for grads, extra in problem.steps]
    params = optax.tree.cast(problem.params, "bfloat16")
    updates, _ = run(tx, problem._replace(params=params, steps=steps))
    for step, expected in zip(updates, run(tx, problem)[0], strict=True):
        assert_close(step, expected, rtol=0.0, atol=0.02 * float(optax.tree.norm(expected)))


GIVEN_LAYERS = {
    "bnp_precondition": bnp_precondition,
    "bnp_adam": functools.partial(bnp_optax.bnp_adam, 0.1),
    "zspace_grad_reg": lambda layers: bnp_optax.zspace_grad_reg(0.1, bnp(layers=layers)),
}


@pytest.mark.parametrize("name", GIVEN_LAYERS)
def test_layers_settle_the_state_of_a_grouped_convolution(name: str) -> None:
    model, x = nn.Conv(4, (2, 2), feature_group_count=2), jnp.ones((8, 3, 3, 4))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]

    def loss_fn(params: Any) -> jax.Array:
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    tx = GIVEN_LAYERS[name](layers=bnp_optax.find_layers(loss_fn, params))

    def step(params: Any) -> tuple[Any, Any]:
        state = tx.init(params)
        _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
        extra = {"layer_stats": stats, "grad_fn": jax.grad(loss_fn)}
        return state, tx.update(grads, state, params, **extra)[1]

    before, after = jax.eval_shape(step, params)
    assert avals(after) == avals(before)
    (found,) = bnp_states(before)
    assert found.mean["kernel"].shape == (1, 1, 2, 4)


# Under the transformations of JAX.


@on_every_tree
def test_jitted_scan_over_training_steps(name: str, kind: str) -> None:
    """Compiles once, gives its buffers back, keeps shapes and dtypes, and equals eager steps."""
    problem = problem_of(kind)
    tx, n_traces = descent(name), 0
    step = training_step(tx, problem)

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(carry: tuple[Any, Any], batches: jax.Array) -> tuple[Any, Any]:
        nonlocal n_traces
        n_traces += 1
        return jax.lax.scan(step, carry, batches)[0]

    start = expected = problem.params, tx.init(problem.params)
    carry = jax.tree.map(jnp.copy, start)
    for _ in range(2):
        given = jax.tree.leaves(carry)
        carry = epoch(carry, problem.batches)
        assert all(leaf.is_deleted() for leaf in given)
        for batch in problem.batches:
            expected, _ = step(expected, batch)
    assert n_traces == 1
    assert avals(carry) == avals(start)
    assert_close(carry, expected, rtol=1e-4, atol=1e-5)


@on_every_tree
def test_vmap_over_an_ensemble_equals_a_loop(name: str, kind: str) -> None:
    tx, problem = make(name), problem_of(kind)
    members = [optax.tree.scale(1.0 + i, problem.params) for i in range(N_STEPS)]
    ensemble = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

    def step(params: Any, batch: jax.Array) -> tuple[Any, Any]:
        grads, extra = problem.evaluate(params, batch)
        return tx.update(grads, tx.init(params), params, **extra)

    together = jax.vmap(step)(ensemble, problem.batches)
    for i, member in enumerate(members):
        alone = step(member, problem.batches[i])
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-4, atol=1e-5)


# Optax's own battery: no layers, so that only the optimizer inside is left to get there.


def parabola(params: Any) -> jax.Array:
    return sum(jnp.sum((leaf - 1.0) ** 2) for leaf in jax.tree.leaves(params))


def rosenbrock(params: jax.Array) -> jax.Array:
    return (1.0 - params[0]) ** 2 + 100.0 * (params[1] - params[0] ** 2) ** 2


STARTS = {
    "parabola": (parabola, jnp.array([-1.0, 10.0, 1.0]), 3_000),
    "parabola_on_a_matrix": (parabola, jnp.array([[-1.0, 10.0], [1.0, 0.0]]), 3_000),
    "parabola_on_a_tuple": (parabola, (jnp.zeros(2), jnp.full((2, 2), 3.0)), 3_000),
    "rosenbrock": (rosenbrock, jnp.zeros(2), 30_000),
}
MINIMIZERS = {
    "bnp_sgd": lambda: READY_MADE["bnp_sgd"](1e-3),
    "bnp_sgd_momentum": lambda: READY_MADE["bnp_sgd_momentum"](1e-3),
    "bnp_adam": lambda: READY_MADE["bnp_adam"](1e-2),
    "bnp_adamw": lambda: READY_MADE["bnp_adamw"](1e-2),
    "adam_l1": lambda: bnp_optax.adam_l1(1e-2, 1e-3),
    "gradient_regularization": lambda: optax.chain(
        bnp_optax.gradient_regularization(1e-3), optax.adam(1e-2)
    ),
    "gradient_regularization_forward": lambda: optax.chain(
        forward_regularization(1e-3), optax.adam(1e-2)
    ),
    "zspace_grad_reg": lambda: optax.chain(
        bnp_optax.zspace_grad_reg(1e-3, bnp_optax.rms()), optax.adam(1e-2)
    ),
    "proximal_l1": lambda: sgd_l1(1e-3, 1e-3),
    "precondition_rms": lambda: optax.chain(precondition(bnp_optax.rms()), optax.scale(-1e-2)),
    "precondition_adagrad": lambda: optax.chain(
        precondition(bnp_optax.adagrad()), optax.scale(-1.0)
    ),
}


@pytest.mark.optimized
@pytest.mark.parametrize("target", STARTS)
@pytest.mark.parametrize("name", MINIMIZERS)
def test_converges(name: str, target: str) -> None:
    loss, start, n_steps = STARTS[target]
    tx, gradient = optax.with_extra_args_support(MINIMIZERS[name]()), jax.grad(loss)

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = tx.update(gradient(params), state, params, grad_fn=gradient)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def minimize(params: Any) -> Any:
        return jax.lax.scan(step, (params, tx.init(params)), length=n_steps)[0][0]

    assert_close(minimize(start), optax.tree.ones_like(start), rtol=3e-2, atol=0.0)
