"""The few numbers of a layer from which, with its running mean and variance, P is made.

With the layer's weight w and floor f,

    sigma~^2 = w (sigma^2 + (1 - w)^2 mu^2) + f,

and P is centered about w mu. Without shrinkage w = 1 and f = eps_rel max(sigma^2) + eps_abs; with
it w = 1 / (1 + k c) and f = (1 - w + eps_rel) mean(sigma^2 + (1 - w)^2 mu^2) + eps_abs, maximum
and means over the inputs. So P takes no reduction of any layer, and those of an update are done
for all layers of a shape at once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

Scalar = Float[Array, ""]


class Numbers(NamedTuple):
    """What `bnp` keeps of a layer beside mean and variance, in `BNPState` as one vector.

    Attributes:
      inv_q: 1 / q, 1 before the first statistics.
      entered: How many batches entered the running statistics; inf where these are `fixed`.
      rejected: How many did not, as they were not finite or had a negative variance.
      batch_size: N, the largest of those that entered, or the option `batch_size`.
      largest_var: The largest running variance, which bounds what the next batch can do.
      inv_sample: c, where 1 / c examples are what the running statistics are worth.
      weight: w.
      floor: f.
      bias: P's entry of the bias, beta / q, or 1 / q without `scale_bias`.
      gram_bias: P P^T's, that squared and the sum over the inputs of (w mu / (sigma~ q))^2.
      square_gain: Mean over the inputs of 1 / sigma~^2, by which P scales the kernel.
    """

    inv_q: Any
    entered: Any
    rejected: Any
    batch_size: Any
    largest_var: Any
    inv_sample: Any
    weight: Any
    floor: Any
    bias: Any
    gram_bias: Any
    square_gain: Any

    @classmethod
    def of(cls, vector: Float[Array, "11"]) -> "Numbers":
        """Those of a vector.

        Raises:
          ValueError: If there are not as many.
        """
        check_length(vector)
        return cls(*vector)

    @classmethod
    def at(cls, vector: Float[Array, "11"], name: str) -> Scalar:
        """One of those of a vector, by its name; of each layer a step takes only some."""
        return jax.lax.index_in_dim(vector, cls._fields.index(name), keepdims=False)

    def vector(self) -> Float[Array, "11"]:
        """All of them."""
        return vector(*self)


def check_length(vector: Float[Array, "_"]) -> None:
    """Raise unless a state has as many numbers for a layer as there are."""
    check_alone("bnp", vector)
    if len(vector) != len(Numbers._fields):
        msg = (
            f"The state of `bnp` has {len(vector)} numbers for a layer, but this version keeps "
            f"{len(Numbers._fields)}: it is a state of an older version. Call `init` on the "
            "parameters, and train a few hundred steps for the running statistics to settle."
        )
        raise ValueError(msg)


def check_alone(preconditioner: str, vector: Array) -> None:
    """Raise if a vector of the state of one network has more axes, being of several networks."""
    if jnp.ndim(vector) > 1:
        msg = (
            f"The state of `{preconditioner}` is that of several networks, stacked: call what "
            "takes it under `jax.vmap`, as in `jax.vmap(bnp_optax.metrics)(opt_state)`."
        )
        raise ValueError(msg)


def vector(*numbers: ArrayLike) -> Float[Array, "_"]:
    """A float32 vector; stacked, as in an update, it has the same sharding in an explicit mesh.

    Entry by entry: of more than eight numbers XLA does not fuse a concatenation with what makes
    them, and each of them would be a kernel.
    """
    place, result = np.arange(len(numbers)), jnp.zeros(len(numbers), jnp.float32)
    for i, number in enumerate(numbers):
        result = jnp.where(place == i, jnp.asarray(number, jnp.float32), result)
    return result


# Of a layer without statistics, mean 0 and variance 1, which count as one example.
START = Numbers(1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0)


def floored(mean: Array | None, var: Array, weight: Scalar, floor: Any) -> Array:
    """sigma~^2; `mean` is None in a layer that is not centered."""
    return weight * shrunk(mean, var, weight) + floor


def shrunk(mean: Array | None, var: Array, weight: Scalar) -> Array:
    """sigma^2 + (1 - w)^2 mu^2, the mean square of the inputs about w mu."""
    return var if mean is None else var + ((1.0 - weight) * mean) ** 2
