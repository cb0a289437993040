"""Flax's `TrainState`, with statistics."""

from typing import Any

import optax
from flax.training import train_state

_LEFT_OUT: Any = object()


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
        extra = {} if layer_stats is _LEFT_OUT else {"layer_stats": layer_stats}
        tx = optax.with_extra_args_support(self.tx)

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            return tx.update(updates, state, params, **extra)

        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        stepped: Any = train_state.TrainState.apply_gradients(bound, grads=grads, **kwargs)
        return stepped.replace(tx=kwargs.get("tx", self.tx))
