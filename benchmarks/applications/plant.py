"""A plant with four sensors in units of their own, and its value function, exactly.

The sensors are an oscillator's displacement (m) and velocity (m/s), a temperature (K) and a
pressure (Pa), driven by noise: with s the standardized state,

    s' = A s + w,   w ~ N(0, W),   reward r(s) = s^T Q s - tr(Q S),   S = A S A^T + W

so that the value of the discounted rewards is a quadratic function,

    V(s) = s^T M s - tr(M S),   M = Q + discount A^T M A

The temperature is slow and the pressure faster: the stream's samples are far from independent.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

DISCOUNT = 0.95
# The oscillator turns by 0.15 rad a step; the temperature forgets in 200 steps, the pressure in 30.
_TURN, _DAMPING = 0.15, 0.985
_ROTATION = np.array([[np.cos(_TURN), np.sin(_TURN)], [-np.sin(_TURN), np.cos(_TURN)]])
DYNAMICS = np.block(
    [
        [_DAMPING * _ROTATION, np.zeros((2, 2))],
        [np.zeros((2, 2)), np.diag([np.exp(-1 / 200), np.exp(-1 / 30)])],
    ]
)
# The state is standardized, S = I, by this noise.
NOISE = np.eye(4) - DYNAMICS @ DYNAMICS.T
MIDDLE = np.array([0.020, 0.0, 293.0, 101_325.0])
SPREAD = np.array([0.002, 0.03, 4.0, 600.0])

_SHAPE = np.array(
    [[1.0, 0.0, 0.6, 0.0], [0.0, 0.3, 0.0, 0.5], [0.6, 0.0, -0.4, 0.3], [0.0, 0.5, 0.3, 0.5]]
)


def _discounted(reward: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """M of the value, from Q of the reward."""
    steps = DISCOUNT * np.kron(DYNAMICS.T, DYNAMICS.T)
    return np.linalg.solve(np.eye(16) - steps, reward.ravel()).reshape(4, 4)


# The variance of s^T M s is 2 tr(M S M S): rewards are scaled so that values have variance 1.
_VARIANCE = 2.0 * np.sum(_discounted(_SHAPE) ** 2)
REWARD = _SHAPE / np.sqrt(_VARIANCE)
VALUE = _discounted(REWARD)


def begin(key: PRNGKeyArray) -> Float[Array, "4"]:
    """A state of the stationary distribution."""
    return jax.random.normal(key, (4,))


def move(state: Float[Array, "4"], key: PRNGKeyArray) -> Float[Array, "4"]:
    """The next state."""
    noise = jnp.asarray(np.linalg.cholesky(NOISE), jnp.float32) @ jax.random.normal(key, (4,))
    return jnp.asarray(DYNAMICS, jnp.float32) @ state + noise


def observe(state: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
    """What the sensors say of states, in metres, metres per second, kelvin and pascal."""
    last = (1,) * (state.ndim - 1) + (4,)
    return state * SPREAD.astype(np.float32).reshape(last) + MIDDLE.astype(np.float32).reshape(last)


def reward(state: Float[Array, "4"]) -> Float[Array, ""]:
    """Of one state."""
    return _quadratic(state, REWARD)


def value(state: Float[Array, "4"]) -> Float[Array, ""]:
    """The expected sum of discounted rewards from a state on, its own included."""
    return _quadratic(state, VALUE)


def _quadratic(state: Float[Array, "4"], form: np.ndarray) -> Float[Array, ""]:
    return state @ jnp.asarray(form, jnp.float32) @ state - float(np.trace(form))
