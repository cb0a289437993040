"""A training step to spoil, and patterns of messages."""

import functools
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


class Step(NamedTuple):
    """What a training step has in its hands."""

    loss_fn: Callable[[Any], jax.Array]
    params: Any
    grads: Any
    stats: dict[str, LayerStats]

    def update(self, tx: Any, **extra: Any) -> Any:
        return tx.update(self.grads, tx.init(self.params), self.params, **extra)[0]


@functools.cache
def step_of(model: nn.Module) -> Step:
    x = jax.random.normal(jax.random.key(1), (8, 3))
    params = model.init(jax.random.key(0), x)["params"]

    def loss_fn(params: Any) -> jax.Array:
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    _, grads, stats = jax.jit(bnp_optax.value_and_grad(loss_fn))(params)
    return Step(loss_fn, params, grads, stats)


FIRST, SECOND = "Dense_0/kernel", "Dense_1/kernel"  # (4, 2) and (3, 4): Flax names the outer first

FACTORIES = {
    "bnp_precondition": bnp_precondition,
    "in_zspace": lambda **options: in_zspace(optax.adam(1e-3), bnp(**options)),
    "bnp_sgd": lambda **options: bnp_optax.bnp_sgd(0.1, **options),
    "bnp_sgd_momentum": lambda **options: bnp_optax.bnp_sgd(0.1, momentum=0.9, **options),
    "bnp_adam": lambda **options: bnp_optax.bnp_adam(1e-3, **options),
    "bnp_adamw": lambda **options: bnp_optax.bnp_adamw(1e-3, **options),
}


for_each_factory = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)


def says(*parts: str) -> str:
    """A pattern for `parts` in this order, whatever is between them."""
    return "(?s)" + ".*".join(map(re.escape, parts))


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, two in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert jnp.result_type(one) == jnp.result_type(two)
        np.testing.assert_array_equal(one, two)
