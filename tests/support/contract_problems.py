"""The transformations of the library, problems to run them on, and how to compare runs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax import BNPState, WhitenState, bnp, bnp_precondition, in_zspace, precondition

N_STEPS = 3

READY_MADE: dict[str, Callable[[Any], Any]] = {
    "bnp_sgd": bnp_optax.bnp_sgd,
    "bnp_sgd_momentum": functools.partial(bnp_optax.bnp_sgd, momentum=0.9),
    "bnp_adam": bnp_optax.bnp_adam,
    "bnp_adamw": bnp_optax.bnp_adamw,
    "adam_l1": functools.partial(bnp_optax.adam_l1, l1=0.1),
    "whiten_adam": bnp_optax.whiten_adam,
    "whiten_muon": bnp_optax.whiten_muon,
}


def regularized_by_hand(strength: float) -> optax.GradientTransformation:
    """Gradient regularization of `bare_loss`, whose Hessian is 2 / size in each leaf."""

    def update(grads: Any, params: Any) -> Any:
        return jax.tree.map(lambda g: (1.0 + 4.0 * strength / g.size) * g, grads)

    return optax.stateless(update)


def thresholded(updates: Any, params: Any, threshold: Any) -> Any:
    """`updates` that end at the soft threshold of where they led, kernels only."""

    def end(path: Any, u: jax.Array, p: jax.Array, t: Any) -> jax.Array:
        is_kernel = p.ndim >= 2 and "bias" not in jax.tree_util.keystr(path)
        x = p + u
        return jnp.sign(x) * jnp.maximum(jnp.abs(x) - t, 0.0) - p if is_kernel else u

    return jax.tree.map_with_path(end, updates, params, threshold)


def sgd_l1_by_hand(learning_rate: float, l1: float) -> optax.GradientTransformation:
    def update(grads: Any, params: Any) -> Any:
        steps = optax.tree.scale(-learning_rate, grads)
        return thresholded(steps, params, optax.tree.full_like(params, l1 * learning_rate))

    return optax.stateless(update)


def adam_l1_by_hand(learning_rate: float, l1: float) -> optax.GradientTransformation:
    """Adam, and then the soft threshold at l1 * learning_rate * P_ii."""
    adam = optax.adam(learning_rate)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(grads, state, params)
        rest = 1.0 - 0.999 ** state[0].count
        threshold = jax.tree.map(
            lambda v: l1 * learning_rate / jnp.sqrt(jnp.sqrt(v / rest) + 1e-8), state[0].nu
        )
        return thresholded(updates, params, threshold), state

    return optax.GradientTransformation(adam.init, update)


def forward_regularization(strength: Any) -> optax.GradientTransformationExtraArgs:
    """With a distance that rounding does not swallow; on a quadratic any is exact."""
    return bnp_optax.gradient_regularization(strength, mode="forward", radius=0.5)


def regularization_in_z(strength: Any) -> optax.GradientTransformationExtraArgs:
    return bnp_optax.zspace_grad_reg(strength, bnp())


def sgd_l1(strength: Any = 0.5, learning_rate: Any = 0.1) -> optax.GradientTransformationExtraArgs:
    """`proximal_l1` in its place, last."""
    return optax.chain(optax.sgd(learning_rate), bnp_optax.proximal_l1(strength, learning_rate))


# Each transformation, and what it is where there is no layer to precondition.
TRANSFORMATIONS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "bnp_precondition": (bnp_precondition, optax.identity),
    "precondition": (lambda: precondition(bnp()), optax.identity),
    "in_zspace": (lambda: in_zspace(optax.adam(1e-3), bnp()), lambda: optax.adam(1e-3)),
    "zspace_weight_decay": (
        lambda: bnp_optax.zspace_weight_decay(0.01),
        lambda: optax.add_decayed_weights(0.01),
    ),
    "pspace_weight_decay": (
        lambda: bnp_optax.pspace_weight_decay(0.01),
        lambda: optax.add_decayed_weights(0.01),
    ),
    "bnp_sgd": (lambda: READY_MADE["bnp_sgd"](0.1), lambda: optax.sgd(0.1)),
    "bnp_sgd_momentum": (
        lambda: READY_MADE["bnp_sgd_momentum"](0.1),
        lambda: optax.sgd(0.1, momentum=0.9),
    ),
    "bnp_adam": (lambda: READY_MADE["bnp_adam"](1e-3), lambda: optax.adam(1e-3)),
    "bnp_adamw": (lambda: READY_MADE["bnp_adamw"](1e-3), lambda: optax.adamw(1e-3)),
    "precondition_whiten": (
        lambda: precondition(bnp_optax.whiten(refresh_every=2)),
        optax.identity,
    ),
    "whiten_adam": (lambda: READY_MADE["whiten_adam"](0.03), lambda: optax.adam(0.03)),
    "whiten_muon": (
        lambda: READY_MADE["whiten_muon"](0.003),
        lambda: optax.adam(0.003, nesterov=True),
    ),
    "orthogonalize": (
        bnp_optax.orthogonalize,
        lambda: optax.scale_by_adam(nesterov=True),
    ),
    "gradient_regularization": (
        lambda: bnp_optax.gradient_regularization(0.1),
        lambda: regularized_by_hand(0.1),
    ),
    "gradient_regularization_forward": (
        lambda: forward_regularization(0.1),
        lambda: regularized_by_hand(0.1),
    ),
    "zspace_grad_reg": (lambda: regularization_in_z(0.1), lambda: regularized_by_hand(0.1)),
    "in_zspace_grad_reg": (
        lambda: in_zspace(
            optax.chain(bnp_optax.gradient_regularization(0.1), optax.sgd(0.1)), bnp()
        ),
        lambda: optax.chain(regularized_by_hand(0.1), optax.sgd(0.1)),
    ),
    "in_zspace_proximal_l1": (
        lambda: in_zspace(sgd_l1(), bnp()),
        lambda: sgd_l1_by_hand(0.1, 0.5),
    ),
    "proximal_l1": (sgd_l1, lambda: sgd_l1_by_hand(0.1, 0.5)),
    "adam_l1": (lambda: READY_MADE["adam_l1"](0.1), lambda: adam_l1_by_hand(0.1, 0.1)),
    "precondition_rms": (
        lambda: precondition(bnp_optax.rms()),
        lambda: optax.scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True),
    ),
    "precondition_adagrad": (
        lambda: precondition(bnp_optax.adagrad()),
        optax.scale_by_rss,
    ),
}
# Those that take the Hessian from `grad_fn`.
REGULARIZING = (
    "gradient_regularization",
    "gradient_regularization_forward",
    "zspace_grad_reg",
    "in_zspace_grad_reg",
)
# Those that look at each leaf alone, in a layer or not.
LEAFWISE = (
    "zspace_weight_decay",
    "pspace_weight_decay",
    "proximal_l1",
    "adam_l1",
    "precondition_rms",
    "precondition_adagrad",
)
# Those that precondition layers, from `layer_stats`.
PRECONDITIONING = [
    name
    for name in TRANSFORMATIONS
    if name not in (*LEAFWISE, "orthogonalize") and not name.startswith("gradient_regularization")
]


def make(name: str) -> optax.GradientTransformationExtraArgs:
    return TRANSFORMATIONS[name][0]()


def counterpart(name: str) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(TRANSFORMATIONS[name][1]())


def descent(name: str) -> optax.GradientTransformationExtraArgs:
    """The transformation, followed by a step downhill where it does not take one."""
    tx = make(name)
    steps = name in (*READY_MADE, "proximal_l1") or name.startswith("in_zspace")
    return tx if steps else optax.chain(tx, optax.scale(-0.1))


class Net(nn.Module):
    """Convolutions and dense layers, with a bias and without; of few shapes, to compile fast."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.tanh(nn.Conv(3, (2, 2))(x))
        x = nn.tanh(nn.Conv(3, (2, 2), use_bias=False)(x))
        x = nn.tanh(nn.Dense(3, use_bias=False)(x.mean((1, 2))))
        return nn.Dense(3)(x)


