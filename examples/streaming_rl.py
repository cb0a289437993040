"""Streaming reinforcement learning, one observation at a time, in plain JAX.

    python examples/streaming_rl.py

An actor and a critic learn to balance a pole on a cart, in metres, seconds and radians. There is
no replay and no batch: each step of the environment is followed by one update, along eligibility
traces, and forgotten. The networks have no normalization, and the observations no wrapper that
standardizes them: Adam works in z-space, on running statistics of what each layer has seen.
"""

import jax
import jax.numpy as jnp
import optax

import bnp_optax

DISCOUNT, TRACE, ENTROPY = 0.99, 0.8, 0.01
LEARNING_RATE, WIDTH, MAX_STEPS = 3e-4, 32, 500


def reset(key):
    """Position, velocity, angle and angular velocity at the start of an episode."""
    return jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)


def move(state, action):
    """A fiftieth of a second with a push of 10 N to the left (0) or right (1)."""
    _, velocity, angle, spin = state
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    pushed = (jnp.where(action == 1, 10.0, -10.0) + 0.05 * spin**2 * sine) / 1.1
    turning = (9.8 * sine - cosine * pushed) / (0.5 * (4.0 / 3.0 - 0.1 * cosine**2 / 1.1))
    acceleration = pushed - 0.05 * turning * cosine / 1.1
    return state + 0.02 * jnp.stack([velocity, acceleration, spin, turning])


def has_failed(state):
    """Off the track, or fallen by twelve degrees."""
    return (jnp.abs(state[0]) > 2.4) | (jnp.abs(state[2]) > 12.0 * jnp.pi / 180.0)


def init(key, outputs):
    """A network with two hidden layers."""
    sizes = [4, WIDTH, WIDTH, outputs]
    keys = jax.random.split(key, 3)
    return [
        {"kernel": jax.random.normal(k, (n, m)) / jnp.sqrt(n), "bias": jnp.zeros(m)}
        for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def apply(layers, x):
    """Its outputs for one observation."""
    for layer in layers[:-1]:
        x = jax.nn.leaky_relu(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def value(params, x):
    """The critic's prediction of the rewards to come."""
    return apply(params["critic"], x)[0]


def loss_fn(params, x, action, sign):
    """Of its gradient the traces are made: the value, the policy, and the policy's entropy."""
    logs = jax.nn.log_softmax(apply(params["actor"], x))
    entropy = -jnp.sum(jnp.exp(logs) * logs)
    return -value(params, x) - logs[action] - ENTROPY * sign * entropy


def main(steps=100_000, parts=10, seed=0):
    """Learn from one stream; returns the mean length of the episodes in each part of it."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {"actor": init(keys[0], 2), "critic": init(keys[1], 1)}
    # A stream's samples depend on each other: the statistics have a long memory.
    tx = bnp_optax.bnp_adam(LEARNING_RATE, decay=0.999)
    captured = bnp_optax.value_and_grad(loss_fn)

    def step(carry, key):
        params, opt_state, traces, state, age = carry
        keys = jax.random.split(key)
        action = jax.random.categorical(keys[0], apply(params["actor"], state))
        following = move(state, action)
        failed = has_failed(following)
        ended = failed | (age + 1 >= MAX_STEPS)

        # The reward of a step, such that a life without end is worth 1.
        ahead = (1.0 - DISCOUNT) + DISCOUNT * jnp.where(failed, 0.0, value(params, following))
        error = ahead - value(params, state)
        _, grads, stats = captured(params, state, action, jnp.sign(error))
        forget = jnp.where(age == 0, 0.0, DISCOUNT * TRACE)
        traces = jax.tree.map(lambda trace, grad: forget * trace + grad, traces, grads)
        grads = jax.tree.map(lambda trace: error * trace, traces)
        updates, opt_state = tx.update(grads, opt_state, params, layer_stats=stats)
        params = optax.apply_updates(params, updates)

        state = jnp.where(ended, reset(keys[1]), following)
        return (params, opt_state, traces, state, jnp.where(ended, 0, age + 1)), ended

    @jax.jit
    def part(carry, keys):
        carry, ended = jax.lax.scan(step, carry, keys)
        return carry, ended.size / jnp.maximum(1, ended.sum())

    traces = jax.tree.map(jnp.zeros_like, params)
    carry = params, tx.init(params), traces, reset(keys[2]), jnp.asarray(0)
    lengths = []
    for key in jax.random.split(keys[3], parts):
        carry, length = part(carry, jax.random.split(key, steps // parts))
        lengths.append(float(length))
        done = len(lengths) * (steps // parts)
        print(f"{done:7d} steps: episodes of {length:.0f} steps on average")
    return lengths


if __name__ == "__main__":
    main()
