"""Learning from a stream, one observation at a time, in raw units.

No replay, no batches, no target networks: TD(lambda) with eligibility traces, and after each step
of the environment one update of the parameters. With e the traces of the gradient of what is
predicted, and delta the error of the prediction,

    delta = r + discount v(s') - v(s),   e <- discount lambda e - grad v(s),   grads = delta e

and the actor, where there is one, has traces of -grad log pi(a | s) in the same way.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

import bnp_optax
from benchmarks.applications import cartpole, plant
from benchmarks.applications.base import Application
from benchmarks.applications.stream_methods import (
    CONTESTANTS,
    METHODS,
    Moments,
    Network,
    StreamMethod,
    by_error,
    obgd,
)

_TRACE, _WARM_UP, _CURVE = 0.8, 1000, 20
_CARTPOLE_DISCOUNT, _ENTROPY = 0.99, 0.01
# Overshooting bounds of the stream-x recipe.
_KAPPA = {"actor": 3.0, "critic": 2.0}


class StreamState(NamedTuple):
    """What a learner carries.

    Attributes:
      params: Of its networks.
      state: Of the optimizer.
      traces: e, like `params`.
      inputs: Moments of the observations.
    """

    params: Any
    state: Any
    traces: Any
    inputs: Moments


def networks(method: StreamMethod, outputs: dict[str, int]) -> dict[str, Network]:
    """A network for each name and number of outputs."""
    return {name: Network(n, method.layer_norm, method.bounded) for name, n in outputs.items()}


def begin(
    method: StreamMethod,
    outputs: dict[str, int],
    key: PRNGKeyArray,
    observations: Float[Array, "k n"],
) -> tuple[Any, Any]:
    """Initial values, and the statistics that are held, if any."""
    nets = networks(method, outputs)
    keys = jax.random.split(key, len(nets))
    params = {
        name: net.init(k, observations[0])["params"]
        for (name, net), k in zip(nets.items(), keys, strict=True)
    }
    if not method.from_z:
        return params, {}

    def loss_fn(params: Any, observations: Array) -> Array:
        found = [net.apply({"params": params[name]}, observations) for name, net in nets.items()]
        return sum(jnp.mean(output) for output in found)  # type: ignore[return-value]

    return bnp_optax.start_in_zspace(loss_fn, params, [observations])


def features(method: StreamMethod, moments: Moments, observation: Float[Array, " n"]) -> Array:
    """What the networks get of an observation."""
    return observation if method.inputs == "raw" else moments.standardized(observation)


def make_optimizer(method: StreamMethod, rate: Any, names: Sequence[str]) -> Any:
    """Of the traces, with `error=`."""
    if not method.bounded:
        return by_error(method.optimizer(rate))
    each: dict[Any, Any] = {name: obgd(rate, _KAPPA[name]) for name in names}
    return optax.partition(each, {name: name for name in names})


def learn(
    method: StreamMethod,
    tx: Any,
    captured: Callable[..., Any],
    learner: StreamState,
    error: Float[Array, ""],
    forget: Float[Array, ""] | float,
    *args: Any,
) -> StreamState:
    """One update of the traces and the parameters; `args` are the loss's."""
    params, state, traces, moments = learner
    _, grads, stats = captured(params, *args)
    traces = jax.tree.map(lambda trace, grad: forget * trace + grad, traces, grads)
    extra = {"layer_stats": stats} if method.in_z else {}
    updates, state = tx.update(traces, state, params, error=error, **extra)
    return StreamState(optax.apply_updates(params, updates), state, traces, moments)


def _seen(method: StreamMethod, moments: Moments, observation: Array) -> Moments:
    return moments.add(observation) if method.inputs == "running" else moments


# ---- Prediction: the value of a plant's states ----


