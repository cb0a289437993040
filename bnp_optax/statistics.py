"""Statistics of what a kernel multiplies: the mean and variance of a layer's inputs."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Below this multiple of the float32 spacing, E[m^2] - E[m]^2 is rounding, not variance.
_ROUNDING = 2 * float(jnp.finfo(jnp.float32).eps)
# Sums of fewer float32 numbers keep their digits in any order.
MANY_ROWS = 2**14


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("mean", "var", "sq_mean", "count"),
    meta_fields=("kernel", "bias", "input_axes", "positions"),
)
@dataclasses.dataclass(frozen=True)
class LayerStats:
    """Input statistics of one kernel, in float32, in a shape that broadcasts against the kernel.

    A Dense kernel (in, out) has statistics (in, 1), a convolution (k, k, in, out) has
    (1, 1, in, 1), a grouped one (1, 1, in/groups, out); layers stacked by `nn.scan` or
    `nn.vmap` keep their leading axes.

    Linear averages of statistics, by `jax.lax.pmean` over devices or `jax.tree.map` over
    microbatches, are statistics of the union of the batches: `total_variance` then adds the
    variance of the batch means. (In float32 that part is resolved down to about 1e-6 of the
    squared mean; the variance within a batch is accurate at any mean.)

    Attributes:
      mean: Mean of the inputs that each kernel entry multiplies.
      var: Biased variance of the same, within the batch.
      sq_mean: Square of `mean`, rounded down; after averaging over batches, the mean of the
        squares.
      count: Batch size x output positions x calls. 0 means that the layer did not run. After
        averaging, that of one batch: give `bnp` the whole `batch_size`, which q needs.
      kernel: Name of the kernel, such as `'Dense_0/kernel'`.
      bias: Name of the bias that is added to the kernel's product, or None.
      input_axes: Axes of the kernel that are summed over, negative.
      positions: Output positions that share the kernel: 1 for dense layers, height x width of
        the output for a convolution.

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
      >>> float(stats["kernel"].count)
      2.0
    """

    mean: Float[Array, "..."]
    var: Float[Array, "..."]
    sq_mean: Float[Array, "..."]
    count: Float[Array, ""]
    kernel: str
    bias: str | None
    input_axes: tuple[int, ...]
    positions: int

    @property
    def total_variance(self) -> Float[Array, "..."]:
        """Variance within batches plus that between their means; exactly `var` for one batch."""
        between = self.sq_mean - self.mean**2
        return self.var + jnp.where(between > _ROUNDING * self.sq_mean, between, 0.0)

    @property
    def batch_size(self) -> Float[Array, ""]:
        """N, the number of examples."""
        return self.count / self.positions


def moments(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Mean and biased variance of `x` over `axes`, accurate where |mean| >> standard deviation.

    In two passes: the variance is summed from differences to the mean, of the size of the spread.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = _mean(x, axes)
    var = _mean((x - mean) ** 2, axes)
    return jnp.squeeze(mean, axes).astype(jnp.float32), jnp.squeeze(var, axes).astype(jnp.float32)


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
    """The mean over `axes`, which keep their place; of many rows axis by axis, from the last on.

    XLA may sum over several axes one by one (on the CPU before jax 0.10), which loses digits.
    """
    if math.prod(x.shape[axis] for axis in axes) <= MANY_ROWS:
        return jnp.mean(x, axis=axes, keepdims=True)
    for axis in sorted(axes, reverse=True):
        x = jnp.mean(x, axis=axis, keepdims=True)
    return x
