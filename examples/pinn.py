"""A physics-informed network on raw metres and seconds, in Equinox.

    python examples/pinn.py

The temperature u(x, t) of a rod of 100 m solves u_t = k u_xx, from one arch of a sine and with cold
ends. Second derivatives of the network by its inputs are in the loss, so no BatchNorm may be in
it, and the inputs are 100 m and a million seconds. `start_in_zspace` starts the network as if they
had been standardized, and Adam in z keeps it so: nothing is scaled by hand.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import bnp_optax

LENGTH, CONDUCTIVITY = 100.0, 1e-3  # m, m^2 / s
TIME = LENGTH**2 / (jnp.pi**2 * CONDUCTIVITY)  # s, in which the temperature falls by e
N_POINTS, LEARNING_RATE = 64, 1e-2


def exact(points):
    """The solution."""
    return jnp.exp(-points[:, 1] / TIME) * jnp.sin(jnp.pi * points[:, 0] / LENGTH)


def draw(key):
    """Points of the rod's inside, and of its start and ends."""
    keys = jax.random.split(key, 3)
    box = jnp.array([[LENGTH, TIME]])
    inside, border = (jax.random.uniform(k, (N_POINTS, 2)) * box for k in keys[:2])
    side = jax.random.randint(keys[2], (N_POINTS,), 0, 3)
    x = jnp.where(side == 0, border[:, 0], jnp.where(side == 1, 0.0, LENGTH))
    return inside, jnp.stack([x, jnp.where(side == 0, 0.0, border[:, 1])], axis=1)


def loss_fn(model, inside, border):
    """Mean squares of the equation's residual and of the error at the border."""

    def u(point):
        return model(point)[0]

    def residual(point):
        u_t, u_xx = jax.grad(u)(point)[1], jax.hessian(u)(point)[0, 0]
        return TIME * (u_t - CONDUCTIVITY * u_xx)

    error = jax.vmap(u)(border) - exact(border)
    return jnp.mean(jax.vmap(residual)(inside) ** 2) + 10.0 * jnp.mean(error**2)


def relative_error(model, points):
    """Of the temperatures at some points."""
    error = jax.vmap(model)(points)[:, 0] - exact(points)
    return float(jnp.linalg.norm(error) / jnp.linalg.norm(exact(points)))


def main(steps=3000, seed=0):
    """Train, and return the relative errors before and after."""
    keys = jax.random.split(jax.random.key(seed), 4)
    model = eqx.nn.MLP(2, 1, 32, 3, jnp.tanh, key=keys[0])
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_of(params, inside, border):
        return loss_fn(eqx.combine(params, static), inside, border)

    # Equinox's parameters are named otherwise than Flax's: the layers are found by a trace.
    batch = draw(keys[1])
    layers = bnp_optax.find_layers(loss_of, params, *batch)
    some = [draw(key) for key in jax.random.split(keys[1], 20)]
    params, fixed = bnp_optax.start_in_zspace(loss_of, params, some)
    captured = bnp_optax.value_and_grad(loss_of, fixed=fixed)

    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    tx = bnp_optax.bnp_adam(schedule, layers=layers, fixed=fixed)

    def step(carry, key):
        params, state = carry
        loss, grads, stats = captured(params, *draw(key))
        updates, state = tx.update(grads, state, params, layer_stats=stats)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    def train(params, key):
        carry = params, tx.init(params)
        return jax.lax.scan(step, carry, jax.random.split(key, steps))[0][0]

    trained = train(params, keys[2])
    points = jax.random.uniform(keys[3], (2000, 2)) * jnp.array([[LENGTH, TIME]])
    errors = [relative_error(eqx.combine(p, static), points) for p in (params, trained)]
    print(f"relative error: {errors[0]:.3g} at the start, {errors[1]:.3g} after {steps} steps")
    return errors


if __name__ == "__main__":
    main()
