"""Changes of variables p = P z."""

from bnp_optax.preconditioners.base import Preconditioner
from bnp_optax.preconditioners.bnp import BNPState, bnp
from bnp_optax.preconditioners.options import BNPOptions, takes_bnp_options

__all__ = ["BNPOptions", "BNPState", "Preconditioner", "bnp", "takes_bnp_options"]