def net_loss(params: Any, batch: jax.Array) -> jax.Array:
    return jnp.mean((Net().apply({"params": params}, batch) - 1.0) ** 2)


def bare_loss(params: Any, batch: jax.Array) -> jax.Array:
    return sum(jnp.mean((leaf - batch.mean()) ** 2) for leaf in jax.tree.leaves(params))


def filled(part: Any, whole: Any) -> Any:
    """`part`, with what `whole` has where it has nothing, or a mask."""
    if part is None or isinstance(part, optax.MaskedNode):
        return whole
    if isinstance(whole, dict):
        return {key: filled(part.get(key), leaf) for key, leaf in whole.items()}
    return part


def cut(whole: Any, part: Any) -> Any:
    """That of `whole` which `part` has."""
    if isinstance(part, optax.MaskedNode):
        return part
    if isinstance(part, dict):
        return {key: cut(whole[key], leaf) for key, leaf in part.items()}
    return whole


class Problem(NamedTuple):
    """Parameters, batches, and the gradient and extra arguments of a step.

    The extra arguments are the layers' statistics, if there are layers, and `grad_fn`. Given a part
    of the parameters, that holds the others where they are.
    """

    params: Any
    batches: jax.Array
    evaluate: Callable[[Any, jax.Array], tuple[Any, dict[str, Any]]]
    steps: list[tuple[Any, dict[str, Any]]]


