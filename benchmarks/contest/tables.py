"""Tables of the benchmark, as Markdown."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.contest.summary import (
    Contest,
    Quantity,
    Range,
    Summary,
    Verdict,
    compare,
    final_runs,
)
from benchmarks.training.methods import METHODS

COMMAND = "python -m benchmarks run --problems"

# The best learning rates of Tables 2 and 3 of the JMLR paper.
PAPER_RATES: dict[str, dict[str, float]] = {
    "fc-mnist-b60-raw": {"sgd": 1e-1, "batchnorm": 5e-1, "bnp_sgd": 5e-1, "layernorm": 1e-1},
    "fc-cifar10-b60-raw": {"sgd": 1e-2, "batchnorm": 5e-1, "bnp_sgd": 1e-1, "layernorm": 5e-1},
    "fc-cifar10-b6-raw": {
        "sgd": 5e-3,
        "batchnorm": 5e-2,
        "bnp_sgd": 5e-2,
        "batchrenorm": 5e-2,
        "layernorm": 5e-2,
    },
    "fc-cifar10-b1-raw": {"sgd": 5e-4, "bnp_sgd": 1e-1, "layernorm": 1e-2},
    "cnn-cifar10-b128-raw": {
        "sgd": 1e-1,
        "batchnorm": 1e-1,
        "bnp_sgd": 1e-1,
        "four_things": 5e-3,
    },
    "cnn-cifar10-b2-raw": {
        "sgd": 1e-3,
        "batchnorm": 1e-3,
        "bnp_sgd": 1e-2,
        "four_things": 1e-4,
        "batchrenorm": 1e-2,
    },
    "cnn-cifar10-b1-raw": {"sgd": 1e-3, "bnp_sgd": 1e-1, "four_things": 1e-3},
}
# Trained by the paper with Adam and here by gradient descent, so that rates cannot be compared.
PAPER_ADAM = {("cnn-cifar10-b128-raw", "sgd")}

_NONE = "-"
_QUANTITIES: tuple[Quantity, ...] = ("train_loss", "loss", "score")
_DUELS: tuple[Quantity, ...] = ("score", "train_loss")
_VERDICTS: tuple[Verdict, ...] = ("won", "even", "lost")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table in Markdown; the first columns, so many, are words, the others are set right."""
    rule = [":--" if i < words else "--:" for i in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in x) + " |" for x in lines
    )


def problem_section(contest: Contest) -> str:
    """The table of a problem, and how to measure it again."""
    problem = contest.problem
    target = "none, SGD has no final loss"
    if contest.target is not None:
        target = f"a training loss of {number(contest.target)}, SGD's last"
    facts = [
        f"batches of {problem['batch_size']}",
        f"{problem['steps']} steps",
        f"scale: {problem['scale']}",
        *([] if problem["source"] is None else [f"repeats {problem['source']}"]),
        f"target: {target}",
    ]
    header = ["method", "rate", "train loss", "test loss", score_name(problem)]
    command = f"{COMMAND} {problem['name']} --scale {problem['scale']}"
    rows = [_row(contest, summary) for summary in contest.summaries.values()]
    return "\n\n".join(
        [
            f"### {problem['title']} (`{problem['name']}`)",
            "; ".join(facts) + ".",
            table([*header, "steps to target", "time to target"], rows),
            *_warnings(contest),
            f"`{command}`, in {_environments(contest)}.",
        ]
    )


def overview(contests: Sequence[Contest]) -> str:
    """For each problem the best of the others and the best of ours; then how often each won."""
    parts = []
    for quantity in _DUELS:
        name = "test score" if quantity == "score" else "training loss"
        header = ["problem", "best baseline", name, "best of ours", name, "ours"]
        parts += [f"By the final {name}:", table(header, [_duel(c, quantity) for c in contests])]
    counts = _counts(contests)
    if counts:
        results = [f"{name} {word}" for name in ("score", "loss") for word in _VERDICTS]
        parts.append(table(["against the best baseline", *results], counts))
    return "\n\n".join(parts)


def rates(contests: Iterable[Contest]) -> str:
    """The tuned learning rates beside the paper's."""
    rows = []
    for contest in contests:
        name = contest.problem["name"]
        for method, paper in PAPER_RATES.get(name, {}).items():
            summary = contest.summaries.get(method)
            rate = None if summary is None else summary.cell.rate
            adam = (name, method) in PAPER_ADAM
            rows.append(
                [
                    f"`{name}`",
                    METHODS[method].label,
                    _NONE if rate is None else f"{rate:g}",
                    f"{paper:g}" + (" (Adam)" if adam else ""),
                    _NONE if rate is None or adam else ratio(rate / paper),
                ]
            )
    return table(["problem", "method", "rate", "the paper's", "ratio"], rows, words=2)


def number(value: float) -> str:
    """With three digits; 'diverged' if it is not finite."""
    return f"{value:#.3g}".rstrip(".") if np.isfinite(value) else "diverged"


