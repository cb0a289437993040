"""Who learns a stream of tasks: an optimizer, and what is done to the inputs and the network."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import bnp_optax
from benchmarks.applications.tasks import Kind

WIDTH, CLASSES = 100, 10
# Of shrink-and-perturb's steps, the one in so many that perturbs: noise costs more than a step.
PERTURB_EVERY = 10
# What the noise of shrink-and-perturb alone would keep up, relative to the initial deviation.
PERTURBATION = 0.1

Inputs = Literal["raw", "welford", "running"]


class Decay(NamedTuple):
    """Strength of weight decay on each stream, chosen on a seed of its own.

    `python -m benchmarks plasticity decay` prints what was chosen from.
    """

    permuted: float
    rescaled: float


@dataclasses.dataclass(frozen=True)
class Learner:
    """A way to learn from a stream.

    Attributes:
      make: From a learning rate and the strength of weight decay to the optimizer.
      decay: The strength, if any.
      in_z: Whether the optimizer takes statistics.
      inputs: `'welford'` normalizes by the mean and variance of all that came so far, `'running'`
        by those of about the last hundred batches, as the optimizers in z know them.
      layer_norm: Whether the network has LayerNorm before each ReLU.
      perturb: Whether noise is added to the parameters now and then.
    """

    make: Callable[[Any, Any], Any]
    decay: Decay | None = None
    in_z: bool = False
    inputs: Inputs = "raw"
    layer_norm: bool = False
    perturb: bool = False

    def strength(self, kind: Kind) -> float:
        """Of weight decay on a stream."""
        return 0.0 if self.decay is None else getattr(self.decay, kind)


class Network(nn.Module):
    """Two hidden layers of ReLU."""

    layer_norm: bool = False

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, list[Array]]:
        """Logits, and the units of each hidden layer."""
        hidden = []
        for _ in range(2):
            x = nn.Dense(WIDTH)(x)
            x = nn.relu(nn.LayerNorm()(x) if self.layer_norm else x)
            hidden.append(x)
        return nn.Dense(CLASSES)(x), hidden


class Seen(NamedTuple):
    """Running mean and variance of the inputs, and how many batches entered."""

    mean: Float[Array, " pixels"]
    var: Float[Array, " pixels"]
    batches: Float[Array, ""]


def unseen(width: int) -> Seen:
    """Before the first batch."""
    return Seen(jnp.zeros(width), jnp.zeros(width), jnp.zeros(()))


def normalized(
    inputs: Inputs, x: Float[Array, "n pixels"], seen: Seen
) -> tuple[Float[Array, "n pixels"], Seen]:
    """A batch as the network gets it, with what is known when it has come."""
    if inputs == "raw":
        return x, seen
    rate = 1.0 / (seen.batches + 1.0)
    if inputs == "running":
        rate = jnp.maximum(rate, 0.01)
    moved = jnp.mean(x, axis=0) - seen.mean
    var = (1.0 - rate) * (seen.var + rate * moved**2) + rate * jnp.var(x, axis=0)
    seen = Seen(seen.mean + rate * moved, var, seen.batches + 1.0)
    return (x - seen.mean[None]) * jax.lax.rsqrt(seen.var + 1e-2)[None], seen


def perturbed(params: Any, key: Array, fresh: Callable[[Array], Any], shrunk: Any) -> Any:
    """After the decay's shrinking: a share of new initial values, which decay in their turn.

    Args:
      params: The parameters.
      key: For one step.
      fresh: Initial values from a key.
      shrunk: The share of the parameters that decay takes in a step.

    Source: Ash and Adams, "On Warm-Starting Neural Network Training", NeurIPS 2020; at any time,
    as nobody says where a task ends.
    """
    share = PERTURBATION * jnp.sqrt(2.0 * shrunk * PERTURB_EVERY)
    return jax.lax.cond(
        jax.random.bernoulli(jax.random.fold_in(key, 1), 1.0 / PERTURB_EVERY),
        lambda p: jax.tree.map(lambda p, new: p + share * new, p, fresh(key)),
        lambda p: p,
        params,
    )


def undecayed(make: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """An optimizer that knows no weight decay."""
    return lambda rate, _: make(rate)


def _adamw(rate: Any, decay: Any) -> Any:
    return optax.adamw(rate, weight_decay=decay)


def _bnp_adamw(**options: Any) -> Callable[[Any, Any], Any]:
    return lambda rate, decay: bnp_optax.bnp_adamw(rate, weight_decay=decay, **options)


_ADAM = undecayed(optax.adam)
LEARNERS = {
    "sgd": Learner(undecayed(optax.sgd)),
    "adam": Learner(_ADAM),
    "adamw": Learner(_adamw, Decay(0.1, 0.03)),
    "shrink-perturb": Learner(_adamw, Decay(0.3, 0.03), perturb=True),
    "layernorm-adam": Learner(_ADAM, layer_norm=True),
    "welford-adam": Learner(_ADAM, inputs="welford"),
    "welford-layernorm-adamw": Learner(_adamw, Decay(1.0, 0.03), inputs="welford", layer_norm=True),
    "running-layernorm-adamw": Learner(_adamw, Decay(1.0, 0.03), inputs="running", layer_norm=True),
    "running-adamw": Learner(_adamw, Decay(0.3, 0.03), inputs="running"),
    "bnp-adam": Learner(undecayed(bnp_optax.bnp_adam), in_z=True),
    "bnp-adamw": Learner(_bnp_adamw(), Decay(0.3, 0.03), in_z=True),
    "bnp-adamw-eps10": Learner(_bnp_adamw(eps_rel=10.0), Decay(0.1, 0.03), in_z=True),
    "bnp-adamw-slow": Learner(_bnp_adamw(decay=0.999), Decay(0.3, 0.03), in_z=True),
    "bnp-adamw-layernorm": Learner(_bnp_adamw(), Decay(1.0, 0.3), in_z=True, layer_norm=True),
    "running-bnp-adamw": Learner(_bnp_adamw(), Decay(1.0, 0.1), in_z=True, inputs="running"),
}
