"""Physics-informed networks: a loss of derivatives by the inputs, in metres and seconds.

Nothing may normalize over the batch here: the derivatives of a network that did would not be those
of a function of one point. All contestants have the same network, losses, points a step and number
of steps, and a learning rate that falls to nothing by a cosine. Some have their coordinates scaled
by hand, the others get metres and seconds.

L-BFGS has no use for fresh points: it takes a fixed set, of as many points as sixteen steps of the
others, and an eighth of their steps; its rate scales the direction that its line search starts
with. SOAP has no package for Optax, and is left out.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

import bnp_optax
from benchmarks.applications.base import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    VERMILION,
    Application,
    Contestant,
)
from benchmarks.applications.equations import EQUATIONS, Equation, Point

_STEPS, _POINTS, _CURVE = 3000, 64, 20
# What L-BFGS has: so many batches in its set of points, and one step for so many of the others.
_POOL, _LBFGS_STEPS = 16, 8


class Network(nn.Module):
    """Three hidden layers of tanh."""

    @nn.compact
    def __call__(self, x: Point) -> Float[Array, ""]:
        """The field at one point."""
        for _ in range(3):
            x = nn.tanh(nn.Dense(32)(x))
        return nn.Dense(1)(x)[0]


@dataclasses.dataclass(frozen=True)
class PinnMethod:
    """How a contestant trains.

    Attributes:
      optimizer: From a rate, or its schedule; from z it takes `layers` and `fixed`, too.
      by_hand: Whether coordinates are standardized by hand.
      in_z: Whether the optimizer takes statistics.
      from_z: Whether initial values are those of z, and the inputs' statistics held.
      second: Whether it takes the layers' second moments.
      line_search: Whether it has one, and a fixed set of points.
    """

    optimizer: Callable[..., Any]
    by_hand: bool = False
    in_z: bool = False
    from_z: bool = False
    second: bool = False
    line_search: bool = False


def _muon_in_z(rate: Any, **options: Any) -> Any:
    return bnp_optax.in_zspace(optax.contrib.muon(rate), bnp_optax.bnp(scale=False, **options))


# They whiten fully, where the default takes the fourth root of the covariance.
_WHITEN_ADAM, _WHITEN_MUON = (
    functools.partial(make, exponent=0.5, damping=0.1)
    for make in (bnp_optax.whiten_adam, bnp_optax.whiten_muon)
)
METHODS = {
    "adam": PinnMethod(optax.adam),
    "adam-by-hand": PinnMethod(optax.adam, by_hand=True),
    "muon-by-hand": PinnMethod(optax.contrib.muon, by_hand=True),
    "lbfgs-by-hand": PinnMethod(optax.lbfgs, by_hand=True, line_search=True),
    "bnp-adam-by-hand": PinnMethod(bnp_optax.bnp_adam, by_hand=True, in_z=True),
    "whiten-by-hand": PinnMethod(_WHITEN_ADAM, by_hand=True, in_z=True, second=True),
    "whiten-muon-by-hand": PinnMethod(_WHITEN_MUON, by_hand=True, in_z=True, second=True),
    "adam-z": PinnMethod(bnp_optax.bnp_adam, in_z=True, from_z=True),
    "muon-z": PinnMethod(_muon_in_z, in_z=True, from_z=True),
    "whiten-z": PinnMethod(_WHITEN_ADAM, in_z=True, from_z=True, second=True),
    "whiten-muon-z": PinnMethod(_WHITEN_MUON, in_z=True, from_z=True, second=True),
}
CONTESTANTS = (
    Contestant("adam", "Adam", 1e-2),
    Contestant("adam-by-hand", "Adam, scaled by hand", 1e-2, color=BLUE),
    Contestant("muon-by-hand", "Muon, scaled by hand", 1e-2, color=BLUE, dashes="--"),
    Contestant("lbfgs-by-hand", "L-BFGS, scaled by hand", 1.0, color=GREEN),
    Contestant("bnp-adam-by-hand", "bnp_adam, scaled by hand", 1e-2, ours=True, color=ORANGE),
    Contestant(
        "whiten-by-hand",
        "whiten_adam, scaled by hand",
        3e-2,
        ours=True,
        color=ORANGE,
        dashes="--",
    ),
    Contestant(
        "whiten-muon-by-hand",
        "whiten_muon, scaled by hand",
        3e-2,
        ours=True,
        color=ORANGE,
        dashes=":",
    ),
    Contestant("adam-z", "Adam in z, from z", 1e-2, ours=True, color=VERMILION),
    Contestant("muon-z", "Muon in z, from z", 1e-2, ours=True, color=PURPLE),
    Contestant(
        "whiten-z", "Adam in whitened z, from z", 3e-2, ours=True, color=VERMILION, dashes="--"
    ),
    Contestant(
        "whiten-muon-z", "Muon in whitened z, from z", 1e-2, ours=True, color=PURPLE, dashes="--"
    ),
)


def make_solution(equation: Equation, by_hand: bool) -> Callable[[Any, Point], Float[Array, ""]]:
    """`solution(params, point)`, of a point in metres and seconds."""
    lower, upper = np.array(equation.lower), np.array(equation.upper)
    shift, scale = np.zeros(2), np.ones(2)
    if by_hand:
        shift, scale = (lower + upper) / 2, (upper - lower) / np.sqrt(12)
    return lambda params, point: Network().apply({"params": params}, (point - shift) / scale)  # type: ignore[return-value]


def make_loss(
    equation: Equation, solution: Callable[[Any, Point], Float[Array, ""]]
) -> Callable[..., Float[Array, ""]]:
    """Mean squares of the equation's residual, and of the error at the boundary."""

    def loss_fn(params: Any, inside: Array, boundary: tuple[Array, Array]) -> Float[Array, ""]:
        u = functools.partial(solution, params)
        residuals = jax.vmap(functools.partial(equation.residual, u))(inside)
        error = jax.vmap(u)(boundary[0]) - boundary[1]
        return jnp.mean(residuals**2) + 10.0 * jnp.mean(error**2)

    return loss_fn


