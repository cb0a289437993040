"""What the capture and BNP add to a step before it runs: tracing, compilation, kernels, state.

    python -m benchmarks cost-capture

Tracing and lowering of `value_and_grad`, and the FLOPs and bytes that XLA reports of it compiled,
in multiples of `jax.value_and_grad`'s: for a transformer of 12 blocks, unrolled and scanned, a
residual network of 38 layers, and a fully connected one. The instructions that another layer adds
to a training step: those of the optimized program's entry, each of which is a kernel to start,
counted at two depths. Tracing and compilation of a training step of a transformer of 24 blocks,
unrolled, and the arrays in its optimizer's state. With `--steps`, training steps of a residual
network and a transformer on this machine's device: time, kernels, memory.

FLOPs, bytes, instructions and arrays are exact. Times are processor seconds, taken in turns with
the caches of JAX emptied, and reported as medians of the ratios to the plain function's of the same
turn. Of a scan, XLA counts the FLOPs and bytes of one turn. Steps are timed by the clock, in turns.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

import bnp_optax
from benchmarks.arguments import Count, CountOrZero
from benchmarks.cost import methods
from benchmarks.cost.methods import BNP, SGD, CostMethod
from benchmarks.cost.step import peak_memory
from benchmarks.cost.transformer import Transformer
from benchmarks.environment import environment
from benchmarks.networks.resnet import CifarResNet
from benchmarks.networks.small import MLP

# Not kernels: they name, take apart or reinterpret buffers.
_NO_KERNELS = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast"}


class LossOnBatch(NamedTuple):
    """A loss of parameters and a batch.

    Attributes:
      loss_fn: `loss_fn(params, x, y)`, a scalar.
      params: The parameters, or their shapes.
      batch: The other arguments, or their shapes.
    """

    loss_fn: Callable[..., jax.Array]
    params: Any
    batch: tuple[Any, ...]


def classification(model: nn.Module, x: Sequence[int], dtype: Any = jnp.float32) -> LossOnBatch:
    """A model that is to predict a class from each last row of an input of shape `x`."""

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    inputs = jax.ShapeDtypeStruct(tuple(x), dtype)
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    logits = jax.eval_shape(lambda p, x: model.apply({"params": p}, x), params, inputs)
    labels = jax.ShapeDtypeStruct(logits.shape[:-1], jnp.int32)
    return LossOnBatch(loss_fn, params, (inputs, labels))


def transformer(depth: int, width: int, scanned: bool) -> LossOnBatch:
    """A decoder on 8 sequences of 32 tokens."""
    return classification(Transformer(width, depth, scanned), (8, 32), jnp.int32)


def mlp(hidden: int, width: int, batch_size: int = 32) -> LossOnBatch:
    """A fully connected network with `hidden` hidden layers."""
    return classification(MLP((width,) * hidden), (batch_size, width))


def make_step(problem: LossOnBatch, tx: Any, captured: bool) -> tuple[Callable[..., Any], Any]:
    """A training step, and the shapes of what it carries: parameters and optimizer state."""
    tx = optax.with_extra_args_support(tx)

    def step(carry: Any, *batch: Any) -> Any:
        params, state = carry
        if captured:
            loss, grads, stats = bnp_optax.value_and_grad(problem.loss_fn)(params, *batch)
            updates, state = tx.update(grads, state, params, layer_stats=stats)
        else:
            loss, grads = jax.value_and_grad(problem.loss_fn)(params, *batch)
            updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return step, (problem.params, jax.eval_shape(tx.init, problem.params))


# By name, the optimizer that one with statistics is compared with.
PLAIN = {BNP: SGD, "Adam in z": "Adam"}
METHODS = {name: methods.METHODS[name] for pair in PLAIN.items() for name in reversed(pair)}


def compile_step(problem: LossOnBatch, method: CostMethod) -> Any:
    """The compiled training step of a method, which gives the old carry's memory to the new."""
    step, carry = make_step(problem, method.tx, method.captured)
    return jax.jit(step, donate_argnums=0).lower(carry, *problem.batch).compile()


def kernels(compiled: Any) -> collections.Counter[str]:
    """How many instructions of each kind the entry of a compiled program has."""
    text = compiled.as_text()
    entry = text[text.index("\nENTRY ") :]
    found = re.findall(r"^ +(?:ROOT )?%\S+ = (?:\(.*?\)|\S+) ([a-z][\w\-]*)\(", entry, re.MULTILINE)
    counted = collections.Counter(found)
    return collections.Counter({op: n for op, n in counted.items() if op not in _NO_KERNELS})


def kernels_per_layer(
    method: CostMethod, width: int = 64, depths: tuple[int, int] = (4, 8)
) -> dict[str, float]:
    """How many instructions of each kind another hidden layer adds to a training step."""
    few, many = (kernels(compile_step(mlp(depth, width), method)) for depth in depths)
    kinds = sorted({*few, *many})
    slopes = {kind: (many[kind] - few[kind]) / (depths[1] - depths[0]) for kind in kinds}
    return {kind: slope for kind, slope in slopes.items() if slope}


