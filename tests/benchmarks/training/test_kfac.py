"""K-FAC as a peer: why it is not there, and its trainer with a stand-in that is plain SGD."""

import dataclasses
import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.problems import problems
from benchmarks.training import kfac
from benchmarks.training.kfac import KfacTrainer
from benchmarks.training.methods import METHODS
from benchmarks.training.trainer import Trainer


class PlainSGD:
    """`kfac_jax.Optimizer`, as far as it is used here, without the curvature."""

    def __init__(
        self,
        value_and_grad_func,
        l2_reg,
        *,
        num_burnin_steps=10,
        norm_constraint=None,
    ):
        assert (l2_reg, num_burnin_steps) == (0.0, 0)

        def step(params, state, batch, learning_rate):
            loss, grads = value_and_grad_func(params, batch)
            params = jax.tree.map(lambda p, g: p - learning_rate * g, params, grads)
            return params, {"step": state["step"] + 1}, {"loss": loss}

        # The real one donates them as well.
        self._step = jax.jit(step, donate_argnums=(0, 1))

    def init(self, params, rng, batch, func_state=None):
        return {"step": jnp.int32(0)}

    def step(
        self,
        params,
        state,
        rng,
        data_iterator=None,
        batch=None,
        func_state=None,
        learning_rate=None,
        momentum=None,
        damping=None,
        global_step_int=None,
    ):
        assert global_step_int == int(state["step"])
        assert momentum is not None
        assert damping is not None
        return self._step(params, state, batch, learning_rate)


def module(optimizer=PlainSGD):
    """A stand-in for kfac_jax; `registered` collects what it is told of the losses."""
    fake = ModuleType("kfac_jax")
    fake.Optimizer = optimizer
    fake.registered = []
    for kind in ("softmax_cross_entropy", "squared_error"):

        def register(outputs, targets=None, weight=1.0, kind=kind):
            fake.registered.append((kind, outputs.shape, targets.shape, weight))

        setattr(fake, f"register_{kind}_loss", register)
    return fake


@pytest.fixture
def fake(monkeypatch):
    made = module()
    monkeypatch.setitem(sys.modules, "kfac_jax", made)
    return made


def short(name: str, **changes):
    """A problem with few steps."""
    return dataclasses.replace(problems("small")[name], **({"steps": 12, "points": 3} | changes))


def both(problem, rate=0.05, seed=2):
    """The curves of SGD and of the stand-in for K-FAC."""
    data = problem.load(None)
    return [
        kind(problem, name, METHODS[name], data)(rate, seed, data.test)
        for kind, name in ((Trainer, "sgd"), (KfacTrainer, "kfac"))
    ]


def assert_same(seen, expected):
    for name in ("train_loss", "loss", "score"):
        found = getattr(seen, name)
        assert found.shape == (3,)
        np.testing.assert_allclose(found, getattr(expected, name), rtol=1e-4, err_msg=name)
    assert seen.seconds > 0


# Whether it is there.


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "kfac_jax", None)
    reason = kfac.unavailable()
    assert reason.startswith("kfac_jax does not import (ModuleNotFoundError: ")
    assert reason.endswith("); pip install kfac-jax")


def test_a_package_that_breaks_at_import_is_a_reason(monkeypatch, tmp_path):
    (tmp_path / "kfac_jax.py").write_text("raise AttributeError('no jax.core.Effects\\nhere')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kfac_jax", raising=False)
    assert kfac.unavailable() == (
        "kfac_jax does not import (AttributeError: no jax.core.Effects); it may need an older jax"
    )


def test_a_package_that_breaks_in_a_step_is_a_reason_found_once(monkeypatch):
    tried = []

    class Broken(PlainSGD):
        def step(self, *args, **kwargs):
            tried.append(1)
            msg = "too many values to unpack (expected 2)"
            raise ValueError(msg)

    monkeypatch.setitem(sys.modules, "kfac_jax", module(Broken))
    for _ in range(2):
        assert kfac.unavailable() == (
            f"kfac_jax fails under jax {jax.__version__} (ValueError: too many values to unpack "
            "(expected 2)); it may need an older jax"
        )
    assert len(tried) == 1


def test_a_package_that_works_is_available(fake):
    assert kfac.unavailable() is None


def test_no_optax_transformation_is_made():
    with pytest.raises(RuntimeError, match=r"train with `benchmarks\.training\.kfac\.KfacTrainer`"):
        METHODS["kfac"].make(0.1, None)


# The trainer.


def test_with_plain_sgd_in_its_place_the_curves_are_those_of_sgd(fake):
    sgd, seen = both(short("fc-digits-b60-standardized"))
    assert_same(seen, sgd)
    assert seen.train_loss[-1] < seen.train_loss[0]
    assert set(fake.registered) == {("softmax_cross_entropy", (60, 10), (60,), 1.0)}


def test_a_second_run_is_a_new_run(fake):
    problem = short("fc-digits-b60-standardized")
    data = problem.load(None)
    trainer = KfacTrainer(problem, "kfac", METHODS["kfac"], data)
    first, other, again = (trainer(0.05, seed, data.test) for seed in (0, 1, 0))
    np.testing.assert_array_equal(first.loss, again.loss)
    assert not np.array_equal(first.loss, other.loss)


def test_regression(fake):
    sgd, seen = both(short("tabular-standardized"), rate=0.01)
    assert_same(seen, sgd)
    assert set(fake.registered) == {("squared_error", (10,), (10,), 1.0)}


def test_schedules_augmentation_and_drift(fake):
    def augment(x, key):
        return x + jax.random.normal(key, x.shape)

    problem = short(
        "fc-digits-b60-standardized",
        augment=augment,
        drift=lambda x, number: x * (1 + number / 6),
        schedule=lambda rate, steps: lambda number: rate * (1 - number / steps),
    )
    sgd, seen = both(problem)
    assert_same(seen, sgd)


def test_several_targets_of_an_example_are_weighed(fake):
    register = kfac._registered(fake, "regression")
    register(jnp.zeros((4, 5)), jnp.zeros((4, 5)))
    assert fake.registered == [("squared_error", (4, 5), (4, 5), 0.2)]


def test_a_run_that_diverges_ends_with_nan(fake):
    sgd, seen = both(short("fc-digits-b60-raw"), rate=1e4)
    assert np.isnan(seen.train_loss[-1])
    for name in ("train_loss", "loss", "score"):
        np.testing.assert_array_equal(np.isnan(getattr(seen, name)), np.isnan(getattr(sgd, name)))
