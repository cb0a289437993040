"""What of the preconditioner to log beside the loss."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from bnp_optax._tree import named_leaves, quoted
from bnp_optax.diagnostics.conditioning import conditioning
from bnp_optax.layers import Layers
from bnp_optax.preconditioners.bnp_operator import bnp_states, scalings
from bnp_optax.preconditioners.layout import layers_of
from bnp_optax.preconditioners.numbers import Numbers
from bnp_optax.preconditioners.whiten_operator import (
    Root,
    WhitenOperator,
    roots,
    whiten_states,
)


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

    Of `whiten` D is diag(1, S), with no q; its norms in z are of kernels named `kernel`, or in
    `layers`, of which it is known what axes they sum over.

    Args:
      opt_state: The state of an optimizer, in which every `BNPState` and `WhitenState` is found, or
        a `TrainState`.
      layers: The layers to tell of, from `find_layers`; None for all.
      updates: What `update` returned with this state, or None.

    Returns:
      A flat dict of scalars. It may be called under `jax.jit`.

    Raises:
      ValueError: If there is neither, or `layers` has a kernel that it has not, or `updates`
        lacks a kernel; if the state is that of several networks, stacked by `jax.vmap`.

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
    for name, of in _layers_of(opt_state, layers, updates):
        if name not in kappas:
            continue
        result[f"gain/{name}"] = of.gain
        gains.append(of.gain)
        if of.inv_q is not None:
            result[f"q/{name}"] = 1.0 / of.inv_q
        never_seen = never_seen + (of.entered == 0)
        rejected = rejected + of.rejected.astype(jnp.int32)
        if moved is not None:
            result |= _norms(name, moved, of.in_z)
    result |= {f"kappa/{name}": kappa for name, kappa in kappas.items()}
    gain_of_each = jnp.stack([*gains, *([] if gains else [jnp.ones(())])])
    return result | {
        "layers_never_seen": never_seen,
        "batches_rejected": rejected,
        "kappa_max": jnp.max(jnp.stack([*kappas.values(), jnp.ones(())])),
        "gain_spread": jnp.max(gain_of_each) / jnp.min(gain_of_each),
    }


class _OfLayer(NamedTuple):
    """What a state says of one layer; `in_z` is the kernel's update there, where it is known."""

    gain: Array
    inv_q: Array | None
    entered: Array
    rejected: Array
    in_z: Array | None


def _layers_of(
    opt_state: Any, layers: Layers | None, updates: Any
) -> Iterator[tuple[str, _OfLayer]]:
    named = {} if updates is None else named_leaves(updates)
    for state in bnp_states(opt_state):
        for name, scaling in scalings(state).items():
            of = Numbers.of(scaling.numbers)
            in_z = named[name] / (scaling.diagonal * of.inv_q) if name in named else None
            yield name, _OfLayer(scaling.gain, of.inv_q, of.entered, of.rejected, in_z)
    for state in whiten_states(opt_state):
        found = roots(state)
        in_z = _whitened(found, layers, updates)
        for name, (_, entered, rejected) in named_leaves(state.numbers).items():
            yield name, _OfLayer(found[name].gain, None, entered, rejected, in_z.get(name))


def _whitened(found: dict[str, Root], layers: Layers | None, updates: Any) -> dict[str, Array]:
    """S^-1 of the updates of those kernels that it is known of which axes they sum over."""
    if updates is None:
        return {}
    known = layers_of(updates, layers)
    here = {name: layer for name, layer in known.items() if name in found}
    solved = named_leaves(WhitenOperator(found, here).solve(updates))
    return {name: solved[name] for name in here}


def _norms(name: str, updates: dict[str, Any], in_z: Array | None) -> dict[str, Array]:
    if name not in updates:
        msg = (
            f"`updates` has no `{name}`, but {quoted(updates)}. Pass what `update` returned with "
            "this state."
        )
        raise ValueError(msg)
    norms = {"update_norm": updates[name], "update_norm_in_z": in_z}
    return {
        f"{key}/{name}": jnp.linalg.norm(jnp.asarray(x, jnp.float32).ravel())
        for key, x in norms.items()
        if x is not None
    }