def ratio(value: float) -> str:
    """With two digits, and without an exponent."""
    return f"{float(f'{value:.2g}'):g}"


def score(value: float, problem: dict[str, Any]) -> str:
    """In percent for a classification."""
    if not np.isfinite(value):
        return "diverged"
    return f"{100 * value:.1f}" if problem["task"] == "classification" else f"{value:.3f}"


def points(summary: Summary) -> str:
    """The final score in points of a hundred: mean, and range over the seeds."""
    score = summary.final["score"]
    return f"{100 * score.mean:.1f} ({100 * score.low:.1f} to {100 * score.high:.1f})"


def score_name(problem: dict[str, Any]) -> str:
    """What the score is."""
    return "test accuracy, %" if problem["task"] == "classification" else "test R²"


def _row(contest: Contest, summary: Summary) -> list[str]:
    notes = [] if summary.note is None else [summary.note]
    if summary.diverged:
        notes.append(f"{summary.diverged} of {len(final_runs(summary.cell))} seeds diverged")
    label = summary.label + (" (ours)" if summary.ours else "")
    rate = summary.cell.rate
    texts = [
        "; ".join([label, *notes]),
        _NONE if rate is None else f"{rate:g}" + (" at the edge" if summary.at_edge else ""),
    ]
    for quantity in _QUANTITIES:
        text = _NONE
        if quantity in summary.final:
            text = _range(summary.final[quantity], quantity, contest.problem)
        texts.append(_bold(text, summary is contest.best(quantity)))
    fastest = {name: _least(contest, name) for name in ("steps_to_target", "time_to_target")}
    for name, form in (("steps_to_target", "{}"), ("time_to_target", "{:.3g} s")):
        value = getattr(summary, name)
        text = _NONE if value is None else form.format(value)
        texts.append(_bold(text, value is not None and value == fastest[name]))
    return texts


def _bold(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def _least(contest: Contest, name: str) -> float | None:
    values = [getattr(summary, name) for summary in contest.summaries.values()]
    return min((value for value in values if value is not None), default=None)


def _range(value: Range, quantity: Quantity, problem: dict[str, Any]) -> str:
    mean, low, high = (score(x, problem) if quantity == "score" else number(x) for x in value)
    return mean if mean == "diverged" else f"{mean} ({low} to {high})"


def _duel(contest: Contest, quantity: Quantity) -> list[str]:
    """A row of the overview."""
    sides = [contest.best(quantity, ours) for ours in (False, True)]
    row = [f"`{contest.problem['name']}`"]
    for side in sides:
        if side is None:
            row += [_NONE, _NONE]
        else:
            row += [side.label, _range(side.final[quantity], quantity, contest.problem)]
    rival, best = sides
    return [*row, _NONE if rival is None or best is None else compare(best, rival, quantity)]


def _counts(contests: Sequence[Contest]) -> list[list[str]]:
    """For each of our methods how often it won, was even, and lost, by score and by loss."""
    tallies: dict[str, Counter[tuple[str, str]]] = {}
    for contest in contests:
        for quantity in _DUELS:
            for name, verdict in contest.verdicts(quantity).items():
                tallies.setdefault(contest.summaries[name].label, Counter())[quantity, verdict] += 1
    columns = [(quantity, verdict) for quantity in _DUELS for verdict in _VERDICTS]
    return [[label, *(str(tally[x]) for x in columns)] for label, tally in tallies.items()]


def _warnings(contest: Contest) -> list[str]:
    """What a reader must know before comparing."""
    cells = [s.cell for s in contest.summaries.values() if s.cell.skipped is None]
    warnings = []
    if len({tuple(cell.grid) for cell in cells}) > 1:
        warnings.append("The methods were tuned on different grids.")
    if len({cell.seeds for cell in cells}) > 1:
        warnings.append("The methods had different numbers of seeds.")
    machines = {
        str({key: item for key, item in environment.items() if key != "commit"})
        for cell in cells
        for environment in cell.environments
    }
    if len(machines) > 1:
        warnings.append("Not all were measured in one environment: times are not comparable.")
    return [" ".join(warnings)] if warnings else []


def _environments(contest: Contest) -> str:
    """Where the cells of a problem were measured, each place once."""
    places = [
        environment_line(environment)
        for summary in contest.summaries.values()
        for environment in summary.cell.environments
    ]
    return "; ".join(dict.fromkeys(places)) or "no environment"


def environment_line(environment: dict[str, Any]) -> str:
    """An environment in a line."""
    versions = environment.get("versions", {})
    parts = [f"Python {environment.get('python', '?')}"]
    parts += [f"{name} {versions[name]}" for name in ("jax", "flax", "optax") if name in versions]
    parts += [str(environment["cpu"])] if "cpu" in environment else []
    parts += [str(device) for device in dict.fromkeys(environment.get("devices", []))]
    parts += [f"commit {environment['commit']}"] if environment.get("commit") else []
    return ", ".join(parts)
