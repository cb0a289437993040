"""The registry of problems: their names, figures, methods, and networks' normalizations."""

import re

import jax
import jax.numpy as jnp
import pytest
from support.benchmark_problem_cases import SMALL

from benchmarks.problems import lineups, problems, text
from benchmarks.problems.base import Problem
from benchmarks.problems.halves import is_held_out


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_registry(scale):
    found = problems(scale)
    for name, problem in found.items():
        assert problem.name == name
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert problem.steps % problem.points == 0
        assert problem.batch_size > 0
        assert len(set(problem.methods)) == len(problem.methods)
        assert set(problem.decay) <= set(problem.methods)
    assert list(found) == list(SMALL)
    titles = [problem.title for problem in found.values()]
    assert len(set(titles)) == len(titles)


def test_the_papers_figures_are_all_there():
    sources = {problem.source for problem in SMALL.values() if problem.source}
    assert {source.split(",")[0] for source in sources} == {f"Figure {i}" for i in (3, 4, 5, 6, 7)}


def test_methods_of_problems():
    assert "kfac" in SMALL["fc-digits-b60-raw"].methods
    assert "kfac" not in SMALL["fc-cifar10-b60-raw"].methods
    assert {"batchrenorm", "four_things"} <= set(SMALL["fc-cifar10-b1-standardized"].methods)
    assert "bnp_gn" in SMALL["cnn-cifar10-b2-raw"].methods
    assert SMALL["drift-digits"].methods == lineups.CORE
    assert SMALL["tabular-raw"].methods == (*lineups.CORE, *lineups.FROM_Z)
    assert SMALL["text-transformer"].methods == lineups.TRANSFORMER
    assert SMALL["resnet110-cifar10"].decay["bnp_gn_momentum"] == 1.5e-4
    assert SMALL["resnet110-cifar100"].decay["bnp_gn_momentum"] == 2e-4
    assert SMALL["resnet18-imagenet"].decay["bnp_gn_momentum"] == 8.5e-4
    assert SMALL["resnet18-imagenet"].decay["groupnorm_momentum"] == 1e-4


def test_half_of_the_problems_are_held_out():
    held_out = [name for name in SMALL if is_held_out(name)]
    assert len(SMALL) / 2 <= len(held_out) <= len(SMALL) / 2 + 2
    assert {"drift-digits", "friedman2-raw", "text-scikit-learn"} <= set(held_out)
    assert not {"friedman-raw", "text-transformer", "fc-cifar10-b1-raw"} & set(held_out)


def test_points_must_divide_steps():
    with pytest.raises(ValueError, match="`points` must divide `steps`, got 3 and 10 in p"):
        Problem("p", "P", lambda _: None, lambda *_: None, 1, 10, 3, ("sgd",))


def norms_of(name):
    if name.startswith("text-"):
        return ["none", "layer"]
    if name.startswith("resnet"):
        return ["none", "batch", "group"]
    return ["none", "batch", "layer", "group", "renorm", "four"]


@pytest.mark.parametrize("name", SMALL)
def test_networks_take_their_norms(name):
    problem = SMALL[name]
    shape, dtype = (problem.batch_size, 8, 8, 1), jnp.float32
    if name.startswith("text-"):
        shape, dtype = (problem.batch_size, text.CONTEXT), jnp.int32
    elif "cnn-" in name or "cifar" in name or "imagenet" in name:
        shape = (problem.batch_size, 32, 32, 3)
    elif problem.task == "regression" or name.startswith("breast"):
        shape = (problem.batch_size, 10)
    x, key = jax.ShapeDtypeStruct(shape, dtype), jax.random.key(0)
    for norm in norms_of(name):
        network = problem.network(norm, problem.steps)
        out, variables = jax.eval_shape(network.init_with_output, key, x)
        assert out.shape[0] == problem.batch_size
        assert ("batch_stats" in variables) == (norm in ("batch", "renorm", "four"))
