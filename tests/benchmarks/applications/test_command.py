"""The frame of the applications: search, table, figure, and going on where it stopped."""

import json
import os

import numpy as np
import pytest
from support.toy_application import APPLICATION

from benchmarks.applications import command, search
from benchmarks.applications.base import Application, Contestant
from benchmarks.applications.report import as_table

CONTESTANTS = (
    Contestant("good", "Good", 1e-2),
    Contestant("bad", "Bad", 1e-2),
    Contestant("illegal", "Illegal", 1e-2, legal=False),
    Contestant("ours", "Ours", 1e-3, ours=True),
)
ERRORS = {"good": 2.0, "bad": 3.0, "illegal": 0.1, "ours": 1.0}


def application(calls, contestants=CONTESTANTS):
    def train(name, rate, seeds, steps):
        calls.append((name, rate, tuple(seeds)))
        if rate > 0.1:
            return np.full((len(seeds), 2), np.nan)
        # Best at 0.03, and a little worse for each seed.
        last = ERRORS[name] * (1 + abs(np.log(rate / 0.03))) + 0.01 * np.arange(len(seeds))
        return np.stack([np.full(len(seeds), 9.0), last], axis=1)

    return Application("toy", "Toy", "error", train, contestants, steps=4)


def test_each_is_tuned_by_its_own_search_on_other_seeds():
    calls = []
    *_, found = search.conduct(application(calls), 3, 1, 4)
    assert {name: x["rate"] for name, x in found["contestants"].items()} == dict.fromkeys(
        ERRORS, 0.03
    )
    reported = [seeds for _, rate, seeds in calls if rate == 0.03 and len(seeds) == 3]
    assert reported == [(0, 1, 2)] * 4
    assert all(seeds == (search.TUNING_SEED,) for _, _, seeds in calls if len(seeds) == 1)
    assert found["contestants"]["ours"]["tuning"]["0.03"] == 1.0


def test_table():
    *_, found = search.conduct(application([]), 3, 1, 4)
    lines = as_table(application([]), found).splitlines()
    assert lines[0] == "|  | rate | error | against Good |"
    assert lines[2].endswith("| against it |")
    assert lines[3] == "| Bad | 0.03 | 3.01 (3 to 3.02) |  |"
    assert lines[4].endswith("| not allowed here |")
    assert lines[5].endswith("| won |")


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(command, "registry", lambda _: {"toy": application(calls, CONTESTANTS[:2])})
    assert command.main(seeds=2, results=tmp_path) == 0
    monkeypatch.setattr(command, "registry", lambda _: {"toy": application(calls)})
    calls.clear()
    assert command.main(seeds=2, results=tmp_path) == 0
    assert {name for name, _, _ in calls} == {"illegal", "ours"}
    found = json.loads((tmp_path / "toy.json").read_text())
    assert list(found["contestants"]) == list(ERRORS)
    assert found["environment"]["versions"]["jax"]
    assert (tmp_path / "toy.png").stat().st_size > 0
    assert "| Ours | 0.03 |" in capsys.readouterr().out
    calls.clear()
    kept = (tmp_path / "toy.json").read_text().replace('"jax"', '"jax of then"')
    (tmp_path / "toy.json").write_text(kept)
    assert command.main(seeds=2, results=tmp_path) == 0
    assert not calls
    assert (tmp_path / "toy.json").read_text() == kept  # With the environment of then.
    assert command.main(seeds=3, results=tmp_path) == 0
    assert {name for name, _, _ in calls} == set(ERRORS)


def test_an_application_that_is_not_there(capsys):
    assert command.main(only=("nothing",)) == 2
    assert "no application matches 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_seed_that_diverged_is_worse_than_any(higher_is_better):
    of = Application(
        *("toy", "Toy", "error", lambda *_: np.array([[1.0], [np.nan]])),
        (Contestant("good", "Good", 1e-2), Contestant("ours", "Ours", 1e-2, ours=True)),
        steps=1,
        higher_is_better=higher_is_better,
    )
    *_, found = search.conduct(of, 2, 1, 1)
    found["contestants"]["good"]["scores"] = [1.0, 1.0]
    text = as_table(of, found)
    assert "| Ours | 0.01 | 1 of 2 seeds diverged | lost |" in text


def test_contestants_in_processes_of_their_own():
    *_, alone = search.conduct(APPLICATION, 2, 1, 4)
    *_, beside = search.conduct(APPLICATION, 2, 1, 4, workers=2)
    assert list(beside["contestants"]) == [one.name for one in APPLICATION.contestants]
    for name, one in beside["contestants"].items():
        assert one["scores"] == alone["contestants"][name]["scores"]
        assert one["curves"][0][0] != os.getpid()
