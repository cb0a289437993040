"""Networks of physics: derivatives of the network in the loss, integrators, simulators."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint

from support.capture_models.real_cases import (
    array,
    dense,
    dense_shapes,
    filled,
    inputs,
    mlp,
    muted,
    note,
    real,
    recorded,
    scan,
    squared_error,
)


def field(p, points):
    """What a network says at a point in time and space, or at many."""
    return mlp(p, "layers", points)[..., 0]


def physics_informed(batch, residual, walls=0):
    """Residuals at points, and values at walls. Whatever derivatives it needs, a row is a point."""

    def loss_fn(p, points, at_walls):
        loss = jnp.mean(residual(p, points) ** 2)
        return loss + jnp.mean(field(p, at_walls) ** 2) if walls else loss

    def watch(p, points, at_walls):
        for rows in (points, at_walls) if walls else (points,):
            field(p, rows)
        with muted():
            return loss_fn(p, points, at_walls)

    params = filled({"layers": dense_shapes(2, 5, 4, 1)})
    args = inputs(batch, 2), inputs(max(walls, 1), 2, seed=4)
    return recorded(loss_fn, params, *args, watch=watch)


@real()
def pinn_grad(batch):
    """Burgers' equation, by `jax.grad` at each point."""

    def residual(p, point):
        u, u_x = field(p, point), lambda point: jax.grad(field, 1)(p, point)[1]
        u_t, u_xx = jax.grad(field, 1)(p, point)[0], jax.grad(u_x)(point)[1]
        return u_t + u * u_x(point) - 0.1 * u_xx

    return physics_informed(batch, jax.vmap(residual, (None, 0)))


@real()
def pinn_hessian(batch):
    """Heat with a source, by `jax.hessian`, and walls kept at zero."""

    def residual(p, point):
        u = field(p, point)
        u_t = jax.grad(field, 1)(p, point)[0]
        return u_t - jax.hessian(field, 1)(p, point)[1, 1] + u

    return physics_informed(batch, jax.vmap(residual, (None, 0)), walls=3)


@real()
def pinn_jvp(batch):
    """Forward mode twice, a coordinate at a time."""

    def residual(p, point):
        t, x = point
        along_t = lambda t: field(p, jnp.stack([t, x]))  # noqa: E731
        along_x = lambda x: field(p, jnp.stack([t, x]))  # noqa: E731
        slope = lambda x: jax.jvp(along_x, (x,), (jnp.ones_like(x),))[1]  # noqa: E731
        u, u_t = jax.jvp(along_t, (t,), (jnp.ones_like(t),))
        _, u_xx = jax.jvp(slope, (x,), (jnp.ones_like(x),))
        return u_t - u_xx + jnp.sin(u)

    return physics_informed(batch, jax.vmap(residual, (None, 0)))


@real()
def pinn_whole_batch(batch):
    """The gradient of a sum over the batch, as in code that came from PyTorch."""

    def residual(p, points):
        u, slopes = field(p, points), jax.grad(lambda points: jnp.sum(field(p, points)))(points)
        return slopes[:, 0] + u * slopes[:, 1]

    return physics_informed(batch, residual)


@real()
def pinn_linearize(batch):
    """The network once, its derivative in two directions."""

    def residual(p, point):
        u, derivative = jax.linearize(lambda point: field(p, point), point)
        u_t, u_x = (derivative(direction) for direction in jnp.eye(2, dtype=point.dtype))
        return u_t + u * u_x

    return physics_informed(batch, jax.vmap(residual, (None, 0)))


@real()
def deep_operator_network(batch):
    """DeepONet: a product of what two networks say of a function and of a point."""

    def loss_fn(p, functions, points, values):
        branch, trunk = mlp(p, "branch", functions), mlp(p, "trunk", points)
        return squared_error(branch @ trunk.T + p["bias"], values)

    shapes = {"branch": dense_shapes(4, 5, 3), "trunk": dense_shapes(2, 4, 3), "bias": array()}
    args = inputs(batch, 4), inputs(3, 2), inputs(batch, 3, seed=6)
    return recorded(loss_fn, filled(shapes), *args)


FIRST, SECOND = (ends.astype(np.int32) for ends in np.triu_indices(3, 1))


@real()
def force_field(batch):
    """Energies of pairs and atoms; the forces are the energy's derivative."""

    def energy(p, positions):
        apart = positions[..., FIRST, :] - positions[..., SECOND, :]
        distance = jnp.sqrt(jnp.sum(apart**2, -1) + 1e-2)
        centers = jnp.arange(4.0, dtype=positions.dtype)
        messages = mlp(p, "pair", jnp.exp(-((distance[..., None] - centers) ** 2)))
        zeros = jnp.zeros((*positions.shape[:-1], messages.shape[-1]), positions.dtype)
        atoms = zeros.at[..., FIRST, :].add(messages).at[..., SECOND, :].add(messages)
        return jnp.sum(mlp(p, "atom", jnp.tanh(atoms)), (-2, -1))

    def loss_fn(p, positions, energies, forces):
        found, slopes = jax.vmap(jax.value_and_grad(energy, 1), (None, 0))(p, positions)
        return squared_error(found, energies) + squared_error(-slopes, forces)

    def watch(p, positions, *targets):
        energy(p, positions)
        with muted():
            return loss_fn(p, positions, *targets)

    shapes = {"pair": dense_shapes(4, 5, 3), "atom": dense_shapes(3, 4, 1)}
    args = inputs(batch, 3, 3), inputs(batch, 1)[:, 0], inputs(batch, 3, 3, seed=3)
    return recorded(loss_fn, filled(shapes), *args, watch=watch)


