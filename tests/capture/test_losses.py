"""Loss and gradient are those of `jax.value_and_grad` where the loss reduces over `params`."""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx, traverse_util
from jax.experimental.ode import odeint
from jax.flatten_util import ravel_pytree
from support.capture_checks import (
    FRAMEWORKS,
    PARAMS,
    X,
    assert_nothing_is_lost,
    assert_rows,
    mean_square,
    normal,
    plain,
    through_nnx,
)

OTHER = normal(1, 8, 3) - 1.0
ANCHOR = jax.tree.map(jnp.ones_like, PARAMS)


def leaves(p):
    return jax.tree.leaves(p)


def each(function, p):
    """The sum over the leaves."""
    return sum(map(function, leaves(p)))


def structured(f, p):
    if jax.tree.structure(p) != jax.tree.structure(ANCHOR):
        raise ValueError("other parameters than those of the checkpoint")
    return mean_square(f, p)


def by_path(f, p):
    """A decay that looks up a table by each leaf's path, as many training scripts have."""
    rates = {"kernel": 0.1, "bias": 0.0}
    decay = jax.tree_util.tree_map_with_path(lambda path, q: rates[path[-1].key] * jnp.sum(q**2), p)
    return mean_square(f, p) + each(jnp.sum, decay)


def projected(f, p):
    """A fixed random projection of all parameters: their number is part of the loss."""
    flat, unravel = ravel_pytree(p)
    return mean_square(f, unravel(flat)) + jnp.sum((normal(5, 4, 8) @ flat) ** 2)


# Penalties that reduce over `params`, or compare them with another tree. All take `X` once.
PENALTIES = {
    "mean over all entries": lambda f, p: mean_square(f, p) / each(lambda q: q.size, p),
    "mean over leaves": lambda f, p: mean_square(f, p) / len(leaves(p)),
    "number of dimensions": lambda f, p: mean_square(f, p) * each(lambda q: q.ndim, p),
    "mean L2": lambda f, p: mean_square(f, p) + each(lambda q: jnp.mean(q**2), p) / len(leaves(p)),
    "mean entry": lambda f, p: mean_square(f, p) + jnp.mean(ravel_pytree(p)[0]),
    "sum of exponentials": lambda f, p: mean_square(f, p) + each(lambda q: jnp.sum(jnp.exp(q)), p),
    "log-prior": lambda f, p: (
        mean_square(f, p)
        - each(lambda q: jnp.sum(jax.scipy.stats.norm.logpdf(q, 0.5, 2.0)), p) / 16
    ),
    "Laplace prior": lambda f, p: mean_square(f, p) + each(lambda q: jnp.sum(jnp.abs(q - 1)), p),
    "entropy of all entries": lambda f, p: (
        mean_square(f, p) + jax.scipy.special.logsumexp(ravel_pytree(p)[0])
    ),
    "largest entry": lambda f, p: mean_square(f, p) + jnp.max(ravel_pytree(p)[0]),
    "optax.tree.norm": lambda f, p: mean_square(f, p) + optax.tree.norm(p),
    "norms of leaves": lambda f, p: mean_square(f, p) + each(jnp.linalg.norm, p),
    "ravel_pytree": projected,
    "tree.map with another tree": lambda f, p: (
        mean_square(f, p) + each(lambda d: jnp.sum(d**2), jax.tree.map(operator.sub, p, ANCHOR))
    ),
    "tree.map with a table of rates": lambda f, p: (
        mean_square(f, p)
        + each(jnp.sum, jax.tree.map(lambda q, rate: rate * q**2, p, {"kernel": 1.0, "bias": 0.0}))
    ),
    "optax.tree.vdot": lambda f, p: mean_square(f, p) + optax.tree.vdot(p, ANCHOR),
    "equal structures": structured,
    "names of leaves": by_path,
    "flatten_dict": lambda f, p: mean_square(f, p) / len(traverse_util.flatten_dict(p)),
    "stacked with another tree": lambda f, p: mean_square(
        f, jax.tree.map(lambda q, r: jnp.stack([q, r])[0], p, ANCHOR)
    ),
}