def gradient_costs(problem: LossOnBatch) -> dict[str, float]:
    """FLOPs and bytes of the captured gradient, in multiples of the plain one's."""
    functions = (bnp_optax.value_and_grad(problem.loss_fn), jax.value_and_grad(problem.loss_fn))
    captured, plain = (
        dict(
            jax.jit(function).lower(problem.params, *problem.batch).compile().cost_analysis() or {}
        )
        for function in functions
    )
    keys = {"flops": "flops", "bytes": "bytes accessed"}
    return {name: captured[key] / plain[key] for name, key in keys.items()}


def ratios(slow: Callable[[], Any], plain: Callable[[], Any], turns: int) -> dict[str, Any]:
    """Processor seconds of two functions in turns, and the median of their ratios."""
    seconds: dict[str, list[float]] = {"slow": [], "plain": []}
    for turn in range(turns + 1):
        for name, function in (("plain", plain), ("slow", slow)):
            jax.clear_caches()  # Or what the one traced would be free for the other.
            start = time.process_time()
            function()
            if turn:  # The first turn warms up.
                seconds[name].append(time.process_time() - start)
    quotients = np.array(seconds["slow"]) / np.array(seconds["plain"])
    return {
        "seconds": float(np.median(seconds["slow"])),
        "plain_seconds": float(np.median(seconds["plain"])),
        "ratio": float(np.median(quotients)),
        "quartiles": np.quantile(quotients, [0.25, 0.75]).tolist(),
    }