@real(exact=False)
def hamiltonian(batch):
    """Only derivatives of the energy enter the loss: the last product itself is not used."""

    def loss_fn(p, states, rates):
        slopes = jax.vmap(jax.grad(field, 1), (None, 0))(p, states)
        return squared_error(jnp.stack([slopes[:, 1], -slopes[:, 0]], 1), rates)

    params = filled({"layers": dense_shapes(2, 5, 4, 1)})
    args = inputs(batch, 2), inputs(batch, 2, seed=3)
    return recorded(loss_fn, params, *args, watch=lambda *args: silent(loss_fn, *args))


def silent(function, *args):
    with muted():
        return function(*args)


def dynamics(p, y, t):
    """The rate of a neural differential equation."""
    time = jnp.broadcast_to(jnp.asarray(t, y.dtype), (*y.shape[:-1], 1))
    return mlp(p, "rate", jnp.concatenate([y, time], -1))


@real()
def neural_ode_rk4(batch):
    """Four evaluations a step, each on rows of its own."""

    def loss_fn(p, y, targets):
        def step(y, t):
            k1 = dynamics(p, y, t)
            k2 = dynamics(p, y + 0.1 * k1, t + 0.1)
            k3 = dynamics(p, y + 0.1 * k2, t + 0.1)
            k4 = dynamics(p, y + 0.2 * k3, t + 0.2)
            return y + 0.2 / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

        times = jnp.asarray(0.2 * np.arange(3), y.dtype)
        return squared_error(dense(p, "head", scan(step, y, times)[0]), targets)

    shapes = {"rate": dense_shapes(3, 4, 2), "head": dense_shapes(2, 1)[0]}
    return recorded(loss_fn, filled(shapes), inputs(batch, 2), inputs(batch, 1))


@real({f"rate/{i}/w": "while" for i in range(2)}, rounding=1e-4)
def neural_ode_adaptive(batch):
    """How many steps there are is known only when it runs."""

    def loss_fn(p, y, targets):
        def rate(y, t, p):
            with muted():
                return dynamics(p, y, t)

        times = jnp.asarray([0.0, 0.5], y.dtype)
        y = odeint(rate, y, times, p, rtol=1e-6, atol=1e-6)[-1]
        return squared_error(dense(p, "head", y), targets)

    shapes = {"rate": dense_shapes(3, 4, 2), "head": dense_shapes(2, 1)[0]}
    return recorded(loss_fn, filled(shapes), inputs(batch, 2), inputs(batch, 1))


@real()
def symplectic_network(batch):
    """Two potentials that kick each other, each evaluated once a step."""

    def loss_fn(p, q, v, targets):
        for _ in range(2):
            v = v - 0.1 * mlp(p, "force", q)
            q = q + 0.1 * mlp(p, "speed", v)
        return squared_error(q, targets)

    shapes = {"force": dense_shapes(2, 4, 2), "speed": dense_shapes(2, 4, 2)}
    args = (inputs(batch, 2, seed=seed) for seed in (1, 2, 3))
    return recorded(loss_fn, filled(shapes), *args)


@real({"weights": ".+"})
def fourier_neural_operator(batch):
    """Complex weights in two arrays multiply modes; a dense layer runs beside them."""

    def loss_fn(p, x, y):
        x = dense(p, "lift", x)
        modes = jnp.fft.rfft(x, axis=1)[:, :2]
        scales = p["weights"][0] + 1j * p["weights"][1]
        changed = jnp.fft.irfft(modes * scales, n=x.shape[1], axis=1)
        x = jax.nn.gelu(changed + dense(p, "local", x))
        return squared_error(dense(p, "project", x), y)

    sizes = {"lift": (1, 4), "local": (4, 4), "project": (4, 1)}
    shapes = {name: dense_shapes(*size)[0] for name, size in sizes.items()}
    shapes |= {"weights": array(2, 2, 4)}
    return recorded(loss_fn, filled(shapes), inputs(batch, 6, 1), inputs(batch, 6, 1, seed=3))


@real()
def graph_simulator(batch):
    """Encode, process twice with shared weights, decode; edges between neighbours on a ring."""
    sender, receiver = np.arange(4), np.roll(np.arange(4), 1)

    def loss_fn(p, x, targets):
        nodes = mlp(p, "encode", x)
        for _ in range(2):
            ends = [nodes[:, sender], nodes[:, receiver]]
            messages = mlp(p, "edge", jnp.concatenate(ends, -1))
            gathered = jnp.zeros_like(nodes).at[:, receiver].add(messages)
            nodes = nodes + mlp(p, "node", jnp.concatenate([nodes, gathered], -1))
        return squared_error(note("decode", nodes) @ p["decode"], targets)

    sizes = {"encode": (2, 4, 3), "edge": (6, 4, 3), "node": (6, 4, 3)}
    shapes = {name: dense_shapes(*size) for name, size in sizes.items()} | {"decode": array(3, 2)}
    return recorded(loss_fn, filled(shapes), inputs(batch, 4, 2), inputs(batch, 4, 2, seed=3))
