"""Integers among the parameters, which no gradient step moves.

They are told by the parameters: what stands before in a chain may have made their updates floats.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def is_integer(leaf: Any) -> bool:
    """Whether a parameter is of integers, or of truth values."""
    dtype = jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)


def integers_held(updates: Any, params: Any) -> Any:
    """`updates` with integer zeros for integer parameters.

    Not with zeros of another type: in float32, 16777217 + 0.0 is 16777216.
    """
    return _at_integers(lambda update, p: jnp.zeros_like(p), updates, params, params)


def integers_passed(new: Any, came: Any, params: Any) -> Any:
    """`new`, with what `came` for integer parameters."""
    return _at_integers(lambda new, came: came, new, came, params)


def holding_integers(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, which sees no gradient of integer parameters and does not move them."""
    inner = optax.with_extra_args_support(inner)

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        updates = integers_held(updates, params)
        updates, state = inner.update(updates, state, params, **extra_args)
        return integers_held(updates, params), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _at_integers(
    function: Callable[[Any, Any], Any], updates: Any, others: Any, params: Any
) -> Any:
    """`function(update, other)` for integer parameters, and the update for all else."""
    if not any(map(is_integer, jax.tree.leaves(params))):
        return updates

    def chosen(update: Any, other: Any, p: Any) -> Any:
        return function(update, other) if is_integer(p) else update

    return jax.tree.map(chosen, updates, others, params)
