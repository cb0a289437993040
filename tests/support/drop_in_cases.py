"""The network, data and trainer of the tests of `drop_in`."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax
from support.bnp_cases import assert_trees_close
from support.quick_jit import jit

N_BATCH = 16


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (3,))(x))
        return nn.Dense(2, use_bias=False)(nn.tanh(nn.Dense(5)(x.reshape(len(x), -1))))


MODEL = Net()


BATCHES = np.random.default_rng(0).normal(size=(10, N_BATCH, 6, 3)).astype(np.float32) * 2 + 3


BARE = MODEL.init(jax.random.key(0), BATCHES[0])["params"]


def bare_loss(params, x):
    return jnp.mean((MODEL.apply({"params": params}, x) - 1.0) ** 2)


LAYERS = bnp_optax.find_layers(bare_loss, BARE, BATCHES[0])


OPTIMIZERS = {
    "bnp_sgd": lambda: bnp_optax.bnp_sgd(0.1, layers=LAYERS, batch_size=N_BATCH),
    # At Adam's usual eps, entries of the gradient that are zero but for rounding move too.
    "bnp_adam": lambda: bnp_optax.bnp_adam(1e-2, eps=1e-3, layers=LAYERS, batch_size=N_BATCH),
    "bnp_adamw": lambda: bnp_optax.bnp_adamw(1e-2, eps=1e-3, layers=LAYERS, batch_size=N_BATCH),
}


def wrapped(name="bnp_adam", loss_fn=bare_loss, args=(), **options) -> bnp_optax.DropIn:
    return bnp_optax.drop_in(loss_fn, BARE, OPTIMIZERS[name](), *(args or BATCHES[:1]), **options)


@functools.cache
def explicit(name: str = "bnp_adam", n_steps: int = 10) -> Any:
    """Parameters and state after steps with `value_and_grad`."""
    tx = OPTIMIZERS[name]()
    params, state = BARE, jit(tx.init)(BARE)

    @jit
    def step(params, state, x):
        _, grads, stats = bnp_optax.value_and_grad(bare_loss, layers=LAYERS)(params, x)
        updates, state = tx.update(grads, state, params, layer_stats=stats)
        return optax.apply_updates(params, updates), state

    for x in BATCHES[:n_steps]:
        params, state = step(params, state, x)
    return params, state


class Trainer:
    """One that takes the step itself, as they are written."""

    def __init__(self, loss_fn, params, tx, change=lambda grads: grads):
        self.params, self.state = params, jit(tx.init)(params)

        @functools.partial(jit, donate_argnums=(0, 1))
        def step(params, state, batch):
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            updates, state = tx.update(change(grads), state, params)
            return optax.apply_updates(params, updates), state, loss

        self.step = step

    def fit(self, batches):
        # Donated arrays are gone, and the start is used again.
        self.params, self.state = jax.tree.map(jnp.array, (self.params, self.state))
        for batch in batches:
            self.params, self.state, _ = self.step(self.params, self.state, batch)
        return self


def assert_ends_there(params, name="bnp_adam", n_steps=10, rtol=1e-6):
    assert set(params) == {"params", "layer_stats"}
    assert not params["layer_stats"].any()
    want, _ = explicit(name, n_steps)
    assert_trees_close(bnp_optax.bare_params(params), want, rtol)
    # What the tolerance is to tell apart.
    assert optax.tree.norm(optax.tree.sub(want, BARE)) > 1e-2 * optax.tree.norm(BARE)
