"""Bad input: what the user gets, and that the message says what to do."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax import LayerStats, bnp, bnp_precondition, in_zspace


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2)(nn.tanh(nn.Dense(4)(x)))


class Reparametrized(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2)(nn.tanh(nn.WeightNorm(nn.Dense(4, name="hidden"))(x)))


class Step(NamedTuple):
    """What a training step has in its hands."""

    loss_fn: Callable[[Any], jax.Array]
    params: Any
    grads: Any
    stats: dict[str, LayerStats]

    def update(self, tx: Any, **extra: Any) -> Any:
        return tx.update(self.grads, tx.init(self.params), self.params, **extra)[0]


def step_of(model: nn.Module) -> Step:
    x = jax.random.normal(jax.random.key(1), (8, 3))
    params = model.init(jax.random.key(0), x)["params"]

    def loss_fn(params: Any) -> jax.Array:
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    _, grads, stats = jax.jit(bnp_optax.value_and_grad(loss_fn))(params)
    return Step(loss_fn, params, grads, stats)


@pytest.fixture(scope="module")
def step() -> Step:
    return step_of(Net())


@pytest.fixture(scope="module")
def reparametrized() -> Step:
    return step_of(Reparametrized())


FIRST, SECOND = "Dense_0/kernel", "Dense_1/kernel"  # (4, 2) and (3, 4): Flax names the outer first

FACTORIES = {
    "bnp_precondition": bnp_precondition,
    "in_zspace": lambda **options: in_zspace(optax.adam(1e-3), bnp(**options)),
    "bnp_sgd": lambda **options: bnp_optax.bnp_sgd(0.1, **options),
    "bnp_sgd_momentum": lambda **options: bnp_optax.bnp_sgd(0.1, momentum=0.9, **options),
    "bnp_adam": lambda **options: bnp_optax.bnp_adam(1e-3, **options),
    "bnp_adamw": lambda **options: bnp_optax.bnp_adamw(1e-3, **options),
}


@pytest.fixture(params=FACTORIES)
def factory(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return FACTORIES[request.param]


def says(*parts: str) -> str:
    """A pattern for `parts` in this order, whatever is between them."""
    return "(?s)" + ".*".join(map(re.escape, parts))


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, two in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert jnp.result_type(one) == jnp.result_type(two)
        np.testing.assert_array_equal(one, two)


# Statistics.


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


def test_layer_stats_for_a_leaf_that_the_updates_have_not(step: Step, factory: Any) -> None:
    pattern = says(
        "`layer_stats` has `elsewhere/kernel`, which the updates have not",
        f"their leaves are `Dense_0/bias`, `{FIRST}`",
        "Capture and optimize the same tree",
    )
    with pytest.raises(ValueError, match=pattern):
        step.update(factory(), layer_stats=step.stats | {"elsewhere/kernel": step.stats[FIRST]})


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
    for kept, before in zip(after, state, strict=True):
        assert_same(kept["Dense_0"], before["Dense_0"])
    assert float(after.seen["Dense_1"]["kernel"]) == 2.0
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
def test_option_out_of_range(factory: Any, option: str, value: Any, accepted: str) -> None:
    with pytest.raises(ValueError, match=says(f"`{option}` {accepted}, got {value}")):
        factory(**{option: value})


@pytest.mark.parametrize("value", ["rows", None])
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


# Capture.


@pytest.mark.parametrize("value", ["torch", None])
def test_capture_of_no_known_kind(step: Step, value: Any) -> None:
    with pytest.raises(
        ValueError, match=says("`capture` must be one of 'auto', 'linen', 'jaxpr'", "got")
    ):
        bnp_optax.value_and_grad(step.loss_fn, capture=value)


def squares(params: Any) -> jax.Array:
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("params", "found"),
    [
        ({"w": jnp.ones((3, 3))}, "no leaf is named `kernel`"),
        ({"d": {"kernel": jnp.ones((3, 3))}}, "`d/kernel`: no known layer class uses it"),
    ],
)
def test_loss_that_runs_no_linen_layer(params: Any, found: str) -> None:
    pattern = says(
        "runs no Linen layer", found, "with the `params` that it is given", "`capture='jaxpr'`"
    )
    with pytest.raises(ValueError, match=pattern):
        bnp_optax.value_and_grad(squares, capture="linen")(params)


@pytest.mark.parametrize("name", ["w", "kernel"])
def test_loss_without_a_product(name: str) -> None:
    pattern = says(
        "The loss multiplies no inputs with a parameter",
        f"`{name}`: no product with inputs takes it as it is, but `integer_pow`",
        "from the `params` that it is given",
        "`jax.value_and_grad` if there is nothing to precondition",
    )
    with pytest.raises(ValueError, match=pattern):
        bnp_optax.value_and_grad(squares)({name: jnp.ones((3, 3))})


def test_loss_without_parameters() -> None:
    with pytest.raises(ValueError, match="there are no parameters"):
        bnp_optax.value_and_grad(lambda params, x: jnp.sum(x))({}, jnp.ones(3))


def test_loss_that_ignores_the_params_it_is_given(step: Step) -> None:
    pattern = says("multiplies no inputs", f"`{FIRST}`: the loss does not depend on it")
    with pytest.raises(ValueError, match=pattern):
        bnp_optax.value_and_grad(lambda params: step.loss_fn(step.params))(step.params)


def test_value_and_grad_with_layers_that_params_have_not(step: Step) -> None:
    layers = bnp_optax.find_layers(step.loss_fn, step.params)
    pattern = says(
        f"`layers` has `{SECOND}` of shape (3, 4), but `params` has no such leaf",
        f"The kernels of `params` are `{FIRST}`",
        "Call `find_layers` on these `params`",
    )
    with pytest.raises(ValueError, match=pattern):
        bnp_optax.value_and_grad(step.loss_fn, layers=layers)({"Dense_0": step.params["Dense_0"]})


def test_value_and_grad_with_layers_of_another_shape(step: Step) -> None:
    layers = bnp_optax.find_layers(step.loss_fn, step.params)
    layers[FIRST] = dataclasses.replace(layers[FIRST], kernel_shape=(5, 2), stats_shape=(5, 1))
    pattern = says(f"`layers` has `{FIRST}` of shape (5, 2), but `params` has it with shape (4, 2)")
    with pytest.raises(ValueError, match=pattern):
        bnp_optax.value_and_grad(step.loss_fn, layers=layers)(step.params)


# Layers.


def test_layers_that_params_have_not(step: Step, factory: Any) -> None:
    layers = bnp_optax.find_layers(step.loss_fn, step.params)
    pattern = says(
        f"`layers` has `{SECOND}`, which the parameters have not",
        f"their leaves are `Dense_0/bias`, `{FIRST}`",
        "Call `find_layers` on the `params` that the optimizer gets",
    )
    with pytest.raises(ValueError, match=pattern):
        factory(layers=layers).init({"Dense_0": step.params["Dense_0"]})


def test_layers_of_another_shape(step: Step, factory: Any) -> None:
    layers = bnp_optax.find_layers(step.loss_fn, step.params)
    layers[FIRST] = dataclasses.replace(layers[FIRST], kernel_shape=(5, 2), stats_shape=(5, 1))
    with pytest.raises(ValueError, match=says(f"`{FIRST}`", "(5, 2)", "(4, 2)", "`find_layers`")):
        factory(layers=layers).init(step.params)


def test_layer_that_is_not_covered(reparametrized: Step, factory: Any) -> None:
    step = reparametrized
    summary = bnp_optax.summarize(step.loss_fn, step.params)
    assert summary.uncovered["hidden/kernel"] == "its kernel is reparametrized by `WeightNorm`"
    pattern = says(
        "`hidden/kernel` is to be preconditioned",
        "has none for it, but `Dense_0/kernel`",
        "bnp_optax.summarize(loss_fn, params, ...)",
        "to leave it as it is, pass `layers=bnp_optax.find_layers(loss_fn, params, ...)`",
    )
    with pytest.raises(ValueError, match=pattern):
        step.update(factory(), layer_stats=step.stats)
    layers = bnp_optax.find_layers(step.loss_fn, step.params)
    with_layers = step.update(factory(layers=layers), layer_stats=step.stats)
    assert jax.tree.structure(with_layers) == jax.tree.structure(step.grads)


def test_layer_that_is_not_covered_is_left_as_it_is(reparametrized: Step) -> None:
    step = reparametrized
    layers = bnp_optax.find_layers(step.loss_fn, step.params)
    updates = step.update(bnp_precondition(layers=layers), layer_stats=step.stats)
    assert_same(updates["hidden"], step.grads["hidden"])
    assert not jnp.allclose(updates["Dense_0"]["kernel"], step.grads["Dense_0"]["kernel"])


# Leaves.


def test_complex_kernel(factory: Any) -> None:
    params = {"d": {"kernel": jnp.ones((2, 2), jnp.complex64)}}
    pattern = says("`d/kernel` is complex (complex64)", "`optax.masked` or `layers=`")
    with pytest.raises(ValueError, match=pattern):
        factory().init(params)


def test_complex_kernel_is_not_covered() -> None:
    model, x = nn.Dense(2, param_dtype=jnp.complex64), jnp.ones((4, 3))
    params = {"kernel": jnp.ones((3, 2), jnp.complex64), "bias": jnp.zeros(2, jnp.complex64)}

    def loss_fn(params: Any) -> jax.Array:
        return jnp.mean(jnp.abs(model.apply({"params": params}, x)) ** 2)

    assert "complex" in bnp_optax.summarize(loss_fn, params).uncovered["kernel"]


@pytest.mark.parametrize("layers", [None, {}])
def test_leaves_that_are_no_kernel_pass_through(factory: Any, layers: Any) -> None:
    tree = {
        "integer": {"kernel": jnp.arange(4).reshape(2, 2)},
        "boolean": jnp.array([True, False]),
        "complex": jnp.ones(2, jnp.complex64),
        "vector": {"kernel": jnp.ones(3), "bias": jnp.ones(3)},
        "frozen": {"kernel": None, "bias": None},
        "empty": {},
    }
    in_z = bnp(layers=layers)
    state = in_z.init(tree)
    for function in (in_z.apply, in_z.apply_transpose, in_z.solve):
        assert_same(function(state, tree), tree)
    assert_same(in_z.update(tree, state, tree), state)
    tx = bnp_precondition(layers=layers)
    assert_same(tx.update(tree, tx.init(tree), tree)[0], tree)
    # Whatever the optimizer in z makes of them, it is what it makes of them alone.
    floating = {key: tree[key] for key in ("complex", "vector", "frozen", "empty")}
    start = factory(layers=layers).init(floating)
    updates, _ = factory(layers=layers).update(floating, start, floating)
    assert jax.tree.structure(updates) == jax.tree.structure(floating)
    assert updates["frozen"] == {"kernel": None, "bias": None}


@pytest.mark.parametrize("tree", [{}, (), [{}, None]])
def test_empty_trees_pass_through(factory: Any, tree: Any) -> None:
    tx = factory()
    updates, _ = tx.update(tree, tx.init(tree), tree)
    assert updates == tree


@pytest.mark.parametrize("name", ["zspace_weight_decay", "pspace_weight_decay"])
def test_weight_decay_leaves_integers_alone(name: str) -> None:
    tx = getattr(bnp_optax, name)(0.5)
    params = {"n": jnp.array([2]), "w": jnp.array([2.0]), "none": None, "number": 2.0}
    zeros = {"n": jnp.array([0]), "w": jnp.array([0.0]), "none": None, "number": 0.0}
    updates, _ = tx.update(zeros, tx.init(params), params)
    expected = {"n": jnp.array([0]), "w": jnp.array([1.0]), "none": None, "number": 1.0}
    assert_same(updates, expected)


@pytest.mark.parametrize("frozen", [None, {"kernel": None, "bias": None}])
def test_frozen_layer_may_have_statistics(step: Step, factory: Any, frozen: Any) -> None:
    def freeze(tree: Any) -> Any:
        return tree | {"Dense_0": frozen}

    partial = step._replace(params=freeze(step.params), grads=freeze(step.grads))
    updates = partial.update(factory(), layer_stats=step.stats)
    whole = step.update(factory(), layer_stats=step.stats)
    assert updates["Dense_0"] == frozen
    for one, two in zip(
        jax.tree.leaves(updates["Dense_1"]), jax.tree.leaves(whole["Dense_1"]), strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_dead_inputs_and_zero_gradients_give_finite_updates(step: Step, factory: Any) -> None:
    dead = jax.tree.map(jnp.zeros_like, step.stats)
    dead = {
        name: dataclasses.replace(stats, count=jnp.float32(8.0)) for name, stats in dead.items()
    }
    still = step._replace(grads=optax.tree.zeros_like(step.grads))
    tx = factory(decay=0.0)
    for problem in (step, still):
        updates = problem.update(tx, layer_stats=dead)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
