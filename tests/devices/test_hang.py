"""A program on eight devices ends: stacks of matrices on a CPU can wait for each other for ever."""

import inspect
import os
import subprocess
import sys

# Seconds; it takes about ten.
DEADLINE = 240.0


def whitening_of_stacked_layers(devices=8):
    """Layers of two shapes, stacked by scan, on copies of the parameters."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import bnp_optax

    def drawn(*shape):
        return jnp.asarray(np.random.default_rng(0).normal(size=shape) * 0.2, jnp.float32)

    def loss_fn(params, x):
        def block(h, layers):
            for layer in layers.values():
                h = jnp.tanh(h @ layer["kernel"] + layer["bias"])
            return h, None

        return jnp.mean((jax.lax.scan(block, x, params)[0] - 1.0) ** 2)

    params = {
        "a": {"kernel": drawn(8, 16, 32), "bias": jnp.zeros((8, 32))},
        "b": {"kernel": drawn(8, 32, 16), "bias": jnp.zeros((8, 16))},
    }
    tx = bnp_optax.whiten_adam()

    @jax.jit
    def step(params, state, x):
        _, grads, stats = bnp_optax.value_and_grad(loss_fn, second_moments=True)(params, x)
        updates, state = tx.update(grads, state, params, layer_stats=stats)
        return optax.apply_updates(params, updates), state

    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(drawn(64, 16), NamedSharding(mesh, P("data")))
    carry = jax.device_put((params, tx.init(params)), NamedSharding(mesh, P()))
    for _ in range(10):
        carry = jax.block_until_ready(step(*carry, x))


def test_whitening_of_stacked_layers_ends():
    function = whitening_of_stacked_layers
    source = f"{inspect.getsource(function)}\n\n{function.__name__}()\n"
    # As users run it: a program that is not optimized did not hang.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", source], check=True, timeout=DEADLINE, env=env)
