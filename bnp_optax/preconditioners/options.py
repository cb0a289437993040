"""The options of `bnp`, for functions that hand them on."""

import inspect
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

from jax.typing import ArrayLike

from bnp_optax.layers import Layers
from bnp_optax.preconditioners.bnp import Variance, bnp

Function = TypeVar("Function", bound=Callable[..., Any])


class BNPOptions(TypedDict, total=False):
    """The options of `bnp`, where they are described."""

    decay: ArrayLike
    eps_rel: ArrayLike
    eps_abs: ArrayLike
    scale: bool
    warm_start: bool
    variance: Variance
    batch_size: ArrayLike | None
    max_ratio: ArrayLike | None
    layers: Layers | None


def takes_bnp_options(function: Function) -> Function:
    """Spell out in the signature the options that `function` hands on to `bnp`.

    For `help`, and for `optax.inject_hyperparams`, which makes hyper-parameters of the arguments
    that the signature names.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = inspect.signature(bnp).parameters.values()
    function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return function
