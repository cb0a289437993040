"""What whitening costs over SGD: FLOPs and time of a step, and roots by eigenvectors or Newton.

    python -m benchmarks cost-whiten
    python -m benchmarks cost-whiten --turns 10 --large    # time too, on this machine's device

XLA's FLOPs of the compiled step, in multiples of those of SGD's, for the contest's networks: the
fully connected 3072-100-100-100-10, whose first layer is wider than `max_fan_in`, a convolutional
one, and a small transformer of characters. XLA counts nothing for a library's eigenvectors and QR
factors, and a branch that is not taken like one that is. So the steps are compiled with the branch
of a refresh emptied; its products are counted by themselves, with 9 n^3 FLOPs for n eigenvectors
and 4 n r^2 for a QR factor and both are divided by the period.

Time is that of 200 steps in compiled passes of 20 (of the convolutional network at a batch of 128,
20 steps), refreshes included, a turn of each method after the other. The roots are those of 24
covariances, by `eigh` of all at once and of one after the other, and by the coupled Newton
iteration that Shampoo uses, in ten steps, after which its error falls no further.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float
from rich import box
from rich.console import Console
from rich.table import Table

import bnp_optax
from benchmarks.arguments import Count, CountOrZero
from benchmarks.environment import environment
from benchmarks.networks.paper_cnn import PaperCNN
from benchmarks.networks.small import MLP, convolve_patches
from benchmarks.networks.transformer import CharTransformer
from bnp_optax import sketches
from bnp_optax.preconditioners import running_covariance

# Passes of so many steps are compiled, on batches in turn.
_PASS, _BATCHES = 20, 5
_PERIOD, _RANK, _MAX_FAN_IN = 20, 16, 1024
_EIGH, _QR = 9, 4


class ModelOnBatch(NamedTuple):
    """A network and a batch.

    Attributes:
      model: The network.
      x: Inputs, as shapes.
      y: Classes.
      passes: How many are timed at once.
    """

    model: Any
    x: jax.ShapeDtypeStruct
    y: jax.ShapeDtypeStruct
    passes: int = 10


def _shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _connected(batch_size: int) -> ModelOnBatch:
    """The JMLR paper's fully connected network, on CIFAR-10."""
    shapes = _shape(batch_size, 3072), _shape(batch_size, dtype=jnp.int32)
    return ModelOnBatch(MLP((100, 100, 100), 10, "none"), *shapes)


def _convolutional(batch_size: int) -> ModelOnBatch:
    """Its convolutional network of five layers."""
    shapes = _shape(batch_size, 32, 32, 3), _shape(batch_size, dtype=jnp.int32)
    passes = 1 if batch_size > 16 else 10  # Steps of a tenth of a second.
    # As in the contest on a CPU, where a product of patches is faster.
    return ModelOnBatch(PaperCNN(convolution=convolve_patches), *shapes, passes)


PROBLEMS = {
    **{f"3072-100-100-100-10, batch {n}": _connected(n) for n in (60, 6, 1)},
    **{f"CNN of 5 layers, batch {n}": _convolutional(n) for n in (128, 2, 1)},
    "transformer, 2 blocks of width 64, 16 texts of 64": ModelOnBatch(
        CharTransformer(65),
        _shape(16, 64, dtype=jnp.int32),
        _shape(16, 64, dtype=jnp.int32),
    ),
}
# What an accelerator has time for.
LARGE = {
    "784-2048-2048-2048-10, batch 1024": ModelOnBatch(
        MLP((2048, 2048, 2048), 10, "none"), _shape(1024, 784), _shape(1024, dtype=jnp.int32)
    ),
    "transformer, 6 blocks of width 512, 16 texts of 128": ModelOnBatch(
        CharTransformer(96, width=512, depth=6, heads=8),
        _shape(16, 128, dtype=jnp.int32),
        _shape(16, 128, dtype=jnp.int32),
    ),
}


class Variant(NamedTuple):
    """A way to train.

    Attributes:
      tx: The optimizer.
      second_moments: Whether statistics have second moments; None for no statistics.
      every: Statistics are captured in one step of so many.
      refreshes: Whether refreshes count. Without them it is the bound of what a cheaper root saves.
    """

    tx: optax.GradientTransformation
    second_moments: bool | None = None
    every: int = 1
    refreshes: bool = True


