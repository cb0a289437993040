"""Statistics of what a kernel multiplies: the mean and variance of a layer's inputs."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bnp_optax import sketches

_SPACING = float(jnp.finfo(jnp.float32).eps)
# Below this multiple of E[m^2], E[m^2] - E[m]^2 is rounding, not variance.
_ROUNDING = 2 * _SPACING
# The same for E[m m^T], of averages of some batches.
_ROUNDING_OF_OUTER = 8 * _SPACING

Shape = tuple[int, ...]
Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A kernel, its bias, and how inputs meet the kernel. Static: all of it is known when tracing.

    Axes are those of the kernel as `params` holds it, counted from the end: a Dense kernel of shape
    (in, out) has `input_axes=(-2,)`, a convolution's (height, width, in, out) has (-4, -3, -2).

    Attributes:
      kernel: Name of the kernel leaf, such as `'Dense_0/kernel'`.
      bias: Name of the bias that is added to the kernel's product, or None.
      input_axes: Axes of the kernel that are summed over.
      positions: Output positions that share the kernel: 1 for dense layers, height x width of the
        output for a convolution.
      stats_axes: Axes along which the statistics vary; elsewhere they have size 1. None stands for
        `input_axes`. A convolution's statistics do not vary in space: (-2,). A grouped one's
        differ from group to group: (-2, -1). Stacked layers add the axis that they are stacked on.
      bias_axes: For each axis of the bias, the axis of the kernel that it runs along. None stands
        for the kernel's axes that are not input axes, in their order.
      kernel_shape: Shape of the kernel, stacked axes included; what the properties below need.
      kind: What multiplies, such as `'Dense'`, `'Conv'` or `'Embed'`; only for reading.
      blocks: Axes of the kernel, each with a number, along which so many layers lie that meet
        inputs of their own: (axis, its size) of an axis that layers are stacked on, (axis of the
        features, number of groups) of a grouped convolution. None stands for all `stats_axes` that
        are no input axes, with their sizes.
    """

    kernel: str
    bias: str | None
    input_axes: Axes
    positions: int = 1
    stats_axes: Axes | None = None
    bias_axes: Axes | None = None
    kernel_shape: Shape = ()
    kind: str = ""
    blocks: tuple[tuple[int, int], ...] | None = None

    @property
    def stats_shape(self) -> Shape:
        """Shape of the statistics; broadcasts against the kernel's."""
        axes = self.input_axes if self.stats_axes is None else self.stats_axes
        varying = {axis % len(self.kernel_shape) for axis in axes}
        return tuple(size if axis in varying else 1 for axis, size in enumerate(self.kernel_shape))

    @property
    def fan_in(self) -> int:
        """Number of inputs of one output unit: n of a dense layer, k^2 c of a convolution."""
        return math.prod(self.kernel_shape[axis] for axis in self.input_axes)

    @property
    def block_layout(self) -> tuple[Axes, tuple[tuple[int, int], ...]]:
        """The input axes, and the axes of blocks with their numbers; counted from 0, in order."""
        ndim = len(self.kernel_shape)
        inputs = tuple(sorted(axis % ndim for axis in self.input_axes))
        blocks = self.blocks
        if blocks is None:
            axes = self.input_axes if self.stats_axes is None else self.stats_axes
            others = {axis % ndim for axis in axes} - set(inputs)
            blocks = tuple((axis, self.kernel_shape[axis]) for axis in others)
        return inputs, tuple(sorted((axis % ndim, number) for axis, number in blocks))

    @property
    def block_shape(self) -> Shape:
        """Leading axes of the second moments: (groups,) of a grouped convolution, () of most."""
        return tuple(number for _, number in self.block_layout[1])

    def align_bias(self, bias: Array) -> Array:
        """`bias` transposed and reshaped so that it broadcasts against the kernel."""
        ndim, order = len(self.kernel_shape), self._bias_order(bias.ndim)
        if self.bias_axes is None:
            absent = {axis % ndim for axis in self.input_axes}
        else:
            absent = set(range(ndim)) - {axis % ndim for axis in self.bias_axes}
        shape = tuple(1 if axis in absent else n for axis, n in enumerate(self.kernel_shape))
        return jnp.transpose(bias, order).reshape(shape)

    def restore_bias(self, aligned: Array, bias_shape: Shape) -> Array:
        """What `align_bias` made of a bias of shape `bias_shape`, back in its own layout."""
        order = self._bias_order(len(bias_shape))
        in_order = aligned.reshape(tuple(bias_shape[axis] for axis in order))
        return jnp.transpose(in_order, sorted(range(len(order)), key=order.__getitem__))

    def _bias_order(self, ndim: int) -> list[int]:
        """The axes of the bias in the order of the kernel's axes that they run along."""
        axes = list(range(ndim))
        along = self.bias_axes
        return axes if along is None else sorted(axes, key=lambda i: along[i])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        *("mean", "var", "sq_mean", "count"),
        *("second_moment", "covariance", "rows_mean"),
    ),
    meta_fields=("layer",),
)
@dataclasses.dataclass(frozen=True)
class LayerStats:
    """Input statistics of one kernel, in float32, in a shape that broadcasts against the kernel.

    A Dense kernel (in, out) has statistics (in, 1), a convolution (k, k, in, out) has
    (1, 1, in, 1), a grouped one (1, 1, in/groups, out); layers stacked by `nn.scan` or
    `nn.vmap` keep the axis that they are stacked on.

    Linear averages of statistics, by `jax.lax.pmean` over devices or `jax.tree.map` over
    microbatches, are statistics of the union of the batches: `total_variance` then adds the
    variance of the batch means. (In float32 that part is resolved down to about 1e-6 of the
    squared mean; the variance within a batch is accurate at any mean.)

    Attributes:
      mean: Mean of the inputs that each kernel entry multiplies.
      var: Biased variance of the same, within the batch.
      sq_mean: Square of `mean`, rounded down; after averaging over batches, the mean of the
        squares.
      count: Batch size x output positions x calls, a scalar. 0 means that the layer did not run.
        After averaging, that of one batch: give `bnp` the whole `batch_size`, which q needs
        (`multi_steps` adds the counts up).
      layer: The kernel, its bias and their axes; static.
      second_moment: E[h h^T], of shape (n, n), where h are the layer's n = fan-in inputs in the
        order of the kernel's input axes (of a convolution the patches that the kernel meets), and
        the mean is over rows, or a sample of them. (groups, n, n) of a grouped convolution; layers
        stacked by scan or vmap have leading axes. In a layer of more inputs than
        `second_moment_fan_in`, not the matrix but its products with 31 fixed vectors and its
        diagonal, (32, n), which averages alike and has its leading eigenvectors. None unless
        `second_moments` asked for it.
      covariance: Covariance of the same rows within the batch, about their own mean: in float32
        `second_moment` less the square of the mean has not its digits where |mean| >> deviation.
      rows_mean: Mean of the same rows, (n,). Not always `mean`, which is of all rows, and of a
        convolution, of the feature map's channels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jnp.array([[1.0, 0.0], [3.0, 0.0]])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> _, _, stats = bnp_optax.value_and_grad(loss_fn)(params)
      >>> stats["kernel"].mean.ravel().tolist(), stats["kernel"].var.ravel().tolist()
      ([2.0, 0.0], [1.0, 0.0])
      >>> float(stats["kernel"].count), stats["kernel"].layer.bias
      (2.0, 'bias')
    """

    mean: Float[Array, "..."]
    var: Float[Array, "..."]
    sq_mean: Float[Array, "..."]
    count: Float[Array, ""]
    layer: Layer
    second_moment: Float[Array, "..."] | None = None
    covariance: Float[Array, "..."] | None = None
    rows_mean: Float[Array, "..."] | None = None

    @classmethod
    def of_batch(
        cls, mean: Array, var: Array, count: Array, layer: Layer, **second: Array
    ) -> "LayerStats":
        """Statistics of a single batch, whose `sq_mean` is the square of its mean."""
        # Or the compiler may compute the mean twice, see `square_below`.
        mean = lax.optimization_barrier(mean)
        return cls(mean, var, square_below(mean), count, layer, **second)

    @property
    def total_variance(self) -> Float[Array, "..."]:
        """Variance within batches plus that between their means; exactly `var` for one batch."""
        return total_variance(self.mean, self.var, self.sq_mean)

    @property
    def total_covariance(self) -> Float[Array, "..."] | None:
        """Covariance within batches plus that between their means; that within for one batch.

        As of `total_variance`, the part between is resolved to about 1e-6 of the second moment.
        Without `covariance` it is `second_moment` less the outer product of the mean. None where
        no second moments were captured.
        """
        moment, within, mean = self.second_moment, self.covariance, self.rows_mean
        if moment is None:
            return None
        if within is None or mean is None:
            mean = self.input_mean
            return moment - sketches.outer(mean, moment)
        between = (moment - within) - sketches.outer(mean, moment)
        size = sketches.outer_size(jnp.sqrt(sketches.diagonal(moment)), moment)
        is_rounding = jnp.abs(between) <= _ROUNDING_OF_OUTER * size
        return within + jnp.where(is_rounding, 0.0, between)

    @property
    def input_mean(self) -> Float[Array, "..."]:
        """Mean of the inputs that `second_moment` is of, (n,), with its leading axes."""
        if self.rows_mean is not None:
            return self.rows_mean
        inputs, blocks = self.layer.block_layout
        mean, full = self.mean, list(self.mean.shape)
        for axis in inputs:
            full[axis] = self.layer.kernel_shape[axis]
        for axis, number in blocks:
            if full[axis] > 1:
                mean = lax.slice_in_dim(mean, 0, None, full[axis] // number, axis=axis)
            full[axis] = number
        apart = (*(axis for axis, _ in blocks), *inputs)
        rest = [axis for axis in range(len(full)) if axis not in apart]
        arranged = jnp.transpose(jnp.broadcast_to(mean, full), (*apart, *rest))
        return arranged.reshape(*self.layer.block_shape, self.layer.fan_in)

    @property
    def batch_size(self) -> Float[Array, ""]:
        """N, the number of examples."""
        return self.count / self.layer.positions


def square_below(mean: Array) -> Array:
    """`LayerStats.sq_mean` of one batch, whose mean is behind a barrier.

    `sq_mean - mean**2` must not be positive by rounding, however it is evaluated (fused, say). So
    the compiler must not compute the mean twice, and the square goes down.
    """
    return mean**2 * (1.0 - _SPACING)


def total_variance(mean: Array, var: Array, sq_mean: Array) -> Array:
    """`LayerStats.total_variance`, of its fields."""
    between = sq_mean - mean**2
    return var + jnp.where(between > _ROUNDING * sq_mean, between, 0.0)
