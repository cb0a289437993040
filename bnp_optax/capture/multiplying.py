"""Uses: the products of inputs with views of parameters."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal

from bnp_optax.capture import products
from bnp_optax.capture.facts import Mark
from bnp_optax.capture.following import Following
from bnp_optax.capture.products import Product
from bnp_optax.capture.rearrangements import is_cast
from bnp_optax.capture.uses import Result, Use
from bnp_optax.capture.views import View


class Multiplying(Following):
    """The equations that multiply inputs with parameters."""

    def dot_general(self, index: int, eqn: Any) -> None:
        """A product of two arrays, of which one, or either, may be a view."""
        sides = [self.view(atom) for atom in eqn.invars[:2]]
        for side, view in enumerate(sides):
            if view is None:
                if sides[1 - side] is None and eqn.outvars[0].aval.shape:
                    self.note_mixed(eqn.invars[side], eqn)
                continue
            other = sides[1 - side]
            # A row that data choose, of an embedding, is an input; so may be a scaled parameter.
            of_data = other is None or (other.data and not view.data)
            if other is not None and not of_data and not _are_rows(eqn, 1 - side, other):
                self.note(view, "dot_general with another parameter")
            else:
                found = products.dot_general(eqn, side, view, self.options)
                self.multiply(index, eqn, view, found)

    def conv(self, index: int, eqn: Any) -> None:
        """A convolution, whose kernel may be a view."""
        inputs, kernel = (self.view(atom) for atom in eqn.invars)
        if inputs is not None:
            self.note(inputs, "conv_general_dilated as its input")
        if kernel is None:
            self.note_mixed(eqn.invars[1], eqn)
        if kernel is not None and (inputs is None or inputs.data):
            self.multiply(index, eqn, kernel, products.conv(eqn, kernel, self.options))
        elif kernel is not None:
            self.note(kernel, "conv_general_dilated with another parameter")

    def is_lookup(self, eqn: Any) -> bool:
        """Whether whole rows of a parameter are looked up, and that is to be measured."""
        view = self.view(eqn.invars[0])
        return (
            self.options.embeddings
            and view is not None
            and view.altered is None
            and products.takes_rows(eqn, view)
        )

    def lookup(self, index: int, eqn: Any) -> None:
        """A lookup of rows, as `is_lookup` has found."""
        view = self.view(eqn.invars[0])
        assert view is not None
        self.multiply(index, eqn, view, products.lookup(eqn, view, self.options))

    def multiply(self, index: int, eqn: Any, view: View, found: Product | str) -> None:
        """Note a product with `view`, or why it is none that is measured."""
        if isinstance(found, str):
            self.note(view, found)
            return
        if jnp.issubdtype(found.inputs.aval.dtype, jnp.complexfloating):
            self.note(view, "product with complex inputs")
            return
        n_axes = sum(len(axes) for piece in view.pieces for axes in piece.axes)
        if len(found.summed) == len(view.shape) and not eqn.outvars[0].aval.shape and n_axes > 1:
            # No layer, but a sum over all entries, such as that of a penalty.
            self.note(view, "dot_general with an array of its shape")
            return
        product_inputs = found.inputs
        mark = None if isinstance(found.inputs, Literal) else self.marks.get(found.inputs)
        trusted = mark is not None and mark.trusted
        if view.altered and not trusted:
            self.alter(view, view.altered)
            return
        inputs = self.measured(found, mark)
        rows_from = self.rows_from(found, inputs)
        if trusted and mark is not None:
            of_patches = products.patches(found, mark.var, self.options)
            if of_patches is not None:
                # Its rows are the patches, which the map would have to be made into again.
                rows_from = self.before_casts(found.inputs)
                found, inputs = of_patches, mark.var
        left, right = eqn.invars[:2]
        kernel = self.numbers.atom(self.env, left if right is product_inputs else right)
        view, entries = found.view, []
        for piece in view.pieces:
            input_axes = frozenset().union(*(piece.axes[axis] for axis in found.summed))
            others = [axis for axis in range(len(view.shape)) if axis not in found.summed]
            if any(piece.axes[axis] & input_axes for axis in others):
                self.note(View(view.shape, (piece,)), "reshape that splits its input axis")
                continue
            use = Use(
                piece=piece,
                scale=view.scale,
                scaled=view.scaled,
                eqn=index,
                branch=0,
                inner=None,
                product=found,
                inputs=inputs,
                rows_from=rows_from,
                varying=self.varies(inputs),
                rows=(self.numbers.atom(self.env, inputs), kernel),
                input_axes=input_axes,
                stats_axes=piece.varying.union(*(piece.axes[axis] for axis in found.varying)),
                partial_axes=piece.partial,
                group_axes=piece.axes[-1] if found.n_groups > 1 else frozenset(),
                count=found.count,
                depends=self.is_dependent(inputs),
                constant=not self.is_dependent(inputs) and not self.is_data(inputs),
                live=self.is_live,
                needed=any(map(self.context.needed, eqn.outvars)),
                marked=mark is not None,
                trusted=trusted,
            )
            self.trace.uses.append(use)
            axes = tuple(
                frozenset() if axis is None else piece.axes[axis] for axis in found.out_axes
            )
            # Of the result's axes the kernel's entries lie as they did in the kernel.
            entries.append((use, dataclasses.replace(piece, axes=axes)))
        if entries:
            self.results[eqn.outvars[0]] = Result(tuple(entries))

    def measured(self, product: Product, mark: Mark | None) -> Any:
        """The variable to measure: the layer's inputs as it got them, before padding and casts."""
        inputs = product.inputs
        if mark is not None and fits(mark.var, inputs, product):
            return mark.var
        return self.before_casts(inputs)

    def rows_from(self, product: Product, inputs: Any) -> Any:
        """The variable that rows are taken from: padded, unlike `inputs`, as the product has it."""
        if inputs.aval.shape == product.inputs.aval.shape:
            return inputs
        return self.before_casts(product.inputs)

    def before_casts(self, inputs: Any) -> Any:
        """A variable before its casts: a small spread needs the digits that a cast drops."""
        while not isinstance(inputs, Literal) and is_cast(self.definitions.get(inputs)):
            inputs = self.definitions[inputs].invars[0]
        return inputs


def _are_rows(eqn: Any, side: int, view: View) -> bool:
    """Whether the operand `side`, a parameter, was copied along a batch, as a first state is."""
    contract, batch = eqn.params["dimension_numbers"]
    free = {*range(len(view.shape))} - {*contract[side], *batch[side]}
    return any(not any(piece.axes[axis] for piece in view.pieces) for axis in free)


def fits(named: Any, inputs: Any, product: Product) -> bool:
    """Whether named inputs have the shape of those that a product meets, but for padding."""
    pairs = zip(named.aval.shape, inputs.aval.shape, strict=True)
    return {axis for axis, (a, b) in enumerate(pairs) if a != b} <= set(product.window)
