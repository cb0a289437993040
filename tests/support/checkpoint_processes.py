"""Programs that `test_checkpoints.py` runs: training by two processes, and restoring elsewhere."""

import os
import pathlib
import signal
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bnp_optax
from support import make_checkpoints


def by_two_processes(process, port, folder, n_steps, killed_after):
    """Half of each batch in either process; process 0 saves every step, process 1 may be killed."""
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    tx = make_checkpoints.optimizers()["bnp_adam"]

    @jax.jit
    def step(tree, x):
        _, grads, stats = bnp_optax.value_and_grad(make_checkpoints.loss_fn)(tree["params"], x)
        updates, state = tx.update(grads, tree["opt_state"], tree["params"], layer_stats=stats)
        params = jax.tree.map(jnp.add, tree["params"], updates)
        return jax.lax.with_sharding_constraint({"params": params, "opt_state": state}, everywhere)

    file, tree, first = folder / "state.msgpack", make_checkpoints.start(tx), 0
    if file.exists():
        saved = flax.serialization.from_bytes({"step": 0, "tree": tree}, file.read_bytes())
        tree, first = saved["tree"], saved["step"]
    tree = jax.tree.map(
        lambda a: jax.make_array_from_callback(
            np.shape(a), everywhere, lambda index: np.asarray(a)[index]
        ),
        tree,
    )
    for i in range(first, n_steps):
        x = make_checkpoints.batch(i)
        x = jax.make_array_from_callback(x.shape, rows, lambda index, x=x: x[index])
        tree = step(tree, x)
        local = jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), tree)
        if process == 0:
            part = file.with_suffix(".part")
            part.write_bytes(flax.serialization.to_bytes({"step": i + 1, "tree": local}))
            part.replace(file)
        print("step", i, flush=True)
        if process == 1 and i + 1 == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)


def on_other_meshes(folder):
    """Save from 8 devices, restore on one and on 4 x 2: the same bits, and the same next step."""
    jax.config.update("jax_num_cpu_devices", 8)
    tx = make_checkpoints.optimizers()["bnp_adam"]
    tree, _ = make_checkpoints.train(tx, make_checkpoints.start(tx), 0, 3)
    whole = jax.tree.map(np.asarray, tree)
    meshes = {
        "8": jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)),
        "1": jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[3:4]),
        "4x2": jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2),
    }

    def placed(mesh):
        """Each array over as many of the mesh's axes as divide one of its own."""

        def sharding(a):
            spec = [None] * a.ndim
            for name, size in mesh.shape.items():
                for axis, length in enumerate(a.shape):
                    if spec[axis] is None and length % size == 0:
                        spec[axis] = name
                        break
            return NamedSharding(mesh, PartitionSpec(*spec))

        return jax.tree.map(sharding, whole)

    sharded = jax.device_put(whole, placed(meshes["8"]))
    assert any(not a.sharding.is_fully_replicated for a in jax.tree.leaves(sharded))
    for save_from, restore_on in (("8", "1"), ("1", "4x2"), ("4x2", "8")):
        target = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            whole,
            placed(meshes[restore_on]),
        )
        path = folder / f"from-{save_from}"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, sharded)
            checkpointer.wait_until_finished()
            sharded = checkpointer.restore(path, target)
        for got, want, place in zip(*map(jax.tree.leaves, (sharded, whole, target)), strict=True):
            np.testing.assert_array_equal(got, want)
            assert got.sharding == place.sharding
        # Old versions of XLA cannot partition the gradient of a grouped convolution.
        replicated = jax.device_put(sharded, NamedSharding(meshes[restore_on], PartitionSpec()))
        after, losses = make_checkpoints.train(tx, replicated, 3, 1)
        want_after, want_losses = make_checkpoints.train(tx, whole, 3, 1)
        np.testing.assert_allclose(losses, want_losses, rtol=1e-6)
        for got, want in zip(*map(jax.tree.leaves, (after, want_after)), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
        print("restored on", restore_on, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "two":
        process, port, folder, n_steps, killed_after = sys.argv[2:]
        by_two_processes(
            int(process), int(port), pathlib.Path(folder), int(n_steps), int(killed_after)
        )
    else:
        on_other_meshes(pathlib.Path(sys.argv[2]))
