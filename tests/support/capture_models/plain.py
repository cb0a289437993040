"""Plain JAX: parameters in any tree, kernels in any layout."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from support.capture_models.by_hand import by_output, convolve, relu
from support.capture_models.record import (
    DENSE,
    TORCH_DENSE,
    Model,
    Record,
    case,
    filled,
    float64,
    hand_score,
    inputs,
    score,
    weights,
)


def plain(forward, params, *args):
    """Loss, parameters, arguments and float64 parameters of `forward(params, *args)`."""

    def loss_fn(params, *args):
        return score(forward(params, *args))

    return loss_fn, params, tuple(map(jnp.asarray, args)), float64(params)


@case("jax")
def plain_dict():
    """With a penalty on the weights, which is no use as a kernel."""

    def forward(p, x):
        out = jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
        return out + 1e-2 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))

    x = inputs(3, 4)
    loss_fn, params, args, p = plain(forward, weights(w1=(4, 5), b1=(5,), w2=(5, 2), b2=(2,)), x)
    hidden = np.tanh(x @ p["w1"] + p["b1"])
    out = hidden @ p["w2"] + p["b2"] + 1e-2 * sum((leaf**2).sum() for leaf in p.values())
    expected = {"w1": Record([x], DENSE, "b1"), "w2": Record([hidden], DENSE, "b2")}
    return Model(loss_fn, params, args, expected, hand_score(out))


@case("jax")
def plain_list_of_tuples():
    def forward(layers, x):
        *hidden, (w, b) = layers
        for wi, bi in hidden:
            x = jnp.maximum(jnp.dot(x, wi) + bi, 0)
        return jnp.dot(x, w) + b

    x = inputs(3, 4)
    shapes = [[(4, 3), (3,)], [(3, 5), (5,)], [(5, 2), (2,)]]
    params = filled([tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in pair) for pair in shapes])
    loss_fn, params, args, p = plain(forward, params, x)
    expected, hidden = {}, x
    for i, (w, b) in enumerate(p):
        hidden = relu(hidden) if i else hidden
        expected[f"{i}/0"] = Record([hidden], DENSE, f"{i}/1")
        hidden = hidden @ w + b
    return Model(loss_fn, params, args, expected, hand_score(hidden))


def one_layer(forward, by_hand, axes, *, x=None, calls=None, **shapes):
    """A case of one kernel `w`, with the bias `b` if there is one."""
    x = inputs(3, 4) if x is None else x
    params = weights(**shapes)
    loss_fn, params, args, p = plain(forward, params, x)
    record = Record([x] if calls is None else calls, axes, "b" if "b" in shapes else None)
    return Model(loss_fn, params, args, {"w": record}, hand_score(by_hand(p, x)))


@case("jax")
def plain_einsum():
    return one_layer(
        lambda p, x: jnp.einsum("bi,oi->bo", x, p["w"]),
        lambda p, x: x @ p["w"].T,
        TORCH_DENSE,
        w=(5, 4),
    )


@case("jax")
def plain_einsum_kernel_first():
    return one_layer(
        lambda p, x: jnp.einsum("hio,bhi->obh", p["w"], x),
        lambda p, x: np.einsum("hio,bhi->obh", p["w"], x),
        "bHi,Hio",
        x=inputs(3, 2, 4),
        w=(2, 4, 5),
    )


@case("jax")
def plain_transposed():
    return one_layer(
        lambda p, x: x @ p["w"].T + p["b"],
        lambda p, x: x @ p["w"].T + p["b"],
        TORCH_DENSE,
        w=(5, 4),
        b=(5,),
    )


@case("jax")
def plain_reshaped():
    """A kernel with axes for heads, flattened for one product."""
    return one_layer(
        lambda p, x: (x @ p["w"].reshape(4, 6)).reshape(3, 2, 3) + p["b"],
        lambda p, x: np.einsum("bi,iho->bho", x, p["w"]) + p["b"],
        "bi,iho",
        w=(4, 2, 3),
        b=(2, 3),
    )


@case("jax")
def plain_kernels_joined():
    """Two kernels side by side in one product."""

    def forward(p, x):
        return x @ jnp.concatenate([p["w1"], p["w2"]], 1) + jnp.concatenate([p["b1"], p["b2"]])

    x = inputs(3, 4)
    shapes = {"w1": (4, 2), "b1": (2,), "w2": (4, 3), "b2": (3,)}
    loss_fn, params, args, p = plain(forward, weights(**shapes), x)
    out = np.concatenate([x @ p["w1"] + p["b1"], x @ p["w2"] + p["b2"]], 1)
    expected = {"w1": Record([x], DENSE, "b1"), "w2": Record([x], DENSE, "b2")}
    return Model(loss_fn, params, args, expected, hand_score(out))


@case("jax")
def plain_kernel_split():
    """Halves of one kernel that meet different inputs: its columns have statistics of their own."""

    def forward(p, x):
        return x @ p["w"][:, :3] + jnp.tanh(x) @ p["w"][:, 3:]

    x = inputs(3, 4)
    return one_layer(
        forward,
        lambda p, x: x @ p["w"][:, :3] + np.tanh(x) @ p["w"][:, 3:],
        "biO,iO",
        calls=[np.stack([x] * 3 + [np.tanh(x)] * 3, -1)],
        x=x,
        w=(4, 6),
    )


def layers_in_one_array(forward):
    """A case of two layers whose kernels are stacked in `w`."""
    x = inputs(3, 4)
    loss_fn, params, args, p = plain(forward, weights(w=(2, 4, 4)), x)
    hidden = [x]
    for w in p["w"]:
        hidden.append(np.tanh(hidden[-1] @ w))
    record = Record([np.stack(hidden[:-1])], "Lbi,Lio")
    return Model(loss_fn, params, args, {"w": record}, hand_score(hidden[-1]))


@case("jax")
def plain_stack_indexed():
    """Taken out by a Python loop."""

    def forward(p, x):
        for i in range(2):
            x = jnp.tanh(x @ p["w"][i])
        return x

    return layers_in_one_array(forward)


@case("jax")
def plain_stack_taken_apart():
    def forward(p, x):
        for w in jnp.unstack(p["w"]):
            x = jnp.tanh(x @ w)
        return x

    return layers_in_one_array(forward)


@case("jax")
def plain_kernels_put_together():
    """Into one array, for a scan."""
    x = inputs(3, 3)

    def forward(p, x):
        kernels, biases = jnp.stack([p["w1"], p["w2"]]), jnp.stack([p["b1"], p["b2"]])
        step = lambda x, layer: (jnp.tanh(x @ layer[0] + layer[1]), None)  # noqa: E731
        return lax.scan(step, x, (kernels, biases))[0]

    loss_fn, params, args, p = plain(forward, weights(w1=(3, 3), w2=(3, 3), b1=(3,), b2=(3,)), x)
    hidden = np.tanh(x @ p["w1"] + p["b1"])
    expected = {"w1": Record([x], DENSE, "b1"), "w2": Record([hidden], DENSE, "b2")}
    return Model(loss_fn, params, args, expected, hand_score(np.tanh(hidden @ p["w2"] + p["b2"])))


@case("jax")
def plain_stack_indexed_in_a_loop():
    """Taken out at an index that is known only when it runs."""

    def forward(p, x):
        return lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ p["w"][i]), x)

    return layers_in_one_array(forward)


@case("jax", rounding=2.0**-7)
def plain_half_precision():
    """Kernel and inputs are cast; the statistics are those of inputs in 8 bits of mantissa."""

    def forward(p, x):
        product = x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
        return product + p["b"].astype(jnp.bfloat16)

    return one_layer(forward, lambda p, x: x @ p["w"] + p["b"], DENSE, w=(4, 5), b=(5,))


@case("jax")
def plain_vdot():
    """One unit, whose kernel is a vector."""
    return one_layer(
        lambda p, x: jax.vmap(lambda row: jnp.vdot(p["w"], row) + p["b"])(x),
        lambda p, x: x @ p["w"] + p["b"],
        "bi,i",
        w=(4,),
        b=(),
    )


def nchw_convolve(x, kernel, **keywords):
    """`convolve` of channels first by `(o, i, *window)`."""
    kernel = np.moveaxis(np.moveaxis(kernel, 0, -1), 0, -2)
    return np.moveaxis(convolve(np.moveaxis(x, 1, -1), kernel, **keywords), -1, 1)


@case("jax")
def plain_conv_oihw():
    def forward(p, x):
        out = lax.conv_general_dilated(
            x, p["w"], (2, 2), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        return out + p["b"][:, None, None]

    x = np.moveaxis(inputs(2, 5, 5, 3), -1, 1)
    loss_fn, params, args, p = plain(forward, weights(w=(4, 3, 3, 3), b=(4,)), x)
    out = nchw_convolve(x, p["w"], stride=2) + p["b"][:, None, None]
    return Model(loss_fn, params, args, {"w": Record([x], "bixy,oi__", "b", 4)}, hand_score(out))


@case("jax")
def plain_conv_over_examples():
    """`vmap` over examples, and a kernel for each of two groups of channels."""

    def forward(p, x):
        def one(image):
            return lax.conv_general_dilated(
                image[None],
                p["w"],
                (1,),
                [(1, 1)],
                dimension_numbers=("NWC", "WIO", "NWC"),
                feature_group_count=2,
            )[0]

        return jax.vmap(one)(x)

    x = inputs(3, 4, 4)
    loss_fn, params, args, p = plain(forward, weights(w=(3, 2, 6)), x)
    out = convolve(x, p["w"], (1, 1), groups=2)
    record = Record([by_output(x, 2, 6)], "bxiO,_iO", None, 4)
    return Model(loss_fn, params, args, {"w": record}, hand_score(out))


@case("jax")
def plain_conv_circular():
    """The feature map is the padded one: that it was padded, no convolution shows."""

    def forward(p, x):
        around = jnp.concatenate([x[:, -1:], x, x[:, :1]], 1)
        return lax.conv_general_dilated(
            around, p["w"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )

    x = inputs(3, 5, 2)
    around = np.concatenate([x[:, -1:], x, x[:, :1]], 1)
    loss_fn, params, args, p = plain(forward, weights(w=(3, 2, 3)), x)
    record = Record([around], "bxi,_io", None, 5)
    return Model(loss_fn, params, args, {"w": record}, hand_score(convolve(around, p["w"])))


@case("jax", {"w1": "`mul` changes it"})
def plain_scaled():
    x = inputs(3, 4)
    forward = lambda p, x: jnp.tanh(x @ (0.5 * p["w1"])) @ p["w2"]  # noqa: E731
    loss_fn, params, args, p = plain(forward, weights(w1=(4, 3), w2=(3, 2)), x)
    hidden = np.tanh(x @ (0.5 * p["w1"]))
    expected = {"w2": Record([hidden], DENSE)}
    return Model(loss_fn, params, args, expected, hand_score(hidden @ p["w2"]))


@case("jax")
def plain_scaled_with_its_bias():
    """A layer whose parameters are all scaled alike is one with scaled outputs."""
    return one_layer(
        lambda p, x: (lambda q: x @ q["w"] + q["b"])(jax.tree.map(lambda a: a / 8, p)),
        lambda p, x: (x @ p["w"] + p["b"]) / 8,
        DENSE,
        w=(4, 5),
        b=(5,),
    )


@case("jax", {"w1": "`div` changes it"})
def plain_weight_norm():
    x = inputs(3, 4)

    def forward(p, x):
        return jnp.tanh(x @ (p["w1"] / jnp.linalg.norm(p["w1"], axis=0))) @ p["w2"]

    loss_fn, params, args, p = plain(forward, weights(w1=(4, 3), w2=(3, 2)), x)
    hidden = np.tanh(x @ (p["w1"] / np.linalg.norm(p["w1"], axis=0)))
    expected = {"w2": Record([hidden], DENSE)}
    return Model(loss_fn, params, args, expected, hand_score(hidden @ p["w2"]))


@case("jax", {"tied": "tied"})
def plain_tied():
    """A kernel that meets its inputs along either axis: no statistics fit both."""
    x = inputs(3, 4)
    forward = lambda p, x: jnp.tanh(x @ p["tied"]) @ p["tied"].T @ p["w"]  # noqa: E731
    loss_fn, params, args, p = plain(forward, weights(tied=(4, 3), w=(4, 2)), x)
    hidden = np.tanh(x @ p["tied"]) @ p["tied"].T
    expected = {"w": Record([hidden], DENSE)}
    return Model(loss_fn, params, args, expected, hand_score(hidden @ p["w"]))


@case("jax", {"left": "another parameter", "right": "another parameter"})
def plain_low_rank():
    """A kernel that is a product of two parameters, neither of which multiplies an input."""
    x = inputs(3, 4)
    forward = lambda p, x: jnp.tanh(x @ (p["left"] @ p["right"])) @ p["w"]  # noqa: E731
    loss_fn, params, args, p = plain(forward, weights(left=(4, 2), right=(2, 3), w=(3, 2)), x)
    hidden = np.tanh(x @ (p["left"] @ p["right"]))
    expected = {"w": Record([hidden], DENSE)}
    return Model(loss_fn, params, args, expected, hand_score(hidden @ p["w"]))


@case("jax", {"embed": "`gather` looks"})
def plain_embedding():
    tokens = np.array([[0, 5, 2], [1, 2, 2]])
    forward = lambda p, tokens: p["embed"][tokens] @ p["out"] + p["b"]  # noqa: E731
    loss_fn, params, args, p = plain(forward, weights(embed=(6, 3), out=(3, 2), b=(2,)), tokens)
    embedded = p["embed"][tokens]
    expected = {"out": Record([embedded], DENSE, "b")}
    return Model(loss_fn, params, args, expected, hand_score(embedded @ p["out"] + p["b"]))


@case("jax", {"tied": "`gather` looks"})
def plain_tied_embedding():
    """Looked up at one end and multiplied with at the other."""
    tokens = np.array([[0, 5, 2], [1, 2, 2]])
    forward = lambda p, tokens: jnp.tanh(p["tied"][tokens] @ p["w"]) @ p["tied"].T  # noqa: E731
    loss_fn, params, args, p = plain(forward, weights(tied=(6, 3), w=(3, 3)), tokens)
    embedded = p["tied"][tokens]
    out = np.tanh(embedded @ p["w"]) @ p["tied"].T
    return Model(loss_fn, params, args, {"w": Record([embedded], DENSE)}, hand_score(out))
