"""Bad losses, layers and leaves: what the user gets, and that the message says what to do."""

import dataclasses
from typing import Any

import flax.linen as nn
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
from bnp_optax import bnp, bnp_precondition


class Reparametrized(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2)(nn.tanh(nn.WeightNorm(nn.Dense(4, name="hidden"))(x)))


@pytest.fixture(scope="module")
def step() -> Step:
    return step_of(Net())


@pytest.fixture(scope="module")
def reparametrized() -> Step:
    return step_of(Reparametrized())


# Capture.


def squares(params: Any) -> jax.Array:
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


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
    layers[FIRST] = dataclasses.replace(layers[FIRST], kernel_shape=(5, 2))
    pattern = says(f"`layers` has `{FIRST}` of shape (5, 2), but `params` has it with shape (4, 2)")
    with pytest.raises(ValueError, match=pattern):
        bnp_optax.value_and_grad(step.loss_fn, layers=layers)(step.params)


# Layers.


@for_each_factory
def test_layers_that_params_have_not(step: Step, factory: Any) -> None:
    layers = bnp_optax.find_layers(step.loss_fn, step.params)
    pattern = says(
        f"`layers` has `{SECOND}`, which the parameters have not",
        f"their leaves are `Dense_0/bias`, `{FIRST}`",
        "Call `find_layers` on the `params` that the optimizer gets",
    )
    with pytest.raises(ValueError, match=pattern):
        factory(layers=layers).init({"Dense_0": step.params["Dense_0"]})


@for_each_factory
def test_layers_of_another_shape(step: Step, factory: Any) -> None:
    layers = bnp_optax.find_layers(step.loss_fn, step.params)
    layers[FIRST] = dataclasses.replace(layers[FIRST], kernel_shape=(5, 2))
    with pytest.raises(ValueError, match=says(f"`{FIRST}`", "(5, 2)", "(4, 2)", "`find_layers`")):
        factory(layers=layers).init(step.params)


@for_each_factory
def test_layer_that_is_not_covered(reparametrized: Step, factory: Any) -> None:
    step = reparametrized
    summary = bnp_optax.summarize(step.loss_fn, step.params)
    assert "`mul` changes it before it meets" in summary.uncovered["hidden/kernel"]
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


@for_each_factory
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
@for_each_factory
def test_leaves_that_are_no_kernel_pass_through(factory: Any, layers: Any) -> None:
    tree = {
        "integer": {"kernel": jnp.arange(4).reshape(2, 2)},
        "boolean": jnp.array([True, False]),
        "complex": jnp.ones(2, jnp.complex64),
        "vector": {"kernel": jnp.ones(3), "bias": jnp.ones(3)},
        "frozen": {"kernel": None, "bias": None},
        "empty": {},
        "zero inputs": {"kernel": jnp.ones((0, 2)), "bias": jnp.ones(2)},
        "zero units": {"kernel": jnp.ones((2, 0)), "bias": jnp.ones(0)},
    }
    in_z = bnp(layers=layers)
    state = in_z.init(tree)
    P = in_z.operator(state)
    for function in (P.mv, P.transpose, P.solve, P.gram):
        assert_same(function(tree), tree)
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
@for_each_factory
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
@for_each_factory
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


@for_each_factory
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
