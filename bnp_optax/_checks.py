"""Checks on hyper-parameters, at construction and of concrete numbers only.

A traced value, such as one that `optax.inject_hyperparams` passes, has no value to look at yet.
"""

import math
import numbers
from typing import Any


def _is_concrete(value: Any) -> bool:
    return isinstance(value, numbers.Real)


def check_fraction(name: str, value: Any) -> None:
    """Raise unless `value` lies in [0, 1)."""
    if _is_concrete(value) and not 0.0 <= value < 1.0:
        msg = f"`{name}` must lie in [0, 1), got {value}."
        raise ValueError(msg)


def check_non_negative(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number >= 0."""
    if _is_concrete(value) and not (value >= 0.0 and math.isfinite(value)):
        msg = f"`{name}` must be finite and >= 0, got {value}."
        raise ValueError(msg)


def check_positive(name: str, value: Any) -> None:
    """Raise unless `value` is None or a finite number > 0."""
    if value is not None and _is_concrete(value) and not (value > 0.0 and math.isfinite(value)):
        msg = f"`{name}` must be finite and > 0, got {value}."
        raise ValueError(msg)


def check_above_one(name: str, value: Any) -> None:
    """Raise unless `value` is None or a finite number > 1."""
    if value is not None and _is_concrete(value) and not (value > 1.0 and math.isfinite(value)):
        msg = f"`{name}` must be finite and > 1, or None; got {value}."
        raise ValueError(msg)


def check_count(name: str, value: Any) -> None:
    """Raise unless `value` is None or an integer > 0."""
    if value is not None and not (isinstance(value, numbers.Integral) and int(value) > 0):
        msg = f"`{name}` must be an integer > 0 or None, got {value!r}."
        raise ValueError(msg)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        accepted = ", ".join(repr(choice) for choice in choices)
        msg = f"`{name}` must be one of {accepted}; got {value!r}."
        raise ValueError(msg)


def check_adam(learning_rate: Any, b1: Any, b2: Any, eps: Any) -> None:
    """Raise unless these are hyper-parameters of Adam."""
    check_non_negative("learning_rate", learning_rate)
    check_fraction("b1", b1)
    check_fraction("b2", b2)
    check_non_negative("eps", eps)
