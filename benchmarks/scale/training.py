"""What is trained on many devices: a small network, its batches, optimizers, and a training step.

All modes of `benchmarks.scale.modes` start from the same parameters and see the same batches, so
that each must end where one device does.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax

STEPS, BATCH = 10, 64
# At Adam's usual 1e-8, an entry of a gradient that is 0 but for rounding moves by a whole learning
# rate, in float32 on one device (7e-5 from float64) as on many.
EPS = 1e-3
WIDTHS = (16, 32, 32, 8)

Dense = Callable[[int, Any, jax.Array], jax.Array]
Loss = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer of this library, and what it is without preconditioning.

    Attributes:
      make: The optimizer.
      plain: The same without statistics.
      needs_grad_fn: Whether `update` takes the gradient as a function.
      second_moments: Whether it takes second moments of the inputs.
    """

    make: Callable[[], optax.GradientTransformationExtraArgs]
    plain: Callable[[], optax.GradientTransformation]
    needs_grad_fn: bool = False
    second_moments: bool = False


@dataclasses.dataclass
class PlacedTraining:
    """A compiled step, and where training starts.

    Attributes:
      step: `(carry, x, y) -> carry`, jitted.
      carry: Parameters and the optimizer's state.
      place: Puts a batch where the step wants it.
      params: Parameters of a carry, in the order of `initial`.
      context: What the step is called in.
    """

    step: Any
    carry: Any
    place: Callable[[jax.Array], jax.Array] = jnp.asarray
    params: Callable[[Any], Any] = lambda carry: carry[0]
    context: Callable[[], Any] = contextlib.nullcontext


def initial() -> dict[str, dict[str, np.ndarray]]:
    """Parameters to start from."""
    r = np.random.default_rng(0)

    def layer(n: int, m: int) -> dict[str, np.ndarray]:
        kernel, bias = r.normal(size=(n, m)) / np.sqrt(n), r.normal(size=m) / 2
        return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}

    return {f"Dense_{i}": layer(n, m) for i, (n, m) in enumerate(pairwise(WIDTHS))}


def batches() -> tuple[np.ndarray, np.ndarray]:
    """Badly scaled inputs and targets, one batch for each step."""
    r = np.random.default_rng(1)
    x = r.normal(size=(STEPS, BATCH, WIDTHS[0])) * np.linspace(0.5, 3.0, WIDTHS[0]) + 1.0
    y = r.normal(size=(STEPS, BATCH, WIDTHS[-1]))
    return x.astype(np.float32), y.astype(np.float32)


def _bnp() -> bnp_optax.Preconditioner:
    return bnp_optax.bnp(batch_size=BATCH)


def _regularized() -> optax.GradientTransformationExtraArgs:
    first = bnp_optax.zspace_grad_reg(0.01, _bnp())
    return optax.chain(first, bnp_optax.precondition(_bnp()), optax.sgd(0.1))


OPTIMIZERS: dict[str, Optimizer] = {
    "bnp_sgd": Optimizer(
        lambda: bnp_optax.bnp_sgd(0.1, momentum=0.9, batch_size=BATCH),
        lambda: optax.sgd(0.1, momentum=0.9),
    ),
    "bnp_adam": Optimizer(
        lambda: bnp_optax.bnp_adam(eps=EPS, batch_size=BATCH),
        lambda: optax.adam(3e-3, eps=EPS),
    ),
    "muon in z": Optimizer(
        lambda: bnp_optax.in_zspace(_muon(), _bnp()),
        lambda: _muon(),
    ),
    "zspace_grad_reg": Optimizer(
        _regularized,
        lambda: optax.chain(bnp_optax.gradient_regularization(0.01), optax.sgd(0.1)),
        needs_grad_fn=True,
    ),
    "whiten_muon": Optimizer(
        bnp_optax.whiten_muon,
        bnp_optax.orthogonalize,
        second_moments=True,
    ),
    "whiten_adam": Optimizer(
        lambda: bnp_optax.whiten_adam(eps=EPS),
        lambda: optax.adam(3e-3, eps=EPS),
        second_moments=True,
    ),
}


def _muon() -> optax.GradientTransformation:
    return in_auto_axes(optax.contrib.muon(1e-2))


def in_auto_axes(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with axes of explicit meshes left to the compiler.

    Muon multiplies matrices along both of their axes, and says nothing of shardings.
    """

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
        names = {n for s in jax.tree.leaves(shardings) for n in s.spec if n is not None}
        if not names:
            return inner.update(updates, state, params)
        automatic: Any = jax.sharding.auto_axes(inner.update, out_sharding=shardings)
        return automatic(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def forward(params: Any, x: jax.Array, dense: Dense) -> jax.Array:
    """The network, with `dense(i, layer, x)` for its layers."""
    last = len(WIDTHS) - 2
    for i in range(last):
        x = jnp.tanh(dense(i, params[f"Dense_{i}"], x))
    return dense(last, params[f"Dense_{last}"], x)


def plain_dense(i: int, layer: Any, x: jax.Array) -> jax.Array:
    """A dense layer."""
    del i
    return x @ layer["kernel"] + layer["bias"][None]


def loss_of(dense: Dense = plain_dense) -> Loss:
    """The mean squared error of the network."""
    return lambda params, x, y: jnp.mean((forward(params, x, dense) - y) ** 2)


def _same(x: Any) -> Any:
    return x


def make_step(
    method: Optimizer,
    is_plain: bool,
    loss: Loss,
    average: Callable[[Any], Any] = _same,
    average_grads: Callable[[Any], Any] = _same,
) -> tuple[optax.GradientTransformationExtraArgs, Any]:
    """The optimizer and a training step.

    Args:
      method: The optimizer.
      is_plain: Whether to leave preconditioning out.
      loss: `loss(params, x, y)`.
      average: Averages statistics over devices.
      average_grads: Averages gradients over devices.
    """
    tx = optax.with_extra_args_support(method.plain() if is_plain else method.make())

    def step(carry: Any, x: jax.Array, y: jax.Array) -> Any:
        params, state = carry
        gradient = jax.grad(loss)
        extra: dict[str, Any] = {}
        if is_plain:
            grads = gradient(params, x, y)
        else:
            capture = bnp_optax.value_and_grad(loss, second_moments=method.second_moments)
            _, grads, stats = capture(params, x, y)
            extra["layer_stats"] = average(stats)
        if method.needs_grad_fn:
            extra["grad_fn"] = lambda p: average_grads(gradient(p, x, y))
        updates, state = tx.update(average_grads(grads), state, params, **extra)
        return optax.apply_updates(params, updates), state

    return tx, step


def one_device(method: Optimizer, is_plain: bool = False) -> PlacedTraining:
    """What all modes are compared with."""
    tx, step = make_step(method, is_plain, loss_of())
    params = jax.tree.map(jnp.asarray, initial())
    return PlacedTraining(jax.jit(step), (params, tx.init(params)))


def train(training: PlacedTraining) -> Any:
    """The parameters after all steps, as leaves."""
    carry = training.carry
    with training.context():
        for x, y in zip(*batches(), strict=True):
            carry = training.step(carry, training.place(x), training.place(y))
    training.carry = carry
    return [np.asarray(leaf) for leaf in jax.tree.leaves(training.params(carry))]


@functools.cache
def reference(name: str) -> Any:
    """The parameters that one device ends with."""
    return train(one_device(OPTIMIZERS[name]))


def error(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest entry of the parameter."""
    return max(
        float(np.max(np.abs(a.astype(np.float64) - b)) / np.max(np.abs(b)))
        for a, b in zip(found, expected, strict=True)
    )
