"""Second moments of the patches that a convolution's kernel meets."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.second_moment_cases import assert_of_rows, captured, draw, linen


def patches(x, window, strides, padding, dilation=(1, 1)):
    """Every patch of a map (batch, height, width, channels), in the order of a kernel's entries."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    spans = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    starts = [
        range(0, size - span + 1, stride)
        for size, span, stride in zip(x.shape[1:3], spans, strides, strict=True)
    ]
    found = [
        image[i : i + spans[0] : dilation[0], j : j + spans[1] : dilation[1]]
        for image in x
        for i, j in itertools.product(*starts)
    ]
    return np.stack(found)  # (rows, *window, channels)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR"])
@pytest.mark.parametrize(
    ("strides", "dilation"), [((1, 1), (1, 1)), ((2, 1), (1, 1)), ((1, 1), (2, 2))]
)
def test_convolutions(padding, strides, dilation):
    x = draw(0, 3, 6, 5, 2)
    module = nn.Conv(4, (3, 2), strides, padding=padding, kernel_dilation=dilation)
    out = module.init_with_output(jax.random.key(0), x)[0].shape[1:3]
    shown, widths = x, ((0, 0), (0, 0))
    if padding != "VALID":
        spans = [(k - 1) * d + 1 for k, d in zip((3, 2), dilation, strict=True)]
        if padding == "CIRCULAR":
            total = [span - 1 for span in spans]
        else:
            total = [
                max((o - 1) * s + span - n, 0)
                for o, s, span, n in zip(out, strides, spans, x.shape[1:3], strict=True)
            ]
        widths = tuple((n // 2, n - n // 2) for n in total)
    if padding == "CIRCULAR":
        widths = tuple(((n - 1) // 2, n // 2) for n in spans)
        shown, widths = np.pad(x, ((0, 0), *widths, (0, 0)), mode="wrap"), ((0, 0), (0, 0))
    rows = patches(shown, (3, 2), strides, widths, dilation)
    assert_of_rows(linen(module, x), rows.reshape(len(rows), -1))


def by_patches(x, kernel, strides, padding, **_):
    """A convolution as a product of patches, cut out one place of the window after the other."""
    rows, columns, channels, out = kernel.shape
    pads = jax.lax.padtype_to_pads(x.shape[1:3], (rows, columns), strides, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    n = [(x.shape[1 + i] - kernel.shape[i]) // strides[i] + 1 for i in range(2)]
    cut = [
        x[:, i : i + strides[0] * n[0] : strides[0], j : j + strides[1] * n[1] : strides[1]]
        for i in range(rows)
        for j in range(columns)
    ]
    flat = kernel.reshape(rows * columns * channels, out)
    return jnp.concatenate(cut, -1) @ flat


def by_laxs_patches(x, kernel, strides, padding, **_):
    """The same by JAX's patches, whose channels come first."""
    found = jax.lax.conv_general_dilated_patches(
        x, kernel.shape[:2], strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return found @ kernel.transpose(2, 0, 1, 3).reshape(-1, kernel.shape[-1])


def of_convolution(x, statistics, padding, **options):
    module = nn.Conv(4, (3, 2), (2, 1), padding=padding, **options)
    params = module.init(jax.random.key(0), x)["params"]

    def loss_fn(p, x):
        return jnp.mean(module.apply({"params": p}, x) ** 2)

    return captured(loss_fn, params, x, conv_statistics=statistics)["kernel"]


# Of JAX's patches, in another order than the kernel's, there are statistics by entry alone.
@pytest.mark.parametrize(
    ("convolve", "statistics"),
    [(by_patches, "channel"), (by_patches, "patch"), (by_laxs_patches, "patch")],
)
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_convolutions_that_are_products_of_patches(convolve, statistics, padding):
    x = draw(0, 3, 6, 5, 2)
    ours = of_convolution(x, statistics, padding, conv_general_dilated=convolve)
    expected = of_convolution(x, statistics, padding)
    for name in ("mean", "var", "second_moment", "covariance", "rows_mean"):
        pair = getattr(ours, name), getattr(expected, name)
        np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-5, err_msg=name)


def test_patches_that_a_function_of_its_own_cuts_out():
    def convolve(x, kernel, strides, padding, **_):
        return jax.jit(lambda x, kernel: by_patches(x, kernel, strides, padding))(x, kernel)

    with pytest.raises(ValueError, match="takes its inputs in another form than the layer got"):
        of_convolution(draw(0, 3, 6, 5, 2), "channel", "SAME", conv_general_dilated=convolve)


@pytest.mark.parametrize("groups", [2, 4])
def test_a_block_for_each_group_of_a_convolution(groups):
    x = draw(0, 3, 5, 5, 4)
    stats = linen(nn.Conv(8, (3, 3), padding="VALID", feature_group_count=groups), x)
    rows = patches(x, (3, 3), (1, 1), ((0, 0), (0, 0)))
    rows = rows.reshape(len(rows), 9, groups, 4 // groups)
    assert stats.layer.block_shape == (groups,)
    assert_of_rows(stats, np.moveaxis(rows, 2, 0).reshape(groups, len(rows), -1))


def test_a_transposed_convolution():
    """Zeros between the entries of the map count: the kernel meets them."""
    x, params = draw(0, 2, 4, 4, 3), {"kernel": draw(1, 3, 3, 3, 2)}

    def loss_fn(p, x):
        y = jax.lax.conv_transpose(x, p["kernel"], (2, 2), "VALID")
        return jnp.mean(y**2)

    spread = np.zeros((2, 7, 7, 3))
    spread[:, ::2, ::2] = x
    rows = patches(spread, (3, 3), (1, 1), ((2, 2), (2, 2)))
    stats = captured(loss_fn, params, x)["kernel"]
    assert_of_rows(stats, rows.reshape(len(rows), -1))
