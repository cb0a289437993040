"""Cells: written whole or not at all, and refused if they are something else."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.short_cells import make_cell

from benchmarks.contest import cells
from benchmarks.contest.cells import Cell, CellError

ROOT = Path(__file__).parents[3]


def test_a_cell_comes_back_and_what_is_not_finite_as_nan(tmp_path):
    path = tmp_path / "results" / "digits" / "sgd.json"
    cell = make_cell()
    cells.write(path, cell)
    back = cells.read(path)
    assert back.as_json() == cell.as_json() == json.loads(path.read_text())
    first = back.runs[0]
    assert (first.role, first.rate, first.seed, first.seconds) == ("final", 0.1, 0, 1.5)
    assert first.train_loss.dtype == np.float64
    np.testing.assert_array_equal(first.train_loss, [1, np.nan, np.nan])
    np.testing.assert_array_equal(first.loss, [0.5, np.nan, 0.3333333])
    assert json.loads(path.read_text())["runs"][0]["train_loss"] == [1.0, None, None]
    assert list(path.parent.iterdir()) == [path]


def test_a_skipped_cell_has_a_reason_and_no_runs(tmp_path):
    path = tmp_path / "digits" / "batchnorm.json"
    cell = make_cell(method="batchnorm")
    cells.write(path, Cell(cell.problem, cell.method, skipped="batches of one"))
    assert set(json.loads(path.read_text())) == {"version", "problem", "method", "skipped"}
    back = cells.read(path)
    assert back.skipped == "batches of one"
    assert (back.runs, back.rate, back.complete) == ([], None, False)


def changed(**changes):
    return make_cell().as_json() | changes


def with_run(**changes):
    value = make_cell().as_json()
    value["runs"][1] |= changes
    return value


def without(key):
    value = make_cell().as_json()
    return {name: item for name, item in value.items() if name != key}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no JSON"),
        ('{"version": 1, "prob', "no JSON"),
        (json.dumps(make_cell().as_json())[:-1], "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "a cell is a list, not a dict"),
        ('{"version": NaN}', "no JSON: NaN is no number"),
        (changed(version=2), "version 2 of a cell, expected 1"),
        (changed(version=True), "a cell has a bool as its `version`"),
        (without("version"), "a cell lacks `version`"),
        (without("problem"), "a cell lacks `problem`"),
        (without("runs"), "a cell lacks `runs`"),
        (without("complete"), "a cell lacks `complete`"),
        (changed(problem={"name": "digits"}), "a problem lacks `title`"),
        (changed(method={"name": "sgd"}), "a method lacks `label`"),
        (changed(grid=["0.1"]), "a cell has a str as its `grid`"),
        (changed(environments=[1, 2]), "a cell has a int as its `environments`"),
        (changed(environments=[]), "a run names environment 0 of 0"),
        (changed(skipped=None), "a cell has a NoneType as its `skipped`"),
        (changed(runs=[3]), "a run is a int, not a dict"),
        (with_run(role="warm-up"), "a run's role is 'warm-up'"),
        (with_run(environment=-1), "a run names environment -1 of 1"),
        (with_run(loss=[1.0, 2.0]), "`loss` has 2 points, expected 3"),
        (with_run(score=[1.0, 2.0, 3.0, 4.0]), "`score` has 4 points, expected 3"),
        (with_run(score=[1.0, 2.0, "3"]), "a run has a str as its `score`"),
        (with_run(seconds=None), "a run has a NoneType as its `seconds`"),
    ],
)
def test_what_is_no_cell_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "sgd.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CellError) as caught:
        cells.read(path)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "sgd.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CellError, match="no JSON"):
        cells.read(path)


def test_corrupt_files_are_set_aside_and_none_is_overwritten(tmp_path):
    path = tmp_path / "sgd.json"
    names = []
    for content in ("one", "two", "three"):
        path.write_text(content)
        names.append(cells.set_aside(path).name)
    assert names == ["sgd.json.corrupt", "sgd.json.corrupt-2", "sgd.json.corrupt-3"]
    assert [(tmp_path / name).read_text() for name in names] == ["one", "two", "three"]
    assert not path.exists()


def test_all_cells_are_read_and_the_rest_is_named(tmp_path):
    for problem, method in [("b", "sgd"), ("a", "sgd"), ("a", "adam")]:
        cells.write(tmp_path / problem / f"{method}.json", make_cell(2, problem, method))
    (tmp_path / "a" / "bnp.json").write_text("{")
    (tmp_path / "a" / ".sgd.json.tmp").write_text("{")
    (tmp_path / "a" / "sgd.json.corrupt").write_text("{")
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "b" / "copy.json").write_text((tmp_path / "b" / "sgd.json").read_text())
    found, errors = cells.read_all(tmp_path)
    names = [(cell.problem["name"], cell.method["name"]) for cell in found]
    assert names == [("a", "adam"), ("a", "sgd"), ("b", "sgd")]
    assert [path.relative_to(tmp_path).as_posix() for path, _ in errors] == [
        "a/bnp.json",
        "b/copy.json",
    ]
    assert errors[0][1].startswith("no JSON")
    assert errors[1][1] == "holds b/sgd, which belongs elsewhere"
    assert cells.read_all(tmp_path / "nowhere") == ([], [])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "sgd.json"
    cells.write(path, make_cell())
    before = path.read_text()
    unwritable = make_cell()
    unwritable.problem["data"] = {"rate": float("nan")}
    with pytest.raises(ValueError, match="not JSON compliant"):
        cells.write(path, unwritable)
    assert path.read_text() == before


def test_what_a_killed_writer_left_is_used_up(tmp_path):
    path = tmp_path / "digits" / "sgd.json"
    path.parent.mkdir()
    left = path.with_name(".sgd.json.tmp")
    left.write_text("x" * 100_000)
    assert cells.read_all(tmp_path) == ([], [])
    cells.write(path, make_cell())
    assert not left.exists()
    assert len(cells.read(path).runs) == 2


WRITER = """
import itertools, sys
from pathlib import Path
from benchmarks.contest import cells
from support.short_cells import make_cell

many, few = make_cell(400), make_cell(7)
for cell in itertools.cycle([many, few]):
    cells.write(Path(sys.argv[1]), cell)
    print("written", flush=True)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "sgd.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pauses = np.random.default_rng(0).uniform(0, 0.05, 8)
    for pause in pauses:
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
        ) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"written\n"
            # Whatever readers see meanwhile is whole as well.
            assert len(cells.read(path).runs) in (7, 400)
            try:
                writer.wait(pause)
            except subprocess.TimeoutExpired:
                writer.send_signal(signal.SIGKILL)
        assert writer.returncode == -signal.SIGKILL
        assert len(cells.read(path).runs) in (7, 400)
    cells.write(path, make_cell())
    assert list(tmp_path.iterdir()) == [path]
