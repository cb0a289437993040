"""Arguments that are no numbers, no flags, or no transformations."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.error_cases import for_each_factory, says

import bnp_optax
from bnp_optax import bnp

SGD = optax.sgd(0.1)
# What makes something of one option, and the option.
OPTIONS: list[tuple[Callable[[Any], Any], str]] = [
    *((lambda x, o=o: bnp(**{o: x}), o) for o in ("decay", "eps_rel", "eps_abs")),
    *((lambda x, o=o: bnp_optax.whiten(**{o: x}), o) for o in ("exponent", "damping", "decay")),
    *((lambda x, o=o: bnp_optax.mean_activation(**{o: x}), o) for o in ("damping", "decay")),
    *((lambda x, o=o: bnp_optax.rms(**{o: x}), o) for o in ("decay", "eps")),
    *((lambda x, o=o: bnp_optax.bnp_adam(**{o: x}), o) for o in ("learning_rate", "b1", "eps")),
    *((lambda x, o=o: bnp_optax.whiten_muon(**{o: x}), o) for o in ("learning_rate", "momentum")),
    *((lambda x, o=o: bnp_optax.orthogonalize(**{o: x}), o) for o in ("momentum", "eps", "b2")),
    (lambda x: bnp_optax.adagrad(initial_accumulator_value=x), "initial_accumulator_value"),
    (lambda x: bnp_optax.bnp_sgd(x), "learning_rate"),
    (lambda x: bnp_optax.bnp_adamw(weight_decay=x), "weight_decay"),
    (lambda x: bnp_optax.zspace_weight_decay(x), "weight_decay"),
    (lambda x: bnp_optax.proximal_l1(x, 0.1), "strength"),
    (lambda x: bnp_optax.gradient_regularization(x), "strength"),
    (lambda x: bnp_optax.gradient_regularization(0.1, radius=x), "radius"),
]
on_every_option = pytest.mark.parametrize(
    ("make", "option"), OPTIONS, ids=[f"{i}-{option}" for i, (_, option) in enumerate(OPTIONS)]
)


@pytest.mark.parametrize("value", ["0.1", [0.1], None, 0.1j, {"a": 0.1}])
@on_every_option
def test_something_else_than_a_number(make: Any, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=says(f"`{option}` must be a number, got {value!r}; it m")):
        make(value)


@pytest.mark.parametrize("value", [jnp.float32(-1.0), np.array(-1.0), jnp.bfloat16(-1.0)])
@on_every_option
def test_arrays_of_no_axes_are_looked_at(make: Any, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"`{option}` must ") + ".*got -1"):
        make(value)


@pytest.mark.parametrize("value", [0.1, np.float32(0.1), jnp.float32(0.1), np.array(0.1)])
@on_every_option
def test_numbers_of_any_type(make: Any, option: str, value: Any) -> None:
    del option
    make(value)


@pytest.mark.parametrize("option", ["batch_size", "max_ratio", "shrinkage"])
@for_each_factory
def test_optional_numbers(factory: Any, option: str) -> None:
    factory(**{option: None})
    with pytest.raises(ValueError, match=f"`{option}` must be a number, got '2'"):
        factory(**{option: "2"})


@pytest.mark.parametrize("value", [-1.0, float("nan"), 0.5, 1, None, "network", jnp.array(True)])
@pytest.mark.parametrize(
    ("make", "option"),
    [
        (bnp, "scale"),
        (bnp, "warm_start"),
        (bnp, "scale_bias"),
        (bnp, "scale_others"),
        (bnp_optax.rms, "bias_correction"),
        (bnp_optax.bnp_sgd, "nesterov"),
        (bnp_optax.orthogonalize, "nesterov"),
        (lambda **options: bnp_optax.multi_steps(SGD, 2, **options), "use_grad_mean"),
    ],
)
def test_something_else_than_a_flag(make: Any, option: str, value: Any) -> None:
    if option == "scale" and value == "network":
        make(scale=value)
        return
    accepted = "True, False, 'network'" if option == "scale" else "True, False"
    with pytest.raises(
        ValueError, match=says(f"`{option}` must be one of {accepted}; got {value!r}")
    ):
        make(**{option: value})
    make(**{option: np.bool_(True)})


@pytest.mark.parametrize(
    ("value", "got"), [(optax.adam, "`adam`"), (bnp(), "`Preconditioner`"), (0.1, "`float`")]
)
@pytest.mark.parametrize(
    ("wrap", "argument"),
    [
        (lambda tx: bnp_optax.multi_steps(tx, 2), "tx"),
        (lambda tx: bnp_optax.in_zspace(tx, bnp()), "inner"),
        (lambda tx: bnp_optax.in_zspace(SGD, bnp(), before=tx), "before"),
        (lambda tx: bnp_optax.precondition(bnp(), before=tx), "before"),
        (lambda tx: bnp_optax.drop_in(lambda p: 0.0, {}, tx), "tx"),
    ],
    ids=["multi_steps", "in_zspace", "in_zspace-before", "precondition", "drop_in"],
)
def test_something_else_than_a_transformation(
    wrap: Any, argument: str, value: Any, got: str
) -> None:
    pattern = says(
        f"`{argument}` must be a gradient transformation, such as `optax.adam(1e-3)`; got {got}",
        "A function that makes one is to be called",
    )
    with pytest.raises(ValueError, match=pattern):
        wrap(value)


def test_whatever_has_the_functions_of_a_transformation_is_one() -> None:
    multi = optax.MultiSteps(SGD, 2)
    bnp_optax.in_zspace(multi, bnp()).init({"kernel": jnp.ones((2, 2))})  # type: ignore[arg-type]


# Counts, which `optax.inject_hyperparams` makes arrays of.

MATRIX = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
COUNTS = ["refresh_every", "rank", "max_fan_in"]


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", None, jnp.float32(2), jnp.array([2])])
@pytest.mark.parametrize("option", COUNTS)
def test_something_else_than_a_count(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=says(f"`{option}` must be an integer > 0, got {value!r}")):
        bnp_optax.whiten(**{option: value})


@pytest.mark.parametrize("make", [bnp_optax.whiten_adam, bnp_optax.whiten_muon])
def test_whitening_with_injected_hyperparameters_is_the_same(make: Any) -> None:
    x = jax.random.normal(jax.random.key(0), (16, 3)) + 2.0

    def loss_fn(params: Any) -> jax.Array:
        return jnp.mean((x @ params["kernel"] + params["bias"][None]) ** 2)

    def trained(tx: Any) -> Any:
        params, state = MATRIX, tx.init(MATRIX)
        update = jax.jit(tx.update)
        for _ in range(3):
            _, grads, stats = bnp_optax.value_and_grad(loss_fn, second_moments=True)(params)
            updates, state = update(grads, state, params, layer_stats=stats)
            params = optax.apply_updates(params, updates)
        return params

    injected = optax.inject_hyperparams(make)(learning_rate=1e-2, refresh_every=2)
    expected = trained(make(1e-2, refresh_every=2))
    for one, two in zip(*map(jax.tree.leaves, (trained(injected), expected)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("option", ["rank", "n_steps"])
def test_a_count_that_shapes_or_loops_depend_on_cannot_be_traced(option: str) -> None:
    make = {"rank": bnp_optax.whiten_adam, "n_steps": bnp_optax.orthogonalize}[option]
    tx = optax.inject_hyperparams(make)()
    pattern = says(f"`{option}` is traced", f"`static_args=['{option}']`")

    def step() -> Any:
        return tx.update(MATRIX, tx.init(MATRIX), MATRIX, layer_stats=None)

    with pytest.raises(ValueError, match=pattern):
        jax.jit(step)()
    names = {"rank": ["rank", "max_fan_in"], "n_steps": ["n_steps"]}[option]
    tx = optax.inject_hyperparams(make, static_args=names)()
    jax.eval_shape(step)
