"""The search for a learning rate: the same rule and the same grid for every contestant."""

import math
from collections.abc import Mapping, Sequence


def next_rate(scores: Mapping[float, float], grid: Sequence[float], start: float) -> float | None:
    """The learning rate to try next, or None once the best is bracketed.

    Climbs from the rate nearest to `start` to the neighbours of the best so far, until two on
    either side have been tried, or there are no more: one seed's score may dip. From rates that
    all failed it goes down, and then up: too small a rate fails, too, in a short run. What has been
    tried is all it needs, so a search can be interrupted.

    Args:
      scores: Of the rates tried; -inf if training failed.
      grid: Rates, increasing.
      start: Where the search begins; tried in any case.
    """
    first = grid[_nearest(grid, start)]
    if first not in scores:
        return first
    if all(score == -math.inf for score in scores.values()):
        lowest, highest = grid.index(min(scores)), grid.index(max(scores))
        if lowest > 0:
            return grid[lowest - 1]
        return grid[highest + 1] if highest + 1 < len(grid) else None
    place = grid.index(best_rate(scores, grid, start))
    for neighbour in (place - 1, place + 1, place - 2, place + 2):
        if 0 <= neighbour < len(grid) and grid[neighbour] not in scores:
            return grid[neighbour]
    return None


def best_rate(scores: Mapping[float, float], grid: Sequence[float], start: float) -> float:
    """The rate with the highest score; of equal ones, the one nearest to `start` in the grid."""
    middle = _nearest(grid, start)
    return max(scores, key=lambda rate: (scores[rate], -abs(grid.index(rate) - middle)))


def _nearest(grid: Sequence[float], rate: float) -> int:
    """Index of the grid's rate nearest to `rate`, as ratios go."""
    return min(range(len(grid)), key=lambda i: abs(math.log(grid[i] / rate)))
