"""Changes of variables p = P z."""

from bnp_optax.preconditioners.adaptive import DiagonalState, adagrad, rms
from bnp_optax.preconditioners.base import Operator, Preconditioner
from bnp_optax.preconditioners.bnp import bnp
from bnp_optax.preconditioners.bnp_operator import BNPState
from bnp_optax.preconditioners.composition import ComposeState, compose
from bnp_optax.preconditioners.mean_activation import MeanActivationState, mean_activation
from bnp_optax.preconditioners.options import BNPOptions, WhitenOptions, takes_options
from bnp_optax.preconditioners.whiten import whiten
from bnp_optax.preconditioners.whiten_operator import WhitenState

__all__ = [
    "BNPOptions",
    "BNPState",
    "ComposeState",
    "DiagonalState",
    "MeanActivationState",
    "Operator",
    "Preconditioner",
    "WhitenOptions",
    "WhitenState",
    "adagrad",
    "bnp",
    "compose",
    "mean_activation",
    "rms",
    "takes_options",
    "whiten",
]
