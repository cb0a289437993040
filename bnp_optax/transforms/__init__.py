"""Gradient transformations."""

from bnp_optax.transforms.precondition import (
    PreconditionState,
    bnp_precondition,
    precondition,
)
from bnp_optax.transforms.weight_decay import pspace_weight_decay, zspace_weight_decay
from bnp_optax.transforms.zspace import InZspaceState, in_zspace

__all__ = [
    "InZspaceState",
    "PreconditionState",
    "bnp_precondition",
    "in_zspace",
    "precondition",
    "pspace_weight_decay",
    "zspace_weight_decay",
]
