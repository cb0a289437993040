"""The benchmark of cost from end to end on a tiny network: numbers, figure, and what it trains."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from benchmarks.cost import step
from benchmarks.cost.methods import (
    BATCH_NORM,
    BNP,
    BNP_METHODS,
    METHODS,
    PROBLEMS,
    QUICK_PROBLEMS,
    SGD,
    Workload,
    make_data,
    make_training,
)

pytestmark = pytest.mark.slow

TINY = QUICK_PROBLEMS[0]
RATIOS = [
    f"{key}{suffix}" for key in ("time_ratio", "pass_ratio") for suffix in ("", "_to_batch_norm")
]


def copy(tree):
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def compile_fast(lowered, compile=jax.stages.Lowered.compile):
    """Without LLVM's optimizations, which come after all that XLA reports of costs."""
    return compile(lowered, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick run, and what it compiled, put back to where training starts."""
    made = []

    class Recorded(step.CompiledMethod):
        def __init__(self, *args):
            super().__init__(*args)
            self.first = copy(self.carry)
            made.append(self)

    out = tmp_path_factory.mktemp("cost") / "sub" / "numbers.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "CompiledMethod", Recorded)
        patch.setattr(jax.stages.Lowered, "compile", compile_fast)
        step.main(quick=True, out=out)
    contestants = dict(zip(METHODS, made[-len(METHODS) :], strict=True))
    for contestant in contestants.values():
        contestant.carry = copy(contestant.first)
    return SimpleNamespace(out=out, numbers=json.loads(out.read_text()), contestants=contestants)


@pytest.fixture(scope="module")
def rows(quick):
    return quick.numbers["results"][str(TINY)]


def test_numbers_come_with_their_environment_and_a_figure(quick, rows):
    assert set(quick.numbers) == {"environment", "results"}
    assert quick.numbers["environment"]["versions"]["jax"] == jax.__version__
    assert list(quick.numbers["results"]) == [str(p) for p in QUICK_PROBLEMS]
    assert list(rows) == list(METHODS)
    expected = {"flops", "bytes", "memory", "compile_seconds", "seconds", "pass_seconds"}
    expected |= {"pass_steps", *RATIOS, *(f"{key}_quartiles" for key in RATIOS)}
    for row in rows.values():
        assert set(row) == expected
        assert len(row["pass_seconds"]) == 2
        assert row["pass_steps"] == 10
        for key in RATIOS:
            low, high = row[f"{key}_quartiles"]
            assert 0 < low <= row[key] <= high
        for key in ("flops", "bytes", "memory", "compile_seconds", "seconds"):
            assert row[key] > 0
    assert rows[SGD]["time_ratio"] == rows[SGD]["pass_ratio"] == 1
    assert rows[BATCH_NORM]["time_ratio_to_batch_norm"] == 1
    image = matplotlib.image.imread(quick.out.with_suffix(".png"))
    assert image[..., :3].std() > 0.01


def test_costs_are_as_the_methods_suggest(rows):
    assert rows["SAM"]["flops"] / rows[SGD]["flops"] == pytest.approx(2, rel=0.1)
    assert rows["BNP, input fixed"]["bytes"] < rows[BNP]["bytes"]
    assert rows["BNP, input fixed"]["flops"] < rows[BNP]["flops"]
    assert rows[SGD]["bytes"] < rows["BNP, every 10th"]["bytes"] < rows[BNP]["bytes"]
    assert rows["Adam"]["memory"] > rows["momentum"]["memory"] > rows[SGD]["memory"]


@pytest.mark.parametrize("name", METHODS)
def test_every_step_trains(quick, name):
    contestant = quick.contestants[name]
    losses = []
    for _ in range(7):  # Of three steps each.
        assert contestant.time_step() > 0
        losses.append(float(contestant.loss))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_variants_of_bnp_are_not_sgd_and_differ(quick):
    ends = {}
    for name in (SGD, *BNP_METHODS):
        contestant = quick.contestants[name]
        contestant.carry = copy(contestant.first)
        contestant.time_pass()
        ends[name] = np.asarray(contestant.carry[0]["Dense_0"]["kernel"])
    for name in BNP_METHODS:
        assert np.abs(ends[name] - ends[SGD]).max() > 1e-4
    # Of a batch of eight, 64 rows are all.
    np.testing.assert_array_equal(ends["BNP, 64 rows"], ends[BNP])
    for name in ("BNP, input fixed", "BNP, every 10th"):
        assert np.abs(ends[name] - ends[BNP]).max() > 1e-6


def test_a_pass_is_its_steps_in_order():
    data = make_data(TINY, 80)
    training = make_training(TINY, METHODS["BNP, every 10th"], data)
    carry = training.carry
    assert training.stale is not None
    fresh, stale = jax.jit(training.step), jax.jit(training.stale)
    for i, index in enumerate(data.indices):
        carry, _ = (stale if i % 10 else fresh)(carry, data.x[index], data.y[index])
    actual, _ = jax.jit(training.one_pass)(training.carry, data)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(carry), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_pass_is_a_whole_number_of_periods(problem):
    small = Workload((2, 2), problem.batch_size)
    data = make_data(small, step.EXAMPLES)
    steps, batch_size = data.indices.shape
    assert steps % 10 == 0
    assert steps * batch_size == len(data.x) == step.EXAMPLES
    assert len(np.unique(data.indices)) == data.indices.size
