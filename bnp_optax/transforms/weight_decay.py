"""Weight decay on either side of a preconditioner."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bnp_optax._checks import check_rate

Mask = Any | Callable[[optax.Params], Any] | None


def zspace_weight_decay(
    weight_decay: optax.ScalarOrSchedule, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """L2 regularization of z: add weight_decay * p *after* preconditioning.

    The penalty lambda ||z||^2 has the gradient 2 lambda z in z, which P maps to 2 lambda p:
    decoupled weight decay with weight_decay = 2 lambda, whatever P is. AdamW is this with Adam's P.
    Place it after `precondition` and before the learning rate, or inside `in_zspace`, where what it
    sees is z. Prefer it to `pspace_weight_decay`: it shrinks all parameters at one rate, well
    scaled or not.

    Args:
      weight_decay: 2 lambda >= 0, or a schedule of it.
      mask: Tree of booleans, or a function of the parameters that returns one: where to decay.

    Raises:
      ValueError: If `weight_decay` is negative; at `update`, if `params` is not given.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import bnp_optax
      >>> tx = optax.chain(bnp_optax.zspace_weight_decay(0.1), optax.scale(-1.0))
      >>> params = {"w": jnp.array([2.0, -4.0])}
      >>> updates, _ = tx.update({"w": jnp.zeros(2)}, tx.init(params), params)
      >>> bool(jnp.allclose(updates["w"], -0.1 * params["w"]))
      True

    Source: Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization", (9).
    """
    return _decay(weight_decay, mask)


def pspace_weight_decay(
    weight_decay: optax.ScalarOrSchedule, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """L2 regularization of p: add weight_decay * p *before* preconditioning.

    The penalty lambda ||p||^2 adds 2 lambda p to the gradient, which is then preconditioned: the
    update has M (grad + 2 lambda p). This is what "Adam with L2" does, and like it decays most
    where M is large. Place it before `precondition` or `in_zspace`.

    Args:
      weight_decay: 2 lambda >= 0, or a schedule of it.
      mask: Tree of booleans, or a function of the parameters that returns one: where to decay.

    Raises:
      ValueError: If `weight_decay` is negative; at `update`, if `params` is not given.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import bnp_optax
      >>> tx = optax.chain(bnp_optax.pspace_weight_decay(0.1), optax.sgd(1.0))
      >>> params = {"w": jnp.array([2.0, -4.0])}
      >>> updates, _ = tx.update({"w": jnp.zeros(2)}, tx.init(params), params)
      >>> bool(jnp.allclose(updates["w"], -0.1 * params["w"]))
      True

    Source: Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization", (10), whose last formula has a misprinted sign.
    """
    return _decay(weight_decay, mask)


def _decay(
    weight_decay: optax.ScalarOrSchedule, mask: Mask
) -> optax.GradientTransformationExtraArgs:
    check_rate("weight_decay", weight_decay)

    def decay_of(params: optax.Params) -> optax.GradientTransformation:
        real = jax.tree.map(lambda p: jnp.issubdtype(jnp.result_type(p), jnp.inexact), params)
        # Integer leaves, which no gradient step moves, are left alone.
        return optax.masked(optax.add_decayed_weights(weight_decay, mask), real)

    def init_fn(params: optax.Params) -> Any:
        return decay_of(params).init(params)

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        # Optax would ask a function for the mask of the updates, which tell less.
        decay = decay_of(updates if params is None else params)
        return decay.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
