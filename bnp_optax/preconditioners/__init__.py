"""Changes of variables p = P z."""

from bnp_optax.preconditioners.base import Preconditioner
from bnp_optax.preconditioners.bnp import BNPOptions, BNPState, bnp

__all__ = ["BNPOptions", "BNPState", "Preconditioner", "bnp"]