def _prediction(method: StreamMethod, steps: int) -> Callable[..., Float[Array, " points"]]:
    """One stream."""
    net = networks(method, {"critic": 1})["critic"]
    tests = jax.random.normal(jax.random.key(5), (500, 4))
    exact = jax.vmap(plant.value)(tests)

    def value(params: Any, x: Array) -> Array:
        return net.apply({"params": params["critic"]}, x)[0]  # type: ignore[index]

    def run(rate: Array, key: PRNGKeyArray, params: Any, fixed: Any, warm: Any) -> Array:
        state, observations = warm
        tx = make_optimizer(method, rate, ("critic",))
        captured = _captured(method, lambda params, x: -value(params, x), fixed)

        def step(carry: Any, key: Array) -> tuple[Any, None]:
            state, learner = carry
            following = plant.move(state, key)
            moments = _seen(method, learner.inputs, plant.observe(following))
            learner = learner._replace(inputs=moments)
            x, y = (features(method, moments, plant.observe(s)) for s in (state, following))
            ahead = plant.reward(state) + plant.DISCOUNT * value(learner.params, y)
            error = ahead - value(learner.params, x)
            forget = plant.DISCOUNT * _TRACE
            return (following, learn(method, tx, captured, learner, error, forget, x)), None

        def part(carry: Any, keys: Array) -> tuple[Any, Array]:
            carry, _ = jax.lax.scan(step, carry, keys)
            params, moments = carry[1].params, carry[1].inputs
            x = jax.vmap(lambda s: features(method, moments, plant.observe(s)))(tests)
            found = jax.vmap(functools.partial(value, params))(x)
            return carry, jnp.sqrt(jnp.mean((found - exact) ** 2))

        carry = state, _learner(tx, params, observations)
        return jax.lax.scan(part, carry, _keys(key, steps))[1]

    return run


@functools.cache
def _plant_stream(key_data: int) -> tuple[Array, Array]:
    """The state after, and the observations of, the steps before learning."""
    keys = jax.random.split(jax.random.key(key_data), _WARM_UP + 1)

    def step(state: Array, key: Array) -> tuple[Array, Array]:
        return plant.move(state, key), plant.observe(state)

    return jax.lax.scan(step, plant.begin(keys[0]), keys[1:])


# ---- Control: the cart and the pole ----


def _control(method: StreamMethod, steps: int) -> Callable[..., Float[Array, " points"]]:
    """One stream of episodes."""
    nets = networks(method, {"actor": 2, "critic": 1})

    def value(params: Any, x: Array) -> Array:
        return nets["critic"].apply({"params": params["critic"]}, x)[0]  # type: ignore[index]

    def log_policy(params: Any, x: Array) -> Array:
        return jax.nn.log_softmax(nets["actor"].apply({"params": params["actor"]}, x))  # type: ignore[arg-type]

    def loss_fn(params: Any, x: Array, action: Array, sign: Array) -> Array:
        logs = log_policy(params, x)
        # The entropy is to grow whatever the sign of the error that multiplies its gradient.
        entropy = -jnp.sum(jnp.exp(logs) * logs)
        return -value(params, x) - logs[action] - _ENTROPY * sign * entropy

    def run(rate: Array, key: PRNGKeyArray, params: Any, fixed: Any, warm: Any) -> Array:
        state, observations = warm
        tx = make_optimizer(method, rate, ("actor", "critic"))
        captured = _captured(method, loss_fn, fixed)

        def step(carry: Any, key: Array) -> tuple[Any, Bool[Array, ""]]:
            state, age, gain, learner = carry
            keys = jax.random.split(key)
            x = features(method, learner.inputs, state)
            action = jax.random.categorical(keys[0], log_policy(learner.params, x))
            following = cartpole.move(state, action)
            failed = cartpole.failed(following)
            ended = failed | (age + 1 >= cartpole.MAX_STEPS)
            moments = _seen(method, learner.inputs, following)
            learner = learner._replace(inputs=moments)
            x, y = (features(method, moments, s) for s in (state, following))
            gain, reward = _scaled(method, gain, ended)
            ahead = reward + _CARTPOLE_DISCOUNT * jnp.where(failed, 0.0, value(learner.params, y))
            error = ahead - value(learner.params, x)
            forget = jnp.where(age == 0, 0.0, _CARTPOLE_DISCOUNT * _TRACE)
            args = x, action, jnp.sign(error)
            learner = learn(method, tx, captured, learner, error, forget, *args)
            state = jnp.where(ended, cartpole.reset(keys[1]), following)
            return (state, jnp.where(ended, 0, age + 1), gain, learner), ended

        def part(carry: Any, keys: Array) -> tuple[Any, Array]:
            carry, ended = jax.lax.scan(step, carry, keys)
            return carry, ended.size / jnp.maximum(1, ended.sum())

        gain = jnp.zeros(()), Moments.of(jnp.zeros((1, 1)))
        carry = state, jnp.asarray(0), gain, _learner(tx, params, observations)
        return jax.lax.scan(part, carry, _keys(key, steps))[1]

    return run


