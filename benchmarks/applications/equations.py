"""Partial differential equations in physical units, with their exact solutions.

Each is an equation whose solution is of order 1, on a box in metres and seconds: a long rod whose
heat decays in days, a wave that steepens along a channel whose chainage starts at 5 km, and a
vibrating plate of two millimetres.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

Point = Float[Array, "2"]
Points = Float[Array, "n 2"]
Field = Callable[[Point], Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Equation:
    """What a network is to solve.

    Attributes:
      title: In tables and figures.
      lower: Corner of the box, of the least coordinates.
      upper: The opposite corner.
      residual: `residual(u, point)`, zero where u solves the equation, in units in which its terms
        are of order 1.
      boundary: `boundary(key, n)`, random points where u is given, and its values there.
      exact: The solution at points (n, 2), in float64.
    """

    title: str
    lower: tuple[float, float]
    upper: tuple[float, float]
    residual: Callable[[Field, Point], Float[Array, ""]]
    boundary: Callable[[PRNGKeyArray, int], tuple[Points, Float[Array, " n"]]]
    exact: Callable[[np.ndarray], np.ndarray]

    def inside(self, key: PRNGKeyArray, n: int) -> Points:
        """Random points of the box."""
        lower, upper = np.array(self.lower), np.array(self.upper)
        return jax.random.uniform(key, (n, 2)) * (upper - lower)[None] + lower[None]


def _once(u: Field, point: Point, axis: int) -> Float[Array, ""]:
    """The derivative along an axis, by forward mode."""
    return jax.jvp(u, (point,), (jnp.zeros(2).at[axis].set(1.0),))[1]


def _twice(u: Field, point: Point, axis: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """First and second derivative along an axis."""
    along = jnp.zeros(2).at[axis].set(1.0)
    return jax.jvp(lambda at: _once(u, at, axis), (point,), (along,))


def _initial_and_ends(
    lower: tuple[float, float], upper: tuple[float, float], initial: Callable[[Array], Array]
) -> Callable[[PRNGKeyArray, int], tuple[Points, Float[Array, " n"]]]:
    """Values at t = 0, and zeros at both ends: a third of the points each."""

    def draw(key: PRNGKeyArray, n: int) -> tuple[Points, Float[Array, " n"]]:
        keys = jax.random.split(key, 3)
        x = jax.random.uniform(keys[0], (n,), minval=lower[0], maxval=upper[0])
        t = jax.random.uniform(keys[1], (n,), minval=lower[1], maxval=upper[1])
        side = jax.random.randint(keys[2], (n,), 0, 3)
        at_ends = jnp.where(side == 1, lower[0], upper[0])
        points = jnp.stack([jnp.where(side == 0, x, at_ends), jnp.where(side == 0, 0.0, t)], 1)
        return points, jnp.where(side == 0, initial(x), 0.0)

    return draw


def _heat() -> Equation:
    """u_t = k u_xx on a rod of 100 m, from one arch of a sine."""
    length, conductivity = 100.0, 1e-3
    decay_time = length**2 / (np.pi**2 * conductivity)
    lower, upper = (0.0, 0.0), (length, decay_time)

    def residual(u: Field, point: Point) -> Float[Array, ""]:
        u_t = _once(u, point, 1)
        _, u_xx = _twice(u, point, 0)
        return decay_time * (u_t - conductivity * u_xx)

    def exact(points: np.ndarray) -> np.ndarray:
        x, t = np.asarray(points, np.float64).T
        return np.exp(-t / decay_time) * np.sin(np.pi * x / length)

    boundary = _initial_and_ends(lower, upper, lambda x: jnp.sin(jnp.pi * x / length))
    title = "Heat equation, rod of 100 m, twelve days"
    return Equation(title, lower, upper, residual, boundary, exact)


def _burgers() -> Equation:
    """u_t + u u_x = v u_xx on 2 km of a channel, from a sine of 1 m/s."""
    half, middle, time = 1000.0, 6000.0, 1000.0
    number = 0.05 / np.pi  # Viscosity in units of half the length and of 1 m/s.
    viscosity = number * half
    lower, upper = (middle - half, 0.0), (middle + half, time)

    def residual(u: Field, point: Point) -> Float[Array, ""]:
        u_t = _once(u, point, 1)
        u_x, u_xx = _twice(u, point, 0)
        return time * (u_t + u(point) * u_x - viscosity * u_xx)

    # Cole and Hopf: u = -2 v (log phi)_x, where phi solves the heat equation. Its convolutions
    # with the heat kernel are integrals against exp(-s^2).
    nodes, weights = np.polynomial.hermite.hermgauss(120)

    def exact(points: np.ndarray) -> np.ndarray:
        x, t = np.asarray(points, np.float64).T
        start = ((x - middle) / half)[:, None]
        start = start - 2.0 * np.sqrt(number * t / time)[:, None] * nodes
        exponent = -np.cos(np.pi * start) / (2.0 * np.pi * number)
        phi = weights * np.exp(exponent - exponent.max(1, keepdims=True))
        return -(phi * np.sin(np.pi * start)).sum(1) / phi.sum(1)

    boundary = _initial_and_ends(lower, upper, lambda x: -jnp.sin(jnp.pi * (x - middle) / half))
    title = "Burgers' equation, channel from km 5 to km 7"
    return Equation(title, lower, upper, residual, boundary, exact)


def _helmholtz() -> Equation:
    """u_xx + u_yy + k^2 u = f on a plate of 2 mm, from a mode of 1 by 3 half waves."""
    size = 2e-3
    waves = np.pi * np.array([1.0, 3.0]) / size
    wave_number = 1.0 / size
    # The source's size, so that the residual is of order 1.
    strength = float(np.sum(waves**2) - wave_number**2)

    def mode(point: Point) -> Float[Array, ""]:
        return jnp.prod(jnp.sin(waves * point))

    def residual(u: Field, point: Point) -> Float[Array, ""]:
        laplacian = _twice(u, point, 0)[1] + _twice(u, point, 1)[1]
        return (laplacian + wave_number**2 * u(point)) / strength + mode(point)

    def boundary(key: PRNGKeyArray, n: int) -> tuple[Points, Float[Array, " n"]]:
        keys = jax.random.split(key, 2)
        free = jax.random.uniform(keys[0], (n,), maxval=size)
        side = jax.random.randint(keys[1], (n,), 0, 4)
        edge = jnp.where(side % 2 == 0, 0.0, size)
        points = jnp.stack([jnp.where(side < 2, edge, free), jnp.where(side < 2, free, edge)], 1)
        return points, jnp.zeros(n)

    def exact(points: np.ndarray) -> np.ndarray:
        return np.prod(np.sin(waves * np.asarray(points, np.float64)), axis=1)

    title = "Helmholtz equation, plate of 2 mm"
    return Equation(title, (0.0, 0.0), (size, size), residual, boundary, exact)


EQUATIONS = {"heat": _heat(), "burgers": _burgers(), "helmholtz": _helmholtz()}
