"""Physics-informed networks: exact solutions solve their equations, and all start alike."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.applications import command, pinn
from benchmarks.applications.equations import EQUATIONS

EACH = pytest.mark.parametrize("name", EQUATIONS)


def _inner(equation, n=40):
    """Points away from the border, and steps for differences of either coordinate."""
    lower, upper = np.array(equation.lower), np.array(equation.upper)
    shares = np.random.default_rng(0).uniform(0.1, 0.9, (n, 2))
    return lower + shares * (upper - lower), 3e-4 * (upper - lower)


@EACH
def test_the_exact_solution_has_no_residual(name, x64):
    """By finite differences of the exact solution alone, handed to the residual as a Taylor sum."""
    equation = EQUATIONS[name]
    points, steps = _inner(equation)

    def shifted(i, j):
        return equation.exact(points + np.array([i, j]) * steps)

    middle = shifted(0, 0)
    first = [(shifted(1, 0) - shifted(-1, 0)) / 2, (shifted(0, 1) - shifted(0, -1)) / 2]
    second = [shifted(1, 0) - 2 * middle + shifted(-1, 0)]
    second += [shifted(0, 1) - 2 * middle + shifted(0, -1)]

    def residual(point, value, slopes, bends):
        def field(at):
            away = (at - point) / steps
            return value + slopes @ away + bends @ away**2 / 2

        return equation.residual(field, point)

    found = jax.vmap(residual)(points, middle, np.stack(first, 1), np.stack(second, 1))
    assert np.abs(found).max() < 2e-3


@EACH
def test_a_wrong_solution_has_a_residual(name, x64):
    equation = EQUATIONS[name]
    points, _ = _inner(equation)
    size = np.array(equation.upper) - np.array(equation.lower)

    def wrong(at):
        return jnp.sin(3.0 * jnp.sum(at / size))

    found = jax.vmap(lambda point: equation.residual(wrong, point))(points)
    assert np.abs(found).max() > 0.1


@EACH
def test_the_border_has_the_exact_solution(name):
    equation = EQUATIONS[name]
    points, values = equation.boundary(jax.random.key(0), 200)
    np.testing.assert_allclose(values, equation.exact(np.asarray(points)), atol=2e-5)
    lower, upper = np.array(equation.lower), np.array(equation.upper)
    inside = np.asarray(equation.inside(jax.random.key(1), 500))
    for drawn in (np.asarray(points), inside):
        assert (drawn >= lower * 0.999999).all()
        assert (drawn <= upper * 1.000001).all()
    shares = (inside - lower) / (upper - lower)
    np.testing.assert_allclose(shares.mean(0), 0.5, atol=5 / np.sqrt(12 * 500))


def test_burgers_solution_is_odd_about_the_middle_and_steepens():
    exact = EQUATIONS["burgers"].exact
    left, right = exact(np.array([[5700.0, 600.0], [6300.0, 600.0]]))
    np.testing.assert_allclose(left, -right, rtol=1e-10)

    def slope(t):
        return float(np.diff(exact(np.array([[5990.0, t], [6010.0, t]])))[0])

    assert slope(600.0) < 2.0 * slope(0.0) < 0.0


@pytest.mark.slow
def test_from_z_metres_are_as_good_as_hand_scaled_coordinates_at_the_start():
    """Both networks have the same values at the same initial z."""
    equation = EQUATIONS["burgers"]
    raw, scaled = (pinn.make_solution(equation, by_hand) for by_hand in (False, True))
    params = pinn.Network().init(jax.random.key(0), jnp.zeros(2))["params"]
    pool = pinn.draw(equation, jax.random.key(1), 20_000)
    loss_fn = pinn.make_loss(equation, lambda params, point: raw(params, point))
    start, _ = pinn.bnp_optax.start_in_zspace(
        lambda params, points: loss_fn(params, points, (points[:1], jnp.zeros(1))),
        params,
        [pool[0]],
    )
    points = pool[0][:50]
    found, expected = (
        jax.vmap(lambda point, u=u, p=p: u(p, point))(points)
        for u, p in ((raw, start), (scaled, params))
    )
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert float(jnp.std(expected)) > 0.1


@pytest.mark.slow
def test_from_z_the_network_learns_in_raw_units():
    adam, from_z = (pinn.train("heat", name, 3e-3, [0], 500)[0, -1] for name in ("adam", "adam-z"))
    assert from_z < 0.2 < adam


@pytest.mark.slow
def test_every_contestant_runs_three_steps(tmp_path):
    arguments = {"only": ("pinn-heat",), "seeds": 2, "steps": 3, "results": tmp_path}
    assert command.main(**arguments) == 0
    written = json.loads((tmp_path / "pinn-heat.json").read_text())
    assert written["environment"]["versions"]["jax"]
    assert set(written["contestants"]) == set(pinn.METHODS)
    for result in written["contestants"].values():
        assert len(result["scores"]) == 2
    assert (tmp_path / "pinn-heat.png").stat().st_size > 10_000
    assert "scaled by hand" in (tmp_path / "pinn-heat.md").read_text()
