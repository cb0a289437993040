"""Dense float64 oracles in NumPy, written from the paper and not from the library.

They favour the form in which the paper prints a formula over speed: loops over the entries of a
kernel, explicit matrices, two-pass moments. Layouts are Flax's: inputs `(batch, ..., features)`,
kernels `(*window, inputs of a unit, units)`.
"""

import dataclasses
import itertools
import math

import numpy as np


def moments(rows):
    """Two-pass mean and biased variance of the columns of `rows`, (21) and (22)."""
    rows = np.asarray(rows, np.float64)
    mean = rows.sum(axis=0) / len(rows)
    var = ((rows - mean) ** 2).sum(axis=0) / len(rows)
    return mean, var


def input_moments(inputs):
    """Mean and variance of each input feature over every other axis of a layer's input."""
    inputs = np.asarray(inputs, np.float64)
    return moments(inputs.reshape(-1, inputs.shape[-1]))


# ---------------------------------------------------------------------------------------------
# Networks: forward and backward passes of a chain of layers.
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Dense:
    """A fully connected layer on the last axis; every other axis counts examples."""

    name: str


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution in any number of dimensions; strides and dilation are equal in all of them."""

    name: str
    stride: int = 1
    padding: str = "SAME"
    dilation: int = 1
    groups: int = 1


def _taps(inputs, window, layer):
    """Yield each tap of the window, the slice of the padded input that it meets, and the padding.

    The slice is a column block of the paper's matrix of feature maps (18), for all channels.
    """
    pads, outs = [(0, 0)], []
    for size, k in zip(inputs.shape[1:-1], window, strict=True):
        reach = (k - 1) * layer.dilation + 1
        if layer.padding == "SAME":
            out = math.ceil(size / layer.stride)
            total = max((out - 1) * layer.stride + reach - size, 0)
            pads.append((total // 2, total - total // 2))
        else:
            out = (size - reach) // layer.stride + 1
            pads.append((0, 0))
        outs.append(out)
    pads.append((0, 0))
    blocks = []
    for tap in itertools.product(*(range(k) for k in window)):
        starts = [t * layer.dilation for t in tap]
        cut = [
            slice(start, start + (out - 1) * layer.stride + 1, layer.stride)
            for start, out in zip(starts, outs, strict=True)
        ]
        blocks.append((tap, (slice(None), *cut, slice(None))))
    return pads, tuple(outs), blocks


def _conv_forward(layer, inputs, kernel, bias):
    pads, outs, blocks = _taps(inputs, kernel.shape[:-2], layer)
    padded = np.pad(inputs, pads)
    units, width = kernel.shape[-1], kernel.shape[-2]
    output = np.zeros((len(inputs), *outs, units)) + bias
    for unit in range(units):
        first = width * (unit // (units // layer.groups))
        for tap, cut in blocks:
            output[..., unit] += padded[cut][..., first : first + width] @ kernel[tap][:, unit]
    return output


def _conv_backward(layer, inputs, kernel, cotangent):
    pads, _, blocks = _taps(inputs, kernel.shape[:-2], layer)
    padded = np.pad(inputs, pads)
    units, width = kernel.shape[-1], kernel.shape[-2]
    grad_kernel, grad_padded = np.zeros_like(kernel), np.zeros_like(padded)
    for unit in range(units):
        first = width * (unit // (units // layer.groups))
        seen = slice(first, first + width)
        delta = cotangent[..., unit, None]
        for tap, cut in blocks:
            block = padded[cut][..., seen] * delta
            grad_kernel[tap][:, unit] = block.reshape(-1, width).sum(axis=0)
            grad_padded[cut][..., seen] += delta * kernel[tap][:, unit]
    inner = [slice(low, low + size) for (low, _), size in zip(pads, inputs.shape, strict=True)]
    return grad_kernel, grad_padded[tuple(inner)]


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a forward and backward pass leaves of one layer."""

    inputs: np.ndarray
    grad_kernel: np.ndarray
    grad_bias: np.ndarray | None
    positions: int


