"""What is known of a layer before any number is computed."""

import dataclasses
import math


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

    @property
    def fan_in(self) -> int:
        """Number of inputs of one output unit: n of a dense layer, k^2 c of a convolution."""
        return math.prod(self.kernel_shape[axis] for axis in self.input_axes)

    @property
    def q_squared(self) -> float:
        """q^2 = max(fan_in / N, sqrt(positions)) of Alg. 2 and 3, N being that of one call."""
        batch_size = self.count / self.positions
        return max(self.fan_in / batch_size, math.sqrt(self.positions)) if batch_size else 1.0
