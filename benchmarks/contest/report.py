"""The report of the benchmark: what was measured, in tables, figures, and the paper's claims."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.contest import cells, per_second, regret, units
from benchmarks.contest.claims import Claim, claims
from benchmarks.contest.curves import GROUPS, group_of, place, save_figures
from benchmarks.contest.summary import Contest, contests
from benchmarks.contest.tables import overview, problem_section, rates, table

NOTES = """\
All methods of a problem are tuned alike, by one search on one grid of learning rates, by the score
on the validation split; they have the same seeds, steps and data, unless the table says otherwise.
Losses and scores are those of the last step, on the test split: mean (lowest to highest) over the
seeds. The training loss is the mean over the batches since the evaluation before. **Bold** is the
best of a column. The target is the last training loss of SGD; the time to it is that of so many
steps of the method's fastest whole run, without compilation and evaluation; what a step costs is
measured with more care by `python -m benchmarks cost`.

The best of this library's methods (ours) is compared with the best baseline, both by the test
split, and is *even* with it where the ranges of the seeds overlap."""


def write(results: Path, output: Path) -> str:
    """Read all cells in `results`, and write `report.md` and its figures into `output`.

    Returns:
      The report's text.
    """
    found, errors = cells.read_all(results)
    aside = sorted(results.glob("*/*.json.corrupt*"))
    compared = sorted(contests(found), key=place)
    figures = save_figures(found, output)
    parts = ["# Benchmark", NOTES]
    if not compared:
        parts.append(f"No results in `{results.name}`.")
    else:
        parts += ["## Overview", overview(compared)]
        checked = claims(compared)
        if replicates := any(claim.verdict != "no data" for claim in checked):
            parts += ["## The paper's claims", _claims(checked)]
        parts += regret.section(compared)
        parts += units.section(compared)
        costs = per_second.read_costs(results.parent / "whiten_cost.json")
        parts += per_second.section(compared, costs)
        parts += _sections(compared, figures)
        if replicates:
            parts += ["## Learning rates beside the paper's Tables 2 and 3", rates(compared)]
    parts += _gaps(compared, errors, aside, results)
    text = "\n\n".join(parts) + "\n"
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.md").write_text(text, encoding="utf-8")
    return text


def _sections(compared: Sequence[Contest], figures: Mapping[str, Path]) -> list[str]:
    """A section for each group, with the figures and tables of its problems."""
    parts = []
    for group in GROUPS:
        members = [c for c in compared if group_of(c.problem["name"]) is group]
        if not members:
            continue
        parts.append(f"## {group.title}")
        for contest in members:
            figure = figures.get(contest.problem["name"])
            if figure is not None:
                parts.append(f"![{group.title}]({figure.name})")
            parts.append(problem_section(contest))
    return parts


def _claims(checked: Sequence[Claim]) -> str:
    # The paper's experiments have no drift.
    own = [claim for claim in checked if claim.text.startswith("drift")]
    papers = [claim for claim in checked if claim not in own]
    rows = [[claim.text, claim.verdict, claim.numbers] for claim in checked]
    tallies = f"Of the paper: {_tally(papers)}. Of this benchmark, about drift: {_tally(own)}."
    return f"{tallies}\n\n" + table(["claim", "verdict", "numbers"], rows, words=3)


def _tally(checked: Sequence[Claim]) -> str:
    counts = Counter(claim.verdict for claim in checked).most_common()
    return f"{len(checked)} claims" + "".join(f", {count} {verdict}" for verdict, count in counts)


def _gaps(
    compared: Sequence[Contest],
    errors: Sequence[tuple[Path, str]],
    aside: Sequence[Path],
    results: Path,
) -> list[str]:
    """What is missing from the report, and why."""
    lines = [
        f"- `{contest.problem['name']}/{summary.name}`: {summary.note}"
        for contest in compared
        for summary in contest.summaries.values()
        if summary.note is not None
    ]
    lines += [f"- `{path.relative_to(results)}`, corrupt: {error}" for path, error in errors]
    lines += [f"- `{path.relative_to(results)}`: set aside as corrupt" for path in aside]
    return ["## What is missing", "\n".join(lines)] if lines else []
