"""Hessians of single units, in p and in z, against blocks of the dense ones in float64."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.diagnostics_problems import (
    CNN,
    MLP,
    bnp_state,
    dense_hessian,
    dense_preconditioner,
    problem,
    unit_indices,
)

import bnp_optax
from bnp_optax import diagnostics

RNG = np.random.default_rng(0)

CASES = {
    "dense": (MLP(), (7, 5), "Dense_0", 2),
    "last": (MLP(), (7, 5), "Dense_1", 0),
    "one_unit": (MLP((4, 1)), (7, 5), "Dense_1", 0),
    "no_bias": (MLP(bias=False), (7, 5), "Dense_0", 3),
    "conv": (CNN(), (3, 5, 6, 2), "Conv_0", 1),
    "grouped": (CNN(groups=2), (3, 5, 6, 4), "Conv_0", 3),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("x64")
def test_unit_hessian_is_a_block_of_the_dense_one(name):
    model, shape, layer, unit = CASES[name]
    loss_fn, params, args = problem(model, shape)
    hessian, _ = dense_hessian(loss_fn, params, args)
    places = unit_indices(params, layer, unit)
    got = diagnostics.unit_hessian(loss_fn, params, f"{layer}/kernel", unit, *args)
    assert np.abs(got).max() > 1e-3
    np.testing.assert_allclose(got, hessian[np.ix_(places, places)], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("x64")
def test_unit_hessian_in_z_is_a_block_of_the_dense_one(name):
    model, shape, layer, unit = CASES[name]
    loss_fn, params, args = problem(model, shape)
    P = bnp_optax.bnp(decay=0.5)
    state = bnp_state(loss_fn, params, args, P)
    hessian, _ = dense_hessian(loss_fn, params, args)
    p = dense_preconditioner(P, state, params)
    places = unit_indices(params, layer, unit)
    got = diagnostics.unit_hessian(
        loss_fn, params, f"{layer}/kernel", unit, *args, preconditioner=P, state=state
    )
    expected = (p.T @ hessian @ p)[np.ix_(places, places)]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("x64")
def test_unit_hessian_with_many_inputs_is_found_in_parts():
    loss_fn, params, args = problem(MLP((3, 2)), (6, 70))
    hessian, _ = dense_hessian(loss_fn, params, args)
    places = unit_indices(params, "Dense_0", 1)
    got = diagnostics.unit_hessian(loss_fn, params, "Dense_0/kernel", 1, *args)
    np.testing.assert_allclose(got, hessian[np.ix_(places, places)], rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_unit_hessian_under_jit_and_with_integers_among_the_params():
    loss_fn, params, (x, y) = problem(MLP(), (7, 5))
    expected = diagnostics.unit_hessian(loss_fn, params, "Dense_0/kernel", 1, x, y)

    @jax.jit
    def under_jit(params, x, y):
        tree = params | {"step": jnp.asarray(3)}
        assert loss_fn(tree, x, y).shape == ()
        return diagnostics.unit_hessian(loss_fn, tree, "Dense_0/kernel", 1, x, y)

    np.testing.assert_allclose(under_jit(params, x, y), expected, rtol=1e-12)


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda layer, h, _: (nn.tanh(layer(h)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return layers(nn.Dense(3, param_dtype=float), x, None)[0]


@pytest.mark.usefixtures("x64")
def test_units_of_stacked_layers_are_counted_through():
    loss_fn, params, args = problem(Stacked(), (6, 3))
    (name,) = params
    hessian, _ = dense_hessian(loss_fn, params, args)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    places = unravel(jnp.arange(flat.size, dtype=flat.dtype))[name]
    first, unit = 1, 2
    chosen = [places["bias"][first, unit], *places["kernel"][first, :, unit]]
    chosen = np.asarray(chosen).astype(int)
    got = diagnostics.unit_hessian(loss_fn, params, f"{name}/kernel", first * 3 + unit, *args)
    np.testing.assert_allclose(got, hessian[np.ix_(chosen, chosen)], rtol=1e-10, atol=1e-12)


def test_layers_name_kernels_of_other_names():
    def loss_fn(params, x):
        return jnp.mean((x @ params["weight"] + params["shift"][None]) ** 2)

    x = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)
    params = {"weight": jnp.ones((3, 2)), "shift": jnp.zeros(2)}
    model = nn.Dense(2)
    found = bnp_optax.find_layers(
        lambda p: model.apply({"params": p}, x).sum(), model.init(jax.random.key(0), x)["params"]
    )
    layer = dataclasses.replace(found["kernel"], kernel="weight", bias="shift")
    got = diagnostics.unit_hessian(loss_fn, params, "weight", 1, x, layers={"weight": layer})
    h = diagnostics.extended_inputs(x)
    np.testing.assert_allclose(got, h.T @ h / 5, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"no leaf named `kernel`.*it has `shift`, `weight`"):
        diagnostics.unit_hessian(loss_fn, params, "weight", 1, x)


@pytest.mark.parametrize(
    ("path", "unit", "message"),
    [
        ("Dense_9/kernel", 0, "'Dense_9/kernel'.*names no layer.*`Dense_0/kernel`, `Dense_1/kern"),
        ("Dense_0/bias", 0, "'Dense_0/bias'.*names no layer"),
        ("Dense_0/kernel", 4, r"`unit` must lie in \[0, 4\).*`Dense_0/kernel`; got 4"),
        ("Dense_0/kernel", -1, r"`unit` must lie in \[0, 4\).*got -1"),
    ],
)
def test_no_such_unit(path, unit, message):
    loss_fn, params, args = problem(MLP(), (7, 5))
    with pytest.raises(ValueError, match=message):
        diagnostics.unit_hessian(loss_fn, params, path, unit, *args)


@pytest.mark.parametrize("function", ["unit_hessian", "hessian_extremes", "report"])
def test_preconditioner_and_state_come_together(function):
    loss_fn, params, args = problem(MLP(), (7, 5))
    unit = ("Dense_0/kernel", 0) if function == "unit_hessian" else ()
    call = functools.partial(getattr(diagnostics, function), loss_fn, params, *unit, *args)
    P = bnp_optax.bnp()
    with pytest.raises(ValueError, match="`preconditioner` was given without `state`"):
        call(preconditioner=P)
    with pytest.raises(ValueError, match="`state` was given without `preconditioner`"):
        call(state=P.init(params))
    with pytest.raises(ValueError, match="must be a `Preconditioner`"):
        call(preconditioner=optax.sgd(0.1), state=P.init(params))
