"""The heat equation in raw units: what the benchmark says of short runs."""

import json

import pytest

from benchmarks import heat
from benchmarks.heat import CONTESTANTS, Config

pytestmark = pytest.mark.slow


def test_numbers_come_with_their_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(heat, "CONTESTANTS", (CONTESTANTS[0], CONTESTANTS[-1]))
    out = tmp_path / "heat.json"
    heat.main(Config(rates=(1e-3,), steps=3, seeds=1, out=out))
    written = json.loads(out.read_text())
    assert written["environment"]["versions"]["jax"]
    assert set(written["results"]) == {one.label for one in heat.CONTESTANTS}
    assert "Relative error" in capsys.readouterr().out


def test_from_z_the_network_learns_in_raw_units():
    adam, from_z = (heat.train(one, 3e-3, 0, 500) for one in (CONTESTANTS[0], CONTESTANTS[-1]))
    assert from_z < 0.2 < adam
