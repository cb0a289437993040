"""The JMLR paper's fully connected network, 3072-100-100-100-10, on CIFAR-10.

    python -m benchmarks.cifar10 --data-dir DIR

Batches of 60 for 3000 steps and of 1 for 12,000, on raw pixels / 255 and on standardized ones.
Every method, the one that is known to go wrong included, takes the learning rate of one grid that
is best in validation accuracy after a run with one seed; then it runs with each seed. Train loss is
the mean batch loss over the last tenth of the steps.
"""

import json
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import bnp_optax
from benchmarks import data, methods, models, train
from benchmarks.environment import environment

STEPS = {60: 3000, 1: 12_000}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
USUAL = {"adam": 1e-3, "bnp_sgd": 0.1, "adam_z": 1e-3, "bnp_then_adam": 1e-3}
METHODS = methods.METHODS | {
    "bnp_then_adam": methods.Method(
        label="Adam after BNP (wrong)",
        norm="none",
        make=lambda rate, layers: optax.chain(
            bnp_optax.bnp_precondition(layers=layers), optax.adam(rate)
        ),
        needs_stats=True,
        color="#CC79A7",
        dashes=":",
    ),
}


class Trainer:
    """Runs of one method at one batch size, compiled once for all rates, seeds and inputs."""

    def __init__(self, method: methods.Method, batch_size: int, dataset: data.Dataset):
        """Compile nothing yet; `dataset` serves for shapes."""
        self.model = models.MLP(hidden=(100, 100, 100), norm=method.norm)
        self.method = method
        x, y = jnp.asarray(dataset.train.x[:batch_size]), jnp.asarray(dataset.train.y[:batch_size])
        variables = train.init_variables(self.model, x[:1], [0])[0]
        self.layers = train.find_layers(self.model, method, variables, x, y)
        self._run = jax.jit(self._scan)
        self._accuracy = jax.jit(
            lambda carry, x, y: jnp.mean(train.evaluate(self.model, carry, x, y)[1])
        )

    def _scan(self, rate: jax.Array, variables: Any, indices: Any, x: Any, y: Any) -> Any:
        step = train.make_step(self.model, self.method, self.layers)
        carry = train.init_carry(self.method, self.layers, variables)
        return lax.scan(lambda c, i: step(rate, c, x[i], y[i]), carry, indices)

    def __call__(
        self, rate: float, seed: int, batch_size: int, arrays: dict[str, tuple[Any, Any]]
    ) -> dict[str, Any]:
        """Train once; losses and accuracies."""
        x, y = arrays["train"]
        indices = train.batch_indices(len(y), batch_size, STEPS[batch_size], 1, seed)[0]
        variables = train.init_variables(self.model, x[:1], [seed])[0]
        carry, losses = self._run(jnp.float32(rate), variables, jnp.asarray(indices), x, y)
        losses = np.asarray(losses)
        return {
            "rate": rate,
            "seed": seed,
            "train_loss": float(losses[-len(losses) // 10 :].mean()),
            "finite": bool(np.isfinite(losses).all()),
            "validation_accuracy": float(self._accuracy(carry, *arrays["validation"])),
            "test_accuracy": float(self._accuracy(carry, *arrays["test"])),
        }


def table(title: str, rows: dict[str, list[dict[str, Any]]]) -> Table:
    """Means over seeds, with the range of the losses."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in ("method", "rate", "train loss", "(range)", "test accuracy"):
        justify = "left" if column == "method" else "right"
        result.add_column(column, justify=justify, no_wrap=True)
    for name, runs in rows.items():
        losses = [run["train_loss"] for run in runs]
        accuracy = float(np.mean([run["test_accuracy"] for run in runs]))
        result.add_row(
            METHODS[name].label,
            f"{runs[0]['rate']:g}",
            f"{np.mean(losses):.3f}" if all(run["finite"] for run in runs) else "not finite",
            f"({min(losses):.3f}-{max(losses):.3f})",
            f"{accuracy:.3f}",
        )
    return result


def best_rate(run: Trainer, batch_size: int, arrays: dict[str, Any], advance: Any) -> float:
    """The rate of the grid with the best validation accuracy of those that stay finite."""
    scores = {}
    for rate in RATES:
        result = run(rate, 0, batch_size, arrays)
        scores[rate] = result["validation_accuracy"] if result["finite"] else -1.0
        advance()
    return max(scores, key=lambda rate: scores[rate])


def main(
    data_dir: pathlib.Path | None = None,
    batch_sizes: tuple[Literal[60, 1], ...] = (60, 1),
    inputs: tuple[Literal["raw", "standardized"], ...] = ("raw", "standardized"),
    seeds: int = 3,
    rates: Literal["tuned", "usual"] = "tuned",
    out: pathlib.Path = pathlib.Path("results/cifar10.json"),
) -> None:
    """Run and print.

    Args:
      data_dir: Folder with `cifar10.npz`; default: the environment variable BNP_DATA_DIR.
      batch_sizes: Which of the two settings.
      inputs: Which of the two inputs.
      seeds: Runs with the chosen rate.
      rates: `usual` skips tuning and runs four methods: Adam at 1e-3, BNP + SGD at 0.1.
      out: Where the numbers go, with their environment.
    """
    console = Console()
    console.width = max(console.width, 100)
    try:
        raw = data.load("cifar10", data_dir, train_size=40_000, eval_size=10_000)
    except data.DataError as error:
        console.print(f"cifar10: {error}", style="red", highlight=False)
        raise SystemExit(2) from error
    names = list(METHODS) if rates == "tuned" else list(USUAL)
    n_runs = seeds + (len(RATES) if rates == "tuned" else 0)
    results: dict[str, Any] = {}
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        total = n_runs * len(names) * len(batch_sizes) * len(inputs)
        task = progress.add_task("runs", total=total)

        def advance() -> None:
            progress.advance(task)

        for kind in inputs:
            dataset = raw if kind == "raw" else data.standardize(raw, per="feature")
            arrays = {
                part: (jnp.asarray(split.x), jnp.asarray(split.y))
                for part in ("train", "validation", "test")
                for split in [getattr(dataset, part)]
            }
            for batch_size in batch_sizes:
                title = f"Batch {batch_size}, {kind} inputs, {STEPS[batch_size]} steps"
                rows = results[title] = {}
                for name in names:
                    run = Trainer(METHODS[name], batch_size, dataset)
                    if rates == "tuned":
                        rate = best_rate(run, batch_size, arrays, advance)
                    else:
                        rate = USUAL[name]
                    rows[name] = []
                    for seed in range(seeds):
                        rows[name].append(run(rate, seed, batch_size, arrays))
                        advance()
                console.print(table(title, rows))
                out.parent.mkdir(parents=True, exist_ok=True)
                report = {"environment": environment(), "results": results}
                out.write_text(json.dumps(report, indent=2))
    console.print(f"Numbers: {out}")


if __name__ == "__main__":
    tyro.cli(main)