def draw(equation: Equation, key: PRNGKeyArray, n: int = _POINTS) -> tuple[Any, Any]:
    """Points inside, and at the boundary with the values there."""
    keys = jax.random.split(key)
    return equation.inside(keys[0], n), equation.boundary(keys[1], n)


def train(
    equation: str, name: str, rate: float, seeds: Sequence[int], steps: int
) -> Float[np.ndarray, "seeds points"]:
    """The relative error on 2,000 other points, along the training, a row for each seed."""
    run, rows = _compiled(equation, name, steps), []
    for seed in seeds:
        keys = jax.random.split(jax.random.key(seed), 3)
        params, fixed = Network().init(keys[0], jnp.zeros(2))["params"], {}
        pool = draw(EQUATIONS[equation], keys[1], _POOL * _POINTS)
        if METHODS[name].from_z:
            solution = make_solution(EQUATIONS[equation], by_hand=False)
            loss_fn = make_loss(EQUATIONS[equation], solution)
            params, fixed = bnp_optax.start_in_zspace(loss_fn, params, [pool])
        rows.append(np.asarray(run(jnp.asarray(rate), keys[2], params, fixed, pool)))
    return np.stack(rows)


@functools.cache
def layers_of_network() -> dict[str, bnp_optax.Layer]:
    """Of the network, by kernel."""
    params = jax.eval_shape(Network().init, jax.random.key(0), jnp.zeros(2))["params"]
    network = lambda params, x: Network().apply({"params": params}, x)  # noqa: E731
    return bnp_optax.find_layers(network, params, jnp.zeros(2))


@functools.cache
def _compiled(name: str, contestant: str, steps: int) -> Callable[..., Float[Array, " points"]]:
    """One training, compiled once for all rates and seeds."""
    equation, method = EQUATIONS[name], METHODS[contestant]
    solution = make_solution(equation, method.by_hand)
    loss_fn = make_loss(equation, solution)
    points = equation.inside(jax.random.key(5), 2000)
    exact = jnp.asarray(equation.exact(np.asarray(points)), jnp.float32)
    n_steps = max(1, steps // _LBFGS_STEPS) if method.line_search else steps
    n_parts = min(_CURVE, n_steps)

    def run(
        rate: Array, key: PRNGKeyArray, params: Any, fixed: Any, pool: Any
    ) -> Float[Array, " points"]:
        captured = bnp_optax.value_and_grad(loss_fn, fixed=fixed, second_moments=method.second)
        schedule = rate if method.line_search else optax.cosine_decay_schedule(rate, steps)
        held = {"fixed": fixed, "layers": layers_of_network()} if method.from_z else {}
        tx = optax.with_extra_args_support(method.optimizer(schedule, **held))

        def step(carry: Any, index: Array) -> tuple[Any, None]:
            params, state = carry
            batch, extra = draw(equation, jax.random.fold_in(key, index)), {}
            if method.line_search:
                value_fn = lambda params: loss_fn(params, *pool)  # noqa: E731
                value, grads = optax.value_and_grad_from_state(value_fn)(params, state=state)
                extra = {"value": value, "grad": grads, "value_fn": value_fn}
            elif method.in_z:
                _, grads, extra["layer_stats"] = captured(params, *batch)
            else:
                grads = jax.grad(loss_fn)(params, *batch)
            updates, state = tx.update(grads, state, params, **extra)
            return (optax.apply_updates(params, updates), state), None

        def part(carry: Any, indices: Array) -> tuple[Any, Array]:
            carry, _ = jax.lax.scan(step, carry, indices)
            error = jax.vmap(functools.partial(solution, carry[0]))(points) - exact
            return carry, jnp.linalg.norm(error) / jnp.linalg.norm(exact)

        indices = jnp.arange(n_steps // n_parts * n_parts).reshape(n_parts, -1)
        return jax.lax.scan(part, (params, tx.init(params)), indices)[1]

    return jax.jit(run)


def _application(name: str, title: str) -> Application:
    return Application(
        name=f"pinn-{name}",
        title=title,
        measure="relative error",
        train=functools.partial(train, name),
        contestants=CONTESTANTS,
        steps=_STEPS,
    )


def applications() -> list[Application]:
    """One for each equation."""
    return [_application(name, equation.title) for name, equation in EQUATIONS.items()]
