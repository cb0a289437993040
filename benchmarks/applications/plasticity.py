"""Why a network stops learning: what its units, weights and steps are after many tasks.

    python -m benchmarks plasticity          # the table
    python -m benchmarks plasticity decay    # which strength of decay suits whom

The stream is that of `continual-permuted`. Units, weights and steps are measured at the end of each
task, on its last thousand examples; the table has means over the last ten tasks and the seeds.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float

import bnp_optax
from benchmarks.applications import tasks
from benchmarks.applications.continual import LAST, compiled
from benchmarks.applications.learners import LEARNERS, WIDTH, Learner, Network, undecayed
from benchmarks.arguments import Count
from benchmarks.contest.tables import table
from benchmarks.environment import environment

# None of those that are reported.
_CHOOSING = 1000
_HIDDEN = "Dense_1/kernel"


@dataclasses.dataclass(frozen=True)
class TableOptions:
    """Accuracy, and what goes with its loss.

    Attributes:
      tasks: Length of a training.
      seeds: Trainings of each row.
      data_dir: Folder of mnist.npz; the environment variable BNP_DATA_DIR if not given.
      results: Where the numbers go.
    """

    tasks: Count = 40
    seeds: Count = 2
    data_dir: Path | None = None
    results: Path = Path("results/applications/plasticity.json")


@dataclasses.dataclass(frozen=True)
class DecayOptions:
    """Accuracy in the last tasks of the streams by rate and strength, on a seed of their own.

    Attributes:
      tasks: Length of a training.
      rates: Learning rates.
      strengths: Of decay.
      learners: Names, or all that decay.
      data_dir: Folder of mnist.npz; the environment variable BNP_DATA_DIR if not given.
    """

    tasks: Count = 40
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    strengths: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    learners: tuple[str, ...] = tuple(name for name, one in LEARNERS.items() if one.decay)
    data_dir: Path | None = None


def effective_rank(features: Float[Array, "n units"]) -> Float[Array, ""]:
    """The exp of the entropy of the singular values' shares: between 1 and the number of units.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    values = jnp.linalg.svd(features, compute_uv=False)
    shares = values / jnp.maximum(jnp.sum(values), 1e-12)
    return jnp.exp(-jnp.sum(jnp.where(shares > 0, shares * jnp.log(shares + 1e-30), 0.0)))


def numbers(learner: Learner, rate: Any, params: Any, state: Any, x: Array) -> dict[str, Array]:
    """What is measured at the end of a task; weights, gain and step are of the second layer."""
    given: Any = Network(learner.layer_norm).apply({"params": params}, x)
    logits, hidden = given
    on = [jnp.mean(units > 0, axis=0) for units in hidden]
    size = jnp.sqrt(jnp.mean(params["Dense_1"]["kernel"] ** 2))
    size_in_z, gain = size, jnp.ones(())
    if learner.in_z:
        logged = bnp_optax.metrics(state, updates=params)
        gain = logged[f"gain/{_HIDDEN}"]
        size_in_z = logged[f"update_norm_in_z/{_HIDDEN}"] / WIDTH
    return {
        "dead 1, %": 100 * jnp.mean(on[0] == 0),
        "dead 2, %": 100 * jnp.mean(on[1] == 0),
        "rarely on 2, %": 100 * jnp.mean(on[1] < 0.02),
        "rank 2": effective_rank(hidden[1]),
        "weights": size,
        "z": size_in_z,
        "gain": gain,
        "step, % of weights": 100 * rate * gain / size,
        "logits": jnp.sqrt(jnp.mean(logits**2)),
    }


def measure(learner: Learner, rate: float, n_tasks: int, seeds: range, pool: Any) -> dict[str, Any]:
    """Accuracy in the first and the last tasks, a number for each seed; means of the others."""
    run = compiled(learner, functools.partial(numbers, learner, rate))
    firsts, lasts, others, strength = [], [], [], learner.strength("permuted")
    for seed in seeds:
        stream = tasks.draw("permuted", n_tasks, len(pool.y), seed)
        key = jax.random.key(seed)
        accuracy, found = run(rate, strength, key, pool.x, pool.y, stream)
        firsts.append(100 * float(np.mean(accuracy[1 : LAST + 1])))
        lasts.append(100 * float(np.mean(accuracy[-LAST:])))
        others.append({name: float(np.mean(values[-LAST:])) for name, values in found.items()})
    means = {name: float(np.mean([one[name] for one in others])) for name in others[0]}
    return {"first": firsts, "last": lasts} | means


