"""What every transformation promises: to Optax, to JAX, and to the tools that keep its state."""

import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import bnp_optax
from bnp_optax import BNPState, LayerStats, bnp, bnp_precondition, in_zspace, precondition

N_STEPS = 3

READY_MADE: dict[str, Callable[[Any], Any]] = {
    "bnp_sgd": bnp_optax.bnp_sgd,
    "bnp_sgd_momentum": functools.partial(bnp_optax.bnp_sgd, momentum=0.9),
    "bnp_adam": bnp_optax.bnp_adam,
    "bnp_adamw": bnp_optax.bnp_adamw,
    "adam_l1": functools.partial(bnp_optax.adam_l1, l1=0.1),
}


def regularized_by_hand(strength: float) -> optax.GradientTransformation:
    """Gradient regularization of `bare_loss`, whose Hessian is 2 / size in each leaf."""

    def update(grads: Any, params: Any) -> Any:
        return jax.tree.map(lambda g: (1.0 + 4.0 * strength / g.size) * g, grads)

    return optax.stateless(update)


def thresholded(updates: Any, params: Any, threshold: Any) -> Any:
    """`updates` that end at the soft threshold of where they led, kernels only."""

    def end(path: Any, u: jax.Array, p: jax.Array, t: Any) -> jax.Array:
        is_kernel = p.ndim >= 2 and "bias" not in jax.tree_util.keystr(path)
        x = p + u
        return jnp.sign(x) * jnp.maximum(jnp.abs(x) - t, 0.0) - p if is_kernel else u

    return jax.tree.map_with_path(end, updates, params, threshold)


def sgd_l1_by_hand(learning_rate: float, l1: float) -> optax.GradientTransformation:
    def update(grads: Any, params: Any) -> Any:
        steps = optax.tree.scale(-learning_rate, grads)
        return thresholded(steps, params, optax.tree.full_like(params, l1 * learning_rate))

    return optax.stateless(update)


def adam_l1_by_hand(learning_rate: float, l1: float) -> optax.GradientTransformation:
    """Adam, and then the soft threshold at l1 * learning_rate * P_ii."""
    adam = optax.adam(learning_rate)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(grads, state, params)
        rest = 1.0 - 0.999 ** state[0].count
        threshold = jax.tree.map(
            lambda v: l1 * learning_rate / jnp.sqrt(jnp.sqrt(v / rest) + 1e-8), state[0].nu
        )
        return thresholded(updates, params, threshold), state

    return optax.GradientTransformation(adam.init, update)


def forward_regularization(strength: Any) -> optax.GradientTransformationExtraArgs:
    """With a distance that rounding does not swallow; on a quadratic any is exact."""
    return bnp_optax.gradient_regularization(strength, mode="forward", radius=0.5)


def regularization_in_z(strength: Any) -> optax.GradientTransformationExtraArgs:
    return bnp_optax.zspace_grad_reg(strength, bnp())


def sgd_l1(strength: Any = 0.5, learning_rate: Any = 0.1) -> optax.GradientTransformationExtraArgs:
    """`proximal_l1` in its place, last."""
    return optax.chain(optax.sgd(learning_rate), bnp_optax.proximal_l1(strength, learning_rate))


