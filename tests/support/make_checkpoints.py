"""Write the checkpoints that `test_checkpoints.py` restores; run it to write them anew.

They are in the repository so that a state that later versions cannot read does not go unnoticed.
If a change of the state is meant, write them anew and say in the changelog that old states cannot
be loaded.
"""

import json
import pathlib

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import bnp_optax

DATA = pathlib.Path(__file__).parents[1] / "data"
N_BEFORE, N_AFTER = 3, 3


class Net(nn.Module):
    """Two layers: a grouped convolution, and a dense one without a bias."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(8, (3,), feature_group_count=2, name="a")(x))
        return nn.Dense(1, use_bias=False, name="b")(x.reshape(len(x), -1))


def batch(step):
    """Numbers that no version of a random generator changes."""
    index = np.arange(4 * 5 * 4, dtype=np.float32).reshape(4, 5, 4)
    return 3.0 * np.sin(index**2 + 7.0 * step) + 2.0


def loss_fn(params, x):
    return jnp.mean((Net().apply({"params": params}, x) - 1.0) ** 2)


def first_params():
    shapes = jax.eval_shape(Net().init, jax.random.key(0), batch(0))["params"]
    return jax.tree.map(
        lambda p: jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape) / 3, shapes
    )


def optimizers():
    layers = bnp_optax.find_layers(loss_fn, first_params(), batch(0))
    return {
        "bnp_adam": bnp_optax.bnp_adam(1e-2, layers=layers),
        "multi_steps": bnp_optax.multi_steps(
            optax.chain(bnp_optax.bnp_precondition(layers=layers), optax.sgd(1e-2)), 2
        ),
    }


def start(tx):
    params = first_params()
    return {"params": params, "opt_state": tx.init(params)}


def train(tx, tree, first, n_steps):
    """The parameters and state after some steps, and the losses on the way."""

    @jax.jit
    def step(tree, x):
        loss, grads, stats = bnp_optax.value_and_grad(loss_fn)(tree["params"], x)
        updates, state = tx.update(grads, tree["opt_state"], tree["params"], layer_stats=stats)
        return {"params": optax.apply_updates(tree["params"], updates), "opt_state": state}, loss

    losses = []
    for i in range(first, first + n_steps):
        tree, loss = step(tree, batch(i))
        losses.append(float(loss))
    return tree, losses


def write(folder=DATA):
    """A msgpack file and an Orbax folder for each optimizer, and the losses of the next steps."""
    losses = {}
    for name, tx in optimizers().items():
        tree, _ = train(tx, start(tx), 0, N_BEFORE)
        (folder / f"{name}.msgpack").write_bytes(flax.serialization.to_bytes(tree))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / name, tree, force=True)
            checkpointer.wait_until_finished()
        # It says where on this machine the folder was, and nobody reads it.
        (folder / name / "commit_success.txt").unlink(missing_ok=True)
        losses[name] = train(tx, tree, N_BEFORE, N_AFTER)[1]
    (folder / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    write()
