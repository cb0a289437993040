"""The Hessian of the loss in the bias and weights of one unit."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnp_optax._tree import named_leaves, split_arrays
from bnp_optax.diagnostics.checks import operator_of
from bnp_optax.diagnostics.displacement import (
    displaced,
    find_kernel,
    multiply,
    promoted,
    unit_coordinates,
)
from bnp_optax.layers import Layers
from bnp_optax.preconditioners.base import Operator, Preconditioner
from bnp_optax.statistics import Layer

# Rows that are found at once: each takes as much memory as the forward pass.
_ROWS = 32


def unit_hessian(
    loss_fn: Callable[..., Any],
    params: Any,
    kernel_path: str,
    unit: int,
    *args: Any,
    preconditioner: Preconditioner | Operator | None = None,
    state: Any = None,
    layers: Layers | None = None,
) -> Float[Array, "n n"]:
    r"""The dense Hessian of the loss in one unit's [b, w], or that of z in [b, w] = P z.

        nabla^2 L = H^^T S H^,   nabla^2_z L = P^T (nabla^2 L) P

    where H^ = [e, H] holds the unit's inputs and S the second derivatives of the loss in its
    activations. All other parameters stay as they are. It is found by automatic differentiation,
    and so holds also where a loss is no mean over examples.

    Args:
      loss_fn: `loss_fn(params, *args)`, a scalar; it is compiled.
      params: Parameters of the network.
      kernel_path: Name of the layer's kernel, such as `'Dense_0/kernel'`.
      unit: Index of the unit, in [0, number of units): the output feature of a dense layer, the
        output channel of a convolution. A layer with several output axes (heads, layers stacked by
        `nn.scan`) has a unit for every entry of its bias, counted in row-major order.
      *args: Further arguments of the loss.
      preconditioner: Such as `bnp()`, or P itself, an `Operator`; None for the Hessian in [b, w].
        With `bnp()` the factor 1/q is part of P.
      state: State of the preconditioner.
      layers: From `find_layers`, for kernels that are not named `kernel` and for layers without a
        bias that `nn.scan` or `nn.vmap` stacks; None tells a unit's weights by Flax's conventions.

    Returns:
      A symmetric matrix of 1 + n rows, n being the fan-in: first b, then w in the order of the
      kernel's axes, `kernel[..., unit].ravel()`. A layer without a bias has w only.

    Raises:
      ValueError: If `kernel_path` names no layer or `unit` is out of range, or of
        `preconditioner` and `state` only one is given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> from bnp_optax.diagnostics import extended_inputs, unit_hessian
      >>> model, x = nn.Dense(2), jax.random.normal(jax.random.key(1), (8, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p, x: 0.5 * jnp.sum(model.apply({"params": p}, x) ** 2) / len(x)
      >>> hessian = unit_hessian(loss_fn, params, "kernel", 0, x)
      >>> h = extended_inputs(x)
      >>> bool(jnp.allclose(hessian, h.T @ h / 8, atol=1e-6))
      True

    Source: Lange, Helfrich, Ye, JMLR 2022, Propositions 2 and 9, Theorem 3.
    """
    P = operator_of(preconditioner, state)
    layer = find_kernel(params, kernel_path, layers)
    count = unit_coordinates(params, layer).units
    if not 0 <= unit < count:
        msg = f"`unit` must lie in [0, {count}), the units of `{kernel_path}`; got {unit}."
        raise ValueError(msg)
    (hessian,) = hessians_of_units(loss_fn, params, layer, [unit], args, P)
    return hessian


def hessians_of_units(
    loss_fn: Callable[..., Any],
    params: Any,
    layer: Layer,
    units: Sequence[int],
    args: tuple[Any, ...],
    P: Operator | None,
) -> list[Float[Array, "n n"]]:
    """`unit_hessian` of several units of one layer, compiled once."""
    size = unit_coordinates(params, layer).size
    zero = jnp.zeros(size, promoted(named_leaves(params)[layer.kernel]).dtype)
    # As arguments, arrays are not copied into the compiled code, nor folded there.
    dynamic, rebuild = split_arrays((params, args))

    @jax.jit
    def rows(dynamic: list[Array], unit: Array, basis: Float[Array, "k n"]) -> Float[Array, "k n"]:
        params, args = rebuild(dynamic)
        coordinates = unit_coordinates(params, layer)

        def loss(z: Array) -> Array:
            step = multiply(P, coordinates.embed(z, unit))
            return displaced(loss_fn, params, args, step)

        return jax.vmap(lambda v: jax.jvp(jax.grad(loss), (zero,), (v,))[1])(basis)

    # A Python loop: in a compiled one, XLA on the CPU is slow at the gradients of convolutions.
    at_once = min(_ROWS, size)
    starts = range(0, size, at_once)
    basis = jnp.eye(len(starts) * at_once, size, dtype=zero.dtype)
    result = []
    for unit in units:
        parts = [rows(dynamic, jnp.asarray(unit), basis[i : i + at_once]) for i in starts]
        hessian = jnp.concatenate(parts)[:size]
        result.append(0.5 * (hessian + hessian.T))
    return result