VARIANTS = {
    "SGD": Variant(optax.sgd(0.1)),
    "Adam": Variant(optax.adam(1e-3)),
    "Adam in z": Variant(bnp_optax.bnp_adam(1e-3), False),
    "Muon": Variant(optax.contrib.muon(1e-3)),
    "orthogonalize": Variant(
        optax.chain(bnp_optax.orthogonalize(), optax.scale_by_learning_rate(1e-3))
    ),
    "whiten_adam": Variant(bnp_optax.whiten_adam(), True),
    "whiten_adam, refreshes for nothing": Variant(bnp_optax.whiten_adam(), True, refreshes=False),
    "whiten_muon": Variant(bnp_optax.whiten_muon(), True),
    "whiten_adam, captured every 10th": Variant(bnp_optax.whiten_adam(), True, 10),
    "whiten_muon, captured every 10th": Variant(bnp_optax.whiten_muon(), True, 10),
}


def flops(function: Callable[..., Any], *args: Any) -> float:
    """XLA's FLOPs of a compiled call."""
    cost: Any = jax.jit(function).lower(*args).compile().cost_analysis()
    return cost["flops"]


def _make_step(problem: ModelOnBatch, variant: Variant, captured: bool) -> Callable[..., Any]:
    """`step(params, state, x, y)`: the parameters and the state after a step."""
    tx = optax.with_extra_args_support(variant.tx)

    def loss_fn(params: Any, x: Any, y: Any) -> Any:
        logits = problem.model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        extra = {}
        if captured:
            _, grads, stats = bnp_optax.value_and_grad(
                loss_fn, second_moments=variant.second_moments
            )(params, x, y)
            extra["layer_stats"] = stats
        else:
            grads = jax.grad(loss_fn)(params, x, y)
            extra |= {} if variant.second_moments is None else {"layer_stats": None}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def _step_flops(problem: ModelOnBatch, variant: Variant, captured: bool) -> float:
    """FLOPs of a step, without those of a refresh."""
    step = _make_step(problem, variant, captured)
    params = jax.eval_shape(problem.model.init, jax.random.key(0), problem.x)["params"]
    state = jax.eval_shape(variant.tx.init, params)

    as_before = running_covariance._as_before
    with mock.patch.object(running_covariance, "_decomposed", as_before):
        return flops(step, params, state, problem.x, problem.y)


def _refresh_flops(problem: ModelOnBatch) -> float:
    """FLOPs of one refresh of all layers."""
    total = 0.0

    def loss_fn(params: Any, x: Any) -> Any:
        return jnp.mean(problem.model.apply({"params": params}, x) ** 2)

    params = jax.eval_shape(problem.model.init, jax.random.key(0), problem.x)["params"]
    for layer in bnp_optax.find_layers(loss_fn, params, problem.x).values():
        n, rank = layer.fan_in, min(_RANK, layer.fan_in)
        if n <= _MAX_FAN_IN:
            total += _EIGH * n**3
            continue
        k = sketches.N_PRODUCTS
        total += flops(functools.partial(sketches.leading, rank=rank), _shape(k + 1, n))
        total += _QR * n * rank**2 + 2 * _EIGH * k**3
    return total


@functools.cache
def measured(name: str) -> dict[str, float]:
    """FLOPs of a step of each variant over those of SGD, spread over the period of a refresh."""
    problem = PROBLEMS[name]
    refresh = _refresh_flops(problem) / _PERIOD
    found = {}
    for label, variant in VARIANTS.items():
        is_captured = variant.second_moments is not None
        cost = _step_flops(problem, variant, is_captured)
        cost += refresh if variant.second_moments and variant.refreshes else 0.0
        if variant.every > 1:
            stale = _step_flops(problem, variant, False)
            cost = cost / variant.every + stale * (1.0 - 1.0 / variant.every)
        found[label] = cost
    return {label: cost / found["SGD"] for label, cost in found.items()}


