"""P = U D / q on a parameter tree, from the running statistics that `bnp` keeps."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bnp_optax._tree import named_leaves, replace_leaves
from bnp_optax.layers import Layers
from bnp_optax.preconditioners import centering
from bnp_optax.preconditioners.alike import at_once
from bnp_optax.preconditioners.base import Operator
from bnp_optax.preconditioners.layout import layers_of


class BNPState(NamedTuple):
    """State of `bnp`: running statistics at the kernels, and a number for each layer.

    The trees have the parameters' structure, with `optax.MaskedNode` at all other leaves. The
    vectors have an entry for each layer, in the order in which the kernels are flattened, and one
    that is not used where there is no layer.

    Attributes:
      mean: At kernels with a bias, the running mean mu, which broadcasts against the kernel.
      var: At all kernels, the running variance sigma^2, of the same shape; the mean square where
        there is no bias.
      q: q of each layer's last statistics; 1 before the first.
      inputs: The axes of each kernel that are summed over: bit i stands for axis i.
      seen: Number of batches that entered each layer's running statistics.
      rejected: Number of batches that did not, as they were not finite or had a negative variance.
      eps: `eps_rel` and `eps_abs`, by which sigma~ exceeds sigma.
    """

    mean: Any
    var: Any
    q: Float[Array, " layers"]
    inputs: Int[Array, " layers"]
    seen: Int[Array, " layers"]
    rejected: Int[Array, " layers"]
    eps: Float[Array, "2"]


class Scaling(NamedTuple):
    """D of one layer.

    Attributes:
      mean: mu; None in a layer without a bias, of which D has no entry for the bias.
      diagonal: 1 / sigma~, broadcasts against the kernel; 1 before the first statistics.
      q: The factor that P divides by.
      inputs: As in `BNPState`.
      kernel_scale: D / q of the kernel.
      bias_scale: 1 / q.
    """

    mean: Array | None
    diagonal: Array
    q: Float[Array, ""]
    inputs: Int[Array, ""]
    kernel_scale: Array
    bias_scale: Float[Array, ""]


def scalings(state: BNPState) -> dict[str, Scaling]:
    """D of each layer, by the name of its kernel."""
    means, variances = named_leaves(state.mean), named_leaves(state.var)
    if not variances:
        return {}

    def scaled(var: Array, numbers: Any) -> tuple[Any, Any]:
        seen, q, inputs = numbers
        # Step 3.
        floored = var + state.eps[0] * over_inputs(jnp.max, var, inputs) + state.eps[1]
        diagonal = jnp.where(seen > 0, jax.lax.rsqrt(floored), 1.0)
        return (diagonal, diagonal / q), ()

    numbers = (state.seen, state.q, state.inputs)
    scales, _ = at_once(scaled, list(variances.values()), numbers)
    by_layer = map(jnp.unstack, (state.q, state.inputs, 1.0 / state.q))
    return {
        name: Scaling(means.get(name), diagonal, q, inputs, kernel_scale, bias_scale)
        for name, (diagonal, kernel_scale), q, inputs, bias_scale in zip(
            variances, scales, *by_layer, strict=True
        )
    }


def bnp_states(state: Any) -> list[BNPState]:
    """Every `BNPState` in the state of an optimizer."""

    def is_bnp(node: Any) -> bool:
        return isinstance(node, BNPState)

    return [node for node in jax.tree.leaves(state, is_leaf=is_bnp) if is_bnp(node)]


def over_inputs(reduce: Callable[..., Array], x: Array, inputs: Int[Array, ""]) -> Array:
    """`reduce` of `x` over the axes that `inputs` says, for each group or stacked layer apart.

    They are known only with the statistics: a kernel with three axes and no bias may be that of
    stacked dense layers or of one layer with two input axes.
    """
    for axis, size in enumerate(x.shape):
        if size > 1:
            x = jnp.where((inputs >> axis) & 1, reduce(x, axis=axis, keepdims=True), x)
    return x


class BNPOperator(Operator):
    """P = U D / q in every layer, the identity elsewhere."""

    def __init__(self, state: BNPState, layers: Layers | None) -> None:
        self._scalings = scalings(state)
        self._layers = layers

    def mv(self, z: Any) -> Any:
        """P z."""
        return self._by_layer(centering.mv, z)

    def transpose(self, g: Any) -> Any:
        """P^T g."""
        return self._by_layer(centering.transpose, g)

    def solve(self, p: Any) -> Any:
        """P^-1 p."""
        return self._by_layer(centering.solve, p)

    def gram(self, g: Any) -> Any:
        """P P^T g, in one pass over the kernels."""
        leaves, centered, means = named_leaves(g), [], []
        for name, layer in layers_of(g, self._layers).items():
            scaling = self._scalings[name]
            if layer.bias is not None and scaling.mean is not None:
                shape = jax.eval_shape(layer.align_bias, leaves[layer.bias]).shape
                sums = centering.Sums.of(layer.kernel_shape, shape, scaling.mean.shape)
                centered.append(name)
                means.append((scaling.mean, scaling.kernel_scale, sums))

        def squared(arrays: Any, _: Any) -> tuple[Array, Any]:
            return centering.squared_mean(*arrays), ()

        squares = dict(zip(centered, at_once(squared, means, ())[0], strict=True))
        return self._by_layer(centering.gram, g, squares)

    def _by_layer(
        self,
        function: Callable[..., tuple[Array, Any]],
        tree: Any,
        squares: Mapping[str, Array] | None = None,
    ) -> Any:
        """`function` of each layer, and of what `squares` has for it."""
        leaves, new = named_leaves(tree), {}
        for name, layer in layers_of(tree, self._layers).items():
            scaling = self._scalings[name]
            mean, s, s_b = scaling.mean, scaling.kernel_scale, scaling.bias_scale
            more = (squares.get(name),) if squares is not None else ()
            dtype = jnp.promote_types(leaves[name].dtype, jnp.float32)
            w = leaves[name].astype(dtype)
            if layer.bias is None or mean is None:
                w, _ = function(w, None, None, s, s_b, *more)
            else:
                bias = leaves[layer.bias]
                aligned = layer.align_bias(bias.astype(dtype))
                w, b = function(w, aligned, mean, s, s_b, *more)
                new[layer.bias] = layer.restore_bias(b, bias.shape).astype(bias.dtype)
            new[name] = w.astype(leaves[name].dtype)
        return replace_leaves(tree, new)
