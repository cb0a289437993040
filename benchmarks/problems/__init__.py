"""The problems that methods are compared on; nothing is read before a problem is loaded."""

from benchmarks.problems.base import Data, Problem, Scale
from benchmarks.problems.drift import drifting
from benchmarks.problems.images import image_problems
from benchmarks.problems.tabular import Inputs, table
from benchmarks.problems.text import PYTHON, SKLEARN, next_character, next_character_deep

__all__ = ["Data", "Problem", "Scale", "problems"]


def problems(scale: Scale) -> dict[str, Problem]:
    """All problems by name, the paper's kinds first.

    Args:
      scale: `'small'` for runs of seconds to minutes on a CPU, `'paper'` for the paper's networks,
        sizes and lengths.
    """
    both: tuple[Inputs, Inputs] = ("raw", "standardized")
    all_of_them = [
        *image_problems(scale),
        drifting("digits", "scattering", scale),
        drifting("mnist", "scattering", scale),
        drifting("digits", "growing", scale),
        *(table("tabular", inputs, scale) for inputs in both),
        *(table("friedman", inputs, scale) for inputs in both),
        *(table("friedman2", inputs, scale) for inputs in both),
        *(table("friedman3", inputs, scale) for inputs in both),
        *(table("breast-cancer", inputs, scale) for inputs in both),
        next_character(PYTHON, scale),
        next_character(SKLEARN, scale),
        next_character_deep(scale),
    ]
    return {problem.name: problem for problem in all_of_them}
