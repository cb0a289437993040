"""What capture costs in a transformer: step, tracing and compilation, FLOPs and bytes.

    python -m benchmarks cost-transformer

A decoder of 24 blocks of width 256 on 8 sequences of 128 tokens, its blocks unrolled or scanned:
a step of SGD, the same with the statistics of all tokens or of 64, and BNP + SGD, which uses them.
FLOPs and bytes are those that XLA reports (of a scan, it counts one turn). Tracing and compilation
are in processor seconds. Times of steps are taken in turns and given as the median ratio to SGD's
step of the same turn, with the middle half.
"""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import bnp_optax
from benchmarks.arguments import Count
from benchmarks.environment import environment


class Block(nn.Module):
    """A pre-norm block: causal attention and a two-layer network."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """The form that `nn.scan` takes: a carry, and nothing scanned over."""
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(hidden), None


class Transformer(nn.Module):
    """A decoder; its blocks are unrolled, or run by `nn.scan`."""

    width: int
    depth: int
    scanned: bool
    vocabulary: int = 256

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        if self.scanned:
            blocks = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=self.depth)
            x, _ = blocks(self.width)(x, None)
        else:
            for _ in range(self.depth):
                x, _ = Block(self.width)(x, None)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the benchmark.

    Attributes:
      depth: Number of blocks.
      width: Width of the residual stream.
      batch_size: Number of sequences.
      length: Tokens of a sequence.
      turns: Timed steps of each variant.
      out: Where the numbers go, with their environment.
    """

    depth: Count = 24
    width: Count = 256
    batch_size: Count = 8
    length: Count = 128
    turns: Count = 20
    out: pathlib.Path = pathlib.Path("results/transformer_cost.json")


@dataclasses.dataclass(frozen=True)
class CaptureVariant:
    """What a step does beside SGD.

    Attributes:
      captures: Whether it captures statistics.
      sample_rows: Number of rows that they are taken from; None for all.
      precondition: Whether BNP uses them; else the step returns them.
    """

    captures: bool = False
    sample_rows: int | None = None
    precondition: bool = False


VARIANTS = {
    "SGD": CaptureVariant(),
    "capture": CaptureVariant(captures=True),
    "capture, 64 rows": CaptureVariant(captures=True, sample_rows=64),
    "BNP": CaptureVariant(captures=True, precondition=True),
    "BNP, 64 rows": CaptureVariant(captures=True, sample_rows=64, precondition=True),
}


def make_step(model: nn.Module, variant: CaptureVariant) -> tuple[Any, Callable[..., Any]]:
    """The optimizer of a variant, and its training step."""

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    tx = bnp_optax.bnp_sgd(0.01) if variant.precondition else optax.sgd(0.01)
    tx = optax.with_extra_args_support(tx)

    def step(carry: Any, tokens: jax.Array) -> Any:
        params, state = carry
        if variant.captures:
            captured = bnp_optax.value_and_grad(loss_fn, sample_rows=variant.sample_rows)
            loss, grads, stats = captured(params, tokens)
        else:
            loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
            stats = None
        updates, state = tx.update(grads, state, params, layer_stats=stats)
        kept = None if variant.precondition else stats
        return (optax.apply_updates(params, updates), state), loss, kept

    return tx, step


def measure(
    config: TransformerConfig, scanned: bool, console: Console
) -> dict[str, dict[str, Any]]:
    """Every variant's costs."""
    model = Transformer(config.width, config.depth, scanned)
    shape = (config.batch_size, config.length + 1)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, model.vocabulary)
    params = jax.jit(model.init)(jax.random.key(1), tokens[:, :-1])["params"]
    rows: dict[str, dict[str, Any]] = {}
    compiled, carries = {}, {}
    for name, variant in VARIANTS.items():
        tx, step = make_step(model, variant)
        carry = (params, tx.init(params))
        jax.clear_caches()  # Or what one variant traced would be free for the next.
        start = time.process_time()
        traced = jax.jit(step).trace(carry, tokens)
        middle = time.process_time()
        compiled[name] = traced.lower().compile()
        stop = time.process_time()
        cost = compiled[name].cost_analysis()
        rows[name] = {
            "trace_seconds": middle - start,
            "compile_seconds": stop - middle,
            "flops": cost["flops"],
            "bytes": cost["bytes accessed"],
        }
        carries[name] = carry
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    title = "scanned" if scanned else "unrolled"
    for turn in track(range(config.turns + 1), description=title, console=console, transient=True):
        for name, step in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(step(carries[name], tokens))
            if turn:  # The first turn warms the caches.
                times[name].append(time.perf_counter() - start)
    for name, row in rows.items():
        ratios = np.array(times[name]) / np.array(times["SGD"])
        row["seconds"] = float(np.median(times[name]))
        row["time_ratio"] = float(np.median(ratios))
        row["time_ratio_quartiles"] = np.quantile(ratios, [0.25, 0.75]).tolist()
    return rows


def table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    """Ratios to SGD, one row a variant."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    result.add_column("", no_wrap=True)
    for column in ("FLOPs", "bytes", "compile", "step", "(mid half)", "[ms]"):
        result.add_column(column, justify="right", no_wrap=True)
    sgd = rows["SGD"]
    start = sgd["trace_seconds"] + sgd["compile_seconds"]
    for name, row in rows.items():
        low, high = row["time_ratio_quartiles"]
        result.add_row(
            name,
            f"{row['flops'] / sgd['flops']:.4f}x",
            f"{row['bytes'] / sgd['bytes']:.3f}x",
            f"{(row['trace_seconds'] + row['compile_seconds']) / start:.2f}x",
            f"{row['time_ratio']:.3f}x",
            f"({low:.2f}-{high:.2f})",
            f"{1e3 * row['seconds']:.0f}",
        )
    return result


def main(config: Annotated[TransformerConfig, tyro.conf.arg(name="")]) -> None:
    """Measure what the capture costs in a transformer, and print tables."""
    # A table that is piped to a file need not fit a terminal.
    console = Console(width=None if sys.stdout.isatty() else 100)
    results = {}
    for name, scanned in (("unrolled", False), ("scanned", True)):
        results[name] = measure(config, scanned, console)
        size = f"{config.depth} blocks, width {config.width}"
        batch = f"{config.batch_size} x {config.length} tokens"
        console.print(table(f"{size}, {name}, {batch}", results[name]))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps({"environment": environment(), "results": results}, indent=2))
    console.print(f"Multiples of SGD's. Numbers: {config.out}")