def rows() -> Iterator[tuple[str, Learner, float]]:
    """Adam in z, and one change of it at a time, beside Adam."""
    adam, in_z = LEARNERS["adam"], LEARNERS["bnp-adam"]
    yield "Adam", adam, 1e-3
    yield "AdamW", LEARNERS["adamw"], 1e-3
    for rate in (1e-3, 3e-3, 1e-2):
        yield "Adam in z", in_z, rate
    changes: tuple[tuple[str, float, dict[str, Any]], ...] = (
        ("eps_rel=10", 3e-3, {"eps_rel": 10.0}),
        ("scale_bias=False", 3e-3, {"scale_bias": False}),
        ("scale=False", 1e-3, {"scale": False}),
        ("decay=.999", 3e-3, {"decay": 0.999}),
    )
    for label, rate, options in changes:
        make = undecayed(functools.partial(bnp_optax.bnp_adam, **options))
        yield f"Adam in z, {label}", dataclasses.replace(in_z, make=make), rate
    yield "LayerNorm, Adam in z", dataclasses.replace(in_z, layer_norm=True), 3e-3
    decaying = {
        "bnp-adamw": "AdamW in z",
        "bnp-adamw-eps10": "AdamW in z, eps_rel=10",
        "bnp-adamw-slow": "AdamW in z, decay=.999",
    }
    for name, label in decaying.items():
        yield label, LEARNERS[name], 3e-3


def tabulate(config: TableOptions) -> None:
    """Print what goes with the loss of plasticity, a row as soon as it is there, and keep it."""
    pool = tasks.images(config.data_dir)
    found = []
    for label, learner, rate in rows():
        strength = learner.strength("permuted")
        measured = measure(learner, rate, config.tasks, range(config.seeds), pool)
        found.append({"label": label, "rate": rate, "weight decay": strength} | measured)
        lines = as_table(found).splitlines()
        print("\n".join(lines if len(found) == 1 else lines[-1:]), flush=True)
        config.results.parent.mkdir(parents=True, exist_ok=True)
        kept = {"environment": environment(), "tasks": config.tasks, "rows": found}
        config.results.write_text(json.dumps(kept, indent=1))
        config.results.with_suffix(".md").write_text(f"{as_table(found)}\n")


def as_table(found: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    named = [name for name, value in found[0].items() if isinstance(value, float)][2:]
    lines = [
        [row["label"], f"{row['rate']:g}", *(_range(row[part]) for part in ("first", "last"))]
        + [f"{row[name]:.3g}" for name in named]
        for row in found
    ]
    header = ["", "rate", f"tasks 2 to {LAST + 1}, %", f"last {LAST}, %", *named]
    return table(header, lines)


def choose(config: DecayOptions) -> None:
    """Print the accuracy of each learner that decays at its best rate, for each strength."""
    pool = tasks.images(config.data_dir)
    header = ["", *(f"decay {strength:g}" for strength in config.strengths)]
    for kind in ("permuted", "rescaled"):
        stream = tasks.draw(kind, config.tasks, len(pool.y), _CHOOSING)
        lines = []
        for name in config.learners:
            learner = LEARNERS[name]
            cells, run, key = [], compiled(learner), jax.random.key(_CHOOSING)
            for strength in config.strengths:
                scores = {
                    rate: np.mean(run(rate, strength, key, pool.x, pool.y, stream)[0][-LAST:])
                    for rate in config.rates
                }
                best = max(config.rates, key=scores.__getitem__)
                cells.append(f"{100 * scores[best]:.1f} at {best:g}")
            lines.append([name, *cells])
            print(lines[-1], flush=True)
        print(f"\n{kind}\n\n{table(header, lines)}\n", flush=True)


def _range(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    prog = "python -m benchmarks plasticity"
    if argv[:1] == ["decay"]:
        choose(tyro.cli(DecayOptions, args=argv[1:], prog=f"{prog} decay", description=__doc__))
    else:
        tabulate(tyro.cli(TableOptions, args=argv, prog=prog, description=__doc__))
