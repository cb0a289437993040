"""P = U D / q on a parameter tree, from the running statistics that `bnp` keeps."""

import collections
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bnp_optax._explicit import fitted, spec_of
from bnp_optax._tree import named_leaves, quoted, replace_leaves
from bnp_optax.layers import Layers
from bnp_optax.preconditioners import centering
from bnp_optax.preconditioners.base import Operator
from bnp_optax.preconditioners.centering import Entries
from bnp_optax.preconditioners.layout import layers_of
from bnp_optax.preconditioners.numbers import Numbers, check_length, floored, shrunk
from bnp_optax.preconditioners.running import Running
from bnp_optax.preconditioners.together import in_one_axis, together

# The units of the data, which the layers' gains make up for, are not those of other parameters.
_MAX_GAIN = 10.0
# Layers of one shape whose entries are computed at once: that takes some kernels more, whatever
# their number, and of few layers compiles no faster.
_MANY = 20


class BNPState(NamedTuple):
    """State of `bnp`: running statistics and a few numbers at each kernel.

    Every field but the last has the parameters' structure, with `optax.MaskedNode` where it has
    nothing to say, and without the boxes of Flax, such as `nn.Partitioned`, whose axis names are
    those of the parameters; `bnp_optax.state_sharding` tells how to shard it.

    Attributes:
      moments: At all kernels, along a first axis, the running mean mu and the running variance
        sigma^2, each of a shape that broadcasts against the kernel; the mean square alone where
        there is no bias.
      numbers: At all kernels, the vector of `Numbers`.
      inputs: At kernels whose statistics vary along an axis that is not summed over, such as that
        of stacked layers, or may do so: the axes that are, where bit i stands for axis i.
      eps: `eps_rel` and `eps_abs`, by which sigma~ exceeds sigma; and `shrinkage`, if any.
    """

    moments: Any
    numbers: Any
    inputs: Any
    eps: Float[Array, "_"]

    @property
    def mean(self) -> Any:
        """The running mean, at kernels with a bias; or its shape, if this is a state of shapes."""
        mask = optax.MaskedNode()
        return jax.tree.map(lambda x: _part(x, 0) if x.shape[0] > 1 else mask, self.moments)

    @property
    def var(self) -> Any:
        """The running variance, or mean square, at all kernels."""
        return jax.tree.map(lambda x: _part(x, -1), self.moments)


def _part(x: Any, place: int) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda x: x[place], x)
    return x[place]


class Scaling(NamedTuple):
    """D of one layer.

    Attributes:
      mean: mu, or w mu; None in a layer without a bias, of which D has no entry for the bias.
      diagonal: 1 / sigma~, broadcasts against the kernel; 1 before the first statistics.
      numbers: Of the layer, as in `BNPState`.
      inputs: As in `BNPState`; None where all axes of the statistics are summed over.
    """

    mean: Array | None
    diagonal: Array
    numbers: Float[Array, "11"]
    inputs: Float[Array, ""] | None

    def number(self, name: str) -> Float[Array, ""]:
        """One of `Numbers`."""
        return Numbers.at(self.numbers, name)

    @property
    def gain(self) -> Float[Array, ""]:
        """Root mean square of the kernel's entries of P."""
        square = self.number("square_gain")
        if self.inputs is not None:  # Of all groups together.
            square = jnp.mean(self.diagonal**2)
        return self.number("inv_q") * jnp.sqrt(square)


def scalings(state: BNPState) -> dict[str, Scaling]:
    """D of each layer, by the name of its kernel."""
    moments, numbers, inputs = map(named_leaves, state[:-1])

    def scaling(name: str, of_layer: Array) -> Scaling:
        check_length(numbers[name])
        return _scaling(Running(of_layer, numbers[name]), inputs.get(name), state.eps)

    return {name: scaling(name, of_layer) for name, of_layer in moments.items()}


