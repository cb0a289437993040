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
    """

    mean: Array | None
    diagonal: Array
    q: Float[Array, ""]
    inputs: Int[Array, ""]


def scalings(state: BNPState) -> dict[str, Scaling]:
    """D of each layer, by the name of its kernel."""
    mean, result = named_leaves(state.mean), {}
    for i, (name, var) in enumerate(named_leaves(state.var).items()):
        # Step 3.
        floored = var + state.eps[0] * over_inputs(jnp.max, var, state.inputs[i]) + state.eps[1]
        diagonal = jnp.where(state.seen[i] > 0, jax.lax.rsqrt(floored), 1.0)
        result[name] = Scaling(mean.get(name), diagonal, state.q[i], state.inputs[i])
    return result


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
        return self._by_layer(centering.gram, g)

    def _by_layer(self, function: Callable[..., tuple[Array, Any]], tree: Any) -> Any:
        leaves, new = named_leaves(tree), {}
        for name, layer in layers_of(tree, self._layers).items():
            mean, diagonal, q, _ = self._scalings[name]
            dtype = jnp.promote_types(leaves[name].dtype, jnp.float32)
            w, s = leaves[name].astype(dtype), diagonal / q
            if layer.bias is None or mean is None:
                w, _ = function(w, None, None, s, 1.0 / q)
            else:
                bias = leaves[layer.bias]
                w, b = function(w, layer.align_bias(bias.astype(dtype)), mean, s, 1.0 / q)
                new[layer.bias] = layer.restore_bias(b, bias.shape).astype(bias.dtype)
            new[name] = w.astype(leaves[name].dtype)
        return replace_leaves(tree, new)
