"""Flax's `TrainState`, with statistics."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

from bnp_optax._optional import needs_flax

with needs_flax("bnp_optax.TrainState"):
    from flax.training import train_state

from bnp_optax.statistics import Layer, LayerStats

_LEFT_OUT: Any = object()
# What Flax overwrites with its gradient, such as the scales of FP8. Where `params` has it, the
# transformation gets `params["params"]` alone.
_OVERWRITTEN = "_overwrite_with_gradient"
_PREFIX = "params/"


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` whose `apply_gradients` takes `layer_stats`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> state = bnp_optax.TrainState.create(
      ...     apply_fn=model.apply, params=params, tx=bnp_optax.bnp_adam(1e-3)
      ... )
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> loss, grads, stats = bnp_optax.value_and_grad(loss_fn)(state.params)
      >>> state = state.apply_gradients(grads=grads, layer_stats=stats)
      >>> int(state.step)
      1
    """

    def apply_gradients(
        self, *, grads: Any, layer_stats: Any = _LEFT_OUT, **kwargs: Any
    ) -> "TrainState":
        """One step of `tx`.

        Args:
          grads: Gradients, of the structure of `params`.
          layer_stats: Passed on to `tx.update`; None reuses the running statistics. May be left
            out for a `tx` that needs none.
          **kwargs: Fields to replace.

        Returns:
          The state after the step, with `step` one higher.
        """
        if _OVERWRITTEN in grads:
            layer_stats = _without_prefix(layer_stats)
        extra = {} if layer_stats is _LEFT_OUT else {"layer_stats": layer_stats}
        tx = optax.with_extra_args_support(self.tx)

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            return tx.update(updates, state, params, **extra)

        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        stepped: Any = train_state.TrainState.apply_gradients(bound, grads=grads, **kwargs)
        return stepped.replace(tx=kwargs.get("tx", self.tx))


def _without_prefix(layer_stats: Any) -> Any:
    """Statistics of the kernels in `params`, as they are called in `params["params"]`."""
    if not isinstance(layer_stats, Mapping):
        return layer_stats

    def layer_of(layer: Layer) -> Layer:
        bias = None if layer.bias is None else layer.bias.removeprefix(_PREFIX)
        return dataclasses.replace(layer, kernel=layer.kernel.removeprefix(_PREFIX), bias=bias)

    return {
        name.removeprefix(_PREFIX): dataclasses.replace(stats, layer=layer_of(stats.layer))
        if isinstance(stats, LayerStats)
        else stats
        for name, stats in layer_stats.items()
    }
