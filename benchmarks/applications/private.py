"""Differentially private training: nothing may be shared between the examples of a batch.

Each example's gradient is clipped, and noise added to the sum. In z-space both are done in z: with
P known without looking at the private examples, P^T maps each example's gradient. Statistics are of
images that reveal nothing: public ones without labels, or draws from a normal distribution whose
moments were taken from the private images with noise of their own. Epsilon is the same for all,
that release included.

Source: Abadi et al., "Deep learning with differential privacy", CCS 2016.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import bnp_optax
from benchmarks import data
from benchmarks.applications import base
from benchmarks.applications.accountant import noise_for
from benchmarks.applications.base import Application, Contestant
from benchmarks.applications.search import TUNING_SEED
from benchmarks.applications.tasks import halved
from bnp_optax.alias import ADAM_OPTIONS, SGD_OPTIONS

EPSILON, DELTA = 2.0, 1e-5
N_PRIVATE, N_PUBLIC = 10_000, 500
# Of examples, on average: each enters independently of the others, as the accountant assumes.
BATCH = 64
# A larger batch, of probability 1e-10, would be cut.
CAPACITY = 120
WIDTH = 32
STEPS, POINTS = 1000, 20
CLIP = 1.0
# Of an image's row (x, x^2), and the deviation of the noise on their sum relative to it.
ROW_CLIP, ROW_NOISE = 10.0, 8.0
# Variance of a pixel, from 0 to 1, to which no smaller one is standardized.
FLOOR = 1e-2

Source = Literal["raw", "public", "private"]


class ReleasedMoments(NamedTuple):
    """Mean and variance of each pixel."""

    mean: Float[np.ndarray, " pixels"]
    var: Float[np.ndarray, " pixels"]


class PrivateImages(NamedTuple):
    """What a training has."""

    x: Float[np.ndarray, "private pixels"]
    y: Int[np.ndarray, " private"]
    public: Float[np.ndarray, "public pixels"]
    eval_x: Float[np.ndarray, "eval pixels"]
    eval_y: Int[np.ndarray, " eval"]


@dataclasses.dataclass(frozen=True)
class PrivateLearner:
    """A way to learn in private.

    Attributes:
      make: From a learning rate to the optimizer, which gets the sum of clipped gradients.
      standardized: By whose moments the inputs are.
      statistics: Whose images P is of, with its options; None for no P.
      layer_norm: Whether the network has LayerNorm before each ReLU.
    """

    make: Callable[[Any], optax.GradientTransformation]
    standardized: Source = "raw"
    statistics: tuple[Source, Any] | None = None
    layer_norm: bool = False

    @property
    def releases(self) -> bool:
        """Whether moments of the private images are released."""
        return "private" in (self.standardized, self.statistics and self.statistics[0])


class Network(nn.Module):
    """Two hidden layers of ReLU."""

    layer_norm: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Logits."""
        for _ in range(2):
            x = nn.Dense(WIDTH)(x)
            x = nn.relu(nn.LayerNorm()(x) if self.layer_norm else x)
        return nn.Dense(10)(x)


def released_moments(x: Float[np.ndarray, "n pixels"], seed: int) -> ReleasedMoments:
    """Mean and variance by the Gaussian mechanism, one release of all rows (x, x^2).

    One example changes their sum by ROW_CLIP at most; how many there are is public.
    """
    rows = np.concatenate([x, x**2], axis=1).astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows *= np.minimum(1.0, ROW_CLIP / np.maximum(norms, 1e-12))
    noise = np.random.default_rng(seed).normal(0.0, ROW_CLIP * ROW_NOISE, rows.shape[1])
    mean, square = np.split((rows.sum(axis=0) + noise) / len(x), 2)
    # All that is done to what was released is free.
    mean = np.clip(mean, 0.0, 1.0)
    return ReleasedMoments(mean, np.clip(square - mean**2, 0.0, 0.25))


def drawn(moments: ReleasedMoments, n: int, seed: int) -> Float[np.ndarray, "n pixels"]:
    """Images that stand for the private ones in P: each pixel normal, by itself."""
    normal = np.random.default_rng(seed).normal(size=(n, len(moments.mean)))
    return (moments.mean + np.sqrt(moments.var) * normal).astype(np.float32)


