"""Every mode of JAX on eight devices: is the result that of one, and at what communication.

    python -m benchmarks scale

Eight virtual devices of the CPU, so that it runs anywhere, in some minutes. For each mode and
optimizer: the largest difference of the parameters from those of one device after ten steps,
relative to the largest entry of each parameter; the collectives in the optimized program of a step
with and without preconditioning; and how often the step was compiled in the ten steps. (Muon's is
compiled twice in explicit meshes, without preconditioning too: its coefficients start without a
sharding in their type.)
"""

import contextlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.scale.modes import DEVICES, MODES
from benchmarks.scale.training import OPTIMIZERS, batches, error, reference, train

_COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
)
OUTPUT = Path("results/scale.json")

Row = dict[str, Any]


def collectives(training: Any) -> int | None:
    """How many collectives a compiled step has; None where it cannot be lowered by itself."""
    if not hasattr(training.step, "lower"):
        return None
    x, y = (training.place(a[0]) for a in batches())
    with training.context():
        text = training.step.lower(training.carry, x, y).compile().as_text()
    return len(_COLLECTIVE.findall(text))


def measure(mode: str, optimizer: str) -> Row:
    """One row of the table."""
    method = OPTIMIZERS[optimizer]
    plain = collectives(MODES[mode](method, True))
    training = MODES[mode](method, False)
    distance = error(train(training), reference(optimizer))
    size = getattr(training.step, "_cache_size", None)
    compilations = None if size is None else size()
    return {
        "mode": mode,
        "optimizer": optimizer,
        "error": distance,
        "plain_collectives": plain,
        "collectives": collectives(training),
        "compilations": compilations,
    }


def table(rows: list[Row]) -> Table:
    """Modes down, and a line for each optimizer."""
    result = Table(title="Eight devices against one", box=box.SIMPLE)
    for name in ("mode", "optimizer", "error", "collectives", "without BNP", "compilations"):
        result.add_column(name, justify="left" if name in ("mode", "optimizer") else "right")
    last = ""
    for row in rows:
        mode = "" if row["mode"] == last else row["mode"]
        last = row["mode"]
        counts = (row["collectives"], row["plain_collectives"], row["compilations"])
        shown = ("" if count is None else str(count) for count in counts)
        result.add_row(mode, row["optimizer"], f"{row['error']:.1e}", *shown)
    return result


def failures(rows: list[Row], tolerance: float) -> list[str]:
    """What does not end where one device does."""
    return [f"{r['mode']}, {r['optimizer']}" for r in rows if not r["error"] <= tolerance]


def main(output: Path = OUTPUT, modes: tuple[str, ...] = (), tolerance: float = 1e-6) -> int:
    """Measure every mode of JAX on eight devices, with every optimizer.

    Args:
      output: The JSON file to write.
      modes: Names of modes; all if not given.
      tolerance: Largest difference from one device that passes.
    """
    # A pipe has no width of its own.
    console = Console() if sys.stdout.isatty() else Console(width=100)
    unknown = [name for name in modes if name not in MODES]
    if unknown:
        print(f"error: no mode {unknown}; the modes are {list(MODES)}", file=sys.stderr)
        return 2
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # It is too late where a backend runs already.
        jax.config.update("jax_num_cpu_devices", DEVICES)
    if len(jax.devices()) < DEVICES:
        print(
            f"error: {DEVICES} devices are needed, there are {len(jax.devices())}; start JAX "
            f"with `jax_num_cpu_devices` of {DEVICES}",
            file=sys.stderr,
        )
        return 2
    start = time.perf_counter()
    pairs = [(mode, name) for mode in modes or MODES for name in OPTIMIZERS]
    rows = [measure(*pair) for pair in track(pairs, console=console)]
    console.print(table(rows))
    found = {
        "environment": environment(),
        "seconds": round(time.perf_counter() - start),
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    failed = failures(rows, tolerance)
    if failed:
        print(f"not as on one device: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
