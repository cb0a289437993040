"""The problems that methods are compared on; nothing is read before a problem is loaded."""

from benchmarks.problems.base import Data, Problem, Scale
from benchmarks.problems.drift import drifting
from benchmarks.problems.images import image_problems
from benchmarks.problems.tabular import regression
from benchmarks.problems.text import next_character

__all__ = ["Data", "Problem", "Scale", "problems"]


def problems(scale: Scale) -> dict[str, Problem]:
    """All problems by name, the paper's kinds first.

    Args:
      scale: `'small'` for runs of seconds to minutes on a CPU, `'paper'` for the paper's networks,
        sizes and lengths.
    """
    all_of_them = [
        *image_problems(scale),
        drifting("digits", "scattering", scale),
        drifting("mnist", "scattering", scale),
        drifting("digits", "growing", scale),
        regression("tabular", "raw", scale),
        regression("tabular", "standardized", scale),
        regression("friedman", "raw", scale),
        regression("friedman", "standardized", scale),
        next_character(scale),
    ]
    return {problem.name: problem for problem in all_of_them}
