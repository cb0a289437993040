"""Layers whose statistics are known once and for all, so that P is held in them."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from bnp_optax._tree import is_concrete, quoted
from bnp_optax.statistics import Layer, LayerStats

# In float32 an input whose variance is a smaller part of its squared mean is constant.
_CONSTANT = 1e-12


def held_statistics(stats: LayerStats) -> LayerStats:
    """Statistics in which constant inputs vary by their size, whatever their units.

    Raises:
      ValueError: If they are not finite.
    """
    _check_finite(stats)
    square = stats.mean**2
    size = jnp.where(square > 0.0, square, 1.0)
    varies = stats.total_variance > _CONSTANT * square
    if stats.layer.bias is None:
        # What divides there is the root of the mean square.
        varies = varies | (square > 0.0)
    return dataclasses.replace(stats, var=jnp.where(varies, stats.var, size))


def check_fixed(fixed: Mapping[str, LayerStats], found: Mapping[str, Layer]) -> None:
    """Raise unless the layers that a preconditioner has are those of fixed statistics."""
    for name, stats in fixed.items():
        shape = found[name].kernel_shape if name in found else None
        if shape != stats.layer.kernel_shape:
            has = (
                f"has it with shape {shape}" if shape else f"has no such layer, but {quoted(found)}"
            )
            msg = (
                f"`fixed` has `{name}` of shape {stats.layer.kernel_shape}, and `bnp` {has}. Take "
                "the statistics from this loss and these parameters, and pass "
                "`layers=find_layers(...)` where kernels are not named `kernel`."
            )
            raise ValueError(msg)


def _check_finite(stats: LayerStats) -> None:
    """Raise if statistics that have values are not finite: P would keep them for good."""
    moments = stats.mean, stats.var, stats.sq_mean
    # By NumPy, which also inside a trace gives values.
    if is_concrete(moments) and not all(np.isfinite(np.asarray(x)).all() for x in moments):
        msg = (
            f"`fixed` has statistics of `{stats.layer.kernel}` that are not finite. Take them, by "
            "`start_in_zspace` or `dataset_statistics`, from data without NaN and infinity."
        )
        raise ValueError(msg)
