"""The options of preconditioners, for functions that hand them on."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict, TypeVar

from jax.typing import ArrayLike

from bnp_optax.layers import Layers
from bnp_optax.preconditioners.running import Variance
from bnp_optax.statistics import LayerStats

Function = TypeVar("Function", bound=Callable[..., Any])


class BNPOptions(TypedDict, total=False):
    """The options of `bnp`, where they are described."""

    decay: ArrayLike
    eps_rel: ArrayLike
    eps_abs: ArrayLike
    scale: bool | Literal["network"]
    warm_start: bool
    variance: Variance
    shrinkage: ArrayLike | None
    scale_bias: bool
    scale_others: bool
    batch_size: ArrayLike | None
    max_ratio: ArrayLike | None
    layers: Layers | None
    fixed: Mapping[str, LayerStats] | None


class WhitenOptions(TypedDict, total=False):
    """The options of `whiten`, where they are described."""

    exponent: ArrayLike
    damping: ArrayLike
    decay: ArrayLike
    refresh_every: int
    rank: int
    max_fan_in: int
    layers: Layers | None


def takes_options(of: Callable[..., Any], **defaults: Any) -> Callable[[Function], Function]:
    """Spell out in the signature the options that a function hands on to `of`.

    For `help`, and for `optax.inject_hyperparams`, which makes hyper-parameters of the arguments
    that the signature names.

    Args:
      of: Such as `bnp`; its options are keyword-only.
      **defaults: Those that are not those of `of`. The function puts them in.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [
            p.replace(default=defaults.get(name, p.default))
            for name, p in inspect.signature(of).parameters.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return function

    return decorate
