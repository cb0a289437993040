"""What the cost is compared of: networks, methods, and the training steps of a method."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

import bnp_optax
from benchmarks.networks.small import MLP, Norm

# Parameters, optimizer state and running averages of the network.
Carry = tuple[Any, Any, Any]
Step = Callable[[Carry, Array, Array], tuple[Carry, Array]]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A fully connected network and a batch size.

    Attributes:
      sizes: Widths of input, hidden layers and output.
      batch_size: Examples of a step.
      paper: Seconds of an epoch with BN and with BNP in Table 1 of the JMLR paper, or None.
    """

    sizes: tuple[int, ...]
    batch_size: int
    paper: tuple[float, float] | None = None

    def __str__(self) -> str:
        """Sizes and batch size, as in `784-512-10, batch 256`."""
        return f"{'-'.join(map(str, self.sizes))}, batch {self.batch_size}"


PROBLEMS = (
    Workload((3072, 100, 100, 10), 16, paper=(16.08, 16.69)),
    Workload((3072, 100, 100, 10), 256, paper=(10.81, 10.70)),
    Workload((3072, 100, 100, 10), 512, paper=(10.67, 10.57)),
    Workload((784, 512, 512, 512, 10), 256),
)
# For trials of the benchmark itself; it stands in for the paper's network.
QUICK_PROBLEMS = (Workload((48, 12, 4), 8, paper=(16.08, 16.69)),)


@dataclasses.dataclass(frozen=True)
class CostMethod:
    """A way to train.

    Attributes:
      tx: The optimizer. Its learning rate matters only in that training neither stops nor diverges.
      norm: Normalization after each hidden activation.
      captured: Whether the optimizer takes statistics of the layers' inputs.
      sample_rows: Rows of the batch that statistics are taken from; None for all.
      fixed: Whether those of the input layer come from one pass over the data before training.
      every: Statistics are captured in one step of so many; in between, P stays as it is.
      twice: Whether the optimizer takes a second gradient of the same batch.
    """

    tx: optax.GradientTransformation
    norm: Norm = "none"
    captured: bool = False
    sample_rows: int | None = None
    fixed: bool = False
    every: int = 1
    twice: bool = False


_SAM = optax.contrib.sam(
    optax.sgd(0.01), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), opaque_mode=True
)
_BNP = bnp_optax.bnp_sgd(0.01)

SGD, BATCH_NORM, BNP = "SGD", "BatchNorm + SGD", "BNP + SGD"
METHODS: dict[str, CostMethod] = {
    SGD: CostMethod(optax.sgd(0.01)),
    "momentum": CostMethod(optax.sgd(0.01, momentum=0.9)),
    "Adam": CostMethod(optax.adam(1e-3)),
    "Muon": CostMethod(optax.contrib.muon(1e-3)),
    "SAM": CostMethod(_SAM, twice=True),
    BATCH_NORM: CostMethod(optax.sgd(0.01), norm="batch"),
    "LayerNorm + SGD": CostMethod(optax.sgd(0.01), norm="layer"),
    "GroupNorm + SGD": CostMethod(optax.sgd(0.01), norm="group"),
    BNP: CostMethod(_BNP, captured=True),
    "BNP, 64 rows": CostMethod(_BNP, captured=True, sample_rows=64),
    "BNP, input fixed": CostMethod(_BNP, captured=True, fixed=True),
    "BNP, fixed, 64 rows": CostMethod(_BNP, captured=True, sample_rows=64, fixed=True),
    "BNP, every 10th": CostMethod(_BNP, captured=True, every=10),
    "Adam in z": CostMethod(bnp_optax.bnp_adam(1e-3), captured=True),
}
BNP_METHODS = tuple(name for name in METHODS if name.startswith("BNP"))


class Examples(NamedTuple):
    """Examples for one pass of training, on the device.

    Attributes:
      x: Inputs, standard normal.
      y: Classes, at random.
      indices: The batches of the pass, shuffled.
    """

    x: Float[Array, "examples d"]
    y: Int[Array, "examples"]
    indices: Int[Array, "steps batch_size"]


