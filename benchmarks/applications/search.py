"""Every contestant of an application at the learning rate that its own search chooses."""

import functools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import numpy as np

from benchmarks.applications.base import Application, Contestant
from benchmarks.training.tuning import best_rate, next_rate

# Three to a decade, the same for all.
RATES = tuple(float(f"{x}e{e}") for e in range(-6, 1) for x in (1, 3))
# The seeds that choose are none of those that are reported.
TUNING_SEED = 1000


def conduct(
    application: Application,
    seeds: int,
    tuning_seeds: int,
    steps: int,
    before: Mapping[str, Any] | None = None,
    workers: int = 1,
) -> Iterator[dict[str, Any]]:
    """The results, as what JSON can hold, each time that one more contestant has its own.

    Args:
      application: What is trained.
      seeds: Trainings at the rate that is chosen.
      tuning_seeds: Trainings at each rate of the search; the median chooses.
      steps: Length of a training.
      before: Results of the same settings: contestants that are in them are not trained again.
      workers: Contestants at a time, each in a process of its own if more than one.
    """
    settings = {"steps": steps, "seeds": seeds, "tuning_seeds": tuning_seeds, "rates": list(RATES)}
    known: dict[str, Any] = {}
    if before is not None and all(before.get(name) == x for name, x in settings.items()):
        known = dict(before["contestants"])
    names = [contestant.name for contestant in application.contestants]
    missing = [contestant for contestant in application.contestants if contestant.name not in known]
    one = functools.partial(_one, application, seeds=seeds, tuning_seeds=tuning_seeds, steps=steps)
    for name, result in _completed(one, missing, workers):
        known[name] = result
        order = sorted(known, key=lambda n: names.index(n) if n in names else len(names))
        yield settings | {"contestants": {n: known[n] for n in order}}
    # Whoever is not compared any more goes.
    yield settings | {"contestants": {name: known[name] for name in names}}


def _completed(
    one: Callable[[Contestant], dict[str, Any]], contestants: Sequence[Contestant], workers: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results by name, each as soon as it is there."""
    if workers == 1:
        yield from ((contestant.name, one(contestant)) for contestant in contestants)
        return
    # A fork of a process in which JAX runs may wait for ever.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        names = {pool.submit(one, contestant): contestant.name for contestant in contestants}
        for future in as_completed(names):
            yield names[future], future.result()


def _one(
    application: Application, contestant: Contestant, seeds: int, tuning_seeds: int, steps: int
) -> dict[str, Any]:
    sign = 1.0 if application.higher_is_better else -1.0
    tuned: dict[float, float] = {}
    choosing = range(TUNING_SEED, TUNING_SEED + tuning_seeds)
    while (rate := next_rate(tuned, RATES, contestant.start)) is not None:
        curves = application.train(contestant.name, rate, choosing, steps)
        median = sign * float(np.median(application.judged(np.asarray(curves, float))))
        tuned[rate] = median if math.isfinite(median) else -math.inf
    rate = best_rate(tuned, RATES, contestant.start)
    curves = np.asarray(application.train(contestant.name, rate, range(seeds), steps), float)
    return {
        "label": contestant.label,
        "ours": contestant.ours,
        "legal": contestant.legal,
        "rate": rate,
        "tuning": {f"{at:g}": _number(sign * score) for at, score in sorted(tuned.items())},
        "scores": [_number(score) for score in application.judged(curves)],
        "curves": [[_number(value) for value in curve] for curve in curves],
    }


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
