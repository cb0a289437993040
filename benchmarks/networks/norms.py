"""Normalizations that Flax lacks: batch renormalization, and batch normalization improved."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# Ioffe's schedule, as shares of his 40k steps: where the clips open, and where they are open.
_START, _R_END, _D_END = 5 / 40, 40 / 40, 25 / 40


class BatchRenorm(nn.Module):
    """Batch renormalization: the batch's moments, corrected toward the running ones.

    With the batch's mean m and standard deviation s, and the running M and S before it, training
    takes

        y = ((x - m) / s r + d) gamma + beta,    r = clip(s / S, 1 / r_max, r_max),
                                                 d = clip((m - M) / S, -d_max, d_max),

    where r and d are constants to the gradient. Without the clips that is (x - M) / S, which is
    what evaluation takes. The clips open on Ioffe's schedule (see `renorm_clips`), with the steps
    that the collection `batch_stats` counts. Moments are taken over all axes but the last.

    Source: Ioffe (2017), Batch Renormalization, Algorithm 1.

    Attributes:
      steps: Length of the run, which the schedule is stretched to.
      momentum: Of the running mean and standard deviation; Ioffe's is 0.99.
      r_max: The last clip of r, at least 1.
      d_max: The last clip of d.
      epsilon: Added to variances.
    """

    steps: int
    momentum: float = 0.99
    r_max: float = 3.0
    d_max: float = 5.0
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "n *d c"], train: bool) -> Float[Array, "n *d c"]:
        """Normalize `x`."""
        axes, channels = tuple(range(x.ndim - 1)), x.shape[-1:]
        row = (1,) * len(axes) + channels
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        deviation = self.variable("batch_stats", "deviation", jnp.ones, channels)
        step = self.variable("batch_stats", "step", jnp.zeros, (), jnp.int32)
        running_m, running_s = mean.value.reshape(row), deviation.value.reshape(row)
        if train:
            m = jnp.mean(x, axes, keepdims=True)
            s = jnp.sqrt(jnp.var(x, axes, keepdims=True) + self.epsilon)
            r_max, d_max = renorm_clips(step.value, self.steps, self.r_max, self.d_max)
            r = lax.stop_gradient(jnp.clip(s / running_s, 1 / r_max, r_max))
            d = lax.stop_gradient(jnp.clip((m - running_m) / running_s, -d_max, d_max))
            y = (x - m) / s * r + d
            if not self.is_initializing():
                _average(mean, m, self.momentum)
                _average(deviation, s, self.momentum)
                step.value = step.value + 1
        else:
            y = (x - running_m) / running_s
        return _scale_and_shift(self, y)


def renorm_clips(
    step: Int[Array, ""] | int, steps: int, r_max: float, d_max: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Clips of r and d at a step: 1 and 0 for an eighth of the run, then linear.

    They reach `d_max` at 25 / 40 of the run, and `r_max` at its end.

    Args:
      step: Number of steps before this one.
      steps: Length of the run.
      r_max: The last clip of r.
      d_max: The last clip of d.
    """

    def ramp(end: float) -> Array:
        share = jnp.asarray(step, jnp.float32) / steps
        return jnp.clip((share - _START) / (end - _START), 0.0, 1.0)

    return 1 + (r_max - 1) * ramp(_R_END), d_max * ramp(_D_END)


