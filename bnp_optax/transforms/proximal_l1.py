"""L1 regularization by its proximal step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from bnp_optax._checks import check_rate
from bnp_optax._tree import BIAS, is_named, path_name
from bnp_optax.transforms.integers import is_integer


class ProximalL1State(NamedTuple):
    """State of `proximal_l1`.

    Attributes:
      count: Number of steps, for schedules.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]


def proximal_l1(
    strength: optax.ScalarOrSchedule,
    learning_rate: optax.ScalarOrSchedule,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Turn the step p + u into the proximal step of strength ||p||_1: exact zeros.

    The new parameters are the soft threshold of those that the step would have made,

        sign(p + u) max(|p + u| - strength * learning_rate, 0).

    **Last in a chain**, after the learning rate: whatever follows would move the parameters off
    the threshold, and what is zero would not stay so. Inside `in_zspace`, last in the inner chain,
    it is L1 of z: for a diagonal P it thresholds p_i at strength * learning_rate * P_ii, so well
    and badly scaled parameters alike. After `apply_updates` the zeros are exact, through
    `in_zspace` too.

    **When to use which.** In p for weights that one reads as they are (selection of inputs by a
    first layer). In z to remove what matters least to the outputs: z is the weight times the
    input's standard deviation, so a large weight on a faint input goes before a small one on a
    strong input. A subgradient of ||p||_1 in the loss gives no zeros, and Adam divides it by the
    gradient's size.

    Args:
      strength: lambda >= 0, or a schedule of it.
      learning_rate: That of the step, > 0, or its schedule.
      mask: Tree of booleans, or a function of the parameters that returns one: what to penalize.
        None penalizes all but leaves named `bias` and those with less than two axes.

    Raises:
      ValueError: If `strength` or `learning_rate` is negative; at `update`, if no `params` are
        given.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import bnp_optax
      >>> tx = optax.chain(optax.sgd(0.1), bnp_optax.proximal_l1(2.0, 0.1))
      >>> params = {"kernel": jnp.array([[0.1, -1.0]])}
      >>> updates, _ = tx.update({"kernel": jnp.zeros((1, 2))}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[0.0, -0.800000011920929]]

    Source: Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization" (L1 by the same argument as (9)); Parikh and Boyd, "Proximal Algorithms", 2014.
    """
    check_rate("strength", strength)
    check_rate("learning_rate", learning_rate)

    def init_fn(params: optax.Params) -> ProximalL1State:
        del params
        return ProximalL1State(jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, ProximalL1State]:
        del extra_args
        if params is None:
            msg = "`proximal_l1` needs `params`: call `tx.update(grads, state, params)`."
            raise ValueError(msg)
        scalars = [s(state.count) if callable(s) else s for s in (strength, learning_rate)]
        threshold = scalars[0] * scalars[1]

        def proximal(u: Array, p: Array) -> Array:
            if is_integer(p):
                return u
            stepped = p + u
            shrunk = jnp.sign(stepped) * jnp.maximum(jnp.abs(stepped) - threshold, 0.0)
            return (shrunk - p).astype(u.dtype)

        return jax.tree.map(proximal, updates, params), ProximalL1State(state.count + 1)

    proximal = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    chosen = optax.masked(proximal, _penalized if mask is None else mask)
    return optax.with_extra_args_support(chosen)


def _penalized(params: optax.Params) -> Any:
    """All floating-point leaves with two or more axes that are not named `bias`."""
    return jax.tree.map_with_path(
        lambda path, p: (
            jnp.ndim(p) >= 2
            and jnp.issubdtype(jnp.result_type(p), jnp.floating)
            and not is_named(path_name(path), BIAS)
        ),
        params,
    )
