"""Plain JAX under its transformations and control flow."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from support.capture_models.by_hand import gelu, over_time, relu, unrolled
from support.capture_models.plain import one_layer, plain
from support.capture_models.record import (
    DENSE,
    TORCH_DENSE,
    Model,
    Record,
    case,
    hand_score,
    inputs,
    weights,
)


@case("jax")
def plain_vmap_over_examples():
    return one_layer(
        lambda p, x: jax.vmap(lambda row: p["w"] @ row + p["b"])(x),
        lambda p, x: x @ p["w"].T + p["b"],
        TORCH_DENSE,
        w=(5, 4),
        b=(5,),
    )


@case("jax")
def plain_ensemble():
    """On inputs that the members share, the first kernels are one kernel with more outputs."""

    def forward(p, x):
        def member(p):
            return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

        return jax.vmap(member)(p)

    x = inputs(3, 4)
    shapes = {"w1": (2, 4, 3), "b1": (2, 3), "w2": (2, 3, 2), "b2": (2, 2)}
    loss_fn, params, args, p = plain(forward, weights(**shapes), x)
    hidden = np.tanh(np.einsum("bi,eio->ebo", x, p["w1"]) + p["b1"][:, None])
    out = np.einsum("ebi,eio->ebo", hidden, p["w2"]) + p["b2"][:, None]
    expected = {"w1": Record([x], "bi,eio", "b1"), "w2": Record([hidden], "Ebi,Eio", "b2")}
    return Model(loss_fn, params, args, expected, hand_score(out))


@case("jax")
def plain_gradient_in_the_loss():
    """The kernel meets inputs along one axis; cotangents, along the other, do not count."""

    def forward(p, x):
        return jax.vmap(jax.grad(lambda row: jnp.sum(jnp.sin(p["w"] @ row))))(x) @ p["out"]

    x = inputs(3, 4)
    loss_fn, params, args, p = plain(forward, weights(w=(5, 4), out=(4, 2)), x)
    gradient = np.cos(x @ p["w"].T) @ p["w"]
    expected = {"w": Record([x], TORCH_DENSE), "out": Record([gradient], DENSE)}
    return Model(loss_fn, params, args, expected, hand_score(gradient @ p["out"]))


@case("jax")
def plain_jit():
    @jax.jit
    def layer(w, b, x):
        return jax.nn.relu(x @ w + b)

    return one_layer(
        lambda p, x: layer(p["w"], p["b"], x),
        lambda p, x: relu(x @ p["w"] + p["b"]),
        DENSE,
        w=(4, 5),
        b=(5,),
    )


@case("jax")
def plain_checkpoint():
    def forward(p, x):
        layer = jax.checkpoint(lambda w, b, x: jnp.tanh(x @ w + b))
        return layer(p["w2"], p["b2"], layer(p["w1"], p["b1"], x))

    x = inputs(3, 4)
    loss_fn, params, args, p = plain(forward, weights(w1=(4, 3), b1=(3,), w2=(3, 2), b2=(2,)), x)
    hidden = np.tanh(x @ p["w1"] + p["b1"])
    expected = {"w1": Record([x], DENSE, "b1"), "w2": Record([hidden], DENSE, "b2")}
    return Model(loss_fn, params, args, expected, hand_score(np.tanh(hidden @ p["w2"] + p["b2"])))


@case("jax")
def plain_custom_derivatives():
    """Activations with a `custom_jvp` or a `custom_vjp`."""

    @jax.custom_vjp
    def clip_gradient(x):
        return x

    clip_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))

    def forward(p, x):
        hidden = clip_gradient(jax.nn.gelu(x @ p["w1"]))
        return jax.nn.relu(hidden @ p["w2"]) @ p["w3"]

    x = inputs(3, 4)
    loss_fn, params, args, p = plain(forward, weights(w1=(4, 3), w2=(3, 3), w3=(3, 2)), x)
    first = gelu(x @ p["w1"])
    second = relu(first @ p["w2"])
    expected = {
        name: Record([call], DENSE) for name, call in (("w1", x), ("w2", first), ("w3", second))
    }
    return Model(loss_fn, params, args, expected, hand_score(second @ p["w3"]))


@case("jax")
def plain_custom_vjp_layer():
    """A product that defines its own derivative, by the usual formula."""

    @jax.custom_vjp
    def layer(w, x):
        return x @ w

    layer.defvjp(lambda w, x: (x @ w, (w, x)), lambda res, g: (res[1].T @ g, g @ res[0].T))
    return one_layer(lambda p, x: layer(p["w"], x), lambda p, x: x @ p["w"], DENSE, w=(4, 5))


@case("jax")
def plain_scan_over_layers():
    def forward(p, x):
        def layer(x, own):
            return jnp.tanh(x @ own["w"] + own["b"]), None

        return lax.scan(layer, x, p)[0]

    x = inputs(3, 4)
    loss_fn, params, args, p = plain(forward, weights(w=(3, 4, 4), b=(3, 4)), x)
    hidden = [x]
    for w, b in zip(p["w"], p["b"], strict=True):
        hidden.append(np.tanh(hidden[-1] @ w + b))
    record = Record([np.stack(hidden[:-1])], "L...i,Lio", "b")
    return Model(loss_fn, params, args, {"w": record}, hand_score(hidden[-1]))


@case("jax")
def plain_scan_of_scan():
    """Two levels of stacked layers, rematerialized, beside a weight that all of them share."""

    def forward(p, x):
        @jax.checkpoint
        def inner(x, w):
            return jnp.tanh(x @ w + jnp.sin(x @ p["shared"])), None

        return lax.scan(lambda x, w: lax.scan(inner, x, w), x, p["w"])[0]

    x = inputs(2, 3)
    loss_fn, params, args, p = plain(forward, weights(w=(2, 2, 3, 3), shared=(3, 3)), x)
    seen = [x]
    for w in p["w"].reshape(4, 3, 3):
        seen.append(np.tanh(seen[-1] @ w + np.sin(seen[-1] @ p["shared"])))
    expected = {
        "w": Record([np.stack(seen[:-1]).reshape(2, 2, 2, 3)], "KLbi,KLio"),
        "shared": Record(seen[:-1], DENSE),
    }
    return Model(loss_fn, params, args, expected, hand_score(seen[-1]))


@case("jax")
def plain_recurrent():
    """Weights that a scan over time closes over, and a loop of a fixed number of steps."""

    def forward(p, x):
        def step(h, x):
            return jnp.tanh(x @ p["wx"] + h @ p["wh"] + p["b"]), None

        h, _ = lax.scan(step, jnp.zeros((x.shape[0], 3)), jnp.swapaxes(x, 0, 1))
        return lax.fori_loop(0, 2, lambda _, h: jnp.sin(h @ p["wo"]), h)

    x = inputs(3, 4, 2)
    shapes = {"wx": (2, 3), "wh": (3, 3), "b": (3,), "wo": (3, 3)}
    loss_fn, params, args, p = plain(forward, weights(**shapes), x)
    cell = lambda h, x: [np.tanh(x @ p["wx"] + h[-1] @ p["wh"] + p["b"])]  # noqa: E731
    before, after = unrolled(cell, x, 3)
    again = np.sin(after[-1] @ p["wo"])
    # The bias is added to the sum of both products: it centers neither alone.
    expected = {
        "wx": Record(over_time(x), DENSE),
        "wh": Record(before, DENSE),
        "wo": Record([after[-1], again], DENSE),
    }
    return Model(loss_fn, params, args, expected, hand_score(np.sin(again @ p["wo"])))


@case("jax")
def plain_cond():
    """A kernel in the branch that is taken and one in the other, which sees nothing."""

    def forward(p, x, flag):
        hidden = jnp.tanh(x @ p["w"] + p["b"])
        return lax.cond(flag, lambda h: h @ p["taken"], lambda h: (2 * h) @ p["other"], hidden)

    x = inputs(3, 4)
    shapes = {"w": (4, 3), "b": (3,), "taken": (3, 2), "other": (3, 2)}
    loss_fn, params, args, p = plain(forward, weights(**shapes), x, True)
    hidden = np.tanh(x @ p["w"] + p["b"])
    expected = {
        "w": Record([x], DENSE, "b"),
        "taken": Record([hidden], DENSE),
        "other": Record([], DENSE),
    }
    return Model(loss_fn, params, args, expected, hand_score(hidden @ p["taken"]))


@case("jax")
def plain_cond_both():
    """One kernel in both branches: only the branch that is taken counts."""

    def forward(p, x, flag):
        return lax.cond(flag, lambda x: x @ p["w"], lambda x: jnp.sin(3 * x) @ p["w"], x)

    x = inputs(3, 4)
    loss_fn, params, args, p = plain(forward, weights(w=(4, 3)), x, False)
    seen = np.sin(3 * x.astype(np.float64))
    return Model(loss_fn, params, args, {"w": Record([seen], DENSE)}, hand_score(seen @ p["w"]))