def gradients(layers, params, inputs, targets):
    """Gradients of `sum((network(inputs) - targets)**2) / (2 batch)`, with a ReLU between layers.

    A Dense layer after a Conv takes the flattened feature map.

    Returns:
      A dict from a layer's name to its `Pass`.
    """
    values = np.asarray(inputs, np.float64)
    seen, outputs = {}, {}
    for index, layer in enumerate(layers):
        kernel = np.asarray(params[layer.name]["kernel"], np.float64)
        bias = np.asarray(params[layer.name].get("bias", np.zeros(kernel.shape[-1])), np.float64)
        if index:
            values = np.maximum(values, 0.0)
            if isinstance(layer, Dense) and isinstance(layers[index - 1], Conv):
                values = values.reshape(len(values), -1)
        seen[layer.name] = values
        if isinstance(layer, Dense):
            values = values @ kernel + bias
        else:
            values = _conv_forward(layer, values, kernel, bias)
        outputs[layer.name] = values
    cotangent = (values - np.asarray(targets, np.float64)) / len(values)

    result = {}
    for layer in reversed(layers):
        kernel = np.asarray(params[layer.name]["kernel"], np.float64)
        values, units = seen[layer.name], kernel.shape[-1]
        cotangent = cotangent.reshape(outputs[layer.name].shape)
        if isinstance(layer, Dense):
            rows, delta = values.reshape(-1, values.shape[-1]), cotangent.reshape(-1, units)
            grad_kernel, upstream = rows.T @ delta, (delta @ kernel.T).reshape(values.shape)
            positions = 1
        else:
            grad_kernel, upstream = _conv_backward(layer, values, kernel, cotangent)
            positions = math.prod(cotangent.shape[1:-1])
        grad_bias = None
        if "bias" in params[layer.name]:
            grad_bias = cotangent.reshape(-1, units).sum(axis=0)
        result[layer.name] = Pass(values, grad_kernel, grad_bias, positions)
        # The input of a later layer is a ReLU's output: its derivative is 1 where that is > 0.
        cotangent = upstream * (values > 0)
    return result


# ---------------------------------------------------------------------------------------------
# Algorithms 2 and 3.
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Running:
    """Running mean and variance of a layer's input features; without a bias, `var` is E[h^2]."""

    mean: np.ndarray
    var: np.ndarray
    started: bool = False


@dataclasses.dataclass(frozen=True)
class Options:
    """The constants of the algorithms (rho, eps_1, eps_2) and what the paper leaves open."""

    decay: float = 0.99
    eps_rel: float = 1e-2
    eps_abs: float = 1e-4
    scale: bool = True
    warm_start: bool = False
    variance: str = "auto"
    batch_size: float | None = None


def initial(features):
    """The statistics before the first step: mean 0, variance 1."""
    return Running(np.zeros(features), np.ones(features))


def _moved(running, rows, one_row, has_bias, options):
    """Steps 1 and 2 of both algorithms."""
    mean, var = moments(rows)
    if not has_bias:
        # Without a bias nothing can be centered: the columns are scaled by their norms.
        mean, var = np.zeros_like(mean), (rows**2).sum(axis=0) / len(rows)
    elif options.variance == "running" or (options.variance == "auto" and one_row):
        var = ((rows - running.mean) ** 2).sum(axis=0) / len(rows)
    if options.warm_start and not running.started:
        return Running(mean, var, True)
    rho = options.decay
    return Running(rho * running.mean + (1 - rho) * mean, rho * running.var + (1 - rho) * var, True)


def scale_squared(fan_in, examples, positions, options):
    """q^2 of Algorithm 2 (positions = 1) and Algorithm 3."""
    if not options.scale:
        return 1.0
    examples = examples if options.batch_size is None else options.batch_size
    return max(fan_in / examples, math.sqrt(positions))


def floored(var, options):
    """sigma~^2 of step 3; `var` holds the inputs of one unit."""
    return var + options.eps_rel * var.max() + options.eps_abs


def algorithm_2(running, inputs, grad_kernel, grad_bias=None, options=None):
    """One step of Algorithm 2 on a dense layer: new statistics, preconditioned gradients."""
    options = options or Options()
    rows = np.asarray(inputs, np.float64).reshape(-1, inputs.shape[-1])
    examples, fan_in = rows.shape
    grad_w = np.asarray(grad_kernel, np.float64).T
    running = _moved(running, rows, examples == 1, grad_bias is not None, options)
    mean, var = running.mean, floored(running.var, options)
    q2 = scale_squared(fan_in, examples, 1, options)

    new_w = np.empty_like(grad_w)
    for i, j in np.ndindex(*grad_w.shape):
        centered = grad_w[i, j] if grad_bias is None else grad_w[i, j] - mean[j] * grad_bias[i]
        new_w[i, j] = centered / var[j] / q2
    if grad_bias is None:
        return running, new_w.T, None
    new_b = np.empty(len(grad_bias))
    for i in range(len(new_b)):
        new_b[i] = grad_bias[i] / q2 - sum(new_w[i, j] * mean[j] for j in range(fan_in))
    return running, new_w.T, new_b