class Running:
    """A training that goes on: passes of 20 steps."""

    def __init__(self, problem: ModelOnBatch, variant: Variant) -> None:
        self.passes = problem.passes
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = (_shape(_BATCHES, *s.shape, dtype=s.dtype) for s in (problem.x, problem.y))
        self.batches = tuple(map(_random, keys[:2], shapes))
        params = problem.model.init(keys[2], self.batches[0][0])["params"]
        self.carry = (params, variant.tx.init(params))
        captured = variant.second_moments is not None
        first, other = (_make_step(problem, variant, c) for c in (captured, False))

        # Of one batch for all steps the compiler would take the statistics before the loop.
        def batch(batches: Any, at: Any) -> Any:
            return [x[at % _BATCHES] for x in batches]

        def turn(at: Any, carry: Any, batches: Any) -> Any:
            """One step with statistics, and those without until the next."""
            carry = first(*carry, *batch(batches, at))
            rest = variant.every - 1
            return jax.lax.fori_loop(
                0, rest, lambda i, c: other(*c, *batch(batches, at + 1 + i)), carry
            )

        def steps(carry: Any, batches: Any) -> Any:
            turns, every = _PASS // variant.every, variant.every
            return jax.lax.fori_loop(0, turns, lambda i, c: turn(every * i, c, batches), carry)

        self.steps = jax.jit(steps, donate_argnums=0)

    def seconds(self) -> float:
        """Of a step."""
        start = time.perf_counter()
        for _ in range(self.passes):
            self.carry = self.steps(self.carry, self.batches)
        jax.block_until_ready(self.carry)
        return (time.perf_counter() - start) / (self.passes * _PASS)


def _random(key: Array, shape: jax.ShapeDtypeStruct) -> Array:
    if shape.dtype == jnp.int32:
        return jax.random.randint(key, shape.shape, 0, 10)
    return jax.random.normal(key, shape.shape, shape.dtype)


def timed(problem: ModelOnBatch, turns: int) -> dict[str, dict[str, float]]:
    """By variant, seconds of a step, and the median and quartiles of its ratio to SGD's."""
    running = {
        label: Running(problem, variant) for label, variant in VARIANTS.items() if variant.refreshes
    }
    seconds: dict[str, list[float]] = {label: [] for label in running}
    for turn in range(turns + 1):
        for label, one in running.items():
            taken = one.seconds()
            if turn:  # The first compiles.
                seconds[label].append(taken)
    found = {}
    for label, values in seconds.items():
        low, ratio, high = np.quantile(np.divide(values, seconds["SGD"]), [0.25, 0.5, 0.75])
        found[label] = {
            "seconds": float(np.median(values)),
            "ratio": float(ratio),
            "low": float(low),
            "high": float(high),
        }
    return found


