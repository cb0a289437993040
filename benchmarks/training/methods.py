"""The contestants: an optimizer, the normalization of its network, and how to draw it."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import optax

import bnp_optax
from benchmarks.networks.small import Norm

# One grid for all contestants, about three to a decade.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
MOMENTUM = 0.9
# The documented rates of the ready-made optimizers.
SGD, ADAM, ADAMW, WHITEN_ADAM, WHITEN_MUON = (
    inspect.signature(make).parameters["learning_rate"].default
    for make in (
        *(bnp_optax.bnp_sgd, bnp_optax.bnp_adam, bnp_optax.bnp_adamw),
        *(bnp_optax.whiten_adam, bnp_optax.whiten_muon),
    )
)
# Decoupled, of AdamW and of Muon; on the scales and offsets of the four improvements, L2.
WEIGHT_DECAY = 1e-2
NORM_DECAY = 1e-4

# What the demonstration offers.
MethodName = Literal[
    "sgd", "adam", "batchnorm", "layernorm", "ready_sgd", "ready_adam", "bnp_sgd", "adam_z"
]
Layers = Mapping[str, bnp_optax.Layer]
Make = Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train a network.

    Attributes:
      label: Name in tables and figures.
      norm: Normalization of the network that it trains.
      make: `make(learning_rate, layers)` is the optimizer; `layers` is None unless `needs_stats`.
        Those with momentum also take `decay`, the strength of an L2 penalty on the kernels.
      needs_stats: Whether `update` takes `layer_stats`; what this library adds does.
      color: In figures; the palette of Okabe and Ito, safe for colour-blind readers.
      dashes: Line style in figures.
      start: The learning rate at which the search for the best begins: the customary one.
      embeddings: Whether tables that rows are looked up in count as layers.
      second_moments: Whether `update` takes the second moments of inputs too.
      from_z: Whether initial values are those of z, and the input layers' statistics are held:
        `make` then takes them as `fixed`.
    """

    label: str
    norm: Norm
    make: Make
    needs_stats: bool
    color: str
    dashes: str
    start: float = 1e-1
    embeddings: bool = False
    second_moments: bool = False
    from_z: bool = False


