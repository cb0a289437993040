"""Reinforcement learning and learning to learn."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from support.capture_models.real_cases import (
    array,
    dense,
    dense_shapes,
    filled,
    inputs,
    mlp,
    muted,
    note,
    over_examples,
    real,
    recorded,
    squared_error,
    under,
    variables,
    whole_numbers,
)


class ActorCritic(nn.Module):
    """Flax's PPO example."""

    @nn.compact
    def __call__(self, x):
        x = x / 255.0
        x = nn.relu(nn.Conv(3, (4, 4), strides=(2, 2), name="conv1")(x))
        x = nn.relu(nn.Conv(4, (2, 2), strides=(1, 1), name="conv2")(x))
        x = nn.relu(nn.Dense(6, name="hidden")(x.reshape(x.shape[0], -1)))
        return nn.log_softmax(nn.Dense(3, name="logits")(x)), nn.Dense(1, name="value")(x)


@real()
def flax_ppo(batch):
    frames, model = 100 * inputs(batch, 6, 6, 2), ActorCritic()
    params, _ = variables(model, frames)

    def loss_fn(params, frames, actions, old, advantages, returns):
        log_probs, values = model.apply({"params": params}, frames)
        ratio = jnp.exp(log_probs[jnp.arange(len(actions)), actions] - old)
        clipped = jnp.clip(ratio, 0.8, 1.2)
        policy = -jnp.mean(jnp.minimum(ratio * advantages, clipped * advantages))
        entropy = -jnp.mean(jnp.sum(jnp.exp(log_probs) * log_probs, 1))
        return policy + 0.5 * squared_error(values[:, 0], returns) - 0.01 * entropy

    numbers = inputs(batch, 3, seed=3).T
    return recorded(loss_fn, params, frames, whole_numbers(batch, below=3), *numbers)


