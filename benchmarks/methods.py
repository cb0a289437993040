"""The contestants: an optimizer, the normalization of its network, and how to draw it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import optax

import bnp_optax
from benchmarks.models import Norm

# One grid for all contestants, about three to a decade.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)

MethodName = Literal[
    "sgd", "adam", "batchnorm", "layernorm", "bnp_sgd", "adam_z", "bnp_sgd_warm", "adam_z_warm"
]
Layers = Mapping[str, bnp_optax.Layer]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train a network.

    Attributes:
      label: Name in tables and figures.
      norm: Normalization of the network that it trains.
      make: `make(learning_rate, layers)` is the optimizer; `layers` is None unless `needs_stats`.
      needs_stats: Whether `update` takes `layer_stats`; what this library adds does.
      color: In figures; the palette of Okabe and Ito, safe for colour-blind readers.
      dashes: Line style in figures.
    """

    label: str
    norm: Norm
    make: Callable[[Any, Layers | None], optax.GradientTransformation]
    needs_stats: bool
    color: str
    dashes: str


METHODS: dict[MethodName, Method] = {
    "sgd": Method(
        label="SGD",
        norm="none",
        make=lambda rate, layers: optax.sgd(rate),
        needs_stats=False,
        color="#000000",
        dashes=":",
    ),
    "adam": Method(
        label="Adam",
        norm="none",
        make=lambda rate, layers: optax.adam(rate),
        needs_stats=False,
        color="#E69F00",
        dashes="--",
    ),
    "batchnorm": Method(
        label="BatchNorm + SGD",
        norm="batch",
        make=lambda rate, layers: optax.sgd(rate),
        needs_stats=False,
        color="#56B4E9",
        dashes="-.",
    ),
    "layernorm": Method(
        label="LayerNorm + SGD",
        norm="layer",
        make=lambda rate, layers: optax.sgd(rate),
        needs_stats=False,
        color="#009E73",
        dashes="-.",
    ),
    "bnp_sgd": Method(
        label="BNP + SGD",
        norm="none",
        make=lambda rate, layers: optax.chain(
            bnp_optax.bnp_precondition(layers=layers), optax.sgd(rate)
        ),
        needs_stats=True,
        color="#D55E00",
        dashes="-",
    ),
    "adam_z": Method(
        label="Adam in z (BNP)",
        norm="none",
        make=lambda rate, layers: bnp_optax.in_zspace(
            optax.adam(rate), bnp_optax.bnp(layers=layers)
        ),
        needs_stats=True,
        color="#0072B2",
        dashes="-",
    ),
    "bnp_sgd_warm": Method(
        label="BNP warm + SGD",
        norm="none",
        make=lambda rate, layers: optax.chain(
            bnp_optax.bnp_precondition(layers=layers, warm_start=True), optax.sgd(rate)
        ),
        needs_stats=True,
        color="#CC79A7",
        dashes="-",
    ),
    "adam_z_warm": Method(
        label="Adam in z, warm",
        norm="none",
        make=lambda rate, layers: bnp_optax.in_zspace(
            optax.adam(rate), bnp_optax.bnp(layers=layers, warm_start=True)
        ),
        needs_stats=True,
        color="#F0E442",
        dashes="-",
    ),
}
