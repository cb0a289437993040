"""What a training step costs: XLA's FLOPs and bytes, and interleaved time ratios.

    python -m benchmarks.cost

Fully connected networks: SGD, Adam, SGD on the same network with BatchNorm (after each activation,
as in the JMLR paper), BNP + SGD and Adam in z-space. FLOPs and bytes accessed are those that XLA
reports of the compiled step; they are free of noise. Times are of whole steps, one of each method
in turn, and are reported as the median of the ratios to SGD's step of the same turn, with the
range of the middle half.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import bnp_optax
from benchmarks.environment import environment


class MLP(nn.Module):
    """Dense layers with ReLU, and BatchNorm after each activation if asked for."""

    features: tuple[int, ...]
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        for features in self.features[:-1]:
            x = nn.relu(nn.Dense(features)(x))
            if self.batch_norm:
                x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dense(self.features[-1])(x)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network and a batch size."""

    sizes: tuple[int, ...]
    batch_size: int

    def __str__(self) -> str:
        """Sizes and batch size, as in `784-512-10, batch 256`."""
        return f"{'-'.join(map(str, self.sizes))}, batch {self.batch_size}"


PROBLEMS = (Problem((784, 512, 512, 512, 10), 256), Problem((3072, 100, 100, 10), 512))

METHODS: dict[str, tuple[Any, bool, bool]] = {
    # name: (optimizer, BatchNorm in the network, statistics captured)
    "SGD": (optax.sgd(0.1), False, False),
    "Adam": (optax.adam(1e-3), False, False),
    "BatchNorm + SGD": (optax.sgd(0.1), True, False),
    "BNP + SGD": (bnp_optax.bnp_sgd(0.1), False, True),
    "Adam in z": (bnp_optax.bnp_adam(1e-3), False, True),
}


def compile_step(problem: Problem, method: str) -> tuple[Any, Any, tuple[jax.Array, jax.Array]]:
    """The compiled training step of a method, its first state, and a batch."""
    tx, batch_norm, captured = METHODS[method]
    tx = optax.with_extra_args_support(tx)
    model = MLP(problem.sizes[1:], batch_norm)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.uniform(keys[0], (problem.batch_size, problem.sizes[0]))
    y = jax.random.randint(keys[1], (problem.batch_size,), 0, problem.sizes[-1])
    variables = model.init(keys[2], x)
    params = variables.pop("params")

    def loss_fn(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        logits, state = model.apply({"params": params, **state}, x, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state

    def step(carry: Any, x: jax.Array, y: jax.Array) -> Any:
        params, opt_state, state = carry
        if captured:
            value_and_grad = bnp_optax.value_and_grad(loss_fn, has_aux=True)
            (loss, state), grads, stats = value_and_grad(params, state, x, y)
            updates, opt_state = tx.update(grads, opt_state, params, layer_stats=stats)
        else:
            value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, state), grads = value_and_grad(params, state, x, y)
            updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, state), loss

    carry = (params, tx.init(params), variables)
    compiled = jax.jit(step, donate_argnums=0).lower(carry, x, y).compile()
    return compiled, carry, (x, y)


def measure(problem: Problem, turns: int, console: Console) -> dict[str, dict[str, Any]]:
    """FLOPs, bytes and times of every method."""
    compiled = {method: compile_step(problem, method) for method in METHODS}
    carries = {method: carry for method, (_, carry, _) in compiled.items()}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for turn in track(range(turns + 3), description=str(problem), console=console, transient=True):
        for method, (step, _, batch) in compiled.items():
            start = time.perf_counter()
            carries[method], _ = step(carries[method], *batch)
            jax.block_until_ready(carries[method])
            if turn >= 3:  # The first turns warm the caches.
                times[method].append(time.perf_counter() - start)
    rows = {}
    reference = np.array(times["SGD"])
    for method, (step, _, _) in compiled.items():
        cost = step.cost_analysis()
        ratios = np.array(times[method]) / reference
        rows[method] = {
            "flops": cost["flops"],
            "bytes": cost["bytes accessed"],
            "seconds": float(np.median(times[method])),
            "time_ratio": float(np.median(ratios)),
            "time_ratio_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
        }
    batch_norm = np.array(times["BatchNorm + SGD"])
    for method, row in rows.items():
        row["time_ratio_to_batch_norm"] = float(np.median(np.array(times[method]) / batch_norm))
    return rows


def table(problem: Problem, rows: dict[str, dict[str, Any]]) -> Table:
    """Ratios to SGD, one row a method."""
    result = Table(title=str(problem), title_justify="left", box=box.SIMPLE)
    result.add_column("method", no_wrap=True)
    for column in ("FLOPs", "bytes", "time", "(middle half)", "/ BatchNorm", "step"):
        result.add_column(column, justify="right", no_wrap=True)
    sgd = rows["SGD"]
    for method, row in rows.items():
        low, high = row["time_ratio_quartiles"]
        result.add_row(
            method,
            f"{row['flops'] / sgd['flops']:.4f}x",
            f"{row['bytes'] / sgd['bytes']:.3f}x",
            f"{row['time_ratio']:.3f}x",
            f"({low:.2f}-{high:.2f})",
            f"{row['time_ratio_to_batch_norm']:.3f}x",
            f"{1e3 * row['seconds']:.2f} ms",
        )
    return result


def main(turns: int = 200, out: pathlib.Path = pathlib.Path("results/cost.json")) -> None:
    """Measure and print.

    Args:
      turns: Timed steps of each method.
      out: Where the numbers go, with their environment.
    """
    console = Console()
    results = {}
    for problem in PROBLEMS:
        rows = measure(problem, turns, console)
        console.print(table(problem, rows))
        results[str(problem)] = rows
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"environment": environment(), "results": results}, indent=2))
    console.print(f"FLOPs, bytes and time as multiples of SGD's. Numbers: {out}")


if __name__ == "__main__":
    tyro.cli(main)
