"""Small networks, plain or normalized after each hidden activation."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from benchmarks.networks.norms import BatchRenorm, FourThings, channels_per_group

ModelName = Literal["mlp", "cnn"]
Norm = Literal["none", "batch", "layer", "group", "renorm", "four"]

BATCH_NORM_MOMENTUM = 0.9


class Normalize(nn.Module):
    """Any normalization by its name, or none.

    Batch normalization evaluates with running averages, and so do its variants. Their momentum is
    0.9 where Flax's default is 0.99: in a few hundred steps the latter would still remember its
    start. Layer normalization takes its moments over all features of an example, positions
    included; group normalization does so for each group of channels.

    Attributes:
      norm: Which normalization.
      steps: Length of the run, for the schedule of batch renormalization.
      group_size: Channels of a group, for `'group'` and `'four'`; at most all of them.
    """

    norm: Norm
    steps: int = 1
    group_size: int = 4

    @nn.compact
    def __call__(self, x: Float[Array, "n *d c"], train: bool) -> Float[Array, "n *d c"]:
        """Normalize `x`."""
        if self.norm == "batch":
            return nn.BatchNorm(use_running_average=not train, momentum=BATCH_NORM_MOMENTUM)(x)
        if self.norm == "layer":
            return nn.LayerNorm(reduction_axes=tuple(range(1, x.ndim)), feature_axes=-1)(x)
        if self.norm == "group":
            size = channels_per_group(x.shape[-1], self.group_size)
            return nn.GroupNorm(num_groups=None, group_size=size)(x)
        if self.norm == "renorm":
            return BatchRenorm(self.steps, momentum=BATCH_NORM_MOMENTUM)(x, train)
        if self.norm == "four":
            four = FourThings(group_size=self.group_size, momentum=BATCH_NORM_MOMENTUM)
            return four(x, train)
        return x


class MLP(nn.Module):
    """Fully connected ReLU network.

    Attributes:
      hidden: Widths of the hidden layers.
      classes: Width of the output.
      norm: Normalization after each hidden activation: what the next layer gets is B(activation).
      steps: Length of the run, as in `Normalize`.
      kernel_init: Initializer of the kernels.
    """

    hidden: Sequence[int] = (64, 64)
    classes: int = 10
    norm: Norm = "none"
    steps: int = 1
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "n *d"], train: bool = False) -> Float[Array, "n classes"]:
        """Logits of `x`, which is flattened."""
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, kernel_init=self.kernel_init)(x))
            x = Normalize(self.norm, self.steps)(x, train)
        return nn.Dense(self.classes, kernel_init=self.kernel_init)(x)


class CNN(nn.Module):
    """Convolutional ReLU network: 3 x 3 kernels, strides in place of pooling, one dense layer.

    Attributes:
      features: Channels of each convolution.
      strides: Stride of each convolution.
      hidden: Width of the dense layer before the output.
      classes: Width of the output.
      norm: Normalization after each hidden activation.
      convolution: What `nn.Conv` calls, such as `convolve_patches`; None for XLA's convolution.
      steps: Length of the run, as in `Normalize`.
      kernel_init: Initializer of the kernels.
    """

    features: Sequence[int] = (8, 16)
    strides: Sequence[int] = (2, 2)
    hidden: int = 32
    classes: int = 10
    norm: Norm = "none"
    convolution: Callable[..., Any] | None = None
    steps: int = 1
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self, x: Float[Array, "n height width c"], train: bool = False
    ) -> Float[Array, "n classes"]:
        """Logits of `x`."""
        for width, stride in zip(self.features, self.strides, strict=True):
            conv = nn.Conv(
                width,
                (3, 3),
                strides=stride,
                kernel_init=self.kernel_init,
                conv_general_dilated=self.convolution,
            )
            x = Normalize(self.norm, self.steps)(nn.relu(conv(x)), train)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, kernel_init=self.kernel_init)(x))
        x = Normalize(self.norm, self.steps)(x, train)
        return nn.Dense(self.classes, kernel_init=self.kernel_init)(x)


def convolve_patches(
    inputs: Float[Array, "n height width c"],
    kernel: Float[Array, "k l c out"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "n rows columns out"]:
    """A convolution as one product of patches and kernel.

    For `nn.Conv(conv_general_dilated=convolve_patches)`. On CPUs, XLA's own convolution is several
    times slower inside `lax.scan` than outside, and under `jax.vmap` over kernels it becomes a
    grouped one, which is slower still; products are neither.

    Args:
      inputs: Images.
      kernel: Kernel, in Flax's layout.
      strides: Of the two spatial axes.
      padding: `'SAME'`, `'VALID'`, or (before, after) of each spatial axis.
      **options: The others of `lax.conv_general_dilated`, at their defaults.

    Raises:
      ValueError: For dilated or grouped convolutions.
    """
    dilations = (*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ()))
    if any(d != 1 for d in dilations) or options.get("feature_group_count", 1) != 1:
        msg = "`convolve_patches` does neither dilation nor groups; use XLA's convolution."
        raise ValueError(msg)
    rows, columns, _, out = kernel.shape
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(inputs.shape[1:3], (rows, columns), strides, padding)
    else:
        pads = padding
    x = jnp.pad(inputs, ((0, 0), *((before, after) for before, after in pads), (0, 0)))
    down, across = strides
    n_down = (x.shape[1] - rows) // down + 1
    n_across = (x.shape[2] - columns) // across + 1
    patches = [
        x[:, i : i + down * n_down : down, j : j + across * n_across : across]
        for i in range(rows)
        for j in range(columns)
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, out)
