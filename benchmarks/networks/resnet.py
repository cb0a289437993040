"""Residual networks: the paper's ResNet-110 for CIFAR, and ResNet-18 for ImageNet."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.networks.small import Norm, Normalize

# How a skip changes its shape: by every other pixel and channels of zeros, or by a convolution.
Shortcut = Literal["pad", "projection"]
_SHORTCUTS = ("pad", "projection")


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the blocks of a network are made of.

    Attributes:
      norm: Which normalization.
      steps: Length of the run, as in `Normalize`.
      group_size: Channels of a group, as in `Normalize`.
      init_scale: Factor of He's normal initialization.
      convolution: What `nn.Conv` calls; None for XLA's convolution.
    """

    norm: Norm
    steps: int
    group_size: int
    init_scale: float
    convolution: Callable[..., Any] | None

    @property
    def kernel_init(self) -> nn.initializers.Initializer:
        """Normal, with the standard deviation `init_scale` sqrt(2 / fan-in)."""
        return nn.initializers.variance_scaling(2 * self.init_scale**2, "fan_in", "normal")

    def conv(self, channels: int, size: int = 3, stride: int = 1) -> nn.Conv:
        """A convolution of odd size, with a bias and as much padding on every side."""
        return nn.Conv(
            channels,
            (size, size),
            strides=stride,
            padding=size // 2,
            kernel_init=self.kernel_init,
            conv_general_dilated=self.convolution,
        )

    def normalize(self, x: Float[Array, "n *d c"], train: bool) -> Float[Array, "n *d c"]:
        """A new normalization of `x`."""
        return Normalize(self.norm, self.steps, self.group_size)(x, train)


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a skip.

    Attributes:
      parts: What it is made of.
      channels: Channels of its output.
      train: Whether normalizations take the batch's moments.
      stride: Of its first convolution.
      preactivation: Normalization and ReLU before each convolution, none after the sum.
      shortcut: How the skip changes its shape where it has to.
    """

    parts: Parts
    channels: int
    train: bool
    stride: int = 1
    preactivation: bool = False
    shortcut: Shortcut = "pad"

    @nn.compact
    def __call__(
        self, x: Float[Array, "n height width c"], _: None = None
    ) -> tuple[Float[Array, "n rows columns channels"], None]:
        """The form that `nn.scan` takes: a carry, and nothing scanned over."""
        parts, skip = self.parts, x
        first = parts.conv(self.channels, stride=self.stride)
        second = parts.conv(self.channels)
        if self.preactivation:
            x = nn.relu(parts.normalize(x, self.train))
            # A projection takes what the convolutions take (He et al., 2016b); an identity not.
            skip = self._skip(x if self.shortcut == "projection" and self._reshapes(x) else skip)
            x = nn.relu(parts.normalize(first(x), self.train))
            return skip + second(x), None
        x = nn.relu(parts.normalize(first(x), self.train))
        x = parts.normalize(second(x), self.train)
        return nn.relu(x + self._skip(skip)), None

    def _reshapes(self, x: Float[Array, "n height width c"]) -> bool:
        return self.stride != 1 or x.shape[-1] != self.channels

    def _skip(self, x: Float[Array, "n height width c"]) -> Float[Array, "n rows columns channels"]:
        if not self._reshapes(x):
            return x
        if self.shortcut == "pad":
            x = x[:, :: self.stride, :: self.stride]
            extra = self.channels - x.shape[-1]
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))
        x = self.parts.conv(self.channels, 1, self.stride)(x)
        return x if self.preactivation else self.parts.normalize(x, self.train)


class CifarResNet(nn.Module):
    """Residual network of 6 n + 2 layers: three stages of n blocks, of 16, 32 and 64 channels.

    All convolutions have biases, also before a normalization that removes them: BNP centers only
    the inputs of layers that have one. The equal blocks of a stage are run by `nn.scan`, so their
    kernels are stacked; a gradient of 110 layers compiles in a third of the time. On CPUs, XLA's
    own convolution is slow inside of it: pass `convolve_patches`.

    Source: He et al. (2016a), Section 4.2, and He et al. (2016b) for `preactivation`.

    Attributes:
      depth: Number of layers, 6 n + 2.
      width: Factor of the channels.
      classes: Width of the output.
      norm: Normalization where He et al. have batch normalization.
      steps: Length of the run, as in `Normalize`.
      preactivation: Normalization and ReLU before each convolution instead of after it.
      shortcut: `'pad'` (option A of He et al., without parameters), or `'projection'` (option B).
      group_size: Channels of a group, as in `Normalize`; the paper's is 4.
      init_scale: Factor of He's normal initialization; the paper's for BNP with groups is 0.1 on
        CIFAR-10, 0.4 on CIFAR-100.
      convolution: What `nn.Conv` calls, such as `convolve_patches`; None for XLA's convolution.
    """

    depth: int = 110
    width: int = 1
    classes: int = 10
    norm: Norm = "none"
    steps: int = 1
    preactivation: bool = False
    shortcut: Shortcut = "pad"
    group_size: int = 4
    init_scale: float = 1.0
    convolution: Callable[..., Any] | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "n height width c"], train: bool = False
    ) -> Float[Array, "n classes"]:
        """Logits of `x`.

        Raises:
          ValueError: If the depth is not 6 n + 2, or there is no such shortcut.
        """
        if self.depth < 8 or (self.depth - 2) % 6:
            msg = f"`depth` must be 6 n + 2 with n >= 1, such as 20 or 110; got {self.depth}"
            raise ValueError(msg)
        if self.shortcut not in _SHORTCUTS:
            msg = f"`shortcut` must be one of {_SHORTCUTS}, got {self.shortcut!r}"
            raise ValueError(msg)
        parts = Parts(self.norm, self.steps, self.group_size, self.init_scale, self.convolution)
        options = {"preactivation": self.preactivation, "shortcut": self.shortcut}
        n_blocks = (self.depth - 2) // 6

        x = parts.conv(16 * self.width)(x)
        if not self.preactivation:
            x = nn.relu(parts.normalize(x, train))
        for stage in range(3):
            channels, n_equal = 16 * self.width * 2**stage, n_blocks
            if stage:
                x, _ = Block(parts, channels, train, 2, **options, name=f"down_{stage}")(x)
                n_equal -= 1
            if n_equal:
                blocks = nn.scan(
                    Block,
                    variable_axes={"params": 0, "batch_stats": 0},
                    split_rngs={"params": True},
                    length=n_equal,
                )
                x, _ = blocks(parts, channels, train, **options, name=f"stage_{stage}")(x, None)
        if self.preactivation:
            x = nn.relu(parts.normalize(x, train))
        return nn.Dense(self.classes, kernel_init=parts.kernel_init)(jnp.mean(x, axis=(1, 2)))


class ResNet18(nn.Module):
    """Residual network of 18 layers for images of about 224 x 224 pixels.

    A 7 x 7 convolution and max-pooling, each of stride 2, then four stages of two blocks, with
    projections where the shape changes. All convolutions have biases, as in `CifarResNet`.

    Source: He et al. (2016a), Table 1.

    Attributes:
      width: Channels of the first stage; the others have twice as many as the one before.
      classes: Width of the output.
      norm: Normalization after each convolution.
      steps: Length of the run, as in `Normalize`.
      group_size: Channels of a group, as in `Normalize`; the paper's is 32.
      init_scale: Factor of He's normal initialization.
      convolution: What `nn.Conv` calls, such as `convolve_patches`; None for XLA's convolution.
    """

    width: int = 64
    classes: int = 1000
    norm: Norm = "none"
    steps: int = 1
    group_size: int = 32
    init_scale: float = 1.0
    convolution: Callable[..., Any] | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "n height width c"], train: bool = False
    ) -> Float[Array, "n classes"]:
        """Logits of `x`."""
        parts = Parts(self.norm, self.steps, self.group_size, self.init_scale, self.convolution)
        x = nn.relu(parts.normalize(parts.conv(self.width, 7, 2)(x), train))
        padding: Any = ((1, 1), (1, 1))  # Flax takes it, but declares a string.
        x = nn.max_pool(x, (3, 3), (2, 2), padding)
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                channels = self.width * 2**stage
                x, _ = Block(parts, channels, train, stride, shortcut="projection")(x)
        return nn.Dense(self.classes, kernel_init=parts.kernel_init)(jnp.mean(x, axis=(1, 2)))
