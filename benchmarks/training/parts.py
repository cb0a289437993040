"""The parts of a training run: its start, its batches, one step of any method, its evaluation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import bnp_optax
from benchmarks.training.methods import Layers, Method

# (outputs, y) -> loss of each example.
Losses = Callable[[Any, Any], Any]

_EVALUATION_CHUNK = 500
# The newer code generator of XLA's CPU compiler takes about twice as long over programs of many
# small operations, and what it gains in the run does not make up for it.
_CPU_OPTIONS: dict[str, str | bool] = {"xla_cpu_use_fusion_emitters": False}


class Carry(NamedTuple):
    """What a training run carries from step to step.

    Attributes:
      params: Parameters of the network.
      model_state: Its other collections, the running averages of batch normalization.
      opt_state: State of the optimizer.
    """

    params: Any
    model_state: Any
    opt_state: Any


def init_variables(model: nn.Module, x: Float[Array, "1 *d"], seeds: Sequence[Any]) -> list[Any]:
    """Initial variables of `model`, one per seed.

    With the random generator that XLA brings along: it takes seconds to compile JAX's own.
    """
    init = jax.jit(model.init)
    return [init(jax.random.key(seed, impl="rbg"), x) for seed in seeds]


def batch_indices(
    n: int, batch_size: int, steps: int, points: int, seed: int
) -> Int[np.ndarray, "points steps_per_point batch_size"]:
    """Which of `n` examples each step sees: whole epochs, each shuffled anew."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch_size // n)
    order = np.concatenate([rng.permutation(n) for _ in range(epochs)]).astype(np.int32)
    return order[: steps * batch_size].reshape(points, steps // points, batch_size)


def make_loss(
    model: nn.Module, losses: Losses = optax.softmax_cross_entropy_with_integer_labels
) -> Callable[..., tuple[Array, Any]]:
    """`loss(params, model_state, x, y) -> (mean loss, new model_state)`, training mode."""

    def loss_fn(params: Any, model_state: Any, x: Array, y: Array) -> tuple[Array, Any]:
        variables = {"params": params, **model_state}
        outputs, new_state = model.apply(variables, x, train=True, mutable=list(model_state))
        return jnp.mean(losses(outputs, y)), new_state

    return loss_fn


def find_layers(
    model: nn.Module,
    method: Method,
    variables: Any,
    x: Array,
    y: Array,
    losses: Losses = optax.softmax_cross_entropy_with_integer_labels,
) -> Layers | None:
    """The layers that `method` preconditions on batches like (x, y); None if it does not."""
    if not method.needs_stats:
        return None
    params, model_state = _split(variables)
    loss_fn = make_loss(model, losses)
    return bnp_optax.find_layers(loss_fn, params, model_state, x, y, embeddings=method.embeddings)


def make_step(
    model: nn.Module,
    method: Method,
    layers: Layers | None,
    losses: Losses = optax.softmax_cross_entropy_with_integer_labels,
    fixed: Any = None,
) -> Callable[[Any, Carry, Array, Array], tuple[Carry, Array]]:
    """`step(rate, carry, x, y) -> (new carry, loss of the batch)`; `rate` may be traced.

    `fixed` are the statistics that a training from z holds.
    """
    loss_fn = make_loss(model, losses)
    options = {} if fixed is None else {"fixed": fixed}

    def gradient(*args: Any) -> tuple[Any, Any, dict[str, Any]]:
        if method.needs_stats:
            with_stats = bnp_optax.value_and_grad(
                loss_fn,
                has_aux=True,
                layers=layers,
                embeddings=method.embeddings,
                second_moments=method.second_moments,
                **options,
            )
            value, grads, stats = with_stats(*args)
            return value, grads, {"layer_stats": stats}
        return *jax.value_and_grad(loss_fn, has_aux=True)(*args), {}

    def step(rate: Any, carry: Carry, x: Array, y: Array) -> tuple[Carry, Array]:
        params, model_state, opt_state = carry
        (loss, model_state), grads, extra = gradient(params, model_state, x, y)
        tx = optax.with_extra_args_support(method.make(rate, layers, **options))
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return Carry(optax.apply_updates(params, updates), model_state, opt_state), loss

    return step


def init_carry(method: Method, layers: Layers | None, variables: Any) -> Carry:
    """The start of a run."""
    params, model_state = _split(variables)
    return Carry(params, model_state, method.make(1.0, layers).init(params))


def evaluate(
    model: nn.Module, carry: Carry, x: Float[Array, "n *d"], y: Int[Array, " n"]
) -> tuple[Float[Array, " n"], Bool[Array, " n"]]:
    """Cross-entropy of each example, and whether it is classified rightly; evaluation mode."""

    def judge(x: Array, y: Array) -> tuple[Array, Array]:
        logits: Any = model.apply({"params": carry.params, **carry.model_state}, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses, jnp.argmax(logits, axis=-1) == y

    # The activations of many images at once, and of many runs, would fill the memory.
    n_chunks = -(-len(y) // _EVALUATION_CHUNK)
    if n_chunks == 1 or len(y) % n_chunks:
        return judge(x, y)
    chunks = (x.reshape(n_chunks, -1, *x.shape[1:]), y.reshape(n_chunks, -1))
    losses, hits = lax.map(lambda chunk: judge(*chunk), chunks)
    return losses.reshape(-1), hits.reshape(-1)


def compile_many(lowered: Any) -> Any:
    """A compiled program of many runs side by side."""
    if jax.default_backend() == "cpu":
        try:
            return lowered.compile(compiler_options=_CPU_OPTIONS)
        except jax.errors.JaxRuntimeError:  # A jaxlib that does not know the option.
            pass
    return lowered.compile()


def _split(variables: Any) -> tuple[Any, Any]:
    model_state = dict(variables)
    return model_state.pop("params"), model_state
