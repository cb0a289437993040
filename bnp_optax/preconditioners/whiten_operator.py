"""P = U S on a parameter tree, from the running statistics that `whiten` keeps.

Of one unit with bias b and weights w, with C the running covariance of its inputs and mu their
mean,

    P = U diag(1, S),   U = [[1, -mu^T], [0, I]],   S = (C + lambda I)^(-exponent)

C = V diag(s) V^T is decomposed now and then, and S is applied as V diag((s + lambda)^(-exponent))
V^T, its inverse as V diag((s + lambda)^exponent) V^T. Of a wide layer only the leading eigenvectors
are known; on their complement C is taken for a multiple of the identity, rest I, and

    f(C) = f(rest) I + V diag(f(s) - f(rest)) V^T
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnp_optax._explicit import fitted, gathered
from bnp_optax._tree import named_leaves, quoted, replace_leaves
from bnp_optax.layers import Layers
from bnp_optax.preconditioners import centering
from bnp_optax.preconditioners.base import Operator
from bnp_optax.preconditioners.layout import layers_of
from bnp_optax.preconditioners.numbers import check_alone
from bnp_optax.statistics import Layer

# The least lambda: what inputs that never vary are divided by.
FLOOR = 1e-12


class WhitenState(NamedTuple):
    """State of `whiten`: running moments, eigenvectors, and a few numbers at each kernel.

    Every field but the last has the parameters' structure, with `optax.MaskedNode` where it has
    nothing to say. Below, n is the fan-in, and k is n, or `rank` in a layer wider than
    `max_fan_in`. A grouped convolution has a leading axis of groups, stacked layers have theirs.

    Attributes:
      mean: At kernels with a bias, the running mean mu of the inputs, (n,).
      covariance: At all kernels, the running covariance C about mu, (n, n), or E[h h^T] where there
        is no bias; its sketch of 32 rows, or rank + 1, in a wide layer.
      vectors: Eigenvectors V of C as it was at the last refresh, (n, k).
      values: Its eigenvalues, (k,); of a wide layer (k + 1,), the last for the complement of V.
      numbers: At all kernels, three numbers: how many batches the eigenvectors are of; how many
        entered the running statistics; and how many did not, as they were not finite.
      hyper: `exponent` and `damping`.
    """

    mean: Any
    covariance: Any
    vectors: Any
    values: Any
    numbers: Any
    hyper: Float[Array, "2"]


def whiten_states(state: Any) -> list[WhitenState]:
    """Every `WhitenState` in the state of an optimizer."""

    def is_whiten(node: Any) -> bool:
        return isinstance(node, WhitenState)

    return [node for node in jax.tree.leaves(state, is_leaf=is_whiten) if is_whiten(node)]


class Root(NamedTuple):
    """S of one layer.

    Attributes:
      mean: mu, or None in a layer that is not centered.
      vectors: V.
      spectrum: s + lambda, of a wide layer with that of the complement of V at the end; 1 before
        the first statistics.
      exponent: S is the spectrum to the power of -exponent.
    """

    mean: Array | None
    vectors: Float[Array, "*blocks n k"]
    spectrum: Float[Array, "*blocks k_or_more"]
    exponent: Float[Array, ""]

    @property
    def is_wide(self) -> bool:
        """Whether V is not all of the eigenvectors."""
        return self.spectrum.shape[-1] > self.vectors.shape[-1]

    @property
    def gain(self) -> Float[Array, ""]:
        """Root mean square of the singular values of S, over all blocks."""
        squares = self.spectrum ** (-2.0 * self.exponent)
        n, k = self.vectors.shape[-2:]
        if self.is_wide:
            squares = squares.at[..., -1].multiply(n - k)
        return jnp.sqrt(jnp.mean(jnp.sum(squares, axis=-1) / n))

    @property
    def kappa(self) -> Float[Array, ""]:
        """Condition number of diag(1, S), or of S without a bias; the largest of the blocks'."""
        n, k = self.vectors.shape[-2:]
        # Where V is square, there is no complement.
        sizes = (self.spectrum if n > k else self.spectrum[..., :k]) ** -self.exponent
        if self.mean is not None:
            sizes = jnp.concatenate([sizes, jnp.ones_like(sizes[..., :1])], axis=-1)
        return jnp.max(jnp.max(sizes, axis=-1) / jnp.min(sizes, axis=-1))


