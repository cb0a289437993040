"""Does a problem need it? What one batch says beforehand, and who won in the contest.

    python -m benchmarks need --data-dir DIR

For every problem of the contest with results of Adam (or AdamW) and of this library's counterparts:
the plain network at its initial values, the statistics of one batch of 256, and two numbers of the
layer that the data enter, its offset and its spread,

    rms(mu) / rms(sigma),   max(sigma~) / min(sigma~)  with  sigma~^2 = sigma^2 + 0.01 max sigma^2.

A gain is predicted where the offset is above a threshold: the best on the development half, the
least of equal ones. The table has both halves, and says how often the prediction is right.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bnp_optax
from benchmarks import problems
from benchmarks.contest import cells
from benchmarks.contest.summary import Contest, Verdict, compare, contests
from benchmarks.contest.tables import table
from benchmarks.problems import Problem
from benchmarks.problems.halves import is_held_out
from benchmarks.training.parts import init_variables, make_loss
from benchmarks.training.trainer import LOSSES

_N_EXAMPLES = 256
# What is replaced, and by what: from the usual initial values, or from z where units differ.
_RIVALS = {"adam": ("from_z_adam", "ready_adam"), "adamw": ("ready_adamw",)}


class Case(NamedTuple):
    """A problem.

    Attributes:
      name: Of the problem.
      offset: Of the inputs, from one batch.
      spread: Of the inputs, from one batch.
      verdict: Of the counterpart against the optimizer that it replaces, at tuned rates.
      points: What it gained, in points of the test score.
    """

    name: str
    offset: float
    spread: float
    verdict: Verdict
    points: float


def main(results: Path = Path("benchmarks/results/contest"), data_dir: Path | None = None) -> None:
    """Print what one batch says of each problem beside who won in the contest, in Markdown.

    Args:
      results: Folder of the contest's results.
      data_dir: Folder of the .npz files; the environment variable BNP_DATA_DIR if not given.
    """
    print(report(list(_cases(results, data_dir))))


def report(found: Sequence[Case]) -> str:
    """The table, and how often the rule was right on either half."""
    threshold = best_threshold([case for case in found if not is_held_out(case.name)])
    rows = [
        [
            case.name,
            "held out" if is_held_out(case.name) else "development",
            f"{case.offset:.2f}",
            f"{case.spread:.1f}",
            "gain" if case.offset > threshold else "level",
            f"{case.points:+.1f}, {case.verdict}",
        ]
        for case in sorted(found, key=lambda case: -case.offset)
    ]
    header = ["problem", "half", "offset", "spread", "predicted", "points, verdict"]
    lines = [table(header, rows, words=2), "", f"Threshold of the offset: {threshold:.2f}."]
    for held_out, half in ((False, "development"), (True, "held-out")):
        of_half = [case for case in found if is_held_out(case.name) == held_out]
        right = sum(is_right(case, threshold) for case in of_half)
        won = sum(case.verdict == "won" for case in of_half)
        lines.append(
            f"On the {half} half right in {right} of {len(of_half)}, of which {won} were won."
        )
    return "\n".join(lines)


def is_right(case: Case, threshold: float) -> bool:
    """Whether a gain was predicted, and there was one, or neither."""
    return (case.offset > threshold) == (case.verdict == "won")


def best_threshold(found: Sequence[Case]) -> float:
    """The least offset, of those found, above which a prediction of gains is most often right."""
    candidates = sorted({0.0, *(case.offset for case in found)})
    return max(candidates, key=lambda t: sum(is_right(case, t) for case in found))


def _cases(results: Path, data_dir: Path | None) -> Iterator[Case]:
    known = problems.problems("small")
    for contest in contests(cells.read_all(results)[0]):
        name = contest.problem["name"]
        verdict = _outcome(contest)
        if name in known and verdict is not None:
            yield Case(name, *measured(known[name], data_dir), *verdict)


def _outcome(contest: Contest) -> tuple[Verdict, float] | None:
    for rival, ours in _RIVALS.items():
        old = contest.summaries.get(rival)
        for name in ours:
            new = contest.summaries.get(name)
            if old is not None and new is not None and old.final and new.final:
                gained = new.final["score"].mean - old.final["score"].mean
                return compare(new, old, "score"), 100 * float(gained)
    return None


def measured(problem: Problem, data_dir: Path | None) -> tuple[float, float]:
    """Offset and spread of the inputs of the first layer, or the largest of several."""
    data = problem.load(data_dir)
    model = problem.network("none", problem.steps)
    x, y = (jnp.asarray(part[:_N_EXAMPLES]) for part in (data.train.x, data.train.y))
    if problem.drift is not None:
        x = problem.drift(x, jnp.int32(problem.steps // 2))
    variables = dict(init_variables(model, x[:1], [0])[0])
    params = variables.pop("params")
    loss_fn = make_loss(model, LOSSES[problem.task])

    def loss_of(params: Any, x: Any, y: Any) -> Any:
        return loss_fn(params, variables, x, y)[0]

    try:
        found = list(bnp_optax.dataset_statistics(loss_of, params, [(x, y)]).values())
    except ValueError:  # Behind an embedding no layer has the data alone.
        found = list(jax.jit(bnp_optax.value_and_grad(loss_of))(params, x, y)[2].values())
    offsets, spreads = zip(*map(_offset_and_spread, found), strict=True)
    return max(offsets), max(spreads)


def _offset_and_spread(stats: bnp_optax.LayerStats) -> tuple[float, float]:
    mean, var = np.asarray(stats.mean, np.float64), np.asarray(stats.var, np.float64)
    sizes = np.sqrt(var + 1e-2 * var.max())
    return float(np.sqrt(np.mean(mean**2) / np.mean(var))), float(sizes.max() / sizes.min())
