"""How the statistics of a layer's inputs leave the forward pass."""

from bnp_optax.capture.api import Summary, find_layers, summarize, value_and_grad
from bnp_optax.capture.dataset import dataset_statistics
from bnp_optax.statistics import Layer

__all__ = [
    "Layer",
    "Summary",
    "dataset_statistics",
    "find_layers",
    "summarize",
    "value_and_grad",
]
