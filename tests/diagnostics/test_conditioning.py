"""The condition number of D in the states of BNP, against the float64 oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import oracles
from support.diagnostics_problems import MLP, bnp_state, problem

import bnp_optax
from bnp_optax import diagnostics
from bnp_optax.preconditioners.numbers import START


def kappa_of_d(running, has_bias, options):
    sigma = np.sqrt(oracles.floored(running.var, options))
    d = np.concatenate([np.ones(int(has_bias)), 1 / sigma])
    return d.max() / d.min()


def hidden_inputs(params, x):
    layer = jax.tree.map(np.asarray, params["Dense_0"])
    bias = layer.get("bias", 0.0)
    return {
        "Dense_0/kernel": np.asarray(x),
        "Dense_1/kernel": np.tanh(np.asarray(x) @ layer["kernel"] + np.asarray(bias)),
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.usefixtures("x64")
def test_conditioning_is_that_of_the_matrix_d(bias, scale):
    loss_fn, params, (x, y) = problem(MLP(bias=bias), (7, 5))
    options = oracles.Options(decay=0.25, eps_rel=1e-3, eps_abs=1e-6, scale=scale)
    P = bnp_optax.bnp(decay=0.25, eps_rel=1e-3, eps_abs=1e-6, scale=scale)
    got = diagnostics.conditioning(bnp_state(loss_fn, params, (x, y), P))
    hidden = hidden_inputs(params, x)
    assert got.keys() == hidden.keys()
    for name, h in hidden.items():
        grad_w = np.zeros((h.shape[1], 2))
        grad_b = np.zeros(2) if bias else None
        start = oracles.initial(h.shape[1])
        running, _, _ = oracles.algorithm_2(start, h, grad_w, grad_b, options)
        expected = kappa_of_d(running, bias, options)
        assert expected > 1.1
        assert float(got[name]) == pytest.approx(expected, rel=1e-5)


def train_state(params, tx):
    return bnp_optax.TrainState.create(apply_fn=lambda: None, params=params, tx=tx)


PAPERS = {
    "eps_rel": 1e-2,
    "eps_abs": 1e-4,
    "scale": True,
    "scale_bias": False,
    "shrinkage": None,
}

WRAPPERS = {
    "alias": (lambda: bnp_optax.bnp_sgd(0.1, **PAPERS), None),
    "in_zspace": (lambda: bnp_optax.bnp_adam(0.1, **PAPERS), None),
    "chain": (lambda: optax.chain(optax.clip(1.0), bnp_optax.bnp_sgd(0.1, **PAPERS)), None),
    "masked": (
        lambda: optax.masked(
            bnp_optax.bnp_sgd(0.1, **PAPERS), {"Dense_0": True, "Dense_1": False}
        ),
        ["Dense_0/kernel"],
    ),
    "partition": (
        lambda: optax.partition(
            {"a": bnp_optax.bnp_sgd(0.1, **PAPERS), "b": bnp_optax.bnp_sgd(0.2, **PAPERS)},
            {"Dense_0": "a", "Dense_1": "b"},
        ),
        None,
    ),
    "compose": (
        lambda: bnp_optax.in_zspace(
            optax.sgd(0.1), bnp_optax.compose(bnp_optax.bnp(), bnp_optax.rms())
        ),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_conditioning_finds_the_state_and_works_under_jit(name):
    make, layers = WRAPPERS[name]
    loss_fn, params, args = problem(MLP(), (7, 5))
    expected = diagnostics.conditioning(bnp_state(loss_fn, params, args, bnp_optax.bnp()))
    tx = make()
    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, *args)
    if layers:
        stats = {key: stats[key] for key in layers}
    _, state = tx.update(grads, tx.init(params), params, layer_stats=stats)
    got = jax.jit(diagnostics.conditioning)(state)
    assert sorted(got) == sorted(layers or expected)
    for key, value in got.items():
        assert value.shape == ()
        assert float(value) == pytest.approx(float(expected[key]), rel=1e-5)


def test_conditioning_of_a_train_state_that_has_seen_nothing_is_one():
    _, params, _ = problem(MLP(), (7, 5))
    state = train_state(params, bnp_optax.bnp_sgd(0.1))
    got = diagnostics.conditioning(state)
    assert {name: float(value) for name, value in got.items()} == {
        "Dense_0/kernel": 1.0,
        "Dense_1/kernel": 1.0,
    }


def test_conditioning_of_stacked_layers_and_groups_is_that_of_the_worst():
    """Each layer or group has a D of its own: ratios across them do not count."""
    sigma = np.array([[1.0, 2.0, 8.0], [1000.0, 1000.0, 2000.0]])[..., None]

    def state_of(moments, inputs):
        bits = jnp.float32(sum(1 << axis for axis in inputs))
        numbers = START._replace(inv_q=0.5, entered=1.0).vector()
        fields = (jnp.asarray(moments), numbers, bits)
        return bnp_optax.BNPState(*({"kernel": field} for field in fields), jnp.zeros(2))

    stacked = state_of(np.stack([0 * sigma, sigma**2]), (1,))
    # The bias's 1 is an entry of D too: 1/1 to 1/8, and 1 to 1/2000.
    assert float(diagnostics.conditioning(stacked)["kernel"]) == pytest.approx(2000.0)
    grouped = state_of((sigma**2).transpose(2, 1, 0)[None, None], (0, 1, 2))
    assert float(diagnostics.conditioning(grouped)["kernel"]) == pytest.approx(8.0)


def test_conditioning_without_a_bnp_state():
    with pytest.raises(ValueError, match="`state` holds no `BNPState`, got a `tuple`"):
        diagnostics.conditioning(optax.adam(0.1).init({"kernel": jnp.ones((2, 2))}))
