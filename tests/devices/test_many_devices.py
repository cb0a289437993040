"""Training on eight devices, in every mode of JAX, ends where training on one device does."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import optax
import pytest

import bnp_optax
from benchmarks.scale import command, training
from benchmarks.scale.modes import MODES
from benchmarks.scale.training import (
    BATCH,
    OPTIMIZERS,
    Optimizer,
    error,
    one_device,
    reference,
    train,
)

# An update that is not made, or statistics of one device's share of the rows, are 1e-2 or more.
TOLERANCE = 1e-6


# Where one optimizer in z ends right, others hardly end wrong. Whole matrices are what a kernel
# that is sharded in its type has not.
FIRST = {
    (mode, name)
    for mode in MODES
    for name in OPTIMIZERS
    if name in ("bnp_adam", "zspace_grad_reg") or (name == "whiten_muon" and "explicit" in mode)
}


@pytest.mark.parametrize(
    ("mode", "optimizer"),
    [
        pair if pair in FIRST else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in itertools.product(MODES, OPTIMIZERS)
    ],
)
def test_ends_where_one_device_does(mode, optimizer):
    found = train(MODES[mode](OPTIMIZERS[optimizer], False))
    start = jax.tree.leaves(training.initial())
    assert error(start, reference(optimizer)) > 1e-2
    assert error(found, reference(optimizer)) < TOLERANCE


def in_two_parts():
    """`bnp` in the first layer, `whiten` behind."""
    x, y = training.batches()
    layers = bnp_optax.find_layers(training.loss_of(), training.initial(), x[0], y[0])
    first, *rest = layers
    return bnp_optax.compose(
        bnp_optax.bnp(batch_size=BATCH, layers={first: layers[first]}),
        bnp_optax.whiten(layers={name: layers[name] for name in rest}),
    )


OTHERS = {
    "mean_activation": lambda: bnp_optax.in_zspace(optax.sgd(0.1), bnp_optax.mean_activation()),
    "orthogonalize": lambda: optax.chain(bnp_optax.orthogonalize(), optax.scale(-0.01)),
    "compose": lambda: bnp_optax.in_zspace(optax.sgd(0.01), in_two_parts()),
    "multi_steps": lambda: bnp_optax.multi_steps(bnp_optax.bnp_sgd(0.1, batch_size=BATCH), 2),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("mode", ["explicit, rows", "explicit, FSDP", "shard_map"])
def test_every_transformation_takes_kernels_that_are_sharded_in_their_type(mode, name):
    method = Optimizer(OTHERS[name], lambda: optax.sgd(0.1), second_moments=True)
    expected = train(one_device(method))
    assert error(jax.tree.leaves(training.initial()), expected) > 1e-3
    assert error(train(MODES[mode](method, False)), expected) < TOLERANCE


@pytest.mark.parametrize("mode", ["explicit, rows", "explicit, FSDP", "shard_map", "auto, columns"])
def test_ends_there_but_for_rounding(mode, x64, monkeypatch):
    """In float64 also with Adam's usual eps, which makes steps of what rounding leaves of zeros."""
    initial, batches = training.initial, training.batches

    def doubled(tree):
        return jax.tree.map(lambda a: a.astype(np.float64), tree)

    monkeypatch.setattr(training, "initial", lambda: doubled(initial()))
    monkeypatch.setattr(training, "batches", lambda: doubled(batches()))
    adam = dataclasses.replace(
        OPTIMIZERS["bnp_adam"], make=lambda: bnp_optax.bnp_adam(1e-2, batch_size=BATCH)
    )
    assert error(train(MODES[mode](adam, False)), train(one_device(adam))) < TOLERANCE


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_one_device_s_batch_size_gives_another_q(mode):
    """Where each device sees its rows only, `bnp` must be told how many there are."""
    sgd = dataclasses.replace(OPTIMIZERS["bnp_sgd"], make=lambda: bnp_optax.bnp_sgd(0.1))
    assert error(train(MODES[mode](sgd, False)), train(one_device(sgd))) > 1e-2
    assert error(train(MODES["auto, data"](sgd, False)), train(one_device(sgd))) < TOLERANCE


@pytest.mark.parametrize("optimizer", ["bnp_adam", "whiten_adam", "whiten_muon"])
def test_a_step_is_compiled_once(optimizer):
    """The state starts in the types and shardings that it keeps."""
    for mode in ("explicit, rows", "explicit, FSDP"):
        training = MODES[mode](OPTIMIZERS[optimizer], False)
        start = training.carry
        train(training)
        for before, after in zip(*map(jax.tree.leaves, (start, training.carry)), strict=True):
            assert jax.typeof(before) == jax.typeof(after)
            assert before.sharding == after.sharding


def test_the_benchmark_writes_what_it_measures(tmp_path):
    file = tmp_path / "scale.json"
    assert command.main(output=file, modes=("explicit, rows",)) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["optimizer"] for row in rows] == list(OPTIMIZERS)
    assert all(row["collectives"] > row["plain_collectives"] > 0 for row in rows)
    assert command.failures(rows, 0.0)
    assert not command.failures(rows, TOLERANCE)
    assert command.main(output=file, modes=("none",)) == 2
