"""Where the kernels and biases of a tree are, and the shapes of what is kept for them."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from bnp_optax._tree import BIAS, KERNEL, absent, is_named, named_leaves, quoted, sibling
from bnp_optax.statistics import Layer

Shape = tuple[int, ...]
# Layers as `find_layers` gives them, names of kernels, or a condition on these names.
Layers = Mapping[str, Layer] | Collection[str] | Callable[[str], bool]


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
    bias_shape: Shape


def kernels(tree: Any, layers: Layers | None) -> dict[str, str | None]:
    """The kernels of `tree` that are preconditioned, each with its bias or None.

    They are those of `layers`; without it, or where it only says which names to choose, every real
    leaf named `kernel` with two or more axes.

    Raises:
      ValueError: If a kernel is complex, or `layers` names one that `tree` has not.
    """
    leaves = named_leaves(tree)
    if isinstance(layers, Mapping):
        pairs = {name: layer.bias for name, layer in layers.items()}
    else:
        named = [name for name, leaf in leaves.items() if is_named(name, KERNEL)]
        pairs = {name: sibling(name, BIAS) for name in named if len(leaves[name].shape) >= 2}
        if callable(layers):
            pairs = {name: bias for name, bias in pairs.items() if layers(name)}
        elif layers is not None:
            _check_are_kernels(layers, pairs, leaves)
            pairs = {name: bias for name, bias in pairs.items() if name in layers}
    if layers is not None and not callable(layers):
        missing = absent(layers, tree) if leaves else []
        if missing:
            msg = (
                f"`layers` has {quoted(missing)}, which the parameters have not; their leaves "
                f"are {quoted(leaves)}. Call `find_layers` on the `params` that the optimizer gets."
            )
            raise ValueError(msg)
    present = {name: bias for name, bias in pairs.items() if name in leaves}
    for name in present:
        shape = tuple(leaves[name].shape)
        if isinstance(layers, Mapping) and layers[name].kernel_shape != shape:
            msg = (
                f"`layers` has `{name}` with shape {layers[name].kernel_shape}, but the parameters "
                f"have it with shape {shape}. Call `find_layers` on the `params` that the "
                "optimizer gets."
            )
            raise ValueError(msg)
        if jnp.issubdtype(leaves[name].dtype, jnp.complexfloating):
            msg = (
                f"`{name}` is complex ({leaves[name].dtype}); the statistics of its inputs are "
                "defined for real kernels only. Leave it out with `optax.masked` or `layers=`."
            )
            raise ValueError(msg)
    # A bias may be hidden by a mask; without it, the layer cannot be centered.
    return {
        name: bias if bias in leaves else None
        for name, bias in present.items()
        if jnp.issubdtype(leaves[name].dtype, jnp.floating)
    }


def _check_are_kernels(
    names: Collection[str], kernels: Mapping[str, Any], leaves: Mapping[str, Any]
) -> None:
    """Raise if names alone do not tell how a leaf is used."""
    others = [name for name in names if name in leaves and name not in kernels]
    if others:
        msg = (
            f"`layers` names {quoted(others)}, of which the name does not tell how the inputs meet "
            f"it: only leaves named `{KERNEL}` with two or more axes may be given by name. Pass "
            "that part of `bnp_optax.find_layers(loss_fn, params, ...)`."
        )
        raise ValueError(msg)


def aligned_bias_shape(kernel: Shape, input_axes: Iterable[int]) -> Shape:
    """The kernel's shape with 1 on its input axes."""
    inputs = {axis % len(kernel) for axis in input_axes}
    return tuple(1 if axis in inputs else size for axis, size in enumerate(kernel))


def initial_slots(params: Any, layers: Layers | None) -> list[Slot]:
    """What to keep for each kernel before any statistics have come.

    With layers from `find_layers` this is exact. Without, it is what Flax's conventions say, wide
    enough for Dense, DenseGeneral, attention and ungrouped convolutions, stacked or not;
    statistics of another shape, such as those of grouped convolutions, change it at the first
    update.
    """
    leaves = named_leaves(params)
    slots = []
    for name, bias in kernels(params, layers).items():
        kernel = tuple(leaves[name].shape)
        if isinstance(layers, Mapping):
            axes, shape = layers[name].input_axes, layers[name].stats_shape
        else:
            guess = _guess_input_axes(kernel, tuple(leaves[bias].shape) if bias else None)
            axes, shape = guess, _guess_stats_shape(kernel, guess)
        slots.append(Slot(name, bias, shape, aligned_bias_shape(kernel, axes)))
    return slots


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


def _guess_stats_shape(kernel: Shape, axes: range) -> Shape:
    # Three or more input axes are a convolution's, whose statistics do not vary in space.
    spatial = axes[:-1] if len(axes) >= 3 else range(0)
    return tuple(
        size if axis < axes.stop and axis not in spatial else 1 for axis, size in enumerate(kernel)
    )
