"""What of the preconditioner to log beside the loss."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from bnp_optax._tree import named_leaves
from bnp_optax.diagnostics.conditioning import conditioning
from bnp_optax.layers import Layers
from bnp_optax.preconditioners.bnp_operator import bnp_states


def metrics(opt_state: Any, layers: Layers | None = None) -> dict[str, Array]:
    r"""Scalars that tell how the layers are preconditioned, to log at any step.

    * `layers_never_seen`: covered layers of which no statistics have entered, so that P is the
      identity there: a layer that did not run, or whose statistics were all rejected.
    * `batches_rejected`: batches times layers whose statistics were not finite or had a negative
      variance. Those that were bounded by `max_ratio` have entered.
    * `kappa_max`: the largest kappa(D) of a layer.
    * `kappa/<kernel>`, `q/<kernel>`: kappa(D) >= 1 and q of each layer; q is that of the largest
      batch so far.

    Args:
      opt_state: The state of an optimizer, in which every `BNPState` is found, or a `TrainState`.
      layers: The layers to tell of, from `find_layers`; None for all.

    Returns:
      A flat dict of scalars. It may be called under `jax.jit`.

    Raises:
      ValueError: If there is no `BNPState`, or `layers` has a kernel that it has not.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jnp.array([[0.0, 0.0], [2.0, 20.0]])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
      >>> tx = bnp_optax.bnp_adam(1e-3)
      >>> _, state = tx.update(grads, tx.init(params), params, layer_stats=stats)
      >>> logged = bnp_optax.metrics(state)
      >>> sorted(logged)
      ['batches_rejected', 'kappa/kernel', 'kappa_max', 'layers_never_seen', 'q/kernel']
      >>> int(logged["layers_never_seen"]), float(logged["q/kernel"])
      (0, 1.0)

    Source: kappa(D): Lange, Helfrich, Ye, JMLR 2022, Section 3.3, after Theorem 4.
    """
    kappas = conditioning(opt_state, layers)
    never_seen = rejected = jnp.zeros((), jnp.int32)
    result: dict[str, Array] = {}
    for state in bnp_states(opt_state):
        for name, numbers in named_leaves(state.numbers).items():
            if name in kappas:
                inv_q, n_entered, n_rejected = numbers[:3]
                result[f"q/{name}"] = 1.0 / inv_q
                never_seen = never_seen + (n_entered == 0)
                rejected = rejected + n_rejected.astype(jnp.int32)
    result |= {f"kappa/{name}": kappa for name, kappa in kappas.items()}
    largest = jnp.max(jnp.stack([*kappas.values(), jnp.ones(())]))
    return result | {
        "layers_never_seen": never_seen,
        "batches_rejected": rejected,
        "kappa_max": largest,
    }
