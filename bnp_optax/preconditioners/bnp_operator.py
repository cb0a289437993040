"""P = U D / q on a parameter tree, from the running statistics that `bnp` keeps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bnp_optax._tree import named_leaves, replace_leaves
from bnp_optax.layers import Layers
from bnp_optax.preconditioners import centering
from bnp_optax.preconditioners.base import Operator
from bnp_optax.preconditioners.layout import layers_of


class BNPState(NamedTuple):
    """State of `bnp`: running statistics and a few numbers at each kernel.

    Every field but the last has the parameters' structure, with `optax.MaskedNode` where it has
    nothing to say. A layer's numbers are an array of their own, so that layers of one shape are
    one program to compile; entries of one vector for all layers would be a program each.

    Attributes:
      mean: At kernels with a bias, the running mean mu, which broadcasts against the kernel.
      var: At all kernels, the running variance sigma^2, of the same shape; the mean square where
        there is no bias.
      numbers: At all kernels, three numbers: 1 / q of the last statistics, 1 before the first; how
        many batches entered the running statistics; and how many did not, as they were not finite
        or had a negative variance.
      inputs: At kernels whose statistics vary along an axis that is not summed over, such as that
        of stacked layers, or may do so: the axes that are, where bit i stands for axis i.
      eps: `eps_rel` and `eps_abs`, by which sigma~ exceeds sigma.
    """

    mean: Any
    var: Any
    numbers: Any
    inputs: Any
    eps: Float[Array, "2"]


class Scaling(NamedTuple):
    """D of one layer.

    Attributes:
      mean: mu; None in a layer without a bias, of which D has no entry for the bias.
      diagonal: 1 / sigma~, broadcasts against the kernel; 1 before the first statistics.
      inv_q: 1 / q, the factor of P.
      inputs: As in `BNPState`; None where all axes of the statistics are summed over.
    """

    mean: Array | None
    diagonal: Array
    inv_q: Float[Array, ""]
    inputs: Int[Array, ""] | None


def scalings(state: BNPState) -> dict[str, Scaling]:
    """D of each layer, by the name of its kernel."""
    means, variances, numbers, inputs = map(named_leaves, state[:-1])

    def scaling(name: str, var: Array) -> Scaling:
        axes = inputs.get(name)
        # Step 3.
        floored = var + state.eps[0] * over_inputs(jnp.max, var, axes) + state.eps[1]
        inv_q, entered, _ = numbers[name]
        diagonal = jnp.where(entered > 0, jax.lax.rsqrt(floored), 1.0)
        return Scaling(means.get(name), diagonal, inv_q, axes)

    return {name: scaling(name, var) for name, var in variances.items()}


def bnp_states(state: Any) -> list[BNPState]:
    """Every `BNPState` in the state of an optimizer."""

    def is_bnp(node: Any) -> bool:
        return isinstance(node, BNPState)

    return [node for node in jax.tree.leaves(state, is_leaf=is_bnp) if is_bnp(node)]


def over_inputs(reduce: Callable[..., Array], x: Array, inputs: Int[Array, ""] | None) -> Array:
    """`reduce` of `x` over the axes that `inputs` says, for each group or stacked layer apart.

    They are known only with the statistics: a kernel with three axes and no bias may be that of
    stacked dense layers or of one layer with two input axes. None stands for all axes.
    """
    if inputs is None:
        return reduce(x)
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
        return self._by_layer(centering.gram, g)

    def _by_layer(self, function: Callable[..., tuple[Array, Any]], tree: Any) -> Any:
        leaves, new = named_leaves(tree), {}
        for name, layer in layers_of(tree, self._layers).items():
            scaling = self._scalings[name]
            s_b, s = scaling.inv_q, scaling.diagonal * scaling.inv_q
            dtype = jnp.promote_types(leaves[name].dtype, jnp.float32)
            w = leaves[name].astype(dtype)
            if layer.bias is None or scaling.mean is None:
                w, _ = function(w, None, None, s, s_b)
            else:
                bias = leaves[layer.bias]
                aligned = layer.align_bias(bias.astype(dtype))
                w, b = function(w, aligned, scaling.mean, s, s_b)
                new[layer.bias] = layer.restore_bias(b, bias.shape).astype(bias.dtype)
            new[name] = w.astype(leaves[name].dtype)
        return replace_leaves(tree, new)
