"""States restored: from earlier programs, after a kill, elsewhere, into the wrong place."""

import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from support import make_checkpoints
from support.bnp_cases import CASES, assert_trees_equal, drifting_inputs, setting, targets

import bnp_optax

PROCESSES = pathlib.Path(__file__).parents[1] / "support" / "checkpoint_processes.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

# ---------------------------------------------------------------------------------------------
# A checkpoint in the repository.
# ---------------------------------------------------------------------------------------------


def from_msgpack(name, fresh):
    return flax.serialization.from_bytes(
        fresh, (make_checkpoints.DATA / f"{name}.msgpack").read_bytes()
    )


def from_orbax(name, fresh):
    with ocp.StandardCheckpointer() as checkpointer:
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        return checkpointer.restore(make_checkpoints.DATA / name, target)


@pytest.mark.parametrize("restore", [from_msgpack, from_orbax])
@pytest.mark.parametrize("name", ["bnp_adam", "multi_steps"])
def test_a_committed_checkpoint_is_restored_and_training_goes_on(name, restore):
    tx = make_checkpoints.optimizers()[name]
    tree = restore(name, make_checkpoints.start(tx))
    assert_trees_equal(jax.tree.map(jnp.asarray, tree), from_msgpack(name, tree))
    _, losses = make_checkpoints.train(
        tx, tree, make_checkpoints.N_BEFORE, make_checkpoints.N_AFTER
    )
    want = json.loads((make_checkpoints.DATA / "losses.json").read_text())[name]
    np.testing.assert_allclose(losses, want, rtol=1e-4)
    # The state matters: from a fresh one the losses are others, by 50 times the tolerance.
    fresh = tree | {"opt_state": tx.init(tree["params"])}
    others = make_checkpoints.train(tx, fresh, make_checkpoints.N_BEFORE, 3)[1]
    assert abs(others[-1] - want[-1]) > 50 * 1e-4 * want[-1]


def test_the_names_of_the_state_are_those_of_the_checkpoint():
    """What a file has beside these is what a later version would fail to read, or drop."""
    for name, tx in make_checkpoints.optimizers().items():
        raw = flax.serialization.msgpack_restore(
            (make_checkpoints.DATA / f"{name}.msgpack").read_bytes()
        )
        state = flax.serialization.to_state_dict(make_checkpoints.start(tx))
        assert_same_shapes(raw, state)


def assert_same_shapes(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, two)


# ---------------------------------------------------------------------------------------------
# Shapes, and states of other networks.
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_with_layers_the_shapes_of_the_state_are_settled_at_init(name):
    case, params, loss_fn, target_shape = setting(name)
    x, y = drifting_inputs(case.shape, 0), targets(target_shape, 0)
    layers = bnp_optax.find_layers(loss_fn, params, x, y)
    for tx in (
        bnp_optax.bnp_adam(1e-3, layers=layers),
        bnp_optax.multi_steps(bnp_optax.bnp_sgd(0.1, layers=layers), 2),
    ):

        def step(state, tx=tx):
            _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, x, y)
            return tx.update(grads, state, params, layer_stats=stats)[1]

        state = tx.init(params)
        after = jax.eval_shape(step, state)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        for one, two in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
            assert (one.shape, one.dtype) == (two.shape, two.dtype)


def dense(*sizes, names="abc"):
    rng = np.random.default_rng(0)
    return {
        names[i]: {"kernel": jnp.asarray(rng.normal(size=(m, n))), "bias": jnp.zeros(n)}
        for i, (m, n) in enumerate(itertools.pairwise(sizes))
    }


def dense_loss(params, x):
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    return jnp.mean(x**2)


OTHERS = {
    "narrower": (dense(4, 3, 2), r"`a/kernel`.*another network"),
    "wider inside": (dense(5, 4, 2), r"`b/kernel`.*another network"),
    "other names": (dense(5, 3, 2, names="xy"), r"`a/kernel`, `b/kernel`.*was made for `x/kernel`"),
    "deeper": (dense(5, 3, 2, 2), r"made for `a/kernel`, `b/kernel`, `c/kernel`"),
}


