"""An application: what is trained, by whom, and how it is judged."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

# The palette of Okabe and Ito, safe for colour-blind readers.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
VERMILION, BLUE, PURPLE, YELLOW = "#D55E00", "#0072B2", "#CC79A7", "#F0E442"


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A way to train.

    Attributes:
      name: In the results, and what `Application.train` knows it by.
      label: In tables and figures.
      start: The learning rate at which the search begins: the customary or the documented one.
      ours: Whether it is of this library.
      legal: Whether the setting allows it; what is not is shown for comparison alone.
      color: In figures.
      dashes: Line style in figures.
    """

    name: str
    label: str
    start: float
    ours: bool = False
    legal: bool = True
    color: str = BLACK
    dashes: str = "-"


# (contestant, rate, seeds, steps) -> curves, a row for each seed.
Train = Callable[[str, float, Sequence[int], int], Float[np.ndarray, "seeds points"]]


def last(curves: Float[np.ndarray, "seeds points"]) -> Float[np.ndarray, " seeds"]:
    """What is judged where the end counts."""
    return curves[:, -1]


@dataclasses.dataclass(frozen=True)
class Application:
    """A problem.

    Attributes:
      name: On the command line and in file names.
      title: In tables and figures.
      measure: What the curves are, such as 'relative error'.
      train: `train(name, rate, seeds, steps)` trains one contestant once for each seed and returns
        the curves of the measure at equal distances; NaN where a training diverged. The seed has a
        part in all that is random: initial values, data, noise.
      contestants: Who is compared.
      steps: Length of a training.
      progress: What the steps are, for the figure's axis.
      higher_is_better: Whether the measure is a gain or an error.
      judged: From curves to a number for each seed.
      log: Whether the figure's measure is on a logarithmic axis.
      top: Where the figure's axis ends, if what lies above has only failed.
    """

    name: str
    title: str
    measure: str
    train: Train
    contestants: tuple[Contestant, ...]
    steps: int
    progress: str = "steps"
    higher_is_better: bool = False
    judged: Callable[[np.ndarray], np.ndarray] = last
    log: bool = True
    top: float | None = None
