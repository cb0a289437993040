"""The contestants of the regularization benchmark: in p, in z, or by pruning."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import bnp_optax
from benchmarks.training.methods import Layers

Space = Literal["none", "p", "z"]
Base = Literal["adam", "bnp_adam"]

B1 = 0.9


@dataclasses.dataclass(frozen=True)
class Regularized:
    """An optimizer with a regularizer whose strength is swept.

    Attributes:
      label: Name in tables and figures.
      base: The optimizer without its regularizer; that one's learning rate serves L1.
      space: What the regularizer acts on.
      make: `make(learning_rate, strength, layers)` is the optimizer; `layers` is None unless
        `needs_stats`.
      color: In figures; the palette of Okabe and Ito, safe for colour-blind readers.
      dashes: Line style in figures.
      prune_after: The share of the steps after which the smallest kernel entries are set to 0, a
        share `strength` of them; None for no pruning.
    """

    label: str
    base: Base
    space: Space
    make: Callable[[Any, Any, Layers | None], optax.GradientTransformation]
    color: str
    dashes: str
    prune_after: float | None = None

    @property
    def needs_stats(self) -> bool:
        """Whether `update` takes `layer_stats`."""
        return self.base == "bnp_adam"


def adam_with_gradient_penalty_in_z(
    learning_rate: Any, strength: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """Adam with Ye's (12), p <- p - a M mean(g + 2 strength H M g), M = diag(1 / sqrt(v)).

    The penalty joins the gradient before the momentum: H M g is of this batch's g, and the mean of
    the g before would not be the gradient of anything. M is of g alone, so both its states are
    equal, and strength 0 is Adam.
    """
    penalty = bnp_optax.zspace_grad_reg(strength, bnp_optax.rms())
    return bnp_optax.in_zspace(
        optax.scale_by_learning_rate(learning_rate),
        bnp_optax.rms(),
        before=optax.chain(penalty, optax.ema(B1)),
    )


def subgradient_l1(strength: Any) -> optax.GradientTransformation:
    """Adds strength * sign(p) to the gradient of kernels."""

    def add(updates: Any, params: Any) -> Any:
        return jax.tree.map(
            lambda g, p: g + strength * jnp.sign(p) if p.ndim > 1 else g, updates, params
        )

    return optax.stateless(add)


def keep_zeros() -> optax.GradientTransformation:
    """Freezes the kernel entries that are 0, which pruning left."""

    def mask(updates: Any, params: Any) -> Any:
        return jax.tree.map(
            lambda u, p: jnp.where(p == 0.0, 0.0, u) if p.ndim > 1 else u, updates, params
        )

    return optax.stateless(mask)


def _bnp_adam(
    learning_rate: Any, layers: Layers | None, *, first: Any = None, last: Any = None
) -> optax.GradientTransformation:
    """Adam between two others, all in BNP's z."""
    parts = [part for part in (first, optax.adam(learning_rate, B1), last) if part is not None]
    return bnp_optax.in_zspace(optax.chain(*parts), bnp_optax.bnp(layers=layers))


GRADIENT_METHODS: dict[str, Regularized] = {
    "adam": Regularized(
        label="Adam",
        base="adam",
        space="none",
        make=lambda rate, strength, layers: optax.adam(rate, B1),
        color="#000000",
        dashes=":",
    ),
    "adam_p": Regularized(
        label="Adam, in p",
        base="adam",
        space="p",
        make=lambda rate, strength, layers: optax.chain(
            bnp_optax.gradient_regularization(strength), optax.adam(rate, B1)
        ),
        color="#E69F00",
        dashes="--",
    ),
    "adam_z": Regularized(
        label="Adam, in its z",
        base="adam",
        space="z",
        make=lambda rate, strength, layers: adam_with_gradient_penalty_in_z(rate, strength),
        color="#D55E00",
        dashes="-",
    ),
    "bnp_adam": Regularized(
        label="Adam in BNP's z",
        base="bnp_adam",
        space="none",
        make=lambda rate, strength, layers: _bnp_adam(rate, layers),
        color="#56B4E9",
        dashes=":",
    ),
    "bnp_adam_p": Regularized(
        label="Adam in BNP's z, in p",
        base="bnp_adam",
        space="p",
        make=lambda rate, strength, layers: bnp_optax.in_zspace(
            optax.adam(rate, B1),
            bnp_optax.bnp(layers=layers),
            before=bnp_optax.gradient_regularization(strength),
        ),
        color="#009E73",
        dashes="--",
    ),
    "bnp_adam_z": Regularized(
        label="Adam in BNP's z, in z",
        base="bnp_adam",
        space="z",
        make=lambda rate, strength, layers: _bnp_adam(
            rate, layers, first=bnp_optax.gradient_regularization(strength)
        ),
        color="#0072B2",
        dashes="-",
    ),
}

L1_METHODS: dict[str, Regularized] = {
    "l1_z": Regularized(
        label="L1 in Adam's z",
        base="adam",
        space="z",
        make=lambda rate, strength, layers: bnp_optax.adam_l1(rate, strength, B1),
        color="#D55E00",
        dashes="-",
    ),
    "l1_bnp_z": Regularized(
        label="L1 in BNP's z",
        base="bnp_adam",
        space="z",
        make=lambda rate, strength, layers: _bnp_adam(
            rate, layers, last=bnp_optax.proximal_l1(strength, rate)
        ),
        color="#0072B2",
        dashes="-",
    ),
    "l1_p": Regularized(
        label="L1 in p, proximal",
        base="adam",
        space="p",
        make=lambda rate, strength, layers: optax.chain(
            optax.adam(rate, B1), bnp_optax.proximal_l1(strength, rate)
        ),
        color="#E69F00",
        dashes="--",
    ),
    "l1_subgradient": Regularized(
        label="L1 in p, subgradient",
        base="adam",
        space="p",
        make=lambda rate, strength, layers: optax.chain(
            subgradient_l1(strength), optax.adam(rate, B1)
        ),
        color="#009E73",
        dashes="--",
    ),
    "pruned": Regularized(
        label="pruned at the end",
        base="adam",
        space="none",
        make=lambda rate, strength, layers: optax.adam(rate, B1),
        color="#000000",
        dashes=":",
        prune_after=1.0,
    ),
    "pruned_tuned": Regularized(
        label="pruned, then tuned",
        base="adam",
        space="none",
        make=lambda rate, strength, layers: optax.chain(optax.adam(rate, B1), keep_zeros()),
        color="#CC79A7",
        dashes="-.",
        prune_after=0.75,
    ),
}