def roots(state: WhitenState) -> dict[str, Root]:
    """S of each layer, by the name of its kernel."""
    means, _, vectors, values, numbers = map(named_leaves, state[:-1])
    check_alone("whiten", state.hyper)
    exponent, damping = state.hyper
    result = {}
    for name, s in values.items():
        fan_in, k = vectors[name].shape[-2:]
        sizes = jnp.ones_like(s)
        if s.shape[-1] > k:
            sizes = sizes.at[..., -1].set(fan_in - k)
        average = jnp.sum(sizes * s, axis=-1, keepdims=True) / fan_in
        damped = s + jnp.maximum(damping * average, FLOOR)
        spectrum = jnp.where(numbers[name][1] > 0, damped, 1.0)
        result[name] = Root(means.get(name), vectors[name], spectrum, exponent)
    return result


class WhitenOperator(Operator):
    """P = U S in every layer, the identity elsewhere."""

    def __init__(self, of_layers: dict[str, Root], layers: Layers | None) -> None:
        self._roots = of_layers
        self._layers = layers

    def mv(self, z: Any) -> Any:
        """P z."""

        def of_layer(of: "_OfLayer", w: Array, b: Array | None) -> centering.Pair:
            return of.centered(centering.mv, of.powered(w, -1.0), b)

        return self._by_layer(of_layer, z)

    def transpose(self, g: Any) -> Any:
        """P^T g."""

        def of_layer(of: "_OfLayer", w: Array, b: Array | None) -> centering.Pair:
            w, b = of.centered(centering.transpose, w, b)
            return of.powered(w, -1.0), b

        return self._by_layer(of_layer, g)

    def solve(self, p: Any) -> Any:
        """P^-1 p."""

        def of_layer(of: "_OfLayer", w: Array, b: Array | None) -> centering.Pair:
            w, b = of.centered(centering.solve, w, b)
            return of.powered(w, 1.0), b

        return self._by_layer(of_layer, p)

    def gram(self, g: Any) -> Any:
        """P P^T g, with S^2 in one."""

        def of_layer(of: "_OfLayer", w: Array, b: Array | None) -> centering.Pair:
            w, b = of.centered(centering.transpose, w, b)
            return of.centered(centering.mv, of.powered(w, -2.0), b)

        return self._by_layer(of_layer, g)

    def _by_layer(self, function: Callable[..., centering.Pair], tree: Any) -> Any:
        leaves, new = named_leaves(tree), {}
        for name, layer in layers_of(tree, self._layers).items():
            root = self._root_of(name, layer)
            layer = with_groups(layer, root.vectors.shape[:-2], self._layers)
            of = _OfLayer(root, layer)
            w = leaves[name].astype(jnp.promote_types(leaves[name].dtype, jnp.float32))
            # S mixes the inputs: in a mesh of explicit axes each device sees all of them.
            inputs, blocks = layer.block_layout
            w = gathered(w, [*inputs, *(axis for axis, _ in blocks)])
            if layer.bias is None or root.mean is None:
                w, _ = function(of, w, None)
            else:
                bias = leaves[layer.bias]
                w, b = function(of, w, fitted(layer.align_bias(bias.astype(w.dtype)), w))
                assert b is not None  # One went in.
                restored = layer.restore_bias(b, bias.shape).astype(bias.dtype)
                new[layer.bias] = fitted(restored, bias)
            new[name] = fitted(w.astype(leaves[name].dtype), leaves[name])
        return replace_leaves(tree, new)

    def _root_of(self, name: str, layer: Layer) -> Root:
        root = self._roots.get(name)
        if root is None:
            has = f"has no running statistics of `{name}`, but of {quoted(self._roots)}"
        elif root.vectors.shape[-2] == layer.fan_in:
            return root
        else:
            n = root.vectors.shape[-2]
            has = f"has running statistics of {n} inputs for `{name}` of fan-in {layer.fan_in}"
        msg = (
            f"The state of the preconditioner {has}: it was made for other parameters. Call "
            "`init` on these parameters, or restore the state that belongs to them."
        )
        raise ValueError(msg)