def algorithm_3(running, inputs, grad_kernel, grad_bias=None, options=None, *, positions):
    """One step of Algorithm 3 on a convolution; `positions` is r s of the output.

    The groups follow from the shapes: a unit of group g sees the g-th block of input channels.
    """
    options = options or Options()
    inputs, grad_w = np.asarray(inputs, np.float64), np.asarray(grad_kernel, np.float64)
    channels, examples = inputs.shape[-1], len(inputs)
    *window, width, units = grad_w.shape
    running = _moved(
        running,
        inputs.reshape(-1, channels),
        examples * positions == 1,
        grad_bias is not None,
        options,
    )
    q2 = scale_squared(math.prod(window) * width, examples, positions, options)

    new_w = np.empty_like(grad_w)
    new_b = None if grad_bias is None else np.empty(units)
    for d in range(units):
        first = width * (d // (units // (channels // width)))
        mean = running.mean[first : first + width]
        var = floored(running.var[first : first + width], options)
        for index in np.ndindex(*window, width):
            p = index[-1]
            centered = grad_w[(*index, d)]
            if grad_bias is not None:
                centered = centered - mean[p] * grad_bias[d]
            new_w[(*index, d)] = centered / var[p] / q2
        if new_b is not None:
            shift = sum(
                mean[index[-1]] * new_w[(*index, d)] for index in np.ndindex(*window, width)
            )
            new_b[d] = grad_bias[d] / q2 - shift
    return running, new_w, new_b


def bnp_step(layers, running, params, inputs, targets, options=None):
    """One step of BNP on a whole network.

    Returns:
      The running statistics of each layer, and the preconditioned gradients as a params tree.
    """
    moved, updates = {}, {}
    for layer, seen in ((x, gradients(layers, params, inputs, targets)[x.name]) for x in layers):
        name = layer.name
        before = running.get(name) or initial(seen.inputs.shape[-1])
        if isinstance(layer, Dense):
            after, kernel, bias = algorithm_2(
                before, seen.inputs, seen.grad_kernel, seen.grad_bias, options
            )
        else:
            after, kernel, bias = algorithm_3(
                before,
                seen.inputs,
                seen.grad_kernel,
                seen.grad_bias,
                options,
                positions=seen.positions,
            )
        moved[name] = after
        updates[name] = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
    return moved, updates


# ---------------------------------------------------------------------------------------------
# The matrices of (12), (15) and (23) for one unit's [b, w].
# ---------------------------------------------------------------------------------------------


def centering_matrix(mean):
    """U = [[1, -mean^T], [0, I]]."""
    u = np.eye(len(mean) + 1)
    u[0, 1:] = -mean
    return u


def scaling_matrix(var):
    """D = diag(1, 1/sigma~)."""
    return np.diag(np.concatenate([[1.0], 1 / np.sqrt(var)]))


def unit_matrix(running, unit, kernel_shape, has_bias, q2, options=None):
    """P = U D / q on `unit_vector(kernel, bias, unit)`; D / q alone without a bias."""
    options = options or Options()
    *window, width, units = kernel_shape
    first = width * (unit // (units // (len(running.mean) // width)))
    e = np.ones(math.prod(window))
    mean = np.kron(running.mean[first : first + width], e)
    var = np.kron(floored(running.var[first : first + width], options), e)
    if has_bias:
        return centering_matrix(mean) @ scaling_matrix(var) / math.sqrt(q2)
    return np.diag(1 / np.sqrt(var)) / math.sqrt(q2)


def unit_vector(kernel, bias, unit):
    """[b_d, vec w(., ., 1, d), vec w(., ., 2, d), ...] of (17); no b_d without a bias."""
    w = np.moveaxis(np.asarray(kernel, np.float64)[..., unit], -1, 0).ravel()
    return w if bias is None else np.concatenate([[np.asarray(bias, np.float64)[unit]], w])


def by_unit(matrix_of, kernel, bias=None):
    """Apply `matrix_of(unit)` to each unit's vector and put the results back in their places."""
    window, width = kernel.shape[:-2], kernel.shape[-2]
    new_kernel, new_bias = np.empty(kernel.shape), None if bias is None else np.empty(bias.shape)
    for unit in range(kernel.shape[-1]):
        vector = matrix_of(unit) @ unit_vector(kernel, bias, unit)
        if bias is not None:
            new_bias[unit], vector = vector[0], vector[1:]
        new_kernel[..., unit] = np.moveaxis(vector.reshape(width, *window), 0, -1)
    return new_kernel, new_bias