@functools.cache
def problem_of(kind: str) -> Problem:
    # Compiling is what takes time here: `evaluate` is compiled once, and transformations run
    # op by op except where a test is about `jax.jit`.
    batches = 2.0 + jax.random.normal(jax.random.key(0), (N_STEPS, 8, 2, 2, 3), jnp.float32)
    if kind == "net":
        params = Net().init(jax.random.key(1), batches[0])["params"]

        compiled = jax.jit(bnp_optax.value_and_grad(net_loss, second_moments=True))
        gradient = jax.jit(jax.grad(net_loss))

        def evaluate(params: Any, batch: jax.Array) -> tuple[Any, dict[str, Any]]:
            def grad_fn(part: Any) -> Any:
                return cut(gradient(filled(part, params), batch), part)

            _, grads, stats = compiled(params, batch)
            return grads, {"layer_stats": stats, "grad_fn": grad_fn}
    else:
        array = jnp.array([0.5, -1.0, 2.0], jnp.float32)
        matrix = jnp.array([[1.0, -2.0], [0.5, 3.0]], jnp.float32)
        params = {"array": array, "tuple": (array, matrix)}[kind]

        gradient = jax.jit(jax.grad(bare_loss))

        def evaluate(params: Any, batch: jax.Array) -> tuple[Any, dict[str, Any]]:
            grad_fn = functools.partial(gradient, batch=batch)
            return grad_fn(params), {"grad_fn": grad_fn}

    steps = [evaluate(params, batch) for batch in batches]
    return Problem(params, batches, evaluate, steps)


# What holds of another one holds of these: `bnp_sgd`, `bnp_adam` and `whiten_adam`.
_LIKE_ANOTHER = ("bnp_sgd_momentum", "bnp_adamw", "precondition_whiten", "whiten_muon")


def _marked(name: str, *values: str) -> Any:
    marks = pytest.mark.slow if name in _LIKE_ANOTHER else ()
    return pytest.param(name, *values, marks=marks)


def on_problems(*kinds: str) -> pytest.MarkDecorator:
    """Each transformation on each kind of problem, where the kind can matter to it."""
    cases = [
        _marked(name, kind)
        for name in TRANSFORMATIONS
        for kind in kinds
        if kind != "net" or name not in LEAFWISE or name.endswith("weight_decay")
    ]
    return pytest.mark.parametrize(("name", "kind"), cases)


on_every_transformation = pytest.mark.parametrize(
    "name", [_marked(name) for name in TRANSFORMATIONS]
)
on_every_problem = on_problems("array", "tuple", "net")
on_every_tree = on_problems("tuple", "net")


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, two in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float64), np.asarray(two, np.float64), rtol=rtol, atol=atol
        )


def assert_same(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, rtol=0.0, atol=0.0)


def avals(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def run(tx: Any, problem: Problem, extra: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """Updates and state of `N_STEPS` updates, all at the same parameters."""
    state, all_updates = tx.init(problem.params), []
    for grads, given in problem.steps:
        updates, state = tx.update(grads, state, problem.params, **given, **(extra or {}))
        all_updates.append(updates)
    return all_updates, state


def bnp_states(state: Any) -> list[BNPState | WhitenState]:
    kinds = BNPState | WhitenState
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]


def seen(state: Any) -> set[float]:
    """How many batches the layers of `Net` have seen."""
    (found,) = bnp_states(state)
    return {float(numbers[1]) for numbers in jax.tree.leaves(found.numbers)}


def training_step(tx: Any, problem: Problem) -> Callable[..., Any]:
    def step(carry: tuple[Any, Any], batch: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        grads, extra = problem.evaluate(params, batch)
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    return step