def tracing(problem: LossOnBatch, turns: int) -> dict[str, Any]:
    """What tracing and lowering the captured gradient takes, against the plain one."""
    captured = bnp_optax.value_and_grad(problem.loss_fn)
    plain = jax.value_and_grad(problem.loss_fn)
    arguments = (problem.params, *problem.batch)

    def traced(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: jax.make_jaxpr(function)(*arguments)

    def lowered(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: jax.jit(function).lower(*arguments)

    return {
        "trace": ratios(traced(captured), traced(plain), turns),
        "lower": ratios(lowered(captured), lowered(plain), turns),
    }


@dataclasses.dataclass(frozen=True)
class CaptureConfig:
    """Sizes of the benchmark.

    Attributes:
      depth: Blocks of the transformers that are traced.
      compiled_depth: Blocks of the transformer whose training step is compiled.
      width: Width of the transformers.
      turns: Timed turns of tracing.
      compiled_turns: Timed turns of compilation.
      steps: Timed turns of training steps; 0 for none.
      out: Where the numbers go, with their environment.
    """

    depth: Count = 12
    compiled_depth: Count = 24
    width: Count = 64
    turns: Count = 5
    compiled_turns: Count = 3
    steps: CountOrZero = 0
    out: pathlib.Path = pathlib.Path("results/capture_cost.json")


def _table(title: str, *columns: str) -> Table:
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    result.add_column("", no_wrap=True)
    for column in columns:
        result.add_column(column, justify="right", no_wrap=True)
    return result


def _shown(row: Any) -> str:
    low, high = row["quartiles"]
    return f"{row['ratio']:.2f}x ({low:.2f}-{high:.2f})"


def measure_gradients(config: CaptureConfig, console: Console) -> dict[str, Any]:
    """Tracing, FLOPs and bytes of the captured gradient."""
    problems = {
        f"transformer, {config.depth} blocks": transformer(config.depth, config.width, False),
        f"transformer, {config.depth} blocks, scanned": transformer(
            config.depth, config.width, True
        ),
        "ResNet-38": classification(CifarResNet(38), (8, 32, 32, 3)),
        "MLP, 4 hidden layers": mlp(4, 64),
    }
    table = _table("A captured gradient / a plain one", "trace", "trace, lower", "FLOPs", "bytes")
    results = {}
    for name, problem in problems.items():
        row = results[name] = tracing(problem, config.turns) | gradient_costs(problem)
        costs = (f"{row['flops']:.4f}x", f"{row['bytes']:.3f}x")
        table.add_row(name, _shown(row["trace"]), _shown(row["lower"]), *costs)
    console.print(table)
    return results


def measure_kernels(console: Console) -> dict[str, Any]:
    """Instructions, FLOPs and bytes of training steps of fully connected networks."""
    table = _table(
        "A training step of a fully connected network",
        *("instructions a layer", "added", "FLOPs", "bytes"),
    )
    results: dict[str, Any] = {}
    for name, method in METHODS.items():
        cost = compile_step(mlp(4, 64), method).cost_analysis()
        by_kind = kernels_per_layer(method)
        row = results[name] = {
            "per_layer": sum(by_kind.values()),
            "by_kind": by_kind,
            "flops": cost["flops"],
            "bytes": cost["bytes accessed"],
        }
        shown = [f"{row['per_layer']:.2f}", "", "", ""]
        if name in PLAIN:
            plain = results[PLAIN[name]]
            row["added_per_layer"] = row["per_layer"] - plain["per_layer"]
            shown[1] = f"{row['added_per_layer']:+.2f}"
            shown[2:] = (f"{row[key] / plain[key]:.3f}x" for key in ("flops", "bytes"))
        table.add_row(name, *shown)
    console.print(table)
    return results


def measure_compilation(config: CaptureConfig, console: Console) -> dict[str, Any]:
    """Tracing and compilation of a transformer's step, and what the optimizer's state holds."""
    problem = transformer(config.compiled_depth, config.width, scanned=False)
    table = _table(
        f"A training step of a transformer, {config.compiled_depth} blocks, unrolled",
        *("trace, compile", "s", "plain s", "arrays of state", "plain"),
    )
    results = {}
    for name, of_plain in PLAIN.items():
        pair = (METHODS[name], METHODS[of_plain])
        row = results[name] = ratios(
            functools.partial(compile_step, problem, pair[0]),
            functools.partial(compile_step, problem, pair[1]),
            config.compiled_turns,
        )
        states = [make_step(problem, m.tx, m.captured)[1][1] for m in pair]
        row["arrays"], row["plain_arrays"] = (len(jax.tree.leaves(state)) for state in states)
        seconds = (f"{row['seconds']:.1f}", f"{row['plain_seconds']:.1f}")
        table.add_row(name, _shown(row), *seconds, str(row["arrays"]), str(row["plain_arrays"]))
    console.print(table)
    return results


def _arrays(shapes: Any) -> Any:
    """Random arrays of the given shapes; integers are 0."""

    def array(shape: Any) -> jax.Array:
        if not jnp.issubdtype(shape.dtype, jnp.floating):
            return jnp.zeros(shape.shape, shape.dtype)
        return 0.05 * jax.random.normal(jax.random.key(shape.size), shape.shape, shape.dtype)

    return jax.tree.map(array, shapes)


class Running:
    """A method's training of a problem: compiled, and where it stands."""

    def __init__(self, problem: LossOnBatch, method: CostMethod) -> None:
        self.step = compile_step(problem, method)
        params = _arrays(problem.params)
        self.carry = (params, method.tx.init(params))
        self.batch = _arrays(problem.batch)

    def seconds(self, steps: int = 10) -> float:
        """Of one step, of so many that are not waited for."""
        start = time.perf_counter()
        for _ in range(steps):
            self.carry, _ = self.step(self.carry, *self.batch)
        jax.block_until_ready(self.carry)
        return (time.perf_counter() - start) / steps

    def memory(self) -> int | None:
        """Bytes at most in use, the parameters' and the state's among them."""
        return peak_memory(self.step)


def measure_steps(config: CaptureConfig, console: Console) -> dict[str, Any]:
    """Time, kernels and memory of training steps on this machine's device."""
    problems = {
        "ResNet-20, batch 128": classification(CifarResNet(20), (128, 32, 32, 3)),
        "transformer, 12 blocks, width 512": transformer(12, 512, False),
        "MLP, 4 hidden layers of 64": mlp(4, 64),
    }
    device = jax.devices()[0].device_kind
    results: dict[str, Any] = {"device": device}
    for title, problem in problems.items():
        table = _table(f"{title}: a training step on {device}", "ms", "/ plain", "kernels", "MB")
        running = {name: Running(problem, method) for name, method in METHODS.items()}
        turns: dict[str, list[float]] = {name: [] for name in running}
        for turn in range(config.steps + 1):
            for name, one in running.items():
                seconds = one.seconds()
                if turn:  # The first turn warms up.
                    turns[name].append(seconds)
        rows = results[title] = {}
        for name in METHODS:
            quotients = np.array(turns[name]) / np.array(turns[PLAIN.get(name, name)])
            row = rows[name] = {
                "seconds": float(np.median(turns[name])),
                "ratio": float(np.median(quotients)),
                "quartiles": np.quantile(quotients, [0.25, 0.75]).tolist(),
                "kernels": sum(kernels(running[name].step).values()),
                "memory": running[name].memory(),
            }
            numbers = (str(row["kernels"]), f"{row['memory'] / 1e6:.1f}")
            table.add_row(name, f"{1e3 * row['seconds']:.3f}", _shown(row), *numbers)
        console.print(table)
    return results


def main(config: Annotated[CaptureConfig, tyro.conf.arg(name="")]) -> None:
    """Measure what the capture and BNP add to a step before it runs, and print tables."""
    # A table that is piped to a file need not fit a terminal.
    console = Console(width=None if sys.stdout.isatty() else 110)
    results = {
        "gradients": measure_gradients(config, console),
        "kernels": measure_kernels(console),
        "compilation": measure_compilation(config, console),
    }
    if config.steps:
        results["steps"] = measure_steps(config, console)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps({"environment": environment(), "results": results}, indent=2))
    console.print(f"Medians with the middle half. Numbers: {config.out}")
