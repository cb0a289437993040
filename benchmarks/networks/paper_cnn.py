"""The paper's convolutional network of five layers."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.networks.small import Norm, Normalize


class PaperCNN(nn.Module):
    """Three convolutions and two dense layers, with ReLU and max-pooling.

    The network of the JMLR paper's Figure 5: 3 x 3 kernels without padding, the first two
    convolutions followed by pooling of 2 x 2, kernels drawn from Glorot's uniform distribution.

    Attributes:
      features: Channels of each convolution.
      hidden: Width of the dense layer before the output.
      classes: Width of the output.
      norm: Normalization after each hidden activation, before pooling.
      steps: Length of the run, as in `Normalize`.
      convolution: What `nn.Conv` calls, such as `convolve_patches`; None for XLA's convolution.
    """

    features: Sequence[int] = (32, 64, 32)
    hidden: int = 64
    classes: int = 10
    norm: Norm = "none"
    steps: int = 1
    convolution: Callable[..., Any] | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "n height width c"], train: bool = False
    ) -> Float[Array, "n classes"]:
        """Logits of `x`."""
        init = nn.initializers.glorot_uniform()
        for i, width in enumerate(self.features):
            conv = nn.Conv(
                width,
                (3, 3),
                padding="VALID",
                kernel_init=init,
                conv_general_dilated=self.convolution,
            )
            x = Normalize(self.norm, self.steps)(nn.relu(conv(x)), train)
            if i < len(self.features) - 1:
                x = pool(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, kernel_init=init)(x))
        x = Normalize(self.norm, self.steps)(x, train)
        return nn.Dense(self.classes, kernel_init=init)(x)


def pool(x: Float[Array, "n height width c"]) -> Float[Array, "n rows columns c"]:
    """The largest of each 2 x 2 window; an odd last row or column is dropped.

    By pairs: with the derivative of `nn.max_pool`, a step of `PaperCNN` takes 1.6 times as long
    on CPUs.
    """
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    x = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(x[:, :, ::2], x[:, :, 1::2])
