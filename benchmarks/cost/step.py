"""What a training step costs: XLA's FLOPs and bytes, memory, compilation, and time ratios.

    python -m benchmarks cost

The JMLR paper's fully connected network at the batch sizes of its Table 1, and a wider one, with
plain optimizers, normalizations (after each activation, as in the paper), and BNP in its variants:
statistics of all rows, of 64 rows, with those of the input layer fixed by one pass over the data,
and captured in every tenth step only, of which the average is reported.

FLOPs, bytes accessed and memory are those that XLA reports of the compiled step; they are free of
noise, but of an array that rows are picked out of, XLA may count every byte. Memory is
temporary + arguments + outputs - those that share a buffer. Compilation, tracing included,
is in processor seconds. Times are taken in turns, one of each method in each turn, in a
new order every time, and reported as the median of the ratios to the same turn's SGD or BatchNorm,
with the middle half: of single steps, each waited for, and of a pass of many steps in one compiled
`lax.scan` over shuffled batches. A single step of a small network is mostly the start of its
kernels; a pass is what an epoch of training repeats, and what compares with Table 1 and Figure 9.
"""

import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.arguments import Count
from benchmarks.cost.methods import (
    BATCH_NORM,
    METHODS,
    PROBLEMS,
    QUICK_PROBLEMS,
    SGD,
    CostMethod,
    Examples,
    Workload,
    make_data,
    make_training,
)
from benchmarks.cost.report import cost_table, paper_table, save_figure, time_table
from benchmarks.environment import environment

EXAMPLES = 5120  # Of a pass.
_CALLS = 3
_WARM_UP_TURNS = 2


class CompiledMethod:
    """A method's compiled programs, and where its training stands.

    Attributes:
      costs: What is known without running: FLOPs, bytes, memory and seconds of compilation.
      carry: Where training stands.
      loss: Of the last step, or the mean of the last pass; None before.
    """

    def __init__(self, problem: Workload, method: CostMethod, data: Examples):
        """Compile."""
        training = make_training(problem, method, data)
        batch_size = problem.batch_size
        self._batch = (data.x[:batch_size], data.y[:batch_size])
        self._data = data
        self.carry = training.carry
        self.loss: Any = None
        self._parts = []
        self.costs: dict[str, Any] = dict.fromkeys(("flops", "bytes", "compile_seconds"), 0.0)
        memory = []
        for step, share in training.parts:
            jax.clear_caches()  # Or what one method traced would be free for the next.
            start = time.process_time()
            lowered = jax.jit(step, donate_argnums=0).lower(self.carry, *self._batch)
            compiled = lowered.compile()
            self.costs["compile_seconds"] += time.process_time() - start
            cost: Any = compiled.cost_analysis()
            self.costs["flops"] += share * cost["flops"]
            self.costs["bytes"] += share * cost["bytes accessed"]
            memory.append(peak_memory(compiled))
            self._parts.append((compiled, share))
        self.costs["memory"] = None if None in memory else max(memory)
        one_pass = jax.jit(training.one_pass, donate_argnums=0)
        self._one_pass = one_pass.lower(self.carry, data).compile()

    def time_step(self) -> float:
        """Seconds of a step, averaged over a few calls and over a period of the method."""
        seconds = 0.0
        for step, share in self._parts:
            start = time.perf_counter()
            for _ in range(_CALLS):
                self.carry, self.loss = step(self.carry, *self._batch)
                jax.block_until_ready((self.carry, self.loss))
            seconds += share * (time.perf_counter() - start) / _CALLS
        return seconds

    def time_pass(self) -> float:
        """Seconds of a pass."""
        start = time.perf_counter()
        self.carry, self.loss = self._one_pass(self.carry, self._data)
        jax.block_until_ready((self.carry, self.loss))
        return time.perf_counter() - start


def peak_memory(compiled: Any) -> int | None:
    """Bytes that a program needs at most; None where the backend does not tell."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def measure(
    problem: Workload, turns: int, examples: int, console: Console
) -> dict[str, dict[str, Any]]:
    """Every method's costs and times."""
    data = make_data(problem, examples)
    # What the process compiles first takes longer than the same later.
    CompiledMethod(problem, METHODS[SGD], data)
    methods = track(
        METHODS.items(), description=f"{problem}: compile", console=console, transient=True
    )
    contestants = {name: CompiledMethod(problem, method, data) for name, method in methods}
    steps: dict[str, list[float]] = {name: [] for name in contestants}
    passes: dict[str, list[float]] = {name: [] for name in contestants}
    rng = np.random.default_rng(0)
    numbers = range(turns + _WARM_UP_TURNS)
    for turn in track(numbers, description=f"{problem}: run", console=console, transient=True):
        for times, call in ((steps, CompiledMethod.time_step), (passes, CompiledMethod.time_pass)):
            for name in rng.permutation(list(contestants)).tolist():
                seconds = call(contestants[name])
                if turn >= _WARM_UP_TURNS:
                    times[name].append(seconds)
    return {
        name: contestant.costs
        | {"seconds": float(np.median(steps[name]))}
        | _ratios("time_ratio", steps, name)
        | {"pass_seconds": passes[name], "pass_steps": len(data.indices)}
        | _ratios("pass_ratio", passes, name)
        for name, contestant in contestants.items()
    }


def _ratios(key: str, times: dict[str, list[float]], name: str) -> dict[str, Any]:
    """Median and quartiles of the ratios to SGD and to BatchNorm in the same turn."""
    result = {}
    for suffix, reference in (("", SGD), ("_to_batch_norm", BATCH_NORM)):
        ratios = np.array(times[name]) / np.array(times[reference])
        result[f"{key}{suffix}"] = float(np.median(ratios))
        result[f"{key}{suffix}_quartiles"] = np.quantile(ratios, [0.25, 0.75]).tolist()
    return result


def main(
    turns: Count = 60, quick: bool = False, out: pathlib.Path = pathlib.Path("results/cost.json")
) -> None:
    """Measure what a training step costs, print tables and draw the paper's Figure 9.

    Args:
      turns: How often each method is timed: a few steps and a pass over some thousand examples.
      quick: Tiny networks and two turns, to try the benchmark itself.
      out: Where the numbers go, with their environment; the figure goes next to it.
    """
    # A table that is piped to a file need not fit a terminal.
    console = Console(width=None if sys.stdout.isatty() else 120)
    problems, examples = (QUICK_PROBLEMS, 80) if quick else (PROBLEMS, EXAMPLES)
    results: dict[Workload, dict[str, dict[str, Any]]] = {}
    for problem in problems:
        results[problem] = measure(problem, 2 if quick else turns, examples, console)
        console.print(cost_table(problem, results[problem]))
        console.print(time_table(problem, results[problem]))
    console.print(paper_table(results))
    out.parent.mkdir(parents=True, exist_ok=True)
    numbers = {str(problem): rows for problem, rows in results.items()}
    out.write_text(json.dumps({"environment": environment(), "results": numbers}, indent=2))
    figure = out.with_suffix(".png")
    save_figure(results, figure)
    console.print(f"Multiples of SGD's unless it says / BN. Numbers: {out}, figure: {figure}")