def make_data(problem: Workload, examples: int) -> Examples:
    """At least `examples` examples, and more where that makes no whole number of ten batches.

    So many, a method that captures in every tenth step ends a pass with a whole period.
    """
    steps = -(-examples // (10 * problem.batch_size)) * 10
    rng = np.random.default_rng(0)
    n = steps * problem.batch_size
    return Examples(
        x=jnp.asarray(rng.standard_normal((n, problem.sizes[0]), np.float32)),
        y=jnp.asarray(rng.integers(problem.sizes[-1], size=n)),
        indices=jnp.asarray(rng.permutation(n).reshape(steps, problem.batch_size)),
    )


@dataclasses.dataclass(frozen=True)
class TrainingSteps:
    """How a method trains a network.

    Attributes:
      carry: Where it starts.
      step: A step, with statistics captured if the method does so at all.
      stale: The steps between those that capture; None if every step is the same.
      every: One step of so many is `step`.
    """

    carry: Carry
    step: Step
    stale: Step | None
    every: int

    @property
    def parts(self) -> list[tuple[Step, float]]:
        """The distinct steps, and the share of each in training."""
        if self.stale is None:
            return [(self.step, 1.0)]
        return [(self.step, 1 / self.every), (self.stale, 1 - 1 / self.every)]

    def one_pass(self, carry: Carry, data: Examples) -> tuple[Carry, Array]:
        """All of the steps of `data.indices`, to compile as one; returns a mean loss as well."""

        def one(step: Step) -> Callable[[Carry, Array], tuple[Carry, Array]]:
            return lambda carry, index: step(carry, data.x[index], data.y[index])

        def period(carry: Carry, indices: Array) -> tuple[Carry, Array]:
            carry, loss = one(self.step)(carry, indices[0])
            if self.stale is not None:
                carry, _ = lax.scan(one(self.stale), carry, indices[1:])
            return carry, loss

        periods = data.indices.reshape(-1, self.every, data.indices.shape[-1])
        carry, losses = lax.scan(period, carry, periods)
        return carry, losses.mean()


def _network(problem: Workload, norm: Norm) -> MLP:
    return MLP(problem.sizes[1:-1], problem.sizes[-1], norm)


@functools.cache
def _variables(problem: Workload, norm: Norm) -> dict[str, Any]:
    """Where training starts, in NumPy: steps give their buffers away, so each method copies."""
    init = jax.jit(functools.partial(_network(problem, norm).init, train=True))
    return jax.device_get(init(jax.random.key(0), jnp.zeros((1, problem.sizes[0]))))


def make_training(problem: Workload, method: CostMethod, data: Examples) -> TrainingSteps:
    """The steps of a method, not compiled yet, and a state of its own to start from."""
    model = _network(problem, method.norm)
    tx = optax.with_extra_args_support(method.tx)
    state = jax.tree.map(jnp.array, _variables(problem, method.norm))
    params = state.pop("params")

    def loss_fn(params: Any, state: Any, x: Array, y: Array) -> tuple[Array, Any]:
        variables = {"params": params, **state}
        logits, state = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state

    fixed = None
    if method.fixed:
        x, y, indices = jax.device_get(data)
        batches = [(state, x[index], y[index]) for index in indices]
        fixed = bnp_optax.dataset_statistics(lambda *args: loss_fn(*args)[0], params, batches)
    capture = bnp_optax.value_and_grad(
        loss_fn, has_aux=True, sample_rows=method.sample_rows, fixed=fixed
    )

    def make_step(captured: bool) -> Step:
        def step(carry: Carry, x: Array, y: Array) -> tuple[Carry, Array]:
            params, opt_state, state = carry
            extra: dict[str, Any] = {}
            if captured:
                (loss, new_state), grads, stats = capture(params, state, x, y)
                extra["layer_stats"] = stats
            else:
                plain = jax.value_and_grad(loss_fn, has_aux=True)
                (loss, new_state), grads = plain(params, state, x, y)
                if method.captured:
                    extra["layer_stats"] = None
            if method.twice:
                grad_fn = jax.grad(loss_fn, has_aux=True)
                extra["grad_fn"] = lambda p, _: grad_fn(p, state, x, y)[0]
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
            return (optax.apply_updates(params, updates), opt_state, new_state), loss

        return step

    return TrainingSteps(
        carry=(params, tx.init(params), state),
        step=make_step(method.captured),
        stale=make_step(captured=False) if method.every > 1 else None,
        every=method.every,
    )