# Each transformation, and what it is where there is no layer to precondition.
TRANSFORMATIONS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "bnp_precondition": (bnp_precondition, optax.identity),
    "precondition": (lambda: precondition(bnp()), optax.identity),
    "in_zspace": (lambda: in_zspace(optax.adam(1e-3), bnp()), lambda: optax.adam(1e-3)),
    "zspace_weight_decay": (
        lambda: bnp_optax.zspace_weight_decay(0.01),
        lambda: optax.add_decayed_weights(0.01),
    ),
    "pspace_weight_decay": (
        lambda: bnp_optax.pspace_weight_decay(0.01),
        lambda: optax.add_decayed_weights(0.01),
    ),
    "bnp_sgd": (lambda: READY_MADE["bnp_sgd"](0.1), lambda: optax.sgd(0.1)),
    "bnp_sgd_momentum": (
        lambda: READY_MADE["bnp_sgd_momentum"](0.1),
        lambda: optax.sgd(0.1, momentum=0.9),
    ),
    "bnp_adam": (lambda: READY_MADE["bnp_adam"](1e-3), lambda: optax.adam(1e-3)),
    "bnp_adamw": (lambda: READY_MADE["bnp_adamw"](1e-3), lambda: optax.adamw(1e-3)),
    "gradient_regularization": (
        lambda: bnp_optax.gradient_regularization(0.1),
        lambda: regularized_by_hand(0.1),
    ),
    "gradient_regularization_forward": (
        lambda: forward_regularization(0.1),
        lambda: regularized_by_hand(0.1),
    ),
    "zspace_grad_reg": (lambda: regularization_in_z(0.1), lambda: regularized_by_hand(0.1)),
    "proximal_l1": (sgd_l1, lambda: sgd_l1_by_hand(0.1, 0.5)),
    "adam_l1": (lambda: READY_MADE["adam_l1"](0.1), lambda: adam_l1_by_hand(0.1, 0.1)),
    "precondition_rms": (
        lambda: precondition(bnp_optax.rms()),
        lambda: optax.scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True),
    ),
    "precondition_adagrad": (
        lambda: precondition(bnp_optax.adagrad()),
        optax.scale_by_rss,
    ),
}
# Those that take the Hessian from `grad_fn`.
REGULARIZING = ("gradient_regularization", "gradient_regularization_forward", "zspace_grad_reg")
# Those that look at each leaf alone, in a layer or not.
LEAFWISE = (
    "zspace_weight_decay",
    "pspace_weight_decay",
    "proximal_l1",
    "adam_l1",
    "precondition_rms",
    "precondition_adagrad",
)
# Those that precondition layers, from `layer_stats`.
PRECONDITIONING = [
    name
    for name in TRANSFORMATIONS
    if name not in LEAFWISE and not name.startswith("gradient_regularization")
]


def make(name: str) -> optax.GradientTransformationExtraArgs:
    return TRANSFORMATIONS[name][0]()


def counterpart(name: str) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(TRANSFORMATIONS[name][1]())


def descent(name: str) -> optax.GradientTransformationExtraArgs:
    """The transformation, followed by a step downhill where it does not take one."""
    tx = make(name)
    steps = (*READY_MADE, "in_zspace", "proximal_l1")
    return tx if name in steps else optax.chain(tx, optax.scale(-0.1))