@jax.jit
def _scaling(running: Running, inputs: Array | None, eps: Array) -> Scaling:
    mean, var, numbers = running.mean, running.var, running.numbers
    weight, floor = Numbers.at(numbers, "weight"), Numbers.at(numbers, "floor")
    if inputs is not None:
        floor = _floor_of_groups(mean, var, numbers, inputs, eps)
    diagonal = jax.lax.rsqrt(floored(mean, var, weight, floor))
    return Scaling(None if mean is None else weight * mean, diagonal, numbers, inputs)


def _floor_of_groups(
    mean: Array | None, var: Array, numbers: Array, inputs: Float[Array, ""], eps: Array
) -> Array:
    """The floor of each group or stacked layer, of which `numbers` has that of all together."""
    of = Numbers.of(numbers)
    eps_rel, eps_abs, *with_shrinkage = eps
    if with_shrinkage:
        average = over_inputs(jnp.mean, shrunk(mean, var, of.weight), inputs)
        floor = (1.0 - of.weight + eps_rel) * average + eps_abs
    else:
        floor = eps_rel * over_inputs(jnp.max, var, inputs) + eps_abs
    return jnp.where((of.entered == 0) | jnp.isinf(of.entered), 0.0, floor)


def bnp_states(state: Any) -> list[BNPState]:
    """Every `BNPState` in the state of an optimizer."""

    def is_bnp(node: Any) -> bool:
        return isinstance(node, BNPState)

    return [node for node in jax.tree.leaves(state, is_leaf=is_bnp) if is_bnp(node)]


def over_inputs(reduce: Callable[..., Array], x: Array, inputs: Float[Array, ""] | None) -> Array:
    """`reduce` of `x` over the axes that `inputs` says, for each group or stacked layer apart.

    They are known only with the statistics: a kernel with three axes and no bias may be that of
    stacked dense layers or of one layer with two input axes. None stands for all axes.
    """
    if inputs is None:
        return reduce(x)
    for axis, size in enumerate(x.shape):
        if size > 1:
            x = jnp.where(
                (inputs.astype(jnp.int32) >> axis) & 1, reduce(x, axis=axis, keepdims=True), x
            )
    return x


class BNPOperator(Operator):
    """P = U D / q in every layer; elsewhere the identity, or the layers' mean gain."""

    def __init__(
        self,
        state: BNPState,
        layers: Layers | None,
        scale_bias: bool = False,
        scale_others: bool = False,
    ) -> None:
        self._entries = _entries_of(state)
        self._layers = layers
        self._scale_bias = scale_bias
        self._groups = named_leaves(state.inputs)
        self._numbers = named_leaves(state.numbers)
        self._gain = _mean_gain(state, self._entries) if scale_others else None

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
            entries = self._entries_at(name, leaves[name])
            dtype = jnp.promote_types(leaves[name].dtype, jnp.float32)
            w = leaves[name].astype(dtype)
            entries = entries._replace(s=fitted(entries.s, w))
            if layer.bias is None or entries.mu is None:
                w, _ = function(w, None, entries._replace(mu=None))
            else:
                bias = leaves[layer.bias]
                aligned = fitted(layer.align_bias(bias.astype(dtype)), w)
                entries = entries._replace(mu=fitted(entries.mu, w))
                if self._scale_bias and name in self._groups:
                    beta = _beta_of_groups(entries, self._numbers[name], layer.fan_in, w, aligned)
                    entries = entries._replace(s_b=entries.s_b * beta)
                w, b = function(w, aligned, entries)
                restored = layer.restore_bias(b, bias.shape).astype(bias.dtype)
                new[layer.bias] = fitted(restored, bias)
            new[name] = w.astype(leaves[name].dtype)
        if self._gain is not None:
            new |= _others(function, self._gain, {n: x for n, x in leaves.items() if n not in new})
        return replace_leaves(tree, new)

    def _entries_at(self, name: str, kernel: Array) -> Entries:
        entries = self._entries.get(name)
        if entries is None:
            has = f"has no running statistics of `{name}`, but of {quoted(self._entries)}"
        else:
            shape = entries.s.shape
            if len(shape) == kernel.ndim and all(
                a in (1, b) for a, b in zip(shape, kernel.shape, strict=True)
            ):
                return entries
            has = f"has running statistics of shape {shape} for `{name}` of shape {kernel.shape}"
        msg = (
            f"The state of `bnp` {has}: it was made for other parameters. Call `init` on these "
            "parameters, or restore the state that belongs to them."
        )
        raise ValueError(msg)