class FourThings(nn.Module):
    """Batch normalization with the improvements of Summers and Dinneen that a layer can make.

    - Large batches, of 2 `ghost_size` examples or more, are normalized by channel in ghost batches
      of `ghost_size` consecutive examples, or of the next larger number that divides the batch.
    - Smaller ones combine batch and group normalization: moments are taken over the whole batch
      and over groups of `group_size` channels, so that one example, or one row, has a variance.
    - Evaluation weighs the example in: with its own moments m_1 = E x and m_2 = E x², over its
      positions and over the channels of a group where training grouped them, it normalizes by
      w m_i + (1 - w) (running m_i).

    The fourth one, weight decay on gamma and beta, is the optimizer's. Running averages are those
    of m_1 and m_2 by channel. The collection `batch_stats` also remembers whether training grouped
    channels, since batches in evaluation have other sizes.

    Source: Summers and Dinneen (2020), Four Things Everyone Should Know to Improve Batch
    Normalization, and the layer that they published with it.

    Attributes:
      ghost_size: Examples of a ghost batch.
      group_size: Channels of a group.
      weight: The example's weight w in evaluation, in [0, 1]; 0 leaves the running averages.
      momentum: Of the running averages.
      epsilon: Added to variances.
    """

    ghost_size: int = 16
    group_size: int = 4
    weight: float = 0.1
    momentum: float = 0.99
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "n *d c"], train: bool) -> Float[Array, "n *d c"]:
        """Normalize `x`.

        Raises:
          ValueError: If the groups do not divide the channels.
        """
        n, channels = x.shape[0], x.shape[-1]
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        square = self.variable("batch_stats", "square", jnp.ones, (channels,))
        grouped = self.variable("batch_stats", "grouped", jnp.zeros, (), jnp.bool)
        group = channels_per_group(channels, self.group_size)
        flat = x.reshape(n, -1, channels)
        if train:
            small = n < 2 * self.ghost_size
            y = self._by_parts(flat, n if small else self.ghost_size, group if small else 1)
            if not self.is_initializing():
                _average(mean, jnp.mean(flat, (0, 1)), self.momentum)
                _average(square, jnp.mean(flat**2, (0, 1)), self.momentum)
                grouped.value = jnp.full((), small)
        else:
            m_1 = self._mixed(flat, mean.value, grouped.value, group)
            m_2 = self._mixed(flat**2, square.value, grouped.value, group)
            # Rounding can make the difference negative.
            variance = jnp.maximum(m_2 - m_1**2, 0.0)
            y = (flat - m_1) * lax.rsqrt(variance + self.epsilon)
        return _scale_and_shift(self, y.reshape(x.shape))

    def _by_parts(self, x: Float[Array, "n d c"], part: int, group: int) -> Float[Array, "n d c"]:
        """`x` normalized within parts of the batch and groups of channels."""
        n, positions, channels = x.shape
        part = next(size for size in range(part, n + 1) if n % size == 0)
        parts = x.reshape(n // part, part, positions, channels // group, group)
        axes = (1, 2, 4)
        scale = lax.rsqrt(jnp.var(parts, axes, keepdims=True) + self.epsilon)
        return ((parts - jnp.mean(parts, axes, keepdims=True)) * scale).reshape(x.shape)

    def _mixed(
        self,
        x: Float[Array, "n d c"],
        running: Float[Array, " c"],
        grouped: Bool[Array, ""],
        group: int,
    ) -> Float[Array, "n 1 c"]:
        """The mean of `x` that evaluation takes: of an example's own and the running one."""
        own = jnp.mean(x, 1, keepdims=True)
        mixed = self.weight * own + (1 - self.weight) * running.reshape(1, 1, -1)
        by_group = jnp.mean(mixed.reshape(x.shape[0], 1, -1, group), -1)
        return jnp.where(grouped, jnp.repeat(by_group, group, -1), mixed)


def channels_per_group(channels: int, group_size: int) -> int:
    """Size of a group of channels: `group_size`, or all of them if there are fewer.

    Raises:
      ValueError: If groups of this size do not divide the channels.
    """
    size = min(group_size, channels)
    if size < 1 or channels % size:
        msg = (
            f"`group_size` must be a divisor of the {channels} channels, or larger than that; "
            f"got {group_size}"
        )
        raise ValueError(msg)
    return size


def _average(variable: Any, value: Array, momentum: float) -> None:
    """Move a running average toward the value of a batch."""
    old = variable.value
    variable.value = momentum * old + (1 - momentum) * value.reshape(old.shape)


def _scale_and_shift(module: nn.Module, x: Float[Array, "n *d c"]) -> Float[Array, "n *d c"]:
    """`x` times gamma plus beta, by channel."""
    row = (1,) * (x.ndim - 1) + x.shape[-1:]
    scale = module.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = module.param("bias", nn.initializers.zeros, x.shape[-1:])
    return x * scale.reshape(row) + bias.reshape(row)
