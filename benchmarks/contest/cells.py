"""What one method did on one problem, as a JSON file that is whole or absent."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

VERSION = 1
Role = Literal["tuning", "final"]
CURVES = ("train_loss", "loss", "score")

_PROBLEM_KEYS = {
    "name": str,
    "title": str,
    "task": str,
    "batch_size": int,
    "steps": int,
    "points": int,
    "source": str | None,
    "scale": str,
    "data": dict,
}
_METHOD_KEYS = {"name": str, "label": str, "ours": bool}
_CELL_KEYS = {
    "grid": list,
    "seeds": int,
    "environments": list,
    "runs": list,
    "rate": float | int | None,
    "complete": bool,
}
_RUN_KEYS = {
    "role": str,
    "rate": float | int,
    "seed": int,
    "seconds": float | int,
    "environment": int,
    "train_loss": list,
    "loss": list,
    "score": list,
}


class CellError(ValueError):
    """A file that is no cell; the message is one line."""


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One training.

    Attributes:
      role: 'tuning', measured on the validation split, or 'final', measured on the test split.
      rate: Learning rate.
      seed: Of the initialization and the order of the examples.
      seconds: How long it took.
      environment: Index among the cell's environments.
      train_loss: Mean loss of the batches since the last point; as all curves one value a point,
        float64, NaN where it was not finite.
      loss: Of the split.
      score: Accuracy or explained variance on the split.
    """

    role: Role
    rate: float
    seed: int
    seconds: float
    environment: int
    train_loss: np.ndarray
    loss: np.ndarray
    score: np.ndarray

    def as_json(self) -> dict[str, Any]:
        """The run as what JSON can hold: curves with seven digits, None where not finite."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {name: _numbers(plain[name]) for name in CURVES}

    @classmethod
    def from_json(cls, value: Any, points: int, environments: int) -> "Run":
        """The inverse of `as_json`.

        Raises:
          CellError: If it is not a run of `points` points in one of so many `environments`.
        """
        _check(value, _RUN_KEYS, "run")
        role, place = value["role"], value["environment"]
        _require(role in get_args(Role), f"a run's role is {role!r}, not one of {get_args(Role)}")
        _require(0 <= place < environments, f"a run names environment {place} of {environments}")
        fields: dict[str, Any] = {name: value[name] for name in _RUN_KEYS}
        fields |= {name: _curve(value[name], name, points) for name in CURVES}
        return cls(**fields)


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """All runs of one method on one problem.

    Attributes:
      problem: Its name, title, task, batch_size, steps, points, source, scale, and data.
      method: Its name, label, and whether it is `ours`.
      grid: Learning rates to choose from.
      seeds: Number of final runs.
      environments: Where runs were done: versions, devices, commit.
      runs: In the order in which they were done.
      rate: The chosen learning rate; None if none is chosen yet, or all diverged.
      complete: Whether all runs are done.
      skipped: Why the method was not run on this problem; None if it was.
    """

    problem: dict[str, Any]
    method: dict[str, Any]
    grid: list[float] = dataclasses.field(default_factory=list)
    seeds: int = 0
    environments: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    runs: list[Run] = dataclasses.field(default_factory=list)
    rate: float | None = None
    complete: bool = False
    skipped: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The cell as what JSON can hold."""
        head = {"version": VERSION, "problem": self.problem, "method": self.method}
        if self.skipped is not None:
            return head | {"skipped": self.skipped}
        rest = {name: getattr(self, name) for name in _CELL_KEYS}
        return head | rest | {"runs": [run.as_json() for run in self.runs]}

    @classmethod
    def from_json(cls, value: Any) -> "Cell":
        """The inverse of `as_json`.

        Raises:
          CellError: If it is not a cell of this version.
        """
        _check(value, {"version": int, "problem": dict, "method": dict}, "cell")
        version, problem, method = value["version"], value["problem"], value["method"]
        _require(version == VERSION, f"version {version} of a cell, expected {VERSION}")
        _check(problem, _PROBLEM_KEYS, "problem")
        _check(method, _METHOD_KEYS, "method")
        if "skipped" in value:
            _check(value, {"skipped": str}, "cell")
            return cls(problem, method, skipped=value["skipped"])
        _check(value, _CELL_KEYS, "cell")
        for rate in value["grid"]:
            _check({"grid": rate}, {"grid": float | int}, "cell")
        for environment in value["environments"]:
            _check({"environments": environment}, {"environments": dict}, "cell")
        count = len(value["environments"])
        runs = [Run.from_json(run, problem["points"], count) for run in value["runs"]]
        fields: dict[str, Any] = {name: value[name] for name in _CELL_KEYS} | {"runs": runs}
        return cls(problem, method, **fields)


def read(path: Path) -> Cell:
    """The cell in a file.

    Raises:
      CellError: If the file holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CellError(f"no JSON: {error}".splitlines()[0]) from error
    return Cell.from_json(value)


def write(path: Path, cell: Cell) -> None:
    """Put a cell into a file, at once: readers find the old file or the new one, also after a kill.

    The temporary file beside it has one name, so that what a killed writer left is used up here.
    """
    value = cell.as_json()
    # A line for each run: short enough to read, and to compare two versions of the file.
    entries = [f'"{key}": {_dump(item)}' for key, item in value.items() if key != "runs"]
    if "runs" in value:
        entries.append('"runs": [\n' + ",\n".join(map(_dump, value["runs"])) + "\n]")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write("{\n" + ",\n".join(entries) + "\n}\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def set_aside(path: Path) -> Path:
    """Rename a corrupt file, so that its cell can be measured anew; returns the new path."""
    aside, count = path.with_name(f"{path.name}.corrupt"), 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}.corrupt-{count}")
    return path.rename(aside)


def read_all(folder: Path) -> tuple[list[Cell], list[tuple[Path, str]]]:
    """All cells `<problem>/<method>.json` in a folder, by name, and the files that are none."""
    cells, errors = [], []
    for path in sorted(folder.glob("*/*.json")):
        try:
            cell = read(path)
        except CellError as error:
            errors.append((path, str(error)))
            continue
        names = cell.problem["name"], cell.method["name"]
        if names == (path.parent.name, path.stem):
            cells.append(cell)
        else:
            errors.append((path, f"holds {'/'.join(names)}, which belongs elsewhere"))
    return cells, errors


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _numbers(curve: np.ndarray) -> list[float | None]:
    return [float(f"{x:.7g}") if np.isfinite(x) else None for x in np.asarray(curve, float)]


def _curve(values: list[Any], name: str, points: int) -> np.ndarray:
    _require(len(values) == points, f"`{name}` has {len(values)} points, expected {points}")
    for value in values:
        _check({name: value}, {name: float | int | None}, "run")
    return np.array([np.nan if value is None else value for value in values], float)


def _check(value: Any, keys: dict[str, Any], what: str) -> None:
    """Every key is there and of its type; true and false are no numbers."""
    _require(isinstance(value, dict), f"a {what} is a {type(value).__name__}, not a dict")
    for key, kind in keys.items():
        _require(key in value, f"a {what} lacks `{key}`")
        item = value[key]
        fits = isinstance(item, kind) and (kind is bool or not isinstance(item, bool))
        _require(fits, f"a {what} has a {type(item).__name__} as its `{key}`")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise CellError(message)


def _refuse(constant: str) -> float:
    msg = f"{constant} is no number"
    raise ValueError(msg)
