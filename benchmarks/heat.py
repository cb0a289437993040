"""The heat equation in metres and seconds: raw units in, no scaling by hand.

    python -m benchmarks.heat

A network u(x, t) is to solve u_t = k u_xx on a rod of 100 m with k = 1e-3 m^2/s, u = 0 at its ends,
from u(x, 0) = sin(pi x / 100 m); the exact solution decays in T = 1e6 s. The loss holds second
derivatives by the inputs, so nothing may normalize over the batch. Each method has the same
network, points and steps; one has its coordinates standardized by hand, the others get metres and
seconds. The table has the relative error on 2,000 other points, the median of the seeds.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

import bnp_optax
from benchmarks.environment import environment

LENGTH, CONDUCTIVITY = 100.0, 1e-3
DECAY_TIME = LENGTH**2 / (np.pi**2 * CONDUCTIVITY)
SIZES = np.array([LENGTH, DECAY_TIME])
N_POINTS = 64


class Network(nn.Module):
    """Three hidden layers of tanh."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """U at one point (x, t)."""
        for _ in range(3):
            x = nn.tanh(nn.Dense(32)(x))
        return nn.Dense(1)(x)[0]


def exact(points: jax.Array) -> jax.Array:
    """The solution at points (n, 2)."""
    return jnp.exp(-points[:, 1] / DECAY_TIME) * jnp.sin(jnp.pi * points[:, 0] / LENGTH)


def make_solution(by_hand: bool) -> Callable[[Any, jax.Array], jax.Array]:
    """`solution(params, point)`, of a point in metres and seconds."""
    shift, scale = (SIZES / 2, SIZES / np.sqrt(12)) if by_hand else (np.zeros(2), np.ones(2))
    return lambda params, point: Network().apply({"params": params}, (point - shift) / scale)  # type: ignore[return-value]


def make_loss(solution: Callable[[Any, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """Mean squares of the equation's residual, and of the error at the boundary."""

    def loss_fn(params: Any, inside: jax.Array, boundary: jax.Array) -> jax.Array:
        def residual(point: jax.Array) -> jax.Array:
            first = jax.grad(solution, 1)(params, point)
            second = jax.hessian(solution, 1)(params, point)
            return DECAY_TIME * (first[1] - CONDUCTIVITY * second[0, 0])

        error = jax.vmap(solution, (None, 0))(params, boundary) - exact(boundary)
        return jnp.mean(jax.vmap(residual)(inside) ** 2) + 10.0 * jnp.mean(error**2)

    return loss_fn


def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Points inside, and at the start or one of the ends."""
    keys = jax.random.split(key, 3)
    inside, boundary = (jax.random.uniform(k, (N_POINTS, 2)) * SIZES[None] for k in keys[:2])
    side = jax.random.randint(keys[2], (N_POINTS,), 0, 3)
    ends = jnp.where(side == 1, 0.0, LENGTH)
    at_ends = jnp.stack([ends, boundary[:, 1]], axis=1)
    at_start = jnp.stack([boundary[:, 0], jnp.zeros(N_POINTS)], axis=1)
    return inside, jnp.where((side == 0)[:, None], at_start, at_ends)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A way to train.

    Attributes:
      label: Its name in the table.
      make: From a learning rate to the optimizer.
      by_hand: Whether the coordinates are standardized by hand.
      in_z: Whether the optimizer takes statistics.
      from_z: Whether initial values are those of z.
    """

    label: str
    make: Callable[[float], Any]
    by_hand: bool = False
    in_z: bool = False
    from_z: bool = False


def adam_z_exact(rate: float) -> Any:
    """Adam in z with a P that scales all inputs, however small."""
    exact = bnp_optax.bnp(eps_rel=1e-8, eps_abs=0.0)
    return bnp_optax.in_zspace(optax.adam(rate), exact)


def adam_z(rate: float) -> Any:
    """Adam in z with the paper's P."""
    return bnp_optax.in_zspace(optax.adam(rate), bnp_optax.bnp())


CONTESTANTS = (
    Contestant("Adam", optax.adam),
    Contestant("Adam, scaled by hand", optax.adam, by_hand=True),
    Contestant("Adam, from z", optax.adam, from_z=True),
    Contestant("Adam in z", adam_z, in_z=True),
    Contestant("Adam in z, from z", adam_z_exact, in_z=True, from_z=True),
)


def train(contestant: Contestant, rate: float, seed: int, n_steps: int) -> float:
    """The relative error after training."""
    solution = make_solution(contestant.by_hand)
    loss_fn = make_loss(solution)
    params = Network().init(jax.random.key(seed), jnp.ones(2))["params"]
    fixed = {}
    if contestant.from_z:
        batches = [draw(jax.random.key(1000 + i)) for i in range(20)]
        params, fixed = bnp_optax.start_in_zspace(loss_fn, params, batches)
    tx = optax.with_extra_args_support(contestant.make(rate))
    captured = bnp_optax.value_and_grad(loss_fn, fixed=fixed)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        if contestant.in_z:
            _, grads, stats = captured(params, *draw(key))
            updates, state = tx.update(grads, state, params, layer_stats=stats)
        else:
            grads = jax.grad(loss_fn)(params, *draw(key))
            updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(seed), n_steps)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0][0])
    params = run((params, tx.init(params)))
    points = jax.random.uniform(jax.random.key(5), (2000, 2)) * SIZES[None]
    error = jax.vmap(solution, (None, 0))(params, points) - exact(points)
    return float(jnp.linalg.norm(error) / jnp.linalg.norm(exact(points)))


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
      rates: Learning rates, the same for all.
      steps: Steps of each training.
      seeds: Trainings with each rate.
      out: Where the numbers go, with their environment.
    """

    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    steps: int = 3000
    seeds: int = 3
    out: pathlib.Path = pathlib.Path("results/heat.json")


def main(config: Config) -> None:
    """Train and print."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    table = Table(title="Relative error", title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for rate in config.rates:
        table.add_column(f"rate {rate:g}", justify="right")
    results: dict[str, dict[str, list[float]]] = {}
    for contestant in CONTESTANTS:
        errors = {
            f"{rate:g}": [
                train(contestant, rate, seed, config.steps) for seed in range(config.seeds)
            ]
            for rate in config.rates
        }
        results[contestant.label] = errors
        shown = [
            f"{np.median(found):.4f} ({min(found):.4f}-{max(found):.4f})"
            for found in errors.values()
        ]
        table.add_row(contestant.label, *shown)
    console.print(table)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps({"environment": environment(), "results": results}, indent=2))
    console.print(f"Medians and ranges of {config.seeds} seeds. Numbers: {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