# These change the kernel on its way to the inputs, or multiply it with something else too.
OTHER_USES = {"stacked with another tree", "ravel_pytree"}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("framework", ["linen", "plain"])
def test_a_loss_that_reduces_over_the_parameters(framework, name):
    f = FRAMEWORKS[framework]
    stats, _ = assert_nothing_is_lost(functools.partial(PENALTIES[name], f), PARAMS)
    if name not in OTHER_USES:
        # Nor does a penalty get into the statistics.
        assert_rows(stats["kernel"], X)
        assert stats["kernel"].layer.bias == "bias"


def gradient_of(f, p):
    return jax.grad(functools.partial(mean_square, f))(p)


def on_other(f, p):
    return jnp.mean((f(p, OTHER) - 1.0) ** 2)


def stepped(tx):
    """MAML: the loss after an inner step of `tx`."""

    def loss_fn(f, p):
        updates, _ = tx.update(gradient_of(f, p), tx.init(p), p)
        return on_other(f, optax.apply_updates(p, updates))

    return loss_fn


def sharpness(f, p):
    """SAM: the loss at the worst point nearby."""
    grads = gradient_of(f, p)
    scale = 0.05 / optax.tree.norm(grads)
    return mean_square(f, jax.tree.map(lambda q, g: q + scale * g, p, grads))


def trust_ratio(f, p):
    grads = gradient_of(f, p)
    return mean_square(f, p) * optax.tree.norm(p) / optax.tree.norm(grads)


def per_example(f, p):
    """The sum of the norms of per-example gradients, as for differential privacy."""
    one = lambda p, x: jnp.sum(f(p, x[None]) ** 2)  # noqa: E731
    grads = jax.vmap(jax.grad(one), (None, 0))(p, X)
    return mean_square(f, p) + jnp.mean(jax.vmap(optax.tree.norm)(grads))


def curvature(f, p):
    """vᵀHv along a fixed direction, forward over reverse."""
    loss = functools.partial(mean_square, f)
    return loss(p) + optax.tree.vdot(ANCHOR, jax.jvp(jax.grad(loss), (p,), (ANCHOR,))[1])


INNER = {
    "squared gradient": lambda f, p: (
        mean_square(f, p) + each(lambda g: jnp.sum(g**2), gradient_of(f, p))
    ),
    "norm of the gradient": lambda f, p: mean_square(f, p) + optax.tree.norm(gradient_of(f, p)),
    "entries of the gradient": lambda f, p: (
        mean_square(f, p) + ravel_pytree(gradient_of(f, p))[0] @ jnp.arange(8.0)
    ),
    "trust ratio": trust_ratio,
    "MAML": stepped(optax.sgd(0.1)),
    "MAML, clipped": stepped(optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))),
    "MAML, normalized": stepped(optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1))),
    "MAML, Adam": stepped(optax.adam(0.1, eps=1e-3)),
    "SAM": sharpness,
    "gradients by example": per_example,
    "Hessian-vector product": curvature,
}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("framework", ["linen", "plain"])
def test_a_loss_that_uses_an_inner_gradient(framework, name):
    assert_nothing_is_lost(functools.partial(INNER[name], FRAMEWORKS[framework]), PARAMS)


def test_an_inner_gradient_of_an_nnx_model():
    params = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    loss_fn = functools.partial(INNER["MAML, clipped"], through_nnx)
    assert_nothing_is_lost(loss_fn, params)


@pytest.mark.parametrize("framework", ["linen", "plain"])
def test_an_adaptive_adjoint_takes_the_steps_that_it_takes_alone(framework):
    """`odeint` chooses the steps of its adjoint by the error of all cotangents together."""
    field = {"linen": lambda p, z: nn.Dense(3).apply({"params": p}, z), "plain": plain}[framework]

    def loss_fn(p):
        flow = lambda y, t, p: jnp.tanh(field(p, y)) - y  # noqa: E731
        end = odeint(flow, X, jnp.array([0.0, 1.0]), p["field"], rtol=1e-4, atol=1e-4)[1]
        return jnp.mean(FRAMEWORKS[framework](p["head"], end) ** 2)

    params = {"field": {"kernel": normal(4, 3, 3), "bias": normal(5, 3)}, "head": PARAMS}
    stats, reasons = assert_nothing_is_lost(loss_fn, params)
    assert "field/kernel" in stats or "while" in reasons["field/kernel"]
    assert stats["head/kernel"].count == 16
