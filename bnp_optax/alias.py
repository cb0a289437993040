"""Ready-made optimizers in z-space."""

from collections.abc import Callable
from typing import Any, Unpack

import optax
from jax.typing import ArrayLike

from bnp_optax._checks import check_adam, check_flag, check_fraction, check_rate
from bnp_optax.preconditioners import BNPOptions, bnp, rms, takes_options
from bnp_optax.transforms import bnp_precondition, in_zspace, proximal_l1
from bnp_optax.transforms.integers import holding_integers

# Chosen on half of the problems of the benchmarks; docs/decisions.md says by what.
SGD_OPTIONS: BNPOptions = {
    "eps_rel": 1.0,
    "eps_abs": 1e-8,
    "scale": "network",
    "shrinkage": 10.0,
}
ADAM_OPTIONS: BNPOptions = {
    "eps_rel": 0.3,
    "eps_abs": 1e-8,
    "shrinkage": 10.0,
    "scale_bias": True,
    "scale_others": True,
}


@takes_options(bnp, **SGD_OPTIONS)
def bnp_sgd(
    learning_rate: optax.ScalarOrSchedule = 0.03,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    **bnp_options: Unpack[BNPOptions],
) -> optax.GradientTransformationExtraArgs:
    """SGD in z-space: p <- p - learning_rate P P^T g, with P that of `bnp`.

    The plain choice at small batches and for online learning. Momentum, if any, is taken in z.
    One q serves the whole network, so that one learning rate suits networks and batches of
    different sizes, for losses of like curvature: the default is on the safe side for squared
    errors, and a cross-entropy often takes 0.1.

    Args:
      learning_rate: Step size >= 0, or a schedule of it. The default is where to start with any
        problem, chosen on half of the benchmarks' problems; search by factors of 3 from there.
      momentum: Decay of the trace in [0, 1), or None for none.
      nesterov: Whether to use Nesterov momentum.
      **bnp_options: Options of `bnp`, whose defaults here are those that the signature shows:
        robust statistics (`shrinkage`), not the paper's.

    Returns:
      A transformation whose `update` takes `layer_stats` from `value_and_grad`.

    Raises:
      ValueError: If a hyper-parameter is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import optax
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jax.random.normal(jax.random.key(1), (8, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> tx = bnp_optax.bnp_sgd()
      >>> state = tx.init(params)
      >>> _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
      >>> updates, state = tx.update(grads, state, params, layer_stats=stats)
      >>> bool(loss_fn(optax.apply_updates(params, updates)) < loss_fn(params))
      True

    Source: Lange, Helfrich, Ye, JMLR 2022, Algorithms 2 and 3, which themselves are
    `optax.chain(bnp_precondition(), optax.sgd(learning_rate))`.
    """
    check_rate("learning_rate", learning_rate)
    if momentum is not None:
        check_fraction("momentum", momentum)
    check_flag("nesterov", nesterov)
    options = SGD_OPTIONS | bnp_options
    if momentum is None:
        # Without memory the two ways are one, and M in one pass is the cheaper.
        return holding_integers(optax.chain(bnp_precondition(**options), optax.sgd(learning_rate)))
    return in_zspace(optax.sgd(learning_rate, momentum, nesterov), bnp(**options))


