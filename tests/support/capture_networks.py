"""Networks of two layers in every framework, and losses of their derivatives by the inputs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import jet

from support.capture_checks import (
    assert_covered_or_said,
    assert_nothing_is_lost,
    assert_rows,
    normal,
)

X = normal(0, 16, 3) + 0.5


class Network(NamedTuple):
    """A network of two layers, from a row to a scalar."""

    params: Any
    hidden: Callable[..., Any]
    head: Callable[..., Any]
    kernels: tuple[str, str]

    def __call__(self, p, row):
        return self.head(p, self.hidden(p, row))[0]

    def rows(self, x):
        return x, jax.vmap(functools.partial(self.hidden, self.params))(x)


class TwoLayers(nn.Module):
    use_bias: bool = True

    def setup(self):
        self.first = nn.Dense(5, use_bias=self.use_bias)
        self.second = nn.Dense(1, use_bias=self.use_bias)

    def hidden(self, x):
        return jnp.tanh(self.first(x))

    def head(self, h):
        return self.second(h)

    def __call__(self, x):
        return self.head(self.hidden(x))


def linen(use_bias):
    model = TwoLayers(use_bias)
    params = model.init(jax.random.key(0), X)["params"]
    if use_bias:
        params["first"]["bias"] = normal(7, 5)
    return Network(
        params,
        lambda p, x: model.apply({"params": p}, x, method="hidden"),
        lambda p, h: model.apply({"params": p}, h, method="head"),
        ("first/kernel", "second/kernel"),
    )


def plain(use_bias):
    params = {"w": normal(1, 3, 5), "v": normal(3, 5, 1)}
    if use_bias:
        params |= {"b": normal(2, 5), "c": normal(4, 1)}
    return Network(
        params,
        lambda p, x: jnp.tanh(x @ p["w"] + p.get("b", 0.0)),
        lambda p, h: h @ p["v"] + p.get("c", 0.0),
        ("w", "v"),
    )


def through_nnx():
    rngs = nnx.Rngs(0)
    layers = nnx.Sequential(nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 1, rngs=rngs))
    graph, params = nnx.split(layers)
    return Network(
        params,
        lambda p, x: jnp.tanh(nnx.merge(graph, p).layers[0](x)),
        lambda p, h: nnx.merge(graph, p).layers[1](h),
        ("layers/0/kernel", "layers/1/kernel"),
    )


def equinox():
    keys = jax.random.split(jax.random.key(0))
    params = {"first": eqx.nn.Linear(3, 5, key=keys[0]), "second": eqx.nn.Linear(5, 1, key=keys[1])}
    return Network(
        params,
        lambda p, x: jnp.tanh(p["first"](x)),
        lambda p, h: p["second"](h),
        ("first/weight", "second/weight"),
    )


def haiku():
    hidden = hk.without_apply_rng(hk.transform(lambda x: jnp.tanh(hk.Linear(5, name="first")(x))))
    head = hk.without_apply_rng(hk.transform(lambda h: hk.Linear(1, name="second")(h)))
    params = hidden.init(jax.random.key(0), X) | head.init(jax.random.key(1), jnp.ones(5))
    return Network(params, hidden.apply, head.apply, ("first/w", "second/w"))


NETWORKS = {
    "linen": lambda: linen(use_bias=True),
    "linen, no bias": lambda: linen(use_bias=False),
    "plain": lambda: plain(use_bias=True),
    "plain, no bias": lambda: plain(use_bias=False),
    "nnx": through_nnx,
    "equinox": equinox,
    "haiku": haiku,
}

V = jnp.array([1.0, -2.0, 0.5])


def by_linearize(u, x):
    value, push = jax.linearize(u, x)
    return value + push(V)


def by_vjp(u, x):
    value, pull = jax.vjp(u, x)
    return value + jnp.sum(pull(jnp.ones_like(value))[0])


def second_by_forward(u, x):
    """u, u_x and u_xx along a direction, by forward mode twice: as for residuals of PDEs."""
    first = lambda x: jax.jvp(u, (x,), (V,))[1]  # noqa: E731
    return u(x) + first(x) + jax.jvp(first, (x,), (V,))[1]


def laplacian(u, x):
    slope = jax.grad(u)
    along = jax.vmap(lambda v: v @ jax.jvp(slope, (x,), (v,))[1])
    return jnp.sum(along(jnp.eye(3)))


# Functions of a network of one row, and of the row.
OPERATORS = {
    "grad": lambda u, x: jax.grad(u)(x),
    "value_and_grad": lambda u, x: jnp.hstack(jax.value_and_grad(u)(x)),
    "hessian": lambda u, x: jax.hessian(u)(x),
    "jacfwd": lambda u, x: jax.jacfwd(u)(x),
    "jacrev": lambda u, x: jax.jacrev(u)(x),
    "jacrev of jacfwd": lambda u, x: jax.jacrev(jax.jacfwd(u))(x),
    "jvp": lambda u, x: sum(jax.jvp(u, (x,), (V,))),
    "linearize": by_linearize,
    "vjp": by_vjp,
    "forward over reverse": lambda u, x: jax.jvp(jax.grad(u), (x,), (V,))[1],
    "reverse over forward": lambda u, x: jax.grad(lambda x: jax.jvp(u, (x,), (V,))[1])(x),
    "reverse over reverse": lambda u, x: jax.grad(lambda x: V @ jax.grad(u)(x))(x),
    "second by forward": second_by_forward,
    "laplacian": laplacian,
    "Taylor mode": lambda u, x: jnp.stack(jet.jet(u, (x,), ((V, jnp.zeros(3)),))[1]),
}


def derivative_loss(network, operator, weight=1.0, wrap=lambda u: u):
    """Mean square of a derivative at each of the rows, and of the values there."""

    def loss_fn(p, x):
        u = wrap(functools.partial(network, p))
        loss = jnp.mean(jax.vmap(functools.partial(operator, u))(x) ** 2)
        return loss + weight * jnp.mean(jax.vmap(u)(x) ** 2) if weight else loss

    return loss_fn


def check(network, loss_fn, only_if_covered=()):
    stats, reasons = assert_nothing_is_lost(loss_fn, network.params, X)
    for name, rows in zip(network.kernels, network.rows(X), strict=True):
        if name in only_if_covered:
            assert_covered_or_said(stats, reasons, name, rows)
        else:
            assert_rows(stats[name], rows)
