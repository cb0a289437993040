"""What the units of the inputs change: the same problem with raw and with standardized inputs."""

from collections.abc import Iterator, Sequence

from benchmarks.contest.summary import Contest, Summary, compare
from benchmarks.contest.tables import points, table
from benchmarks.training.methods import METHODS

NOTE = """\
The same data, network, seeds and search of the learning rate; test scores in points of a hundred,
mean (lowest to highest) over the seeds. From z, initial values are those of z by the statistics of
2,000 training examples, and the input layer's P is held: the two columns are then to be the same up
to the rate that the search chose, and are *even* where the ranges of the seeds overlap."""

SHOWN = ("sgd", "adam", "ready_sgd", "ready_adam", "from_z_sgd", "from_z_adam")
_RAW, _STANDARDIZED = "-raw", "-standardized"


def section(compared: Sequence[Contest]) -> list[str]:
    """The table, if anything was trained from z."""
    rows = [
        [name, METHODS[method].label, points(raw), points(other), compare(raw, other, "score")]
        for name, raw_inputs, standardized in _pairs(compared)
        if any(METHODS[method].from_z for method in raw_inputs.summaries)
        for method in SHOWN
        if (raw := _of(raw_inputs, method)) and (other := _of(standardized, method))
    ]
    if not rows:
        return []
    header = ["problem", "method", "raw", "standardized", "raw against standardized"]
    return ["## Raw against standardized inputs", NOTE, table(header, rows, words=2)]


def _pairs(compared: Sequence[Contest]) -> Iterator[tuple[str, Contest, Contest]]:
    by_name = {contest.problem["name"]: contest for contest in compared}
    for name, contest in by_name.items():
        if name.endswith(_RAW):
            bare = name.removesuffix(_RAW)
            if bare + _STANDARDIZED in by_name:
                yield bare, contest, by_name[bare + _STANDARDIZED]


def _of(contest: Contest, method: str) -> Summary | None:
    found = contest.summaries.get(method)
    return found if found is not None and found.final else None