def clipped_and_noised(
    gradients: Any, operator: bnp_optax.Operator | None, inner: Any, state: Any
) -> tuple[Any, Any]:
    """Updates of the parameters from gradients with a leading axis of examples.

    Args:
      gradients: Of each example; zeros where there is none.
      operator: P, or None.
      inner: `optax.contrib.differentially_private_aggregate`, and the optimizer after it.
      state: Of `inner`.
    """
    if operator is None:
        return inner.update(gradients, state)
    updates, state = inner.update(jax.vmap(operator.transpose)(gradients), state)
    return operator.mv(updates), state


def compiled(learner: PrivateLearner, points: int) -> Callable[..., Array]:
    """`run(rate, noise, key, images, reference, keys)`: accuracy at so many points."""
    network = Network(learner.layer_norm)

    def loss_fn(params: Any, x: Array, y: Array, there: Array) -> Array:
        logits = network.apply({"params": params}, x)
        return there * optax.softmax_cross_entropy_with_integer_labels(logits, y)  # type: ignore[arg-type]

    def looked_at(params: Any, x: Array) -> Array:
        return jnp.mean(network.apply({"params": params}, x))  # type: ignore[arg-type]

    @jax.jit
    def run(
        rate: Any, noise: Any, key: Array, images: PrivateImages, reference: Array, keys: Array
    ) -> Any:
        chance = BATCH / len(images.y)
        first, noise_key = jax.random.split(key)
        inner = optax.chain(
            optax.contrib.differentially_private_aggregate(CLIP, noise, noise_key),
            # Of as many as there are on average, not as many as there may be.
            optax.scale(CAPACITY / BATCH),
            learner.make(rate),
        )
        bnp = None if learner.statistics is None else bnp_optax.bnp(**learner.statistics[1])

        def step(carry: Any, key: Array) -> tuple[Any, None]:
            params, state, seen = carry
            keys = jax.random.split(key)
            enters = jax.random.bernoulli(keys[0], chance, images.y.shape)
            (rows,) = jnp.nonzero(enters, size=CAPACITY, fill_value=-1)
            batch = images.x[rows], images.y[rows], (rows >= 0).astype(jnp.float32)
            gradients = jax.vmap(jax.grad(loss_fn), (None, 0, 0, 0))(params, *batch)
            operator = None
            if bnp is not None:
                some = jax.random.choice(keys[1], reference, (BATCH,))
                _, _, stats = bnp_optax.value_and_grad(looked_at)(params, some)
                seen = bnp.update(params, seen, params, layer_stats=stats)
                operator = bnp.operator(seen)
            updates, state = clipped_and_noised(gradients, operator, inner, state)
            return (optax.apply_updates(params, updates), state, seen), None

        def stretch(carry: Any, keys: Array) -> tuple[Any, Array]:
            carry, _ = jax.lax.scan(step, carry, keys)
            logits = network.apply({"params": carry[0]}, images.eval_x)
            return carry, jnp.mean(jnp.argmax(logits, axis=1) == images.eval_y)  # type: ignore[arg-type]

        params = network.init(first, images.x[:1])["params"]
        start = params, inner.init(params), None if bnp is None else bnp.init(params)
        return jax.lax.scan(stretch, start, keys.reshape(points, -1))[1]

    return run


def applications(data_dir: Path | None) -> list[Application]:
    """Fashion-MNIST."""
    return [
        Application(
            name="private-fashion",
            title=f"Fashion-MNIST, {N_PRIVATE} images, epsilon = {EPSILON:g}, delta = {DELTA:g}",
            measure="test accuracy, %",
            train=functools.partial(_train, data_dir),
            contestants=CONTESTANTS,
            steps=STEPS,
            higher_is_better=True,
            log=False,
        )
    ]


def _train(
    data_dir: Path | None, name: str, rate: float, seeds: Sequence[int], steps: int
) -> Float[np.ndarray, "seeds points"]:
    learner, found = LEARNERS[name], []
    points = next(n for n in range(min(POINTS, steps), 0, -1) if steps % n == 0)
    for seed in seeds:
        images = _images(data_dir, seed)
        noise = noise_of(learner, len(images.y), steps)
        released = released_moments(images.x, seed)
        sources = {
            "public": ReleasedMoments(images.public.mean(0), images.public.var(0)),
            "private": released,
        }
        reference = images.public
        if learner.statistics is not None and learner.statistics[0] == "private":
            reference = drawn(released, N_PUBLIC, seed)
        if learner.standardized != "raw":
            mean, var = sources[learner.standardized]
            scale = 1.0 / np.sqrt(var + FLOOR)
            images = images._replace(
                x=((images.x - mean) * scale).astype(np.float32),
                eval_x=((images.eval_x - mean) * scale).astype(np.float32),
            )
        key = jax.random.key(seed)
        keys = jax.random.split(jax.random.fold_in(key, 1), steps)
        run = _compiled(name, points)
        found.append(100.0 * np.asarray(run(rate, noise, key, images, reference, keys)))
    return np.stack(found)