@takes_options(bnp, **ADAM_OPTIONS)
def bnp_adam(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    **bnp_options: Unpack[BNPOptions],
) -> optax.GradientTransformationExtraArgs:
    """Adam in z-space, `in_zspace(optax.adam(learning_rate, b1, b2, eps), bnp(**bnp_options))`.

    The first thing to try, at any batch size.

    Args:
      learning_rate: Step size >= 0, or a schedule of it. The default is where to start with any
        problem, chosen on half of the benchmarks' problems; search by factors of 3 from there.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment, >= 0.
      **bnp_options: Options of `bnp`, whose defaults here are those that the signature shows:
        robust statistics (`shrinkage`), not the paper's.

    Returns:
      A transformation whose `update` takes `layer_stats` from `value_and_grad`.

    Raises:
      ValueError: If a hyper-parameter is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import optax
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jax.random.normal(jax.random.key(1), (8, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> tx = bnp_optax.bnp_adam()
      >>> state = tx.init(params)
      >>> _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
      >>> updates, state = tx.update(grads, state, params, layer_stats=stats)
      >>> bool(loss_fn(optax.apply_updates(params, updates)) < loss_fn(params))
      True

    Source: Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization", (4). For the paper's P: `in_zspace(optax.adam(learning_rate), bnp())`.
    """
    check_adam(learning_rate, b1, b2, eps)
    return in_zspace(optax.adam(learning_rate, b1, b2, eps), bnp(**(ADAM_OPTIONS | bnp_options)))


@takes_options(bnp, **ADAM_OPTIONS)
def bnp_adamw(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    **bnp_options: Unpack[BNPOptions],
) -> optax.GradientTransformationExtraArgs:
    """AdamW in z-space: weight decay shrinks z, and so p, by learning_rate * weight_decay.

    A `mask` that spares biases is honest in z: a bias in z is the unit's mean response, which
    decay of the kernel in p would shift.

    Args:
      learning_rate: Step size >= 0, or a schedule of it. The default is where to start with any
        problem, chosen on half of the benchmarks' problems; search by factors of 3 from there.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment, >= 0.
      weight_decay: Strength of the decay, >= 0.
      mask: Where to decay, as in `optax.adamw`.
      **bnp_options: Options of `bnp`, whose defaults here are those that the signature shows:
        robust statistics (`shrinkage`), not the paper's.

    Returns:
      A transformation whose `update` takes `layer_stats` from `value_and_grad`.

    Raises:
      ValueError: If a hyper-parameter is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import optax
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jax.random.normal(jax.random.key(1), (8, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> tx = bnp_optax.bnp_adamw(weight_decay=0.01)
      >>> state = tx.init(params)
      >>> _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
      >>> updates, state = tx.update(grads, state, params, layer_stats=stats)
      >>> bool(loss_fn(optax.apply_updates(params, updates)) < loss_fn(params))
      True

    Source: Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization", (9).
    """
    check_adam(learning_rate, b1, b2, eps)
    check_rate("weight_decay", weight_decay)
    inner = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)
    return in_zspace(inner, bnp(**(ADAM_OPTIONS | bnp_options)))


def adam_l1(
    learning_rate: optax.ScalarOrSchedule,
    l1: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with L1 regularization of its own z: exact zeros.

    Adam is a preconditioned descent with P = diag((sqrt(v) + eps)^(-1/2)). After each of its steps
    comes the proximal step of l1 ||z||_1, which thresholds p_i at l1 * learning_rate * P_ii. With
    l1 = 0 it is Adam. To L1 what AdamW is to L2.

    Args:
      learning_rate: Step size >= 0, or a schedule of it.
      l1: Strength >= 0, or a schedule of it.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment, >= 0.
      mask: What to penalize, as in `proximal_l1`.

    Raises:
      ValueError: If a hyper-parameter is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax
      >>> import bnp_optax
      >>> target = jnp.array([[1.0, 0.01]])
      >>> loss_fn = lambda p: jnp.sum((p["kernel"] - target) ** 2)
      >>> tx, params = bnp_optax.adam_l1(0.01, 0.1), {"kernel": jnp.ones((1, 2))}
      >>> state = tx.init(params)
      >>> for _ in range(300):
      ...     updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> (params["kernel"] == 0.0).tolist()
      [[False, True]]

    Source: Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization" (L1 by the same argument as (9)).
    """
    check_adam(learning_rate, b1, b2, eps)
    check_rate("l1", l1)
    step = optax.chain(
        optax.scale_by_learning_rate(learning_rate), proximal_l1(l1, learning_rate, mask)
    )
    return in_zspace(step, rms(b2, eps), before=optax.ema(b1))
