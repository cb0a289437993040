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

from bnp_optax.statistics import moments


@dataclasses.dataclass(frozen=True)
class Reading:
    """One call of a layer, as far as its kernel is concerned.

    Attributes:
      inputs: What the kernel multiplies.
      reduce_axes: Axes of `inputs` that the statistics average over.
      arrange: Brings statistics, of `inputs` without `reduce_axes`, into the kernel's layout.
      input_axes: Axes of the kernel that are summed over, negative.
      positions: Output positions that share the kernel.
      count: Batch size x positions.
    """

    inputs: jax.Array
    reduce_axes: tuple[int, ...]
    arrange: Callable[[jax.Array], jax.Array]
    input_axes: tuple[int, ...]
    positions: int
    count: int

    def moments(self) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of the inputs in the kernel's layout."""
        mean, var = moments(self.inputs, self.reduce_axes)
        return self.arrange(mean), self.arrange(var)


class NotCovered(Exception):  # noqa: N818 - a result of looking at a layer, not a failure
    """A layer whose kernel cannot be preconditioned; the message says why."""


def _contraction(
    inputs: jax.Array, axis_of: tuple[int | None, ...], contracted: set[int]
) -> Reading:
    """A product in which kernel axis i meets input axis `axis_of[i]`, or none of them."""
    met = tuple(axis for axis in axis_of if axis is not None)
    reduce_axes = tuple(axis for axis in range(inputs.ndim) if axis not in met)
    order = tuple(sorted(met).index(axis) for axis in met)
    new_axes = tuple(i for i, axis in enumerate(axis_of) if axis is None)

    def arrange(stat: jax.Array) -> jax.Array:
        return jnp.expand_dims(jnp.transpose(stat, order), new_axes)

    return Reading(
        inputs=inputs,
        reduce_axes=reduce_axes,
        arrange=arrange,
        input_axes=tuple(i - len(axis_of) for i, axis in enumerate(axis_of) if axis in contracted),
        positions=1,
        count=math.prod(inputs.shape[axis] for axis in reduce_axes),
    )


def _dense(module: nn.Module, outputs: Any, inputs: jax.Array) -> Reading:
    last = inputs.ndim - 1
    return _contraction(inputs, (last, None), {last})


def _dense_general(module: nn.DenseGeneral, outputs: Any, inputs: jax.Array) -> Reading:
    def normalized(axes: Any) -> tuple[int, ...]:
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        return tuple(
            sorted(axis % inputs.ndim for axis in axes)
        )  # Flax's kernels have them sorted.

    axis, batch = normalized(module.axis), normalized(module.batch_dims)
    n_features = 1 if isinstance(module.features, int) else len(module.features)
    return _contraction(inputs, (*batch, *axis, *(None,) * n_features), set(axis))


def _einsum(
    module: nn.Einsum, outputs: Any, inputs: jax.Array, einsum_str: str | None = None
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
    return _contraction(inputs, axis_of, contracted)


def _convolution(module: nn.Conv | nn.ConvTranspose, outputs: Any, inputs: jax.Array) -> Reading:
    """(21) and (22): moments of the feature map, one per input channel."""
    n_spatial = 1 if isinstance(module.kernel_size, int) else len(module.kernel_size)
    n_batch = inputs.ndim - n_spatial - 1
    features, groups = module.features, getattr(module, "feature_group_count", 1)
    kernel_ndim = n_spatial + 2
    transposed = getattr(module, "transpose_kernel", False)

    def arrange(stat: jax.Array) -> jax.Array:
        # Output channels come group by group, and each meets the input channels of its group.
        by_group = stat.reshape(groups, -1).T
        per_output = by_group if groups == 1 else jnp.repeat(by_group, features // groups, axis=1)
        stat = per_output.T if transposed else per_output
        return jnp.expand_dims(stat, tuple(range(n_spatial)))

    spatial = tuple(range(-kernel_ndim, -2))
    positions = math.prod(outputs.shape[n_batch:-1])
    return Reading(
        inputs=inputs,
        reduce_axes=tuple(range(inputs.ndim - 1)),
        arrange=arrange,
        input_axes=(*spatial, -1 if transposed else -2),
        positions=positions,
        count=math.prod(inputs.shape[:n_batch]) * positions,
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
    return reader(module, outputs, jnp.asarray(inputs), *rest, **kwargs)
