"""What whitening costs: the roots that are timed are roots, and the passes are trainings."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from benchmarks.cost import whiten
from benchmarks.networks.small import MLP
from bnp_optax.preconditioners.whiten_operator import whiten_states


@pytest.mark.parametrize("root", [whiten.eigh_root, whiten.newton_root])
@pytest.mark.parametrize("power", [2, 4])
def test_roots(root, power):
    matrices, damping = whiten.covariances(12, how_many=2)
    found = root(jnp.asarray(matrices, jnp.float32), jnp.asarray(damping, jnp.float32), power)
    for matrix, by, one in zip(matrices, damping, found, strict=True):
        exact = scipy.linalg.fractional_matrix_power(matrix + by * np.eye(12), -1 / power)
        np.testing.assert_allclose(one, exact, rtol=1e-4, atol=1e-4)


def tiny():
    shapes = whiten._shape(8, 5), whiten._shape(8, dtype=jnp.int32)
    return whiten.ModelOnBatch(MLP((4,), 3, "none"), *shapes, passes=2)


@pytest.mark.parametrize("name", ["SGD", "whiten_adam", "whiten_muon, captured every 10th"])
def test_a_pass_is_twenty_steps(name):
    running = whiten.Running(tiny(), whiten.VARIANTS[name])
    before = running.carry[0]["Dense_0"]["kernel"].copy()
    assert running.seconds() > 0.0
    params, state = running.carry
    assert np.max(np.abs(params["Dense_0"]["kernel"] - before)) > 0.0
    if name != "SGD":
        (whitened,) = whiten_states(state)
        per_pass = 2 if "every" in name else 20
        assert whitened.numbers["Dense_0"]["kernel"][1] == 2 * per_pass


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(whiten, "PROBLEMS", {"tiny": tiny()})
    monkeypatch.setattr(
        whiten, "VARIANTS", {name: whiten.VARIANTS[name] for name in ("SGD", "whiten_adam")}
    )
    whiten.main(whiten.WhitenConfig(turns=1, sizes=(4,), out=tmp_path / "cost.json"))
    found = json.loads((tmp_path / "cost.json").read_text())
    assert found["environment"]["versions"]["jax"]
    assert found["results"]["flops"]["tiny"]["SGD"] == 1.0
    assert found["results"]["flops"]["tiny"]["whiten_adam"] > 1.0
    assert found["results"]["time"]["tiny"]["SGD"]["ratio"] == 1.0
    assert found["results"]["roots"]["4"]["Newton, error"] < 1e-5
    assert "4 x 4" in capsys.readouterr().out
