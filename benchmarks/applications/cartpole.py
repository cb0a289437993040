"""The cart and pole of Barto, Sutton and Anderson, in metres, seconds and radians.

Constants, equations, limits and Euler's method are those of Gymnasium's CartPole-v1. The pole is a
uniform rod, on a cart without friction, which is pushed to the left or to the right.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

GRAVITY, CART_MASS, POLE_MASS, HALF_LENGTH = 9.8, 1.0, 0.1, 0.5
FORCE, TIME_STEP = 10.0, 0.02
MAX_POSITION, MAX_ANGLE = 2.4, 12.0 * jnp.pi / 180.0
MAX_STEPS = 500

State = Float[Array, "4"]


def reset(key: PRNGKeyArray) -> State:
    """Position (m), velocity (m/s), angle (rad) and angular velocity (rad/s) of a new episode."""
    return jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)


def move(state: State, action: Int[Array, ""]) -> State:
    """The state after one time step; the action is 0 for a push to the left, 1 to the right."""
    _, velocity, angle, angular_velocity = state
    force = jnp.where(action == 1, FORCE, -FORCE)
    mass = CART_MASS + POLE_MASS
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    pushed = (force + POLE_MASS * HALF_LENGTH * angular_velocity**2 * sine) / mass
    inertia = HALF_LENGTH * (4.0 / 3.0 - POLE_MASS * cosine**2 / mass)
    angular_acceleration = (GRAVITY * sine - cosine * pushed) / inertia
    acceleration = pushed - POLE_MASS * HALF_LENGTH * angular_acceleration * cosine / mass
    rates = jnp.stack([velocity, acceleration, angular_velocity, angular_acceleration])
    return state + TIME_STEP * rates


def failed(state: State) -> Bool[Array, ""]:
    """Whether the cart has left the track or the pole has fallen."""
    return (jnp.abs(state[0]) > MAX_POSITION) | (jnp.abs(state[2]) > MAX_ANGLE)
