"""Batch normalization preconditioning and z-space regularization for Optax."""

from bnp_optax.alias import bnp_adam, bnp_adamw, bnp_sgd
from bnp_optax.capture import Layer, Summary, find_layers, summarize, value_and_grad
from bnp_optax.preconditioners import (
    BNPState,
    ComposeState,
    DiagonalState,
    Preconditioner,
    adagrad,
    bnp,
    compose,
    rms,
)
from bnp_optax.statistics import LayerStats
from bnp_optax.training import TrainState
from bnp_optax.transforms import (
    InZspaceState,
    PreconditionState,
    bnp_precondition,
    in_zspace,
    precondition,
    pspace_weight_decay,
    zspace_weight_decay,
)

__version__ = "0.1.0"

__all__ = [
    "BNPState",
    "ComposeState",
    "DiagonalState",
    "InZspaceState",
    "Layer",
    "LayerStats",
    "PreconditionState",
    "Preconditioner",
    "Summary",
    "TrainState",
    "adagrad",
    "bnp",
    "bnp_adam",
    "bnp_adamw",
    "bnp_precondition",
    "bnp_sgd",
    "compose",
    "find_layers",
    "in_zspace",
    "precondition",
    "pspace_weight_decay",
    "rms",
    "summarize",
    "value_and_grad",
    "zspace_weight_decay",
]
