"""Checks on what the diagnostics are given, of concrete values only.

Under `jax.jit` a value is not known yet, so that nothing is said of it.
"""

from typing import Any

import numpy as np

from bnp_optax._tree import is_concrete
from bnp_optax.preconditioners.base import Operator, Preconditioner, check_preconditioner


def check_matrix(name: str, matrix: Any, square: bool = False) -> None:
    """Raise unless `matrix` has two axes, finite entries if they are known, and is as asked."""
    shape = tuple(np.shape(matrix))
    if len(shape) != 2 or 0 in shape:
        msg = f"`{name}` must be a matrix with rows and columns, got an array of shape {shape}."
        raise ValueError(msg)
    if square and shape[0] != shape[1]:
        msg = (
            f"`{name}` must be square and symmetric, as a Hessian is; got shape {shape}. For the "
            "singular values of a rectangular matrix, leave out `symmetric=True`."
        )
        raise ValueError(msg)
    if is_concrete(matrix):
        bad = int(np.sum(~np.isfinite(np.asarray(matrix, np.float64))))
        if bad:
            msg = f"`{name}` must be finite, but {bad} of its {np.size(matrix)} entries are not."
            raise ValueError(msg)


def check_curvature(name: str, value: Any) -> None:
    """Raise unless `value`, an eigenvalue of a Hessian, is positive and finite, or traced."""
    if is_concrete(value) and not np.all((np.asarray(value) > 0) & np.isfinite(value)):
        msg = (
            f"`{name}` must be a positive, finite curvature, got {value}. Where the Hessian has an "
            "eigenvalue <= 0, gradient descent has no linear rate: take the smallest nonzero "
            "eigenvalue of a singular Hessian, or come closer to a minimizer."
        )
        raise ValueError(msg)


def operator_of(preconditioner: Preconditioner | Operator | None, state: Any) -> Operator | None:
    """P, from a preconditioner with its state, or given itself; None for neither.

    Raises:
      ValueError: If a preconditioner or a state is given without the other.
    """
    if preconditioner is None and state is None:
        return None
    if isinstance(preconditioner, Operator) and state is None:
        return preconditioner
    if preconditioner is None or state is None:
        given, missing = ("state", "preconditioner") if state is not None else (
            "preconditioner", "state"
        )  # fmt: skip
        msg = (
            f"`{given}` was given without `{missing}`. Pass both, `preconditioner=bnp(), "
            "state=its_state`; the state of P is `opt_state.preconditioner` of `in_zspace`, and "
            "that of `precondition` itself. An `Operator` needs no state."
        )
        raise ValueError(msg)
    checked = check_preconditioner(preconditioner)
    return checked.operator(state)