@pytest.mark.parametrize("given", ["statistics", "none"])
@pytest.mark.parametrize("other", OTHERS)
def test_the_state_of_another_network_is_refused_by_name(other, given):
    params, (wrong, message) = dense(5, 3, 2), OTHERS[other]
    _, grads, stats = bnp_optax.value_and_grad(dense_loss)(params, jnp.ones((6, 5)))
    tx = bnp_optax.bnp_precondition()
    if given == "statistics":
        with pytest.raises(ValueError, match=message):
            tx.update(grads, tx.init(wrong), params, layer_stats=stats)
    elif other != "deeper":  # Whose state has all that the updates need.
        with pytest.raises(ValueError, match=r"`(a|b)/kernel`.*was made for other parameters"):
            tx.update(grads, tx.init(wrong), params, layer_stats=None)


def test_flax_restores_no_state_of_other_names():
    tx = bnp_optax.bnp_adam(1e-3)
    saved = flax.serialization.to_bytes(tx.init(dense(5, 3, 2, names="xy")))
    with pytest.raises(ValueError, match="do not match"):
        flax.serialization.from_bytes(tx.init(dense(5, 3, 2)), saved)


def test_layers_give_the_shapes_that_a_state_without_them_has_after_its_first_step():
    """Statistics of a grouped convolution widen the state; into a narrow one Flax restores none."""
    case, params, loss_fn, target_shape = setting("conv_grouped")
    x, y = drifting_inputs(case.shape, 0), targets(target_shape, 0)
    tx = bnp_optax.bnp_adam(1e-3)
    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, x, y)
    _, state = tx.update(grads, tx.init(params), params, layer_stats=stats)
    settled = bnp_optax.bnp_adam(1e-3, layers=bnp_optax.find_layers(loss_fn, params, x, y))
    saved = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(settled.init(params), saved)
    assert_trees_equal(restored, state)
    got, _ = settled.update(grads, restored, params, layer_stats=stats)
    want, _ = tx.update(grads, state, params, layer_stats=stats)
    assert_trees_equal(got, want)


# ---------------------------------------------------------------------------------------------
# A kill, and other meshes.
# ---------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def two_processes(folder, n_steps, killed_after=0):
    """Exit codes of both; the one that is left over when the other was killed is killed too."""
    port = str(free_port())
    pair = [
        subprocess.Popen(
            [
                sys.executable,
                PROCESSES,
                "two",
                str(i),
                port,
                folder,
                str(n_steps),
                str(killed_after),
            ],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [pair[1].communicate(timeout=240)[0]]
        if pair[1].returncode != 0:
            pair[0].kill()
        said.append(pair[0].communicate(timeout=240)[0])
    finally:
        for process in pair:
            process.kill()
    return [process.returncode for process in pair], "\n".join(said)


def saved_step(folder):
    return flax.serialization.msgpack_restore((folder / "state.msgpack").read_bytes())["step"]


@pytest.mark.slow
def test_after_one_of_two_processes_was_killed_training_ends_with_the_same_numbers(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    codes, said = two_processes(whole, 6)
    assert codes == [0, 0], said
    codes, said = two_processes(killed, 6, killed_after=3)
    assert codes[1] == -signal.SIGKILL, said
    assert 2 <= saved_step(killed) <= 4
    codes, said = two_processes(killed, 6)
    assert codes == [0, 0], said
    assert saved_step(killed) == 6
    assert (killed / "state.msgpack").read_bytes() == (whole / "state.msgpack").read_bytes()
    # Two processes train as one does.
    tx = make_checkpoints.optimizers()["bnp_adam"]
    want, _ = make_checkpoints.train(tx, make_checkpoints.start(tx), 0, 6)
    raw = flax.serialization.msgpack_restore((whole / "state.msgpack").read_bytes())
    for got, expected in zip(
        jax.tree.leaves(raw["tree"]),
        jax.tree.leaves(flax.serialization.to_state_dict(want)),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_of_eight_devices_is_restored_on_one_and_on_four_by_two(tmp_path):
    run = subprocess.run(
        [sys.executable, PROCESSES, "meshes", tmp_path],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:-1] == [f"restored on {mesh}" for mesh in ("1", "4x2", "8")]