def _entries_of(state: BNPState) -> dict[str, Entries]:
    """P of all layers; without beta where that is of groups or stacked layers."""
    moments, numbers, groups = map(named_leaves, state[:-1])
    n_alike = collections.Counter(of.shape for name, of in moments.items() if name not in groups)
    many = {}
    for name, of in moments.items():
        check_length(numbers[name])
        if name not in groups and n_alike[of.shape] >= _MANY:
            many[name] = (Running(in_one_axis(of, of), numbers[name]),)

    def in_a_row(kind: None, running: Running) -> Array:
        del kind
        rows = jnp.stack([x for x in _scaled(running, None, state.eps) if x is not None])
        # Of a vector's parts, put in a kernel's shape, XLA makes no copies.
        return rows.ravel() if spec_of(rows) is None else rows

    found = together(in_a_row, many, dict.fromkeys(many))
    result = {}
    for name, of in moments.items():
        if name in many:
            n_rows, *shape = of.shape
            parts = [*found[name]] if found[name].ndim > 1 else jnp.split(found[name], n_rows)
            s, mu = [part.reshape(shape) for part in parts] + [None] * (2 - n_rows)
        else:
            s, mu = _scaled(Running(of, numbers[name]), groups.get(name), state.eps)
        if name in groups:
            s_b, gram_b = Numbers.at(numbers[name], "inv_q"), None
        else:
            s_b, gram_b = (Numbers.at(numbers[name], key) for key in ("bias", "gram_bias"))
        result[name] = Entries(s, mu, s_b, gram_b)
    return result


@jax.jit
def _scaled(running: Running, inputs: Array | None, eps: Array) -> tuple[Array, Array | None]:
    """1 / (sigma~ q), and mu where P centers."""
    scaling = _scaling(running, inputs, eps)
    return scaling.diagonal * scaling.number("inv_q"), scaling.mean


def _mean_gain(state: BNPState, entries: Mapping[str, Entries]) -> Array | None:
    """The geometric mean of the layers' gains, but of held ones, whose inputs have any units."""
    numbers, groups = named_leaves(state.numbers), named_leaves(state.inputs)
    if not numbers:
        return None
    of = Numbers(*jnp.stack(list(numbers.values()), axis=-1))
    gains = of.inv_q * jnp.sqrt(of.square_gain)
    for place, name in enumerate(numbers):
        if name in groups:
            gains = gains.at[place].set(jnp.sqrt(jnp.mean(entries[name].s ** 2)))
    moves = ~jnp.isinf(of.entered)
    mean = jnp.sum(jnp.where(moves, jnp.log(gains), 0.0)) / jnp.maximum(jnp.sum(moves), 1)
    return jnp.clip(jnp.exp(mean), 1.0 / _MAX_GAIN, _MAX_GAIN)


def _beta_of_groups(
    entries: Entries, numbers: Array, fan_in: int, w: Array, bias: Array
) -> Float[Array, "..."]:
    """D's entry of the bias, of which `numbers` has that of all groups together."""
    assert entries.mu is not None
    square = centering.squared_length(entries.mu, w, bias) / fan_in
    return jnp.where(jnp.isinf(Numbers.at(numbers, "entered")), 1.0, jnp.sqrt(1.0 + square))


def _others(
    function: Callable[..., tuple[Array, Any]], gain: Array, leaves: dict[str, Any]
) -> dict[str, Array]:
    """Parameters of no layer, as kernels whose inputs are not centered and have one scale."""
    new = {}
    for name, leaf in leaves.items():
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.floating):
            w = jnp.asarray(leaf, jnp.promote_types(dtype, jnp.float32))
            w, _ = function(w, None, Entries(gain, None, gain))
            new[name] = w.astype(dtype)
    return new
