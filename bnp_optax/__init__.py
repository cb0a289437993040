"""Batch normalization preconditioning and z-space regularization for Optax."""

import importlib
from typing import TYPE_CHECKING, Any

from bnp_optax.alias import adam_l1, bnp_adam, bnp_adamw, bnp_sgd
from bnp_optax.capture import (
    Summary,
    dataset_statistics,
    find_layers,
    summarize,
    value_and_grad,
)
from bnp_optax.drop_in import DropIn, bare_params, drop_in
from bnp_optax.metrics import metrics
from bnp_optax.preconditioners import (
    BNPState,
    ComposeState,
    DiagonalState,
    MeanActivationState,
    Operator,
    Preconditioner,
    WhitenState,
    adagrad,
    bnp,
    compose,
    mean_activation,
    rms,
    whiten,
)
from bnp_optax.sharding import state_sharding
from bnp_optax.start import start_in_zspace
from bnp_optax.statistics import Layer, LayerStats
from bnp_optax.transforms import (
    GradientRegularizationState,
    InZspaceState,
    MultiStepsState,
    OrthogonalizeState,
    PreconditionState,
    ProximalL1State,
    bnp_precondition,
    gradient_regularization,
    in_zspace,
    multi_steps,
    orthogonalize,
    precondition,
    proximal_l1,
    pspace_weight_decay,
    zspace_grad_reg,
    zspace_weight_decay,
)
from bnp_optax.whitened import whiten_adam, whiten_muon

if TYPE_CHECKING:
    from bnp_optax.training import TrainState

__version__ = "0.2.0"

__all__ = [
    "BNPState",
    "ComposeState",
    "DiagonalState",
    "DropIn",
    "GradientRegularizationState",
    "InZspaceState",
    "Layer",
    "LayerStats",
    "MeanActivationState",
    "MultiStepsState",
    "Operator",
    "OrthogonalizeState",
    "PreconditionState",
    "Preconditioner",
    "ProximalL1State",
    "Summary",
    "TrainState",
    "WhitenState",
    "adagrad",
    "adam_l1",
    "bare_params",
    "bnp",
    "bnp_adam",
    "bnp_adamw",
    "bnp_precondition",
    "bnp_sgd",
    "compose",
    "dataset_statistics",
    "drop_in",
    "find_layers",
    "gradient_regularization",
    "in_zspace",
    "mean_activation",
    "metrics",
    "multi_steps",
    "orthogonalize",
    "precondition",
    "proximal_l1",
    "pspace_weight_decay",
    "rms",
    "start_in_zspace",
    "state_sharding",
    "summarize",
    "value_and_grad",
    "whiten",
    "whiten_adam",
    "whiten_muon",
    "zspace_grad_reg",
    "zspace_weight_decay",
]


def __getattr__(name: str) -> Any:
    """What few programs need, or needs Flax, is imported when it is first used."""
    if name == "TrainState":
        return importlib.import_module("bnp_optax.training").TrainState
    if name in {"diagnostics", "flax_nnx"}:
        return importlib.import_module(f"bnp_optax.{name}")
    msg = f"module 'bnp_optax' has no attribute '{name}'"
    raise AttributeError(msg)
