"""Models of every framework whose layers' inputs are recorded by hand.

A case draws small parameters and inputs, and reruns the forward pass in float64 NumPy, written out
from the definition of each layer. What each kernel is multiplied with is read off on the way. The
rerun also yields the loss: one that agrees with the loss function's has run the same network.
"""

# Each of these adds its cases.
from support.capture_models import (  # noqa: F401
    equinox,
    haiku,
    linen,
    linen_convolutions,
    nnx,
    plain,
    plain_transformed,
)
from support.capture_models.record import CASES, Case, Model, Record, filled, inputs, score

__all__ = ["CASES", "Case", "Model", "Record", "filled", "inputs", "score"]
