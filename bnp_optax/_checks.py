"""Checks on arguments, at construction and of concrete numbers only.

A traced value, such as one that `optax.inject_hyperparams` passes, has no value to look at yet.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def check_fraction(name: str, value: Any) -> None:
    """Raise unless `value` lies in [0, 1)."""
    _check(name, value, lambda x: 0.0 <= x < 1.0, "lie in [0, 1)")


def check_non_negative(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number >= 0."""
    _check(name, value, lambda x: x >= 0.0 and math.isfinite(x), "be finite and >= 0")


def check_rate(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number >= 0, or a schedule of it."""
    if not callable(value):
        check_non_negative(name, value)


def check_positive(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number > 0."""
    _check(name, value, lambda x: x > 0.0 and math.isfinite(x), "be finite and > 0")


def check_above_one(name: str, value: Any) -> None:
    """Raise unless `value` is None or a finite number > 1."""
    if value is not None:
        _check(name, value, lambda x: x > 1.0 and math.isfinite(x), "be finite and > 1, or None")


def check_count(name: str, value: Any, *, optional: bool = True, traced: bool = False) -> None:
    """Raise unless `value` is an integer > 0; or None, or a traced one, where these may come.

    An array of no axes will do, which `optax.inject_hyperparams` makes of every number.
    """
    if (optional and value is None) or (traced and isinstance(value, jax.core.Tracer)):
        return
    if not is_integer(value) or int(value) <= 0:
        or_none = " or None" if optional else ""
        msg = f"`{name}` must be an integer > 0{or_none}, got {value!r}."
        raise ValueError(msg)


def count_of(name: str, value: Any) -> int:
    """A count that shapes or loops depend on, of which there must be a value.

    Raises:
      ValueError: If it is traced.
    """
    if isinstance(value, jax.core.Tracer):
        msg = (
            f"`{name}` is traced, but the shapes of arrays or the length of a loop depend on it: "
            "it must be an integer. `optax.inject_hyperparams` leaves it one with "
            f"`static_args=[{name!r}]`."
        )
        raise ValueError(msg)
    return int(value)


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer with a value to look at, in an array of no axes or not."""
    if isinstance(value, jax.Array | np.ndarray):
        concrete = not isinstance(value, jax.core.Tracer)
        return concrete and value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer)
    return isinstance(value, numbers.Integral)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        accepted = ", ".join(repr(choice) for choice in choices)
        msg = f"`{name}` must be one of {accepted}; got {value!r}."
        raise ValueError(msg)


def check_flag(name: str, value: Any, *others: str) -> None:
    """Raise unless `value` is True or False, or one of `others`."""
    if not (isinstance(value, bool | np.bool_) or (isinstance(value, str) and value in others)):
        accepted = ", ".join(["True", "False", *map(repr, others)])
        msg = f"`{name}` must be one of {accepted}; got {value!r}."
        raise ValueError(msg)


def check_adam(learning_rate: Any, b1: Any, b2: Any, eps: Any) -> None:
    """Raise unless these are hyper-parameters of Adam."""
    check_rate("learning_rate", learning_rate)
    check_fraction("b1", b1)
    check_fraction("b2", b2)
    check_non_negative("eps", eps)


def check_transformation(name: str, value: Any) -> None:
    """Raise unless `value` is a gradient transformation, or has its two functions."""
    # A `Preconditioner` has functions of these names too, and one that makes an operator.
    has_both = all(callable(getattr(value, part, None)) for part in ("init", "update"))
    if not has_both or hasattr(value, "operator"):
        got = getattr(value, "__name__", type(value).__name__)
        msg = (
            f"`{name}` must be a gradient transformation, such as `optax.adam(1e-3)`; got `{got}`. "
            "A function that makes one is to be called; a `Preconditioner` goes into "
            "`bnp_optax.precondition` or `bnp_optax.in_zspace`."
        )
        raise ValueError(msg)


def _check(name: str, value: Any, fits: Callable[[float], bool], accepted: str) -> None:
    """Raise unless `value` is a number or an array, and where it is concrete one that `fits`."""
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    if not (is_array or isinstance(value, numbers.Real)):
        msg = f"`{name}` must be a number, got {value!r}; it must {accepted}."
        raise ValueError(msg)
    is_known = not (isinstance(value, jax.core.Tracer) or getattr(value, "ndim", 0))
    if is_known and not fits(float(value)):
        msg = f"`{name}` must {accepted}, got {value}."
        raise ValueError(msg)
