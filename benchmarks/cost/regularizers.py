"""What the regularizers cost: FLOPs, temporary memory, and evaluations of the gradient.

    python -m benchmarks cost-regularizer

A step of Adam on 784-512-512-10 at batch 256, without and with a regularizer, in p and in the z of
BNP: FLOPs, bytes accessed, temporary bytes, and these with the arguments' (peak), as XLA reports
them of the compiled step, in multiples of the same optimizer's without the regularizer. They are
free of noise. And how often a step evaluates `grad_fn`, and four steps are traced.
"""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import optax
from rich import box
from rich.console import Console
from rich.table import Table

import bnp_optax
from benchmarks.environment import environment
from benchmarks.networks.small import MLP

KEYS = ("flops", "bytes", "temporary_bytes", "peak_bytes")
SIZES, BATCH_SIZE = (784, 512, 512, 10), 256


def _regularized(**options: Any) -> optax.GradientTransformation:
    return optax.chain(
        bnp_optax.gradient_regularization(1e-3, radius=0.05, **options), optax.adam(1e-3)
    )


REGULARIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "none": lambda: optax.adam(1e-3),
    "gradient, exact": lambda: _regularized(mode="exact"),
    "gradient, exact, l2": lambda: _regularized(mode="exact", norm="l2"),
    "gradient, forward": lambda: _regularized(mode="forward"),
    "gradient, backward, l2": lambda: _regularized(mode="backward", norm="l2"),
    "decay": lambda: optax.chain(optax.adam(1e-3), bnp_optax.zspace_weight_decay(1e-3)),
    "L1": lambda: optax.chain(optax.adam(1e-3), bnp_optax.proximal_l1(1e-4, 1e-3)),
}
SPACES: dict[str, Callable[[optax.GradientTransformation], Any]] = {
    "p": optax.with_extra_args_support,
    "BNP's z": lambda inner: bnp_optax.in_zspace(inner, bnp_optax.bnp()),
}


def measure(tx: Any, in_z: bool) -> dict[str, float]:
    """The costs of one step, and how often it was traced and evaluated a gradient."""
    model = MLP(SIZES[1:-1], SIZES[-1])
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.uniform(keys[0], (BATCH_SIZE, SIZES[0]))
    y = jax.random.randint(keys[1], (BATCH_SIZE,), 0, SIZES[-1])
    params = model.init(keys[2], x)["params"]
    evaluations: list[None] = []
    traces: list[None] = []

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry: Any, x: jax.Array, y: jax.Array) -> Any:
        params, state = carry
        traces.append(None)

        def grad_fn(params: Any) -> Any:
            evaluations.append(None)
            return jax.grad(loss_fn)(params, x, y)

        if in_z:
            _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, x, y)
            extra = {"layer_stats": stats}
        else:
            grads, extra = jax.grad(loss_fn)(params, x, y), {}
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn, **extra)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=0)
    carry = (params, tx.init(params))
    compiled = jitted.lower(carry, x, y).compile()
    n_evaluations = len(evaluations)
    for _ in range(3):
        carry = jitted(carry, x, y)
    cost: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    return {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
        "gradient_evaluations": n_evaluations,
        "traces": len(traces),
    }


def main(out: pathlib.Path = pathlib.Path("results/regularizer_cost.json")) -> None:
    """Measure what the regularizers cost, and print tables.

    Args:
      out: Where the numbers go, with their environment.
    """
    # A table that is piped to a file need not fit a terminal.
    console = Console(width=None if sys.stdout.isatty() else 100)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for space, wrap in SPACES.items():
        rows = {name: measure(wrap(make()), space != "p") for name, make in REGULARIZERS.items()}
        results[space] = rows
        table = Table(title=f"Adam in {space}", title_justify="left", box=box.SIMPLE)
        table.add_column("regularizer", no_wrap=True)
        for column in ("FLOPs", "bytes", "temporary", "peak", "grad_fn", "traced"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, row in rows.items():
            ratios = [row[key] / rows["none"][key] for key in KEYS]
            counts = [str(row[key]) for key in ("gradient_evaluations", "traces")]
            table.add_row(name, *(f"{ratio:.3f}x" for ratio in ratios), *counts)
        console.print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"environment": environment(), "results": results}, indent=2))
    console.print(f"Multiples of Adam's without a regularizer. Numbers: {out}")
