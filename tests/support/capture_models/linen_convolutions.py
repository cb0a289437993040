"""Linen models that convolve."""

import flax.linen as nn
import numpy as np

from support.capture_models.by_hand import (
    affine,
    by_output,
    convolve,
    positions_of,
    relu,
    spaced_out,
)
from support.capture_models.linen import linen
from support.capture_models.record import (
    DENSE,
    Model,
    Record,
    case,
    hand_score,
    inputs,
)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), strides=2, padding="SAME")(x))
        x = nn.relu(nn.Conv(4, (2, 2), padding="VALID", use_bias=False)(x))
        return nn.Dense(2)(x.reshape(x.shape[0], -1))


@case("linen")
def linen_cnn():
    x = inputs(3, 5, 5, 2)
    loss_fn, params, args, p = linen(ConvNet(), x)
    first = convolve(x, p["Conv_0"]["kernel"], (1, 1), stride=2) + p["Conv_0"]["bias"]
    second = convolve(relu(first), p["Conv_1"]["kernel"])
    flat = relu(second).reshape(3, -1)
    expected = {
        "Conv_0/kernel": Record([x], "bxyi,__io", "Conv_0/bias", positions_of(first)),
        "Conv_1/kernel": Record([relu(first)], "bxyi,__io", None, positions_of(second)),
        "Dense_0/kernel": Record([flat], DENSE, "Dense_0/bias"),
    }
    return Model(loss_fn, params, args, expected, hand_score(affine(flat, p["Dense_0"])))


@case("linen")
def linen_conv_grouped_dilated():
    x = inputs(2, 5, 4, 4)
    model = nn.Conv(6, (2, 2), feature_group_count=2, kernel_dilation=2, padding="VALID")
    loss_fn, params, args, p = linen(model, x)
    out = convolve(x, p["kernel"], dilation=2, groups=2) + p["bias"]
    record = Record([by_output(x, 2, 6)], "bxyiO,__iO", "bias", positions_of(out))
    return Model(loss_fn, params, args, {"kernel": record}, hand_score(out))


class Separable(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (2, 2), feature_group_count=3, padding="VALID", name="depthwise")(x)
        return nn.Conv(2, (1, 1), name="pointwise")(nn.relu(x))


@case("linen")
def linen_conv_depthwise():
    x = inputs(2, 4, 3, 3)
    loss_fn, params, args, p = linen(Separable(), x)
    hidden = convolve(x, p["depthwise"]["kernel"], groups=3) + p["depthwise"]["bias"]
    out = convolve(relu(hidden), p["pointwise"]["kernel"]) + p["pointwise"]["bias"]
    n = positions_of(out)
    expected = {
        "depthwise/kernel": Record([by_output(x, 3, 6)], "bxyiO,__iO", "depthwise/bias", n),
        "pointwise/kernel": Record([relu(hidden)], "bxyi,__io", "pointwise/bias", n),
    }
    return Model(loss_fn, params, args, expected, hand_score(out))


@case("linen")
def linen_conv_1d():
    x = inputs(3, 5, 2)
    loss_fn, params, args, p = linen(nn.Conv(3, (3,)), x)
    out = convolve(x, p["kernel"], (1, 1)) + p["bias"]
    return Model(
        loss_fn, params, args, {"kernel": Record([x], "bxi,_io", "bias", 5)}, hand_score(out)
    )


@case("linen")
def linen_conv_causal():
    """Flax pads this input by an operation of its own; the statistics are of the map before."""
    x = inputs(3, 5, 2)
    loss_fn, params, args, p = linen(nn.Conv(3, (3,), padding="CAUSAL"), x)
    out = convolve(x, p["kernel"], (2, 0)) + p["bias"]
    return Model(
        loss_fn, params, args, {"kernel": Record([x], "bxi,_io", "bias", 5)}, hand_score(out)
    )


@case("linen")
def linen_conv_transpose():
    """The feature map has no zeros between its positions, and the output is larger."""
    x = inputs(2, 3, 2, 2)
    loss_fn, params, args, p = linen(nn.ConvTranspose(3, (3, 3), strides=(2, 2)), x)
    out = convolve(spaced_out(x, 2), p["kernel"], (2, 1)) + p["bias"]
    assert positions_of(out) == 24
    return Model(
        loss_fn, params, args, {"kernel": Record([x], "bxyi,__io", "bias", 24)}, hand_score(out)
    )


@case("linen")
def linen_conv_transpose_flipped():
    """With the kernel of the convolution whose gradient it is: flipped, `(k, k, out, in)`."""
    x = inputs(2, 3, 2, 2)
    loss_fn, params, args, p = linen(nn.ConvTranspose(3, (3, 3), transpose_kernel=True), x)
    out = convolve(x, np.swapaxes(p["kernel"][::-1, ::-1], -1, -2), (1, 1)) + p["bias"]
    return Model(
        loss_fn, params, args, {"kernel": Record([x], "bxyi,__oi", "bias", 6)}, hand_score(out)
    )