def newton_root(
    matrices: Float[Array, "*b n n"], damping: Float[Array, "*b"], power: int, steps: int = 10
) -> Float[Array, "*b n n"]:
    """(A + damping I)^(-1/power), power 2 or 4, by the coupled Newton iteration.

    Source: Guo and Higham, "A Schur-Newton method for the matrix p-th root and its inverse", 2006.
    """
    eye = jnp.broadcast_to(jnp.eye(matrices.shape[-1], dtype=matrices.dtype), matrices.shape)
    damped = matrices + damping[..., None, None] * eye
    dot = functools.partial(jnp.matmul, precision="highest")
    # The Frobenius norm is no less than the largest eigenvalue, as convergence needs.
    scale = (1 + power) / (2 * jnp.linalg.norm(damped, axis=(-2, -1)))[..., None, None]

    def step(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        root, coupled = carry
        factor = ((power + 1) * eye - coupled) / power
        squared = dot(factor, factor)
        return dot(root, factor), dot(dot(squared, squared) if power == 4 else squared, coupled)

    start = (scale ** (1 / power) * eye, damped * scale)
    return jax.lax.fori_loop(0, steps, step, start)[0]


def eigh_root(
    matrices: Float[Array, "*b n n"], damping: Float[Array, "*b"], power: int
) -> Float[Array, "*b n n"]:
    """The same by eigenvectors, of all matrices at once."""
    vectors, values = jax.lax.linalg.eigh(matrices)
    values = (jnp.maximum(values, 0.0) + damping[..., None]) ** (-1 / power)
    scaled = vectors * values[..., None, :]
    return jnp.matmul(scaled, jnp.swapaxes(vectors, -1, -2), precision="highest")


def eigh_root_one_by_one(
    matrices: Float[Array, "b n n"], damping: Float[Array, "b"], power: int
) -> Float[Array, "b n n"]:
    """The same of one matrix after the other."""
    return jnp.stack([eigh_root(*one, power) for one in zip(matrices, damping, strict=True)])


def covariances(n: int, how_many: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Covariances with eigenvalues that fall as 1/k, and a tenth of their mean, in float64."""
    random = np.random.default_rng(n)
    vectors = np.linalg.qr(random.standard_normal((how_many, n, n)))[0]
    values = 1.0 / np.arange(1, n + 1)
    matrices = (vectors * values) @ np.swapaxes(vectors, -1, -2)
    return matrices, np.full(how_many, 0.1 * values.mean())


_ROOTS = {
    "eigh": eigh_root,
    "one by one": eigh_root_one_by_one,
    "Newton": newton_root,
}


def roots(sizes: tuple[int, ...], turns: int) -> dict[str, dict[str, float]]:
    """By size, milliseconds of each way for 24 matrices, and largest relative errors."""
    found = {}
    for n in sizes:
        matrices, damping = covariances(n)
        values, vectors = np.linalg.eigh(matrices)
        values = (values + damping[:, None]) ** -0.25
        exact = (vectors * values[:, None, :]) @ np.swapaxes(vectors, -1, -2)
        given = jnp.asarray(matrices, jnp.float32), jnp.asarray(damping, jnp.float32)
        row = found[str(n)] = {}
        for name, root in _ROOTS.items():
            compiled = jax.jit(functools.partial(root, power=4))
            result = jax.block_until_ready(compiled(*given))
            taken = []
            for _ in range(turns):
                start = time.perf_counter()
                jax.block_until_ready(compiled(*given))
                taken.append(time.perf_counter() - start)
            off = np.linalg.norm(np.asarray(result, np.float64) - exact, axis=(-2, -1))
            row[f"{name}, ms"] = 1e3 * float(np.median(taken))
            row[f"{name}, error"] = float(np.max(off / np.linalg.norm(exact, axis=(-2, -1))))
    return found


@dataclasses.dataclass(frozen=True)
class WhitenConfig:
    """What is measured.

    Attributes:
      turns: Timed turns; 0 for FLOPs alone.
      large: Whether the networks that are timed are larger ones, for an accelerator.
      sizes: Of the matrices whose roots are timed.
      out: Where the numbers go, with their environment.
    """

    turns: CountOrZero = 0
    large: bool = False
    sizes: tuple[Count, ...] = (64, 128, 256, 512)
    out: pathlib.Path = pathlib.Path("results/whiten_cost.json")


def main(config: Annotated[WhitenConfig, tyro.conf.arg(name="")]) -> None:
    """Measure what whitening costs over SGD, and print tables."""
    # A table that is piped to a file need not fit a terminal.
    console = Console(width=None if sys.stdout.isatty() else 110)
    results: dict[str, Any] = {"flops": {}, "time": {}}

    def show(title: str, *columns: str) -> Table:
        result = Table(title=title, title_justify="left", box=box.SIMPLE)
        for at, column in enumerate(("", *columns)):
            result.add_column(column, justify="right" if at else "left", no_wrap=True)
        return result

    for name in () if config.large else PROBLEMS:
        results["flops"][name] = measured(name)
        shown = show(name, "FLOPs / SGD's")
        for label, ratio in measured(name).items():
            shown.add_row(label, f"{ratio:.2f}")
        console.print(shown)
    if config.turns:
        for name, problem in (LARGE if config.large else PROBLEMS).items():
            rows = results["time"][name] = timed(problem, config.turns)
            shown = show(name, "ms a step", "/ SGD's")
            for label, row in rows.items():
                ratio = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
                shown.add_row(label, f"{1e3 * row['seconds']:.3f}", ratio)
            console.print(shown)
        rows = results["roots"] = roots(config.sizes, config.turns)
        shown = show("Roots of 24 covariances", *next(iter(rows.values())))
        for n, row in rows.items():
            shown.add_row(f"{n} x {n}", *(f"{value:.3g}" for value in row.values()))
        console.print(shown)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps({"environment": environment(), "results": results}, indent=2))
    console.print(f"Numbers: {config.out}")
