"""What is known of a layer before any number is computed."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bnp_optax._tree import BIAS, sibling
from bnp_optax.statistics import Layer as NewLayer, LayerStats


@dataclasses.dataclass(frozen=True)
class Layer:
    """A kernel, its bias, and how the layer's inputs meet the kernel.

    Attributes:
      kernel: Name of the kernel leaf, such as `'Dense_0/kernel'`.
      bias: Name of the bias leaf, or None.
      kind: Class of the layer, such as `'Conv'`.
      kernel_shape: Shape of the kernel, stacked axes included.
      stats_shape: Shape of its statistics; broadcasts against `kernel_shape`.
      stacked_axes: Axes of the kernel along which `nn.scan` or `nn.vmap` stacks layers.
      input_axes: Axes of the kernel that are summed over, negative.
      positions: Output positions that share the kernel; 1 for dense layers.
      count: Batch size x output positions of one call, as traced.
      engine: What captures its statistics, `'linen'` or `'jaxpr'`.
    """

    kernel: str
    bias: str | None
    kind: str
    kernel_shape: tuple[int, ...]
    stats_shape: tuple[int, ...]
    stacked_axes: tuple[int, ...]
    input_axes: tuple[int, ...]
    positions: int
    count: int
    engine: str

    @property
    def fan_in(self) -> int:
        """Number of inputs of one output unit: n of a dense layer, k^2 c of a convolution."""
        return math.prod(self.kernel_shape[axis] for axis in self.input_axes)

    @property
    def q_squared(self) -> float:
        """q^2 = max(fan_in / N, sqrt(positions)) of Alg. 2 and 3, N being that of one call."""
        batch_size = self.count / self.positions
        return max(self.fan_in / batch_size, math.sqrt(self.positions)) if batch_size else 1.0


def statistics(mean, var, sq_mean, count, **static):
    kernel_shape = static.pop("kernel_shape", ())
    nd = len(kernel_shape) or jnp.ndim(mean)
    axes = tuple(i - nd for i in range(nd) if jnp.shape(mean)[i] > 1)
    layer = NewLayer(**static, stats_axes=axes, kernel_shape=kernel_shape)
    stats = LayerStats.of_batch(mean, var, count, layer)
    return stats if sq_mean is None else dataclasses.replace(stats, sq_mean=sq_mean)


def public(layer):
    nd = len(layer.kernel_shape)
    axes = tuple(i - nd for i in range(nd) if layer.stats_shape[i] > 1)
    return NewLayer(layer.kernel, layer.bias, layer.input_axes, layer.positions, axes, None, layer.kernel_shape, layer.kind)


def idle_statistics(name, params):
    kernel, bias = params[name], sibling(name, BIAS)
    zeros = jnp.zeros((*kernel.shape[:-1], 1), jnp.float32)
    return statistics(zeros, zeros, zeros, jnp.zeros((), jnp.float32), kernel=name, bias=bias if bias in params else None,
        input_axes=tuple(range(-kernel.ndim, -1)), positions=1, kernel_shape=tuple(kernel.shape))


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The JAX arrays of `tree`, and a function that puts others in their place."""
    leaves, treedef = jax.tree.flatten(tree)
    is_array = [isinstance(x, jax.Array | jax.ShapeDtypeStruct) for x in leaves]

    def rebuild(arrays: list[Any]) -> Any:
        rest: Iterator[Any] = iter(arrays)
        return treedef.unflatten(
            [next(rest) if array else x for x, array in zip(leaves, is_array, strict=True)]
        )

    return [x for x, array in zip(leaves, is_array, strict=True) if array], rebuild
