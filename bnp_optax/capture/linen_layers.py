"""How each Linen layer class meets its kernel: which input entries a kernel entry multiplies."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import recurrent

from bnp_optax.capture.reading import (
    Moments,
    NotCovered,
    Options,
    Reading,
    Weights,
    contraction,
    convolution,
)


def _dense(module: nn.Module, outputs: Any, options: Options, inputs: jax.Array) -> Reading:
    last = inputs.ndim - 1
    return contraction(inputs, (last, None), {last}, options)


def _dense_general(
    module: nn.DenseGeneral, outputs: Any, options: Options, inputs: jax.Array
) -> Reading:
    def normalized(axes: Any) -> tuple[int, ...]:
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        return tuple(
            sorted(axis % inputs.ndim for axis in axes)
        )  # Flax's kernels have them sorted.

    axis, batch = normalized(module.axis), normalized(module.batch_dims)
    n_features = 1 if isinstance(module.features, int) else len(module.features)
    return contraction(inputs, (*batch, *axis, *(None,) * n_features), set(axis), options)


def _einsum(
    module: nn.Einsum,
    outputs: Any,
    options: Options,
    inputs: jax.Array,
    einsum_str: str | None = None,
) -> Reading:
    equation = (einsum_str or module.einsum_str or "").replace(" ", "")
    operands, result = equation.split("->")
    left, right = operands.split(",")
    if "..." in right:
        msg = f"the kernel of `{equation}` has an ellipsis"
        raise NotCovered(msg)
    # Axes under an ellipsis are never the kernel's: any labels that occur nowhere else will do.
    ellipsis = "".join(chr(0x3B1 + i) for i in range(inputs.ndim - len(left.replace("...", ""))))
    left = left.replace("...", ellipsis)
    shared = [label for label in right if label in result]
    if any(len(set(term)) < len(term) for term in (left, right)):
        msg = f"`{equation}` repeats an index within an operand"
        raise NotCovered(msg)
    if any(label not in left and label not in result for label in right):
        msg = f"`{equation}` sums over an axis of the kernel alone"
        raise NotCovered(msg)
    if module.use_bias and shared != [label for label in result if label in right]:
        msg = f"`{equation}` orders the bias unlike the kernel"
        raise NotCovered(msg)
    axis_of = tuple(left.index(label) if label in left else None for label in right)
    contracted = {left.index(label) for label in right if label in left and label not in result}
    return contraction(inputs, axis_of, contracted, options)


def _convolution(
    module: nn.Conv | nn.ConvTranspose, outputs: Any, options: Options, inputs: jax.Array
) -> Reading:
    n_spatial = 1 if isinstance(module.kernel_size, int) else len(module.kernel_size)
    n_batch = inputs.ndim - n_spatial - 1
    groups = getattr(module, "feature_group_count", 1)
    flat = jnp.reshape(inputs, (-1, *inputs.shape[n_batch:]))
    positions = math.prod(outputs.shape[n_batch:-1])
    reading = convolution(flat, positions, module.features, groups, options)
    if not getattr(module, "transpose_kernel", False):
        return reading

    def transposed(weights: Weights) -> Moments:
        mean, var, mass = reading.moments(weights)
        return jnp.swapaxes(mean, -1, -2), jnp.swapaxes(var, -1, -2), mass

    return dataclasses.replace(
        reading, moments=transposed, input_axes=(*reading.input_axes[:-1], -1)
    )


def _method(layer: type[nn.Module]) -> Any:
    return inspect.unwrap(layer.__call__)


# By method, not by class: a subclass that calls `super().__call__` meets its kernel there,
# and one that does not is no layer that is known here.
_READERS: dict[Any, Callable[..., Reading]] = {
    _method(nn.Dense): _dense,
    _method(nn.DenseGeneral): _dense_general,
    _method(nn.Einsum): _einsum,
    _method(nn.Conv): _convolution,
    _method(nn.ConvTranspose): _convolution,
    # Yields the kernel of one gate of an `OptimizedLSTMCell`, which concatenates them.
    _method(recurrent.DenseParams): _dense,
}


def read(
    module: nn.Module,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Any,
    options: Options,
) -> Reading:
    """How a call that returned `outputs` met the kernel of `module`.

    Raises:
      NotCovered: If it is not known how.
    """
    name = type(module).__name__
    reader = _READERS.get(getattr(method, "func", method))
    if reader is None:
        msg = f"`{name}` is no layer class known here"
        raise NotCovered(msg)
    if isinstance(module, nn.ConvLocal):
        msg = f"`{name}` has a kernel of its own at every position"
        raise NotCovered(msg)
    kwargs = dict(kwargs)
    inputs, *rest = args or (kwargs.pop("inputs"),)
    return reader(module, outputs, options, jnp.asarray(inputs), *rest, **kwargs)
