"""How well conditioned a problem is, before and after preconditioning, and what theory expects."""

from bnp_optax.diagnostics.conditioning import condition_number, conditioning, extended_inputs
from bnp_optax.diagnostics.convergence import (
    convergence_factor,
    max_stable_learning_rate,
    optimal_learning_rate,
)
from bnp_optax.diagnostics.hessian import unit_hessian
from bnp_optax.diagnostics.inputs import InputConditioning, extended_second_moment
from bnp_optax.diagnostics.lanczos import HessianExtremes, hessian_extremes
from bnp_optax.diagnostics.least_squares import (
    LeastSquares,
    Run,
    bngd,
    bnp_gd,
    gd,
    least_squares,
)
from bnp_optax.diagnostics.least_squares_sweep import Sweep, random_least_squares, sweep
from bnp_optax.diagnostics.report import LayerReport, Report, report

__all__ = [
    "HessianExtremes",
    "InputConditioning",
    "LayerReport",
    "LeastSquares",
    "Report",
    "Run",
    "Sweep",
    "bngd",
    "bnp_gd",
    "condition_number",
    "conditioning",
    "convergence_factor",
    "extended_inputs",
    "extended_second_moment",
    "gd",
    "hessian_extremes",
    "least_squares",
    "max_stable_learning_rate",
    "optimal_learning_rate",
    "random_least_squares",
    "report",
    "sweep",
    "unit_hessian",
]
