"""Gradient transformations."""

from bnp_optax.transforms.gradient_regularization import (
    GradientRegularizationState,
    gradient_regularization,
    zspace_grad_reg,
)
from bnp_optax.transforms.multi_steps import MultiStepsState, multi_steps
from bnp_optax.transforms.orthogonalize import OrthogonalizeState, orthogonalize
from bnp_optax.transforms.precondition import (
    PreconditionState,
    bnp_precondition,
    precondition,
)
from bnp_optax.transforms.proximal_l1 import ProximalL1State, proximal_l1
from bnp_optax.transforms.weight_decay import pspace_weight_decay, zspace_weight_decay
from bnp_optax.transforms.zspace import InZspaceState, in_zspace

__all__ = [
    "GradientRegularizationState",
    "InZspaceState",
    "MultiStepsState",
    "OrthogonalizeState",
    "PreconditionState",
    "ProximalL1State",
    "bnp_precondition",
    "gradient_regularization",
    "in_zspace",
    "multi_steps",
    "orthogonalize",
    "precondition",
    "proximal_l1",
    "pspace_weight_decay",
    "zspace_grad_reg",
    "zspace_weight_decay",
]
