"""The table of raw against standardized inputs, and training from z in the contest."""

import numpy as np
from support.report_cells import make_cell

from benchmarks.contest import units
from benchmarks.contest.summary import contests
from benchmarks.data import Split
from benchmarks.networks.small import MLP
from benchmarks.problems import Data, Problem
from benchmarks.training.methods import METHODS
from benchmarks.training.trainer import Trainer


def test_table():
    cells = [
        make_cell("a-raw", "from_z_adam", scores=(0.7, 0.8, 0.9)),
        make_cell("a-standardized", "from_z_adam", scores=(0.7, 0.8, 0.9)),
        make_cell("a-raw", "adam", scores=(0.1, 0.2, 0.3)),
        make_cell("a-standardized", "adam", scores=(0.7, 0.8, 0.9)),
        make_cell("b-raw", "adam", scores=(0.1, 0.2, 0.3)),
        make_cell("b-standardized", "adam", scores=(0.7, 0.8, 0.9)),
    ]
    text = "\n".join(units.section(contests(cells)))
    assert "| a | bnp_adam from z | 80.0 (70.0 to 90.0) | 80.0 (70.0 to 90.0) | even |" in text
    assert "| a | Adam | 20.0 (10.0 to 30.0) | 80.0 (70.0 to 90.0) | lost |" in text
    assert "| b |" not in text
    assert units.section(contests(cells[2:])) == []


def problem(scale, shift):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4)).astype(np.float32)
    y = np.tanh(x @ rng.normal(size=(4, 1))).astype(np.float32)
    parts = [Split(x[part] * scale + shift, y[part]) for part in (slice(200), slice(200, None))]
    network = lambda norm, steps: MLP((16,), classes=1, norm=norm)  # noqa: E731
    data = Data(parts[0], parts[1], parts[1], {})
    return Problem("p", "P", lambda _: data, network, 10, 60, 3, (), task="regression"), data


def test_from_z_a_run_does_not_depend_on_units():
    scale, shift = np.array([1e3, 1e-3, 1.0, 7.0]), np.array([1e4, 0.0, -3.0, 7.0])
    for name in ("from_z_adam", "from_z_sgd"):
        curves = []
        for units_of in ((np.ones(4), np.zeros(4)), (scale, shift)):
            of, data = problem(*(np.float32(x) for x in units_of))
            curves.append(Trainer(of, name, METHODS[name], data)(0.01, 1, data.test).loss)
        np.testing.assert_allclose(curves[0], curves[1], rtol=0.02)