def noise_of(learner: PrivateLearner, n: int, steps: int) -> float:
    """Of a training whose epsilon is `EPSILON`, with the release of moments if there is one."""
    return _noise(BATCH / n, steps, ROW_NOISE if learner.releases else None)


@functools.lru_cache
def _noise(chance: float, steps: int, once: float | None) -> float:
    return noise_for(EPSILON, chance, steps, DELTA, once)


@functools.lru_cache(maxsize=4)
def _images(data_dir: Path | None, seed: int) -> PrivateImages:
    """Rates are chosen on one half of the test images, and reported on the other."""
    train, test = data.read("fashion_mnist", data_dir)
    order = np.random.default_rng(seed).permutation(len(train.y))
    n_public = min(N_PUBLIC, len(order) // 4)
    public, private = order[:n_public], order[n_public:][:N_PRIVATE]
    half = slice(1 if seed >= TUNING_SEED else 0, None, 2)
    return PrivateImages(
        halved(train.x[private]),
        train.y[private],
        halved(train.x[public]),
        halved(test.x[half]),
        test.y[half],
    )


_compiled = functools.lru_cache(maxsize=1)(lambda name, points: compiled(LEARNERS[name], points))

LEARNERS = {
    "sgd": PrivateLearner(optax.sgd),
    "adam": PrivateLearner(optax.adam),
    "sgd-public": PrivateLearner(optax.sgd, "public"),
    "adam-public": PrivateLearner(optax.adam, "public"),
    "sgd-private": PrivateLearner(optax.sgd, "private"),
    "adam-private": PrivateLearner(optax.adam, "private"),
    "adam-public-layernorm": PrivateLearner(optax.adam, "public", layer_norm=True),
    "adam-private-layernorm": PrivateLearner(optax.adam, "private", layer_norm=True),
    "bnp-sgd-public": PrivateLearner(optax.sgd, statistics=("public", SGD_OPTIONS)),
    "bnp-adam-public": PrivateLearner(optax.adam, statistics=("public", ADAM_OPTIONS)),
    "bnp-sgd-private": PrivateLearner(optax.sgd, statistics=("private", SGD_OPTIONS)),
    "bnp-adam-private": PrivateLearner(optax.adam, statistics=("private", ADAM_OPTIONS)),
}

CONTESTANTS = (
    Contestant("sgd", "DP-SGD", 1.0, color=base.BLACK),
    Contestant("adam", "DP-Adam", 1e-3, color=base.BLACK, dashes="--"),
    Contestant("sgd-public", "standardized, public: DP-SGD", 1.0, color=base.SKY),
    Contestant("adam-public", "standardized, public: DP-Adam", 1e-3, color=base.SKY, dashes="--"),
    Contestant("sgd-private", "standardized, private: DP-SGD", 1.0, color=base.PURPLE),
    Contestant(
        "adam-private", "standardized, private: DP-Adam", 1e-3, color=base.PURPLE, dashes="--"
    ),
    Contestant(
        *("adam-public-layernorm", "standardized, public, LayerNorm: DP-Adam", 1e-3),
        color=base.ORANGE,
        dashes="--",
    ),
    Contestant(
        *("adam-private-layernorm", "standardized, private, LayerNorm: DP-Adam", 1e-3),
        color=base.ORANGE,
        dashes=":",
    ),
    Contestant("bnp-sgd-public", "in z, public: DP-SGD", 0.3, ours=True, color=base.BLUE),
    Contestant(
        "bnp-adam-public", "in z, public: DP-Adam", 3e-3, ours=True, color=base.BLUE, dashes="--"
    ),
    Contestant("bnp-sgd-private", "in z, private: DP-SGD", 0.3, ours=True, color=base.VERMILION),
    Contestant(
        *("bnp-adam-private", "in z, private: DP-Adam", 3e-3),
        ours=True,
        color=base.VERMILION,
        dashes="--",
    ),
)
