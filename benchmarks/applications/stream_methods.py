"""Who learns from a stream of single observations: networks, inputs, optimizers.

All have the same network, two hidden layers of leaky ReLU; some have LayerNorm before them. All
streams begin with observations before learning starts; who needs statistics of the inputs at the
start has them of these.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

import bnp_optax
from benchmarks.applications.base import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Contestant,
)

# Part of the weights that the sparse initial values leave at zero.
_SPARSITY = 0.9


class Network(nn.Module):
    """Two hidden layers of leaky ReLU.

    Attributes:
      outputs: Their number.
      layer_norm: Whether LayerNorm stands before each activation.
      sparse: Whether initial values are sparse.
    """

    outputs: int
    layer_norm: bool = False
    sparse: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, " n"]) -> Float[Array, " outputs"]:
        """Outputs for one observation."""
        start = sparse_init if self.sparse else nn.initializers.lecun_normal()
        for _ in range(2):
            x = nn.Dense(32, kernel_init=start)(x)
            if self.layer_norm:
                x = nn.LayerNorm(use_scale=False, use_bias=False)(x)
            x = nn.leaky_relu(x)
        return nn.Dense(self.outputs, kernel_init=start)(x)


def sparse_init(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> Float[Array, "inputs units"]:
    """LeCun's uniform values, nine in ten of each unit's set to zero; one at least is kept.

    Source: Elsayed, Vasan, Mahmood, "Streaming Deep Reinforcement Learning Finally Works", 2024.
    """
    keys = jax.random.split(key)
    bound = math.sqrt(1.0 / shape[0])
    values = jax.random.uniform(keys[0], shape, dtype, -bound, bound)
    kept = max(1, shape[0] - math.ceil(_SPARSITY * shape[0]))
    order = jnp.argsort(jax.random.uniform(keys[1], shape), axis=0)
    return jnp.where(order < kept, values, 0.0)


def obgd(learning_rate: Any, kappa: float) -> optax.GradientTransformationExtraArgs:
    """Overshooting-bounded gradient descent along eligibility traces.

    The step shrinks where it would change the prediction by more than the error, as far as the
    traces' size tells:

        M = alpha kappa max(|delta|, 1) ||e||_1,   p <- p - alpha / max(M, 1) delta e

    Source: Elsayed, Vasan, Mahmood, "Streaming Deep Reinforcement Learning Finally Works", 2024,
    Algorithm 3. `update` takes traces and, as `error`, delta.
    """

    def init_fn(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del params
        error = extra_args["error"]
        size = sum(jnp.sum(jnp.abs(trace)) for trace in jax.tree.leaves(updates))
        bound = learning_rate * kappa * jnp.maximum(jnp.abs(error), 1.0) * size
        step = learning_rate / jnp.maximum(bound, 1.0) * error
        return jax.tree.map(lambda trace: -step * trace, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def by_error(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """An optimizer of the gradient delta e, for whom takes the traces e."""
    inner = optax.with_extra_args_support(optimizer)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        error = extra_args.pop("error")
        grads = jax.tree.map(lambda trace: error * trace, updates)
        return inner.update(grads, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


Inputs = Literal["raw", "running", "warm-up"]


@dataclasses.dataclass(frozen=True)
class StreamMethod:
    """How a contestant learns.

    Attributes:
      optimizer: From a rate; takes the gradient delta e, or, where it is `bounded`, the traces.
      inputs: Observations as they are, standardized by running statistics (Welford), or by those
        of the observations before learning.
      layer_norm: Whether the network has LayerNorm.
      in_z: Whether the optimizer takes statistics.
      from_z: Whether initial values are those of z, and the inputs' statistics held.
      bounded: The stream-x recipe: ObGD, sparse initial values, scaled rewards.
    """

    optimizer: Callable[[Any], Any] = optax.adam
    inputs: Inputs = "raw"
    layer_norm: bool = False
    in_z: bool = False
    from_z: bool = False
    bounded: bool = False


# Of `stream-x`, whose optimizer is `obgd`.
_BOUNDED = StreamMethod(inputs="running", layer_norm=True, bounded=True)


def _in_z(rate: Any) -> Any:
    return bnp_optax.bnp_adam(rate, decay=0.999)


def _from_z(rate: Any) -> Any:
    """With a P that scales all inputs, however small."""
    exact: dict[str, Any] = {"eps_rel": 1e-8, "eps_abs": 0.0, "scale_bias": False}
    return bnp_optax.bnp_adam(rate, decay=0.999, **exact)


METHODS = {
    "adam": StreamMethod(),
    "adam-warm-up": StreamMethod(inputs="warm-up"),
    "adam-running": StreamMethod(inputs="running"),
    "norm": StreamMethod(layer_norm=True),
    "norm-warm-up": StreamMethod(inputs="warm-up", layer_norm=True),
    "norm-running": StreamMethod(inputs="running", layer_norm=True),
    "stream-x": _BOUNDED,
    "z": StreamMethod(_in_z, in_z=True),
    "from-z": StreamMethod(_from_z, in_z=True, from_z=True),
    "from-z-norm": StreamMethod(_from_z, layer_norm=True, in_z=True, from_z=True),
    "z-running": StreamMethod(_in_z, inputs="running", in_z=True),
}


class Moments(NamedTuple):
    """Running mean and variance of vectors, by Welford.

    Attributes:
      number: Vectors seen.
      mean: Of them.
      squares: Sum of the squared distances from the mean.
    """

    number: Float[Array, ""]
    mean: Float[Array, " n"]
    squares: Float[Array, " n"]

    @staticmethod
    def of(rows: Float[Array, "k n"]) -> "Moments":
        """The moments of some vectors."""
        mean = rows.mean(0)
        squares = jnp.sum((rows - mean[None]) ** 2, 0)
        return Moments(jnp.asarray(rows.shape[0], jnp.float32), mean, squares)

    def add(self, row: Float[Array, " n"]) -> "Moments":
        """With one more vector."""
        number = self.number + 1.0
        mean = self.mean + (row - self.mean) / number
        return Moments(number, mean, self.squares + (row - self.mean) * (row - mean))

    def standardized(self, row: Float[Array, " n"]) -> Float[Array, " n"]:
        """A vector in units of the standard deviation from the mean."""
        return (row - self.mean) / jnp.sqrt(self.squares / self.number + 1e-12)


CONTESTANTS = (
    Contestant("adam", "Adam", 1e-3),
    Contestant("adam-warm-up", "Adam, inputs standardized once", 1e-3, color=SKY),
    Contestant("adam-running", "Adam, inputs by Welford", 1e-3, color=BLUE),
    Contestant("norm", "LayerNorm + Adam", 1e-3, dashes="--"),
    Contestant("norm-warm-up", "LayerNorm + Adam, standardized once", 1e-3, color=SKY, dashes="--"),
    Contestant("norm-running", "LayerNorm + Adam, Welford", 1e-3, color=BLUE, dashes="--"),
    Contestant("stream-x", "stream-x recipe", 1.0, color=GREEN),
    Contestant("z", "Adam in z", 1e-3, ours=True, color=ORANGE),
    Contestant("from-z", "Adam in z, from z", 1e-3, ours=True, color=VERMILION),
    Contestant(
        "from-z-norm",
        "LayerNorm + Adam in z, from z",
        1e-3,
        ours=True,
        color=VERMILION,
        dashes="--",
    ),
    Contestant("z-running", "Adam in z, Welford", 1e-3, ours=True, color=PURPLE),
)
