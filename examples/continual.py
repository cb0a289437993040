"""Learn one task after the other, eight images at a time, each seen once.

In each task the pixels of handwritten digits are permuted anew, and nobody tells the network. Adam
learns later tasks worse than early ones: the network loses plasticity. AdamW in z does not, and
nothing is normalized: the network stays a function of one image.

    python examples/continual.py

Needs scikit-learn, for the digits that come with it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import bnp_optax

BATCH = 8
STEPS_A_TASK = 200
LEARNING_RATE = 3e-3
# Far more than is usual: it is what keeps the network able to learn.
WEIGHT_DECAY = 0.3


class Network(nn.Module):
    """Two hidden layers of ReLU."""

    @nn.compact
    def __call__(self, x):
        """Logits."""
        for _ in range(2):
            x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(10)(x)


def loss_fn(params, x, y):
    """Cross-entropy, and the share of right answers before the step."""
    logits = Network().apply({"params": params}, x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, jnp.mean(jnp.argmax(logits, axis=1) == y)


def make_step(tx, in_z):
    """One step; an optimizer in z takes the statistics of the layers' inputs, too."""

    @jax.jit
    def step(params, state, x, y):
        if in_z:
            captured = bnp_optax.value_and_grad(loss_fn, has_aux=True)
            (_, accuracy), grads, stats = captured(params, x, y)
            updates, state = tx.update(grads, state, params, layer_stats=stats)
        else:
            (_, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, y)
            updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, accuracy

    return step


def learn(tx, in_z, steps, seed=0):
    """Accuracy in each task, of answers that are given before the network learns from them."""
    images, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    params = Network().init(jax.random.key(seed), jnp.zeros((1, 64)))["params"]
    state, step = tx.init(params), make_step(tx, in_z)
    accuracies = []
    for i in range(steps):
        if i % STEPS_A_TASK == 0:
            pixels, order = random.permutation(64), random.permutation(len(labels))
            accuracies.append([])
        rows = order[i % STEPS_A_TASK * BATCH :][:BATCH]
        x = jnp.asarray(images[rows][:, pixels], jnp.float32) / 16.0
        params, state, accuracy = step(params, state, x, labels[rows])
        accuracies[-1].append(accuracy)
    return [float(np.mean(task)) for task in accuracies]


def main(steps=60 * STEPS_A_TASK):
    """Train, print, and return the accuracy in each task by optimizer."""
    found = {
        "Adam": learn(optax.adam(LEARNING_RATE), False, steps),
        "Adam in z": learn(bnp_optax.bnp_adam(LEARNING_RATE), True, steps),
        "AdamW in z": learn(
            bnp_optax.bnp_adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY), True, steps
        ),
    }
    n = max(1, len(found["Adam"]) // 4)
    for name, accuracies in found.items():
        early, late = np.mean(accuracies[:n]), np.mean(accuracies[-n:])
        print(f"{name:>10}: {early:.3f} in the first {n} tasks, {late:.3f} in the last")
    return found


if __name__ == "__main__":
    main()