class QNetwork(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(nn.relu(nn.Dense(5, name="hidden")(x)))


def deep_q(batch, own_target):
    """Without `own_target` the target is that of older parameters, which are an argument."""
    model, observations = QNetwork(), inputs(batch, 4)
    params, _ = variables(model, observations)

    def loss_fn(params, target_params, observations, actions, rewards, following):
        values = model.apply({"params": params}, observations)
        with muted():
            used = params if own_target else target_params
            best = jnp.max(model.apply({"params": used}, following), -1)
        target = rewards + 0.9 * best
        target = jax.lax.stop_gradient(target) if own_target else target
        return squared_error(values[jnp.arange(len(actions)), actions], target)

    actions, rewards = whole_numbers(batch, below=3), inputs(batch, 1)[:, 0]
    following = inputs(batch, 4, seed=3)
    target_params = filled(params, seed=5)
    return recorded(loss_fn, params, target_params, observations, actions, rewards, following)


@real()
def dqn_target_network(batch):
    return deep_q(batch, own_target=False)


@real()
def dqn_stopped_target(batch):
    """The next observations reach the loss without a derivative: they do not count."""
    return deep_q(batch, own_target=True)


@real()
def dueling_network(batch):
    def loss_fn(p, x, targets):
        hidden = jax.nn.relu(dense(p, "hidden", x))
        value, advantage = dense(p, "value", hidden), dense(p, "advantage", hidden)
        return squared_error(value + advantage - jnp.mean(advantage, -1, keepdims=True), targets)

    sizes = {"hidden": (4, 5), "value": (5, 1), "advantage": (5, 3)}
    shapes = {name: dense_shapes(*size)[0] for name, size in sizes.items()}
    return recorded(loss_fn, filled(shapes), inputs(batch, 4), inputs(batch, 3))


@real()
def reinforce_per_example(batch):
    """Networks written for one observation, under `vmap`."""

    def loss_fn(p, observations, actions, returns):
        def one(observation, action, score):
            return -jax.nn.log_softmax(mlp(p, "policy", observation))[action] * score

        return jnp.mean(over_examples(one)(observations, actions, returns))

    args = inputs(batch, 4), whole_numbers(batch, below=3), inputs(batch, 1)[:, 0]
    return recorded(loss_fn, filled({"policy": dense_shapes(4, 5, 3)}), *args)


@real()
def twin_critics(batch):
    """Two networks by `vmap` over their stacked parameters, on observations that they share."""

    def loss_fn(p, x, targets):
        note("w1", x, "...i,eio", "b1")

        def critic(p):
            return jax.nn.relu(x @ p["w1"] + p["b1"])

        hidden = jax.vmap(critic)({"w1": p["w1"], "b1": p["b1"]})
        note("w2", hidden, "E...i,Eio", "b2")
        values = jax.vmap(lambda h, w, b: h @ w + b)(hidden, p["w2"], p["b2"])
        return squared_error(values[..., 0], targets)

    shapes = {"w1": array(2, 4, 5), "b1": array(2, 5), "w2": array(2, 5, 1), "b2": array(2, 1)}
    return recorded(loss_fn, filled(shapes), inputs(batch, 4), inputs(batch, 1)[:, 0])


class Actor(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(2, name="out")(nn.relu(nn.Dense(5, name="hidden")(x))))


class Critic(nn.Module):
    @nn.compact
    def __call__(self, x, action):
        hidden = nn.relu(nn.Dense(5, name="hidden")(jnp.concatenate([x, action], -1)))
        return nn.Dense(1, name="out")(hidden)


@real()
def deterministic_policy(batch):
    """DDPG's actor loss: the critic's parameters are an argument, its inputs the actions."""
    actor, critic, x = Actor(), Critic(), inputs(batch, 4)
    params, _ = variables(actor, x)
    critic_params, _ = variables(critic, x, inputs(batch, 2))

    def loss_fn(params, critic_params, x):
        with under("actor"):
            action = actor.apply({"params": params["actor"]}, x)
        with muted():
            return -jnp.mean(critic.apply({"params": critic_params}, x, action))

    return recorded(loss_fn, {"actor": params}, critic_params, x)


@real()
def world_model(batch):
    """An imagined rollout: a network's outputs are its inputs at the next step."""

    def loss_fn(p, state, targets):
        loss = 0.0
        for target in jnp.swapaxes(targets, 0, 1):
            action = jnp.tanh(dense(p, "policy", state))
            state = state + mlp(p, "model", jnp.concatenate([state, action], -1))
            loss += squared_error(state, target)
        return loss

    shapes = {"policy": dense_shapes(3, 2)[0], "model": dense_shapes(5, 4, 3)}
    return recorded(loss_fn, filled(shapes), inputs(batch, 3), inputs(batch, 3, 3))


@real(exact=False)
def maml(batch):
    """The loss after a step on other data: kernels are changed before their second product."""

    def task_loss(p, x, y):
        return squared_error(mlp(p, "net", x), y)

    def loss_fn(p, support, query):
        def task(support, query):
            with muted():
                slopes = jax.grad(task_loss)(p, *support)
                adapted = jax.tree.map(lambda a, slope: a - 0.1 * slope, p, slopes)
                return task_loss(adapted, *query)

        return jnp.mean(jax.vmap(task)(support, query))

    def task_data(seed):
        return inputs(batch, 4, 1, seed=seed), inputs(batch, 4, 1, seed=seed + 1)

    params = filled({"net": dense_shapes(1, 5, 4, 1)})
    return recorded(loss_fn, params, task_data(1), task_data(3))


@real()
def distillation(batch):
    """A teacher of other parameters, at a temperature."""

    def loss_fn(p, teacher, x):
        student = jax.nn.log_softmax(mlp(p, "net", x, jax.nn.relu) / 2)
        with muted():
            odds = jax.nn.softmax(jax.lax.stop_gradient(mlp(teacher, "net", x)) / 2)
        return -jnp.mean(jnp.sum(odds * student, -1))

    params = filled({"net": dense_shapes(4, 5, 3)})
    teacher = filled({"net": dense_shapes(4, 6, 3)}, seed=3)
    return recorded(loss_fn, params, teacher, inputs(batch, 4))


@real()
def random_network_distillation(batch):
    """The target network is a constant of the loss."""
    target = filled(dense_shapes(4, 3), seed=9)

    def loss_fn(p, x):
        wanted = jnp.tanh(x @ np.asarray(target[0]["w"]) + np.asarray(target[0]["b"]))
        return squared_error(mlp(p, "net", x, jax.nn.relu), wanted)

    return recorded(loss_fn, filled({"net": dense_shapes(4, 5, 3)}), inputs(batch, 4))
