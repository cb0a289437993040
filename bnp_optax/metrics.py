"""What of the preconditioner to log beside the loss."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from bnp_optax._tree import named_leaves, quoted
from bnp_optax.diagnostics.conditioning import conditioning
from bnp_optax.layers import Layers
from bnp_optax.preconditioners.bnp_operator import Scaling, bnp_states, scalings


def metrics(
    opt_state: Any, layers: Layers | None = None, *, updates: Any = None
) -> dict[str, Array]:
    r"""Scalars that tell how the layers are preconditioned, to log at any step.

    * `layers_never_seen`: covered layers of which no statistics have entered, so that P is the
      identity there: a layer that did not run, or whose statistics were all rejected.
    * `batches_rejected`: batches times layers whose statistics were not finite or had a negative
      variance. Those that were bounded by `max_ratio` have entered.
    * `kappa_max`: the largest kappa(D) of a layer.
    * `gain_spread`: the largest gain of a layer divided by the smallest.
    * `kappa/<kernel>`, `q/<kernel>`: kappa(D) >= 1 and q of each layer; q is that of the largest
      batch so far.
    * `gain/<kernel>`: the root mean square of 1/(sigma~ q), the kernel's entries of P. An optimizer
      in z whose steps are of one size, such as Adam, moves the kernel by so many times its learning
      rate, and gradient descent by the square of it times its own: the layer's effective learning
      rate, relative to the plain optimizer's.
    * `update_norm/<kernel>`, `update_norm_in_z/<kernel>`: Euclidean norms of the kernel's update in
      p, and of what it is in z; only with `updates`.

    Args:
      opt_state: The state of an optimizer, in which every `BNPState` is found, or a `TrainState`.
      layers: The layers to tell of, from `find_layers`; None for all.
      updates: What `update` returned with this state, or None.

    Returns:
      A flat dict of scalars. It may be called under `jax.jit`.

    Raises:
      ValueError: If there is no `BNPState`, or `layers` has a kernel that it has not, or `updates`
        lacks a kernel.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jnp.array([[0.0, 0.0], [2.0, 20.0]])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
      >>> tx = bnp_optax.bnp_adam(1e-3)
      >>> updates, state = tx.update(grads, tx.init(params), params, layer_stats=stats)
      >>> logged = bnp_optax.metrics(state, updates=updates)
      >>> for name in sorted(logged):
      ...     print(name)
      batches_rejected
      gain/kernel
      gain_spread
      kappa/kernel
      kappa_max
      layers_never_seen
      q/kernel
      update_norm/kernel
      update_norm_in_z/kernel
      >>> int(logged["layers_never_seen"]), float(logged["q/kernel"])
      (0, 1.0)

    Source: kappa(D): Lange, Helfrich, Ye, JMLR 2022, Section 3.3, after Theorem 4.
    """
    kappas = conditioning(opt_state, layers)
    moved = None if updates is None else named_leaves(updates)
    never_seen = rejected = jnp.zeros((), jnp.int32)
    gains, result = [], {}
    for state in bnp_states(opt_state):
        found = scalings(state)
        for name, numbers in named_leaves(state.numbers).items():
            if name not in kappas:
                continue
            inv_q, n_entered, n_rejected = numbers[:3]
            result[f"q/{name}"] = 1.0 / inv_q
            gain = found[name].gain
            result[f"gain/{name}"] = gain
            gains.append(gain)
            never_seen = never_seen + (n_entered == 0)
            rejected = rejected + n_rejected.astype(jnp.int32)
            if moved is not None:
                result |= _norms(name, moved, found[name])
    result |= {f"kappa/{name}": kappa for name, kappa in kappas.items()}
    gain_of_each = jnp.stack([*gains, *([] if gains else [jnp.ones(())])])
    return result | {
        "layers_never_seen": never_seen,
        "batches_rejected": rejected,
        "kappa_max": jnp.max(jnp.stack([*kappas.values(), jnp.ones(())])),
        "gain_spread": jnp.max(gain_of_each) / jnp.min(gain_of_each),
    }


def _norms(name: str, updates: dict[str, Any], scaling: Scaling) -> dict[str, Array]:
    if name not in updates:
        msg = (
            f"`updates` has no `{name}`, but {quoted(updates)}. Pass what `update` returned with "
            "this state."
        )
        raise ValueError(msg)
    update = jnp.asarray(updates[name], jnp.float32)
    in_z = update / (scaling.diagonal * scaling.inv_q)
    return {
        f"update_norm/{name}": jnp.linalg.norm(update.ravel()),
        f"update_norm_in_z/{name}": jnp.linalg.norm(in_z.ravel()),
    }
