"""The search for a learning rate."""

import math

import pytest

from benchmarks.training.tuning import best_rate, next_rate

GRID = (0.001, 0.01, 0.1, 1.0, 10.0)


def search(score, start):
    """All rates that are tried, in order."""
    scores = {}
    while (rate := next_rate(scores, GRID, start)) is not None:
        assert rate not in scores
        scores[rate] = score(rate)
    return list(scores), best_rate(scores, GRID, start)


@pytest.mark.parametrize("best", GRID)
@pytest.mark.parametrize("start", GRID)
def test_finds_the_best_from_anywhere_and_brackets_it(best, start):
    tried, found = search(lambda rate: -abs(math.log(rate / best)), start)
    assert found == best
    place = GRID.index(best)
    around = range(place - 2, place + 3)
    assert {GRID[i] for i in around if 0 <= i < len(GRID)} <= set(tried)


def test_begins_at_the_nearest_of_the_grid():
    assert next_rate({}, GRID, 0.03) == 0.01
    assert next_rate({}, GRID, 0.04) == 0.1
    assert next_rate({}, GRID, 1e9) == 10.0


def test_goes_down_from_rates_that_diverge():
    tried, found = search(lambda rate: -math.inf if rate > 0.01 else rate, 1.0)
    assert tried == [1.0, 0.1, 0.01, 0.001]
    assert found == 0.01


def test_tries_them_all_before_it_gives_up():
    tried, _ = search(lambda rate: -math.inf, 0.1)
    assert tried == [0.1, 0.01, 0.001, 1.0, 10.0]


def test_finds_rates_above_those_that_fail():
    _, found = search(lambda rate: rate if rate > 0.1 else -math.inf, 0.1)
    assert found == 10.0


def test_of_equal_rates_the_one_nearest_to_the_start_is_chosen():
    tried, found = search(lambda rate: 0.5, 0.1)
    assert found == 0.1
    assert sorted(tried) == [0.001, 0.01, 0.1, 1.0, 10.0]


def test_a_dip_beside_the_best_so_far_does_not_end_the_search():
    scores = {0.1: 0.14, 0.01: 0.12, 0.001: 0.3, 1.0: 0.1, 10.0: 0.1}
    assert search(scores.__getitem__, 0.1)[1] == 0.001