def is_kernel(params: Any) -> Any:
    """Which leaves of `params` are no vectors: a mask for weight decay."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def is_scale_or_offset(params: Any) -> Any:
    """Which leaves of `params` are parameters of a normalization."""

    def of_norm(path: Any, leaf: Any) -> bool:
        return "FourThings" in jax.tree_util.keystr(path)

    return jax.tree_util.tree_map_with_path(of_norm, params)


def _sgd(rate: Any, layers: Layers | None) -> optax.GradientTransformation:
    return optax.sgd(rate)


def _momentum(rate: Any, layers: Layers | None, decay: float = 0.0) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(decay, is_kernel), optax.sgd(rate, momentum=MOMENTUM)
    )


def _adam(rate: Any, layers: Layers | None) -> optax.GradientTransformation:
    return optax.adam(rate)


def _adamw(rate: Any, layers: Layers | None) -> optax.GradientTransformation:
    return optax.adamw(rate, weight_decay=WEIGHT_DECAY, mask=is_kernel)


def _muon(rate: Any, layers: Layers | None) -> optax.GradientTransformation:
    return optax.contrib.muon(rate)


def _muon_with(decay: float) -> Make:
    return lambda rate, layers: optax.contrib.muon(
        rate, weight_decay=decay, weight_decay_mask=is_kernel
    )


def _four_things(rate: Any, layers: Layers | None) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(NORM_DECAY, is_scale_or_offset), optax.adam(rate))


def _kfac(rate: Any, layers: Layers | None) -> optax.GradientTransformation:
    msg = "K-FAC is no Optax transformation; train with `benchmarks.training.kfac.KfacTrainer`"
    raise RuntimeError(msg)


def _after_bnp(**options: Any) -> Make:
    return lambda rate, layers: optax.chain(
        bnp_optax.bnp_precondition(layers=layers, **options), optax.sgd(rate)
    )


def _adam_after_bnp(rate: Any, layers: Layers | None) -> optax.GradientTransformation:
    return optax.chain(bnp_optax.bnp_precondition(layers=layers), optax.adam(rate))


def _momentum_after_bnp(
    rate: Any, layers: Layers | None, decay: float = 0.0
) -> optax.GradientTransformation:
    return optax.chain(bnp_optax.bnp_precondition(layers=layers), _momentum(rate, layers, decay))


def _in_z(inner: Make, **options: Any) -> Make:
    return lambda rate, layers: bnp_optax.in_zspace(
        inner(rate, None), bnp_optax.bnp(layers=layers, **options)
    )


def _whiten_adam(rate: Any, layers: Layers | None) -> optax.GradientTransformation:
    return bnp_optax.whiten_adam(rate, layers=layers)


def _whiten_muon(rate: Any, layers: Layers | None) -> optax.GradientTransformation:
    return bnp_optax.whiten_muon(rate, layers=layers)


def _whiten_muon_with(**options: Any) -> Make:
    return lambda rate, layers: bnp_optax.whiten_muon(
        rate, mask=is_kernel, layers=layers, **options
    )


def _ready(make: Make) -> Make:
    return lambda rate, layers, **options: make(rate, layers=layers, **options)


def _ready_adamw(rate: Any, layers: Layers | None) -> optax.GradientTransformation:
    return bnp_optax.bnp_adamw(rate, weight_decay=WEIGHT_DECAY, mask=is_kernel, layers=layers)


_BLACK, _ORANGE, _SKY, _GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
_VERMILION, _BLUE, _PURPLE, _YELLOW = "#D55E00", "#0072B2", "#CC79A7", "#F0E442"

METHODS: dict[str, Method] = {
    # Plain networks.
    "sgd": Method("SGD", "none", _sgd, False, _BLACK, ":"),
    "momentum": Method("Momentum", "none", _momentum, False, _BLACK, "--", 1e-2),
    "adam": Method("Adam", "none", _adam, False, _ORANGE, "--", 1e-3),
    "adamw": Method("AdamW", "none", _adamw, False, _ORANGE, "-.", 1e-3),
    "muon": Method("Muon", "none", _muon, False, _YELLOW, "--", 1e-2),
    "kfac": Method("K-FAC (kfac_jax)", "none", _kfac, False, _PURPLE, ":", 3e-2),
    # Normalized networks.
    "batchnorm": Method("BatchNorm + SGD", "batch", _sgd, False, _SKY, "-."),
    "layernorm": Method("LayerNorm + SGD", "layer", _sgd, False, _GREEN, "-."),
    "groupnorm": Method("GroupNorm + SGD", "group", _sgd, False, _GREEN, ":"),
    "batchrenorm": Method("BatchRenorm + SGD", "renorm", _sgd, False, _SKY, ":"),
    "four_things": Method("BN, 4 things + Adam", "four", _four_things, False, _PURPLE, "-.", 1e-3),
    "batchnorm_momentum": Method("BatchNorm + momentum", "batch", _momentum, False, _SKY, "--"),
    "groupnorm_momentum": Method("GroupNorm + momentum", "group", _momentum, False, _GREEN, "--"),
    "batchnorm_adam": Method("BatchNorm + Adam", "batch", _adam, False, _SKY, "--", 1e-3),
    "layernorm_adam": Method("LayerNorm + Adam", "layer", _adam, False, _GREEN, "--", 1e-3),
    "layernorm_adamw": Method("LayerNorm + AdamW", "layer", _adamw, False, _GREEN, "-.", 1e-3),
    "layernorm_muon": Method("LayerNorm + Muon", "layer", _muon, False, _YELLOW, "-.", 1e-2),
    # What this library adds: the ready-made optimizers, whose search starts at the default rate,
    "ready_sgd": Method("bnp_sgd", "none", _ready(bnp_optax.bnp_sgd), True, _VERMILION, "-", SGD),
    "ready_adam": Method("bnp_adam", "none", _ready(bnp_optax.bnp_adam), True, _BLUE, "-", ADAM),
    "ready_adamw": Method("bnp_adamw", "none", _ready_adamw, True, _BLUE, "--", ADAMW),
    "ready_adamw_ln": Method(
        "bnp_adamw + LayerNorm", "layer", _ready_adamw, True, _SKY, "--", ADAMW
    ),
    # the same from initial values of z,
    "from_z_sgd": Method(
        *("bnp_sgd from z", "none", _ready(bnp_optax.bnp_sgd), True, _VERMILION, "-.", SGD),
        from_z=True,
    ),
    "from_z_adam": Method(
        *("bnp_adam from z", "none", _ready(bnp_optax.bnp_adam), True, _BLUE, "-.", ADAM),
        from_z=True,
    ),
    # and the paper's statistics.
    "bnp_sgd": Method("BNP + SGD", "none", _after_bnp(), True, _VERMILION, "-"),
    "bnp_momentum": Method("BNP + momentum", "none", _momentum_after_bnp, True, _PURPLE, "-", 1e-2),
    "adam_z": Method("Adam in z (BNP)", "none", _in_z(_adam), True, _BLUE, "-", 1e-3),
    # The known way to go wrong.
    "bnp_then_adam": Method(
        "Adam after BNP (wrong)", "none", _adam_after_bnp, True, _PURPLE, ":", 1e-3
    ),
    "adamw_z": Method("AdamW in z (BNP)", "none", _in_z(_adamw), True, _BLUE, "--", 1e-3),
    "muon_z": Method(
        "Muon in z (BNP)", "none", _in_z(_muon, scale=False), True, _YELLOW, "-", 1e-2
    ),
    "bnp_gn": Method("BNP + GroupNorm", "group", _after_bnp(), True, _GREEN, "-"),
    "bnp_gn_momentum": Method(
        "BNP + GN + momentum", "group", _momentum_after_bnp, True, _GREEN, "-"
    ),
    "adamw_z_ln": Method("AdamW in z + LayerNorm", "layer", _in_z(_adamw), True, _SKY, "-", 1e-3),
    "whiten_adam": Method(
        *("Adam in z (whitened)", "none", _whiten_adam, True, _BLUE, ":", WHITEN_ADAM),
        second_moments=True,
    ),
    "whiten_muon": Method(
        *("Muon in z (whitened)", "none", _whiten_muon, True, _YELLOW, ":", WHITEN_MUON),
        second_moments=True,
    ),
    "whiten_adam_ln": Method(
        *("Adam in z (whitened) + LayerNorm", "layer", _whiten_adam, True, _BLUE, "-."),
        WHITEN_ADAM,
        second_moments=True,
    ),
    "whiten_muon_ln": Method(
        *("Muon in z (whitened) + LayerNorm", "layer", _whiten_muon, True, _YELLOW, "-."),
        WHITEN_MUON,
        second_moments=True,
    ),
    # Variants of it: which of its parts matter.
    "ready_adam_plain_bias": Method(
        "bnp_adam, scale_bias=False",
        "none",
        _ready(functools.partial(bnp_optax.bnp_adam, scale_bias=False)),
        True,
        _SKY,
        ":",
        ADAM,
    ),
    "ready_adam_fresh": Method(
        "bnp_adam, shrinkage=0",
        "none",
        _ready(functools.partial(bnp_optax.bnp_adam, shrinkage=0.0)),
        True,
        _GREEN,
        ":",
        ADAM,
    ),
    "bnp_sgd_warm": Method(
        "BNP warm + SGD", "none", _after_bnp(warm_start=True), True, _PURPLE, "-"
    ),
    "adam_z_warm": Method(
        "Adam in z, warm", "none", _in_z(_adam, warm_start=True), True, _YELLOW, "-", 1e-3
    ),
    "bnp_sgd_unscaled": Method(
        "BNP + SGD, q = 1", "none", _after_bnp(scale=False), True, _VERMILION, ":"
    ),
    "adam_z_unscaled": Method(
        "Adam in z, q = 1", "none", _in_z(_adam, scale=False), True, _BLUE, ":", 1e-3
    ),
    "bnp_sgd_slow": Method(
        "BNP + SGD, decay 0.999", "none", _after_bnp(decay=0.999), True, _VERMILION, "--"
    ),
    "adam_z_slow": Method(
        "Adam in z, decay 0.999", "none", _in_z(_adam, decay=0.999), True, _BLUE, "--", 1e-3
    ),
    "bnp_sgd_running": Method(
        "BNP + SGD, variance about running mean",
        "none",
        _after_bnp(variance="running"),
        True,
        _VERMILION,
        "-.",
    ),
    "adam_z_running": Method(
        "Adam in z, variance about running mean",
        "none",
        _in_z(_adam, variance="running"),
        True,
        _BLUE,
        "-.",
        1e-3,
    ),
    "adam_z_floor": Method(
        "Adam in z, eps_rel 1e-4", "none", _in_z(_adam, eps_rel=1e-4), True, _SKY, "-", 1e-3
    ),
    "adam_z_embeddings": Method(
        "Adam in z, warm, embeddings too",
        "none",
        _in_z(_adam, warm_start=True),
        True,
        _YELLOW,
        "-.",
        1e-3,
        embeddings=True,
    ),
    "adam_z_centered": Method(
        "Adam in z, eps_rel 10: hardly more than centered",
        "none",
        _in_z(_adam, eps_rel=10.0),
        True,
        _GREEN,
        "--",
        1e-3,
    ),
    "muon_decay": Method("Muon, decay 1", "none", _muon_with(1.0), False, _YELLOW, "-.", 1e-2),
    "muon_weak_decay": Method("Muon, decay 0.3", "none", _muon_with(0.3), False, _SKY, "-.", 1e-2),
    "whiten_muon_eighth": Method(
        *("Muon in z (whitened), exponent 1/8", "none", _whiten_muon_with(exponent=0.125)),
        *(True, _SKY, ":", WHITEN_MUON),
        second_moments=True,
    ),
    "whiten_muon_decay": Method(
        *("Muon in z (whitened), decay 1", "none", _whiten_muon_with(weight_decay=1.0)),
        *(True, _GREEN, ":", WHITEN_MUON),
        second_moments=True,
    ),
    "whiten_muon_strong_decay": Method(
        *("Muon in z (whitened), decay 3", "none", _whiten_muon_with(weight_decay=3.0)),
        *(True, _VERMILION, ":", WHITEN_MUON),
        second_moments=True,
    ),
    "muon_z_floor": Method(
        "Muon in z, eps_rel 1e-4",
        "none",
        _in_z(_muon, scale=False, eps_rel=1e-4),
        True,
        _GREEN,
        "-",
        1e-2,
    ),
}
