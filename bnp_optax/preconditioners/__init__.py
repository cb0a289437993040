"""Changes of variables p = P z."""

from bnp_optax.preconditioners.adaptive import DiagonalState, adagrad, rms
from bnp_optax.preconditioners.base import Preconditioner
from bnp_optax.preconditioners.bnp import BNPState, bnp
from bnp_optax.preconditioners.composition import ComposeState, compose
from bnp_optax.preconditioners.options import BNPOptions, takes_bnp_options

__all__ = [
    "BNPOptions",
    "BNPState",
    "ComposeState",
    "DiagonalState",
    "Preconditioner",
    "adagrad",
    "bnp",
    "compose",
    "rms",
    "takes_bnp_options",
]