class Net(nn.Module):
    """Convolutions and dense layers, with a bias and without; of few shapes, to compile fast."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.tanh(nn.Conv(3, (2, 2))(x))
        x = nn.tanh(nn.Conv(3, (2, 2), use_bias=False)(x))
        x = nn.tanh(nn.Dense(3, use_bias=False)(x.mean((1, 2))))
        return nn.Dense(3)(x)


def net_loss(params: Any, batch: jax.Array) -> jax.Array:
    return jnp.mean((Net().apply({"params": params}, batch) - 1.0) ** 2)


def bare_loss(params: Any, batch: jax.Array) -> jax.Array:
    return sum(jnp.mean((leaf - batch.mean()) ** 2) for leaf in jax.tree.leaves(params))


def filled(part: Any, whole: Any) -> Any:
    """`part`, with the leaves of `whole` where it has none, or a mask."""
    if isinstance(whole, dict):
        return {key: filled(part.get(key), leaf) for key, leaf in whole.items()}
    return whole if part is None or isinstance(part, optax.MaskedNode) else part


def cut(whole: Any, part: Any) -> Any:
    """Those leaves of `whole` that `part` has."""
    if isinstance(part, dict):
        return {key: cut(whole[key], leaf) for key, leaf in part.items()}
    return part if isinstance(part, optax.MaskedNode) else whole


class Problem(NamedTuple):
    """Parameters, batches, and the gradient and extra arguments of a step.

    The extra arguments are the layers' statistics, if there are layers, and `grad_fn`. Given a part
    of the parameters, that holds the others where they are.
    """

    params: Any
    batches: jax.Array
    evaluate: Callable[[Any, jax.Array], tuple[Any, dict[str, Any]]]
    steps: list[tuple[Any, dict[str, Any]]]


@functools.cache
def problem_of(kind: str) -> Problem:
    # Compiling is what takes time here: `evaluate` is compiled once, and transformations run
    # op by op except where a test is about `jax.jit`.
    batches = 2.0 + jax.random.normal(jax.random.key(0), (N_STEPS, 8, 2, 2, 3), jnp.float32)
    if kind == "net":
        params = Net().init(jax.random.key(1), batches[0])["params"]

        compiled = jax.jit(bnp_optax.value_and_grad(net_loss))
        gradient = jax.jit(jax.grad(net_loss))

        def evaluate(params: Any, batch: jax.Array) -> tuple[Any, dict[str, Any]]:
            def grad_fn(part: Any) -> Any:
                return cut(gradient(filled(part, params), batch), part)

            _, grads, stats = compiled(params, batch)
            return grads, {"layer_stats": stats, "grad_fn": grad_fn}
    else:
        array = jnp.array([0.5, -1.0, 2.0], jnp.float32)
        matrix = jnp.array([[1.0, -2.0], [0.5, 3.0]], jnp.float32)
        params = {"array": array, "tuple": (array, matrix)}[kind]

        gradient = jax.jit(jax.grad(bare_loss))

        def evaluate(params: Any, batch: jax.Array) -> tuple[Any, dict[str, Any]]:
            grad_fn = functools.partial(gradient, batch=batch)
            return grad_fn(params), {"grad_fn": grad_fn}

    steps = [evaluate(params, batch) for batch in batches]
    return Problem(params, batches, evaluate, steps)


@pytest.fixture(params=TRANSFORMATIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tx(name: str) -> optax.GradientTransformationExtraArgs:
    return make(name)


@pytest.fixture(params=["array", "tuple", "net"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return problem_of(request.param)


@pytest.fixture(params=["tuple", "net"])
def tree_problem(request: pytest.FixtureRequest) -> Problem:
    return problem_of(request.param)


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, two in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float64), np.asarray(two, np.float64), rtol=rtol, atol=atol
        )


def assert_same(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, rtol=0.0, atol=0.0)


def avals(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def run(tx: Any, problem: Problem, extra: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """Updates and state of `N_STEPS` updates, all at the same parameters."""
    state, all_updates = tx.init(problem.params), []
    for grads, given in problem.steps:
        updates, state = tx.update(grads, state, problem.params, **given, **(extra or {}))
        all_updates.append(updates)
    return all_updates, state


def bnp_states(state: Any) -> list[BNPState]:
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, BNPState))
    return [leaf for leaf in leaves if isinstance(leaf, BNPState)]


def seen(state: Any) -> set[float]:
    """How many batches the layers of `Net` have seen."""
    (found,) = bnp_states(state)
    return {float(layer["kernel"]) for layer in found.seen.values()}


# Alone.


def test_takes_extra_arguments(tx: Any) -> None:
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


@pytest.mark.parametrize("kind", ["array", "tuple"])
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
    plain = make("gradient_regularization") if name == "zspace_grad_reg" else counterpart(name)
    theirs, _ = run(plain, problem_of("net"))
    assert seen(state) == {N_STEPS}
    assert not np.allclose(ours[0]["Conv_0"]["kernel"], theirs[0]["Conv_0"]["kernel"], rtol=0.1)


def test_names_of_one_thing_agree() -> None:
    problem = problem_of("net")
    first = problem._replace(steps=problem.steps[:1])
    preconditioned = optax.tree.scale(-0.1, run(make("bnp_precondition"), first)[0])
    for name in ("bnp_sgd", "bnp_sgd_momentum"):
        assert_close(run(make(name), first)[0], preconditioned, rtol=1e-4)
    assert_same(run(make("precondition"), problem), run(make("bnp_precondition"), problem))
    assert_same(run(make("bnp_adam"), problem), run(make("in_zspace"), problem))


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


def test_unknown_extra_arguments_change_nothing(tx: Any, problem: Problem) -> None:
    unknown = {"value": jnp.ones(()), "unknown": "text"}
    assert_same(run(tx, problem, unknown), run(tx, problem))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_keeps_dtypes_and_state_through_cond(name: str, tree_problem: Problem, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        tx = make(name)
        (grads, extra), params = tree_problem.steps[0], tree_problem.params
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


def test_bfloat16_is_the_same_up_to_rounding(tx: Any) -> None:
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


def training_step(tx: Any, problem: Problem) -> Callable[..., Any]:
    def step(carry: tuple[Any, Any], batch: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        grads, extra = problem.evaluate(params, batch)
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    return step


def test_jitted_scan_over_training_steps(name: str, tree_problem: Problem) -> None:
    """Compiles once, gives its buffers back, keeps shapes and dtypes, and equals eager steps."""
    tx, n_traces = descent(name), 0
    step = training_step(tx, tree_problem)

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(carry: tuple[Any, Any], batches: jax.Array) -> tuple[Any, Any]:
        nonlocal n_traces
        n_traces += 1
        return jax.lax.scan(step, carry, batches)[0]

    start = expected = tree_problem.params, tx.init(tree_problem.params)
    carry = jax.tree.map(jnp.copy, start)
    for _ in range(2):
        given = jax.tree.leaves(carry)
        carry = epoch(carry, tree_problem.batches)
        assert all(leaf.is_deleted() for leaf in given)
        for batch in tree_problem.batches:
            expected, _ = step(expected, batch)
    assert n_traces == 1
    assert avals(carry) == avals(start)
    assert_close(carry, expected, rtol=1e-4, atol=1e-5)


def test_vmap_over_an_ensemble_equals_a_loop(tx: Any, tree_problem: Problem) -> None:
    members = [optax.tree.scale(1.0 + i, tree_problem.params) for i in range(N_STEPS)]
    ensemble = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

    def step(params: Any, batch: jax.Array) -> tuple[Any, Any]:
        grads, extra = tree_problem.evaluate(params, batch)
        return tx.update(grads, tx.init(params), params, **extra)

    together = jax.vmap(step)(ensemble, tree_problem.batches)
    for i, member in enumerate(members):
        alone = step(member, tree_problem.batches[i])
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-4, atol=1e-5)


# Inside the wrappers of Optax.


def test_chain_and_named_chain(tx: Any, problem: Problem) -> None:
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
            k: dataclasses.replace(s, bias=None) if s.bias and hidden(*s.bias.split("/")) else s
            for k, s in kept.items()
        }

    steps = [
        (without(grads, hidden), extra | {"layer_stats": prune(extra["layer_stats"])})
        for grads, extra in problem.steps
    ]
    return problem._replace(params=without(problem.params, hidden), steps=steps)


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
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


def test_partition_with_a_transformation_for_each_label(name: str) -> None:
    problem = problem_of("net")
    labels = {layer: layer.partition("_")[0] for layer in problem.params}
    parted = optax.partition({"Conv": make(name), "Dense": make(name)}, labels)
    updates, state = run(parted, problem)
    if name in REGULARIZING:  # Curvature between the parts is none of either's.
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


def preconditioned_by_adagrad(
    eps: Any, initial_accumulator_value: Any
) -> optax.GradientTransformationExtraArgs:
    return precondition(bnp_optax.adagrad(eps, initial_accumulator_value))


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
    "precondition_adagrad": (
        preconditioned_by_adagrad,
        {"eps": 1e-3, "initial_accumulator_value": 0.2},
    ),
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


def test_apply_if_finite_skips_a_nan_gradient(tx: Any, problem: Problem) -> None:
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


def test_multi_steps_waits_and_then_steps(tx: Any, problem: Problem) -> None:
    wrapped = optax.MultiSteps(tx, 2)
    twice = problem._replace(steps=2 * problem.steps[:1])
    with jax.disable_jit():
        (waiting, stepped), state = run(wrapped, twice)
    assert_same(waiting, optax.tree.zeros_like(waiting))
    assert_close(stepped, run(tx, problem)[0][0])
    assert bool(wrapped.has_updated(state))


def test_schedule_free_starts_with_the_step_it_wraps(name: str, tree_problem: Problem) -> None:
    tx = descent(name)
    wrapped = optax.contrib.schedule_free(tx, learning_rate=0.1)
    updates, state = run(wrapped, tree_problem)
    expected, inner = run(tx, tree_problem)
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


# Wrappers that lose the statistics: each of these facts is one that the user can be told.


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
    missed = r"Add it: .*grad_fn=" if name in REGULARIZING else "`layer_stats` was left out"
    with pytest.raises(ValueError, match=missed):
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

    extra = extra | {"value": value, "grad": grads}
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


@pytest.mark.parametrize("accumulate", [average_of_microbatches, optax_microbatch])
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


# What keeps and moves the state.


def test_map_params_finds_the_params_of_the_state(tx: Any, tree_problem: Problem) -> None:
    fresh = tx.init(tree_problem.params)
    used = run(tx, tree_problem)[1]
    ones = jax.tree.map(lambda _: 1.0, tree_problem.params)
    for state in (fresh, used):
        marked = optax.tree.map_params(tx, lambda x, rest: 0.0 * x + rest, state, ones)
        # Step counts are the only leaves that belong to no parameter.
        expected = jax.tree.map(
            lambda x: jnp.ones_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
        )
        assert_same(marked, expected)
        assert avals(marked) == avals(state)


def test_state_survives_pickle_and_flax_serialization(tx: Any, tree_problem: Problem) -> None:
    _, state = run(tx, tree_problem)
    assert_same(pickle.loads(pickle.dumps(state)), state)
    fresh = tx.init(tree_problem.params)
    as_dict = flax.serialization.to_state_dict(state)
    assert_same(flax.serialization.from_state_dict(fresh, as_dict), state)
    as_bytes = flax.serialization.to_bytes(state)
    assert_same(flax.serialization.from_bytes(fresh, as_bytes), state)


@pytest.mark.parametrize("name", [*READY_MADE, *REGULARIZING, *LEAFWISE])
def test_training_continues_from_an_orbax_checkpoint(name: str, tmp_path: Any) -> None:
    problem, tx = problem_of("net" if name in PRECONDITIONING else "tuple"), descent(name)

    def create() -> bnp_optax.TrainState:
        return bnp_optax.TrainState.create(apply_fn=Net().apply, params=problem.params, tx=tx)

    def proceed(state: bnp_optax.TrainState) -> bnp_optax.TrainState:
        for grads, extra in problem.steps:
            state = state.apply_gradients(grads=grads, **extra)
        return state

    state = proceed(create())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, create())
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert_same(jax.tree.leaves(restored), jax.tree.leaves(state))
    assert_same(jax.tree.leaves(proceed(restored)), jax.tree.leaves(proceed(state)))


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.last = nnx.Linear(3, 3, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jnp.tanh(self.first(x)))


def dense_stats(inputs: jax.Array, kernel: str, bias: str | None) -> LayerStats:
    mean, var = inputs.mean(0)[:, None], inputs.var(0)[:, None]
    count = jnp.float32(len(inputs))
    return LayerStats(mean, var, mean**2, count, kernel, bias, input_axes=(-2,), positions=1)


def nnx_steps(tx: Any, transform: Callable[..., Any]) -> tuple[Any, Any]:
    """Parameters after two steps of `nnx.Optimizer`, and after the same steps on a dict."""
    model = NNXNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = 2.0 + jax.random.normal(jax.random.key(0), (8, 3))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = tx.init(params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(optimizer))]

    def loss(params: Any) -> jax.Array:
        first, last = params["first"], params["last"]
        hidden = jnp.tanh(x @ first["kernel"] + first["bias"][None])
        return jnp.mean((hidden @ last["kernel"] - 1.0) ** 2)

    grad_fn = jax.grad(loss)

    @transform
    def step(model: NNXNet, optimizer: nnx.Optimizer) -> tuple[Any, Any]:
        stats = {
            "first/kernel": dense_stats(x, "first/kernel", "first/bias"),
            "last/kernel": dense_stats(jnp.tanh(model.first(x)), "last/kernel", None),
        }
        grads = nnx.grad(lambda model: jnp.mean((model(x) - 1.0) ** 2))(model)
        optimizer.update(model, grads, layer_stats=stats, grad_fn=grad_fn)
        return nnx.to_pure_dict(grads), stats

    for _ in range(2):
        grads, stats = step(model, optimizer)
        updates, state = tx.update(grads, state, params, layer_stats=stats, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
    assert shapes == [leaf.shape for leaf in jax.tree.leaves(nnx.state(optimizer))]
    return nnx.to_pure_dict(nnx.state(model, nnx.Param)), params


def test_nnx_optimizer_takes_layer_stats(name: str) -> None:
    assert_close(*nnx_steps(descent(name), lambda function: function), rtol=1e-4)


def test_nnx_optimizer_takes_layer_stats_under_jit() -> None:
    assert_close(*nnx_steps(bnp_optax.bnp_adam(1e-3), nnx.jit), rtol=1e-4)


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
TOOK = {
    "bnp_sgd": lambda: READY_MADE["bnp_sgd"](1e-3),
    "bnp_sgd_momentum": lambda: READY_MADE["bnp_sgd_momentum"](1e-3),
    "bnp_adam": lambda: READY_MADE["bnp_adam"](1e-2),
    "bnp_adamw": lambda: READY_MADE["bnp_adamw"](1e-2),
    "adam_l1": lambda: READY_MADE["adam_l1"](1e-2),
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


@pytest.mark.parametrize("target", STARTS)
@pytest.mark.parametrize("name", TOOK)
def test_converges(name: str, target: str) -> None:
    loss, start, n_steps = STARTS[target]
    tx, gradient = optax.with_extra_args_support(TOOK[name]()), jax.grad(loss)

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = tx.update(gradient(params), state, params, grad_fn=gradient)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def minimize(params: Any) -> Any:
        return jax.lax.scan(step, (params, tx.init(params)), length=n_steps)[0][0]

    assert_close(minimize(start), optax.tree.ones_like(start), rtol=3e-2, atol=0.0)
