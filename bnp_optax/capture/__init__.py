"""How the statistics of a layer's inputs leave the forward pass."""

from bnp_optax.capture.api import find_layers, value_and_grad
from bnp_optax.capture.dataset import dataset_statistics
from bnp_optax.capture.summary import Summary, summarize

__all__ = ["Summary", "dataset_statistics", "find_layers", "summarize", "value_and_grad"]