def _scaled(method: StreamMethod, gain: Any, ended: Array) -> tuple[Any, Array]:
    """The reward of a step, 1, such that values are of order 1.

    The longest life is worth 1 / (1 - discount), which all may know; the stream-x recipe divides by
    the running deviation of the discounted sums of past rewards instead.
    """
    if not method.bounded:
        return gain, jnp.asarray(1.0 - _CARTPOLE_DISCOUNT)
    total, moments = gain
    total = 1.0 + _CARTPOLE_DISCOUNT * total
    moments = moments.add(total[None])
    deviation = jnp.sqrt(moments.squares[0] / moments.number + 1e-8)
    return (jnp.where(ended, 0.0, total), moments), 1.0 / jnp.maximum(deviation, 1e-2)


@functools.cache
def _cartpole_stream(key_data: int) -> tuple[Array, Array]:
    """A new episode's state, and the observations of a random policy before learning."""
    keys = jax.random.split(jax.random.key(key_data), _WARM_UP + 1)

    def step(state: Array, key: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key)
        following = cartpole.move(state, jax.random.randint(keys[0], (), 0, 2))
        new = jnp.where(cartpole.failed(following), cartpole.reset(keys[1]), following)
        return new, following

    _, observations = jax.lax.scan(step, cartpole.reset(keys[0]), keys[1:])
    return cartpole.reset(keys[0]), observations


# ---- Both ----


def _captured(method: StreamMethod, loss_fn: Callable[..., Any], fixed: Any) -> Callable[..., Any]:
    """`bnp_optax.value_and_grad`, for whom has use for statistics."""
    if method.in_z:
        return bnp_optax.value_and_grad(loss_fn, fixed=fixed)
    return lambda *args: (*jax.value_and_grad(loss_fn)(*args), {})


def _learner(tx: Any, params: Any, observations: Array) -> StreamState:
    traces = jax.tree.map(jnp.zeros_like, params)
    return StreamState(params, tx.init(params), traces, Moments.of(observations))


def _keys(key: PRNGKeyArray, steps: int) -> PRNGKeyArray:
    """A key for each step, a row for each point of the curve."""
    parts = min(_CURVE, steps)
    return jax.random.split(key, (parts, steps // parts))


_TASKS = {
    "td": (_prediction, _plant_stream, {"critic": 1}),
    "cartpole": (_control, _cartpole_stream, {"actor": 2, "critic": 1}),
}


@functools.cache
def _compiled(task: str, name: str, steps: int) -> Callable[..., Float[Array, "seeds points"]]:
    """All seeds at once, compiled once for all rates."""
    run = _TASKS[task][0](METHODS[name], steps)
    return jax.jit(jax.vmap(run, (None, 0, 0, 0, 0)))


@functools.cache
def _begun(task: str, name: str, seed: int) -> Any:
    _, stream, outputs = _TASKS[task]
    warm = stream(seed)
    return *begin(METHODS[name], outputs, jax.random.key(seed), warm[1]), warm


def train(
    task: str, name: str, rate: float, seeds: Sequence[int], steps: int
) -> Float[np.ndarray, "seeds points"]:
    """Value errors, or mean lengths of episodes, along the stream; a row for each seed."""
    begun = [_begun(task, name, seed) for seed in seeds]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *begun)
    keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), 1) for seed in seeds])
    return np.asarray(_compiled(task, name, steps)(jnp.asarray(rate), keys, *stacked))


def _last_quarter(curves: np.ndarray) -> np.ndarray:
    return curves[:, -max(1, curves.shape[1] // 4) :]


def late_error(curves: Float[np.ndarray, "seeds points"]) -> Float[np.ndarray, " seeds"]:
    """The mean error in the last quarter."""
    return _last_quarter(curves).mean(1)


def late_life(curves: Float[np.ndarray, "seeds points"]) -> Float[np.ndarray, " seeds"]:
    """Steps over episodes in the last quarter, whose points are of as many steps each."""
    return 1.0 / (1.0 / _last_quarter(curves)).mean(1)


def applications() -> list[Application]:
    """Prediction and control."""
    prediction = Application(
        name="stream-td",
        title="Streaming TD, a plant's four sensors in m, m/s, K and Pa",
        measure="value error",
        train=functools.partial(train, "td"),
        contestants=CONTESTANTS,
        steps=40_000,
        judged=late_error,
        top=2.0,
    )
    control = Application(
        name="stream-cartpole",
        title="Streaming actor-critic, CartPole in SI units",
        measure="steps per episode",
        train=functools.partial(train, "cartpole"),
        contestants=CONTESTANTS,
        steps=60_000,
        higher_is_better=True,
        judged=late_life,
        log=False,
    )
    return [prediction, control]