class _OfLayer(NamedTuple):
    """What S and U do to one layer, whose bias is broadcast against its kernel."""

    root: Root
    layer: Layer

    def centered(
        self, function: Callable[..., centering.Pair], w: Array, b: Array | None
    ) -> centering.Pair:
        """U, its transpose or its inverse; nothing without a bias."""
        if b is None or self.root.mean is None:
            return w, b
        mean = fitted(spread(self.root.mean, self.layer).astype(w.dtype), w)
        one = jnp.ones((1,) * w.ndim, w.dtype)
        return function(w, b, centering.Entries(one, mean, jnp.ones((), w.dtype)))

    def powered(self, w: Array, power: float) -> Array:
        """S^-power along the input axes of a kernel, in every block."""
        root, layer = self.root, self.layer
        inputs, blocks = layer.block_layout
        kernel = layer.kernel_shape
        groups = {axis: number for axis, number in blocks if number != kernel[axis]}
        # An axis of groups is cut in two; `at` is where each axis is then.
        cut: list[int] = []
        at = []
        for axis, size in enumerate(kernel):
            at.append(len(cut))
            cut += [groups[axis], size // groups[axis]] if axis in groups else [size]
        axes, new = list(range(len(cut))), len(cut)
        of_blocks, of_inputs = [at[axis] for axis, _ in blocks], [at[axis] for axis in inputs]
        vectors = root.vectors.astype(w.dtype)
        sizes = [kernel[axis] for axis in inputs]
        vectors = vectors.reshape(*layer.block_shape, *sizes, vectors.shape[-1])
        v_axes = [*of_blocks, *of_inputs, new]
        z_axes = [*(axis for axis in axes if axis not in of_inputs), new]
        function = root.spectrum.astype(w.dtype) ** (power * root.exponent.astype(w.dtype))
        split, rest = w.reshape(cut), None
        if root.is_wide:
            function, rest = function[..., :-1] - function[..., -1:], function[..., -1]
        f_axes, dot = [*of_blocks, new], functools.partial(jnp.einsum, precision="highest")
        n_columns = split.size // math.prod(root.vectors.shape[:-1])
        if not root.is_wide and n_columns >= layer.fan_in:
            # A product with S costs half of two with V, and S as much; P^T and P have S in common.
            others = [new + 1 + axis for axis in of_inputs]
            scaled = jnp.einsum(vectors, v_axes, function, f_axes, v_axes)
            s_axes = [*of_blocks, *others, *of_inputs]
            matrix = dot(scaled, [*of_blocks, *others, new], vectors, v_axes, s_axes)
            return dot(
                matrix, s_axes, split, axes, [new + 1 + i if i in of_inputs else i for i in axes]
            ).reshape(w.shape)
        inner = dot(vectors, v_axes, split, axes, z_axes)
        inner = jnp.einsum(function, f_axes, inner, z_axes, z_axes)
        result = dot(vectors, v_axes, inner, z_axes, axes)
        if rest is not None:
            result = result + jnp.einsum(rest, of_blocks, split, axes, axes)
        return result.reshape(w.shape)


def with_groups(layer: Layer, blocks: tuple[int, ...], layers: Layers | None) -> Layer:
    """A layer that names told, with the groups of a convolution that the statistics told."""
    found = layer.block_layout[1]
    if layers is None and len(blocks) == len(found) + 1:
        axis = len(layer.kernel_shape) - 1
        return dataclasses.replace(layer, blocks=(*found, (axis, blocks[-1])))
    return layer


def spread(mean: Array, layer: Layer) -> Array:
    """A mean of shape (*blocks, n) in a shape that broadcasts against the kernel."""
    inputs, blocks = layer.block_layout
    kernel = layer.kernel_shape
    apart = (*(axis for axis, _ in blocks), *inputs)
    full = mean.reshape(*layer.block_shape, *(kernel[axis] for axis in inputs))
    full = jnp.transpose(full, [apart.index(axis) for axis in sorted(apart)])
    full = jnp.expand_dims(full, [axis for axis in range(len(kernel)) if axis not in apart])
    for axis, number in blocks:
        if number != kernel[axis]:
            full = jnp.repeat(full, kernel[axis] // number, axis=axis)
    return full
