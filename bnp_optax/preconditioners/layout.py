"""Where the kernels and biases of a tree are, and the shapes of what is kept for them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from bnp_optax._tree import BIAS, KERNEL, has_masked_nodes, is_named, named_leaves, quoted, sibling
from bnp_optax.capture.layer import Layer

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Slot:
    """A kernel in a parameter tree, and what is kept for it.

    Attributes:
      kernel: Name of the kernel leaf.
      bias: Name of the bias leaf that centering acts on, or None.
      stats_shape: Shape of the running statistics; broadcasts against the kernel.
      bias_shape: Shape of the bias when it is broadcast against the kernel: 1 on input axes.
    """

    kernel: str
    bias: str | None
    stats_shape: Shape
    bias_shape: Shape | None


def is_float(leaf: Any) -> bool:
    """Whether `leaf` is a real floating-point array."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def aligned_bias_shape(kernel: Shape, input_axes: tuple[int, ...]) -> Shape:
    """The kernel's shape with 1 on its input axes."""
    inputs = {axis % len(kernel) for axis in input_axes}
    return tuple(1 if axis in inputs else size for axis, size in enumerate(kernel))


def _guess_input_axes(kernel: Shape, bias: Shape | None) -> range:
    """Which axes of a Flax kernel are summed over, from shapes alone.

    A bias has the axes of its kernel less the input axes, which precede the features and follow
    stacked axes. Without one, all but the last axis are taken for input axes.
    """
    if bias is not None:
        n_inputs = len(kernel) - len(bias)
        for start in range(len(bias) - 1, -1, -1):
            if n_inputs > 0 and kernel[:start] + kernel[start + n_inputs :] == bias:
                return range(start, start + n_inputs)
    return range(len(kernel) - 1)


def _guess(name: str, leaves: Mapping[str, Any]) -> Slot:
    """A slot for a kernel of which only shapes are known yet.

    Wide enough for Dense, DenseGeneral, attention and ungrouped convolutions, stacked or not;
    statistics of another shape (grouped convolutions) replace it at the first update.
    """
    kernel = tuple(leaves[name].shape)
    bias = sibling(name, BIAS) if sibling(name, BIAS) in leaves else None
    axes = _guess_input_axes(kernel, tuple(leaves[bias].shape) if bias else None)
    # Three or more input axes are a convolution's, whose statistics do not vary in space.
    spatial = axes[:-1] if len(axes) >= 3 else range(0)
    kept = [axis < axes.stop and axis not in spatial for axis in range(len(kernel))]
    aligned = aligned_bias_shape(kernel, tuple(axes))
    if bias and math.prod(aligned) != math.prod(leaves[bias].shape):
        bias = None
    return Slot(
        kernel=name,
        bias=bias,
        stats_shape=tuple(d if keep else 1 for d, keep in zip(kernel, kept, strict=True)),
        bias_shape=aligned if bias else None,
    )


def slots(tree: Any, layers: Mapping[str, Layer] | None) -> list[Slot]:
    """The kernels of `tree` that are preconditioned: those of `layers`, else every `kernel`.

    Raises:
      ValueError: If a kernel is complex, or `layers` names one that `tree` has not.
    """
    leaves = named_leaves(tree)
    if layers is None:
        named = [name for name, leaf in leaves.items() if is_named(name, KERNEL)]
        names = [name for name in named if len(leaves[name].shape) >= 2]
    else:
        names = [name for name in layers if name in leaves]
        missing = [name for name in layers if name not in leaves]
        if missing and leaves and not has_masked_nodes(tree):
            msg = (
                f"`layers` has {quoted(missing)}, which the parameters have not; their leaves "
                f"are {quoted(leaves)}. Call `find_layers` on the `params` that the optimizer gets."
            )
            raise ValueError(msg)
    for name in names:
        if jnp.issubdtype(leaves[name].dtype, jnp.complexfloating):
            msg = (
                f"`{name}` is complex ({leaves[name].dtype}); the statistics of its inputs are "
                "defined for real kernels only. Leave it out with `optax.masked` or `layers=`."
            )
            raise ValueError(msg)
    names = [name for name in names if is_float(leaves[name])]
    if layers is None:
        return [_guess(name, leaves) for name in names]
    return [_slot(layers[name], leaves) for name in names]


def _slot(layer: Layer, leaves: Mapping[str, Any]) -> Slot:
    bias = layer.bias if layer.bias in leaves else None
    aligned = aligned_bias_shape(layer.kernel_shape, layer.input_axes) if bias else None
    return Slot(layer.kernel, bias, layer.stats_shape, aligned)
