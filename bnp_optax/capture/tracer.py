"""Follow parameters through a traced function into the products where they meet inputs.

The walk is abstract: it looks at the equations of a jaxpr and computes nothing. Of each variable
it knows whether it is a *view* of parameters, that is, holds their entries and nothing else;
whether it is the *result* of products, to which a bias may be added; and whether it depends on
parameters, on data, or on both. For

    y = x @ W.T + b

the equations are `transpose`, a view of W; `dot_general`, whose other operand x is no view: a use
of W whose rows are those of x, and which sums over W's axis 1; and `add`, of the result and a view
of b, which makes b the bias of that use. A value is a view only as long as no operand depends on
data: what LayerNorm's scale multiplies are activations, even where they have its shape.
"""

import dataclasses
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.extend.core import primitives as prims

from bnp_optax.capture import jaxprs, products, views
from bnp_optax.capture.devices import (
    different_along,
    equal_along,
    is_sum_over_devices,
    mesh_axes,
)
from bnp_optax.capture.jaxprs import Liveness, Numbers, is_identity
from bnp_optax.capture.moments import Options
from bnp_optax.capture.products import Product
from bnp_optax.capture.rearrangements import is_cast, rearranged
from bnp_optax.capture.uses import (
    Bias,
    Passed,
    Result,
    Trace,
    Use,
    add_bias,
    add_biases_of_call,
    compose,
    inside,
    outside,
    outside_pairs,
    outside_result,
    paired,
    paired_cuts,
)
from bnp_optax.capture.views import Piece, View

# How a framework names the inputs of a layer; the second where it vouches for the product. No
# user's name is taken for one of these.
MARK = f"bnp_optax:{uuid.uuid4().hex}:"
TRUSTED = f"{MARK}product:"


class Input(NamedTuple):
    """What is known of an input of a jaxpr.

    Attributes:
      tracked: Whether it is a parameter, or a view of some.
      depends: Whether it depends on parameters.
      data: Whether it depends on anything but parameters and constants.
      number: Of its value.
      mark: Whether it holds the named inputs of a layer, and whether these are trusted; or None.
      result: Whether it is a result of products, and whether these are trusted; or None.
      varying: In `shard_map`, the mesh axes along which devices hold different values.
    """

    tracked: bool
    depends: bool
    data: bool
    number: int
    mark: bool | None = None
    result: bool | None = None
    varying: frozenset[str] = frozenset()


class Mark(NamedTuple):
    """Inputs that a framework has named.

    Attributes:
      var: The variable that holds them as the layer got them.
      trusted: Whether the framework vouches for the product.
    """

    var: Any
    trusted: bool


class Context(NamedTuple):
    """What a walk knows of the whole loss.

    Attributes:
      live: Which variables of the jaxpr a derivative of the loss reaches; uses elsewhere do not
        count.
      needed: Which of them any output depends on.
      numbers: Of values.
      options: How finely to take the statistics.
    """

    live: Liveness
    needed: Liveness
    numbers: Numbers
    options: Options

    def inside(self, index: int, branch: int) -> "Context":
        """The same for what the equation at `index` calls."""
        live, needed = (x.inside(index, branch) for x in (self.live, self.needed))
        return self._replace(live=live, needed=needed)


def trace(closed: Any, inputs: Sequence[Input], context: Context) -> Trace:
    """Find the uses of the tracked inputs of a jaxpr.

    Args:
      closed: A `ClosedJaxpr`, or a `Jaxpr` without constants.
      inputs: What is known of each of its inputs.
      context: What is known of the whole loss.
    """
    return _Tracer(closed, inputs, context).run()


class _Tracer:
    """The state of a walk over one jaxpr."""

    def __init__(self, closed: Any, inputs: Sequence[Input], context: Context) -> None:
        jaxpr = jaxprs.bare(closed)
        self.trace = Trace(jaxpr, getattr(closed, "consts", ()))
        self.context = context
        self.numbers = context.numbers
        self.options = context.options
        self.env = self.numbers.walk(closed, [known.number for known in inputs])
        self.views: dict[Any, View] = {}
        self.results: dict[Any, Result] = {}
        self.marks: dict[Any, Mark] = {}
        self.dependent: set[Any] = set()
        self.data: set[Any] = set(jaxpr.constvars)
        self.definitions: dict[Any, Any] = {}
        self.varying = {
            var: known.varying for var, known in zip(jaxpr.invars, inputs, strict=True)
        }
        self.is_live = True  # Whether a derivative reaches the equation at hand.
        for root, (var, known) in enumerate(zip(jaxpr.invars, inputs, strict=True)):
            if known.tracked:
                self.views[var] = views.root_view(root, tuple(var.aval.shape))
            if known.depends:
                self.dependent.add(var)
            if known.data:
                self.data.add(var)
            if known.mark is not None:
                self.marks[var] = Mark(var, known.mark)
            if known.result is not None:
                passed = self.trace.passed[root] = Passed(root, known.result)
                axes = tuple(frozenset({axis}) for axis in range(len(var.aval.shape)))
                self.results[var] = Result(((passed, axes),))

    def run(self) -> Trace:
        found = self.trace
        for index, eqn in enumerate(found.jaxpr.eqns):
            self.is_live = any(map(self.context.live, eqn.outvars))
            if eqn.outvars:
                self.equation(index, eqn)
            self.definitions.update(dict.fromkeys(eqn.outvars, eqn))
            self.vary(eqn)
            for facts in (self.dependent, self.data):
                if any(not isinstance(atom, Literal) and atom in facts for atom in eqn.invars):
                    facts.update(eqn.outvars)
        found.out_views = [self.view(atom) for atom in found.jaxpr.outvars]
        found.out_results = [self.result(atom) for atom in found.jaxpr.outvars]
        found.out_varying = [self.varies(atom) for atom in found.jaxpr.outvars]
        return found

    def varies(self, atom: Any) -> frozenset[str]:
        """The mesh axes along which devices hold different values of `atom`."""
        return frozenset() if isinstance(atom, Literal) else self.varying.get(atom, frozenset())

    def vary(self, eqn: Any) -> None:
        """Along which mesh axes the results of an equation vary, unless a call has told."""
        along = frozenset().union(*map(self.varies, eqn.invars))
        along = along - equal_along(eqn) | different_along(eqn)
        for out in eqn.outvars if along else ():
            self.varying.setdefault(out, along)

    def view(self, atom: Any) -> View | None:
        return None if isinstance(atom, Literal) else self.views.get(atom)

    def result(self, atom: Any) -> Result | None:
        return None if isinstance(atom, Literal) else self.results.get(atom)

    def is_dependent(self, atom: Any) -> bool:
        return not isinstance(atom, Literal) and atom in self.dependent

    def is_mark(self, eqn: Any) -> bool:
        """Whether an equation names inputs; names of parameters and products are the user's."""
        if eqn.primitive is not prims.name_p or not eqn.params["name"].startswith(MARK):
            return False
        return self.view(eqn.invars[0]) is None and self.result(eqn.invars[0]) is None

    def is_data(self, atom: Any) -> bool:
        return not isinstance(atom, Literal) and atom in self.data

    def note(self, view: View, primitive: str) -> None:
        for piece in view.pieces if self.is_live else ():
            self.trace.consumers.setdefault(piece.root, {})[primitive] = None

    def alter(self, view: View, primitive: str) -> None:
        for piece in view.pieces if self.is_live else ():
            self.trace.altered.setdefault(piece.root, {})[primitive] = None

    def equation(self, index: int, eqn: Any) -> None:
        primitive, name = eqn.primitive, eqn.primitive.name
        if primitive is prims.dot_general_p:
            self.dot_general(index, eqn)
        elif primitive is prims.conv_general_dilated_p:
            self.conv(index, eqn)
        elif jaxprs.is_call(eqn):
            self.call(index, eqn)
        elif primitive is prims.scan_p:
            self.scan(index, eqn)
        elif primitive is prims.cond_p:
            self.cond(index, eqn)
        elif primitive is prims.gather_p and self.is_lookup(eqn):
            self.lookup(index, eqn)
        elif name == "shard_map":
            self.shard_map(index, eqn)
        elif self.is_mark(eqn):
            out = eqn.outvars[0]
            self.marks[out] = Mark(out, eqn.params["name"].startswith(TRUSTED))
        elif is_identity(eqn) or is_sum_over_devices(eqn):
            self.carry_over(eqn)
        elif name in jaxprs.FLAT:
            pass  # Parameters that are held constant are none.
        elif any(self.view(atom) for atom in eqn.invars):
            self.rearrange(eqn)
        elif any(self.result(atom) for atom in eqn.invars):
            self.follow_result(eqn)
        else:
            self.follow_mark(eqn)

    # Views, results and marks on their way.

    def carry_over(self, eqn: Any) -> None:
        """Identities, and sums over devices, which a view does not survive."""
        for atom, out in zip(eqn.invars, eqn.outvars, strict=True):
            if (result := self.result(atom)) is not None:
                self.results[out] = result
            if (view := self.view(atom)) is not None:
                if is_identity(eqn):
                    self.views[out] = view
                else:
                    self.note(view, eqn.primitive.name)
            if not isinstance(atom, Literal) and atom in self.marks:
                self.marks[out] = self.marks[atom]

    def rearrange(self, eqn: Any) -> None:
        """An equation that takes views and is neither a product nor a call."""
        (out, *others), primitive = eqn.outvars, eqn.primitive
        taken = [view for atom in eqn.invars if (view := self.view(atom)) is not None]
        new = None
        if primitive is prims.concatenate_p:
            if len(taken) == len(eqn.invars):
                new = views.concatenate(taken, eqn.params["dimension"])
        elif (first := self.view(eqn.invars[0])) is not None:
            new = rearranged(first, eqn, self.definitions)
        if new is None and len(taken) == 1:
            new = self.scaled(taken[0], eqn)
        if new is not None:
            self.views[out] = new
            return
        # A sum with a product may add a bias.
        if primitive in (prims.add_p, prims.add_jaxvals_p):
            for atom, other in (eqn.invars, eqn.invars[::-1]):
                result, bias = self.result(atom), self.view(other)
                if result is not None and bias is not None:
                    add_bias(result, bias)
                    self.note(bias, primitive.name)
                    return
        for view in taken:
            self.note(view, primitive.name)
            if primitive in (prims.mul_p, prims.div_p, prims.select_n_p) and self.is_masked(eqn):
                self.note(view, "an array of its shape, such as a mask")
        data = [atom for atom in eqn.invars if self.is_data(atom) and self.view(atom) is None]
        same = [view for view in taken if view.shape == tuple(out.aval.shape)]
        # By a number a kernel may be divided, as by its norm; arrays of data are activations.
        if others or not same or not all(self.is_number(atom) for atom in data):
            self.follow_mark(eqn)
            return
        # A number is no kernel, but what scales or quantizes one.
        pieces = tuple(piece for view in same for piece in view.pieces if any(piece.axes))
        altered = next((view.altered for view in same if view.altered), primitive.name)
        by_data = bool(data) or any(view.data for view in same)
        self.views[out] = View(same[0].shape, pieces, altered, data=by_data)

    def is_masked(self, eqn: Any) -> bool:
        """Whether a view meets an array of its shape, of two axes or more, none of them copied."""
        shape = eqn.outvars[0].aval.shape

        def is_whole(atom: Any) -> bool:
            made = None if isinstance(atom, Literal) else self.definitions.get(atom)
            copied = made is not None and made.primitive is prims.broadcast_in_dim_p
            return atom.aval.shape == shape and not copied

        whole = [atom for atom in eqn.invars if is_whole(atom)]
        n_views = sum(self.view(atom) is not None for atom in whole)
        return 0 < n_views < len(whole) and sum(size > 1 for size in shape) >= 2

    def is_number(self, atom: Any) -> bool:
        """Whether all entries are copies of one number."""
        eqn = self.definitions.get(atom)
        if eqn is not None and eqn.primitive is prims.broadcast_in_dim_p:
            atom = eqn.invars[0]
        return not atom.aval.shape

    def scaled(self, view: View, eqn: Any) -> View | None:
        """`view` times a constant, if that is what the equation computes."""
        factor = self.factor(eqn)
        if factor is None or view.shape != tuple(eqn.outvars[0].aval.shape):
            return None
        scale = view.scale * factor
        return dataclasses.replace(view, scale=scale, scaled=eqn.primitive.name)

    def factor(self, eqn: Any) -> float | None:
        """The constant that an equation multiplies its one variable operand by."""
        if eqn.primitive is prims.neg_p:
            return -1.0
        if eqn.primitive is prims.mul_p:
            values = [self.constant(atom) for atom in eqn.invars]
            return next((value for value in values if value), None)
        if eqn.primitive is prims.div_p:
            value = self.constant(eqn.invars[1])
            return 1.0 / value if value else None
        return None

    def constant(self, atom: Any) -> float | None:
        """The value of a real number that depends on nothing, also if it was broadcast."""
        if isinstance(atom, Literal):
            return float(atom.val) if jnp.isrealobj(atom.val) and jnp.ndim(atom.val) == 0 else None
        eqn = self.definitions.get(atom)
        if eqn is None or len(eqn.outvars) > 1 or atom in self.data or atom in self.dependent:
            return None
        if eqn.primitive in (prims.broadcast_in_dim_p, prims.convert_element_type_p):
            return self.constant(eqn.invars[0])
        values = [self.constant(operand) for operand in eqn.invars]
        if atom.aval.shape or not values or None in values or jaxprs.is_call(eqn):
            return None
        with jax.ensure_compile_time_eval():
            operands = [
                jnp.asarray(value, operand.aval.dtype)
                for value, operand in zip(values, eqn.invars, strict=True)
            ]
            return float(eqn.primitive.bind(*operands, **eqn.params))

    def follow_result(self, eqn: Any) -> None:
        """What a product's result goes through on its way to the bias."""
        taken = [r for atom in eqn.invars if (r := self.result(atom)) is not None]
        out, *others = eqn.outvars
        shape = tuple(out.aval.shape)
        if len(taken) != 1 or others:
            return
        (result,) = taken
        if (factor := self.factor(eqn)) is not None:
            self.results[out] = result._replace(scale=result.scale * factor)
            return
        if eqn.primitive in (prims.mul_p, prims.div_p):
            if not any(self.is_data(a) for a in eqn.invars if self.result(a) is None):
                self.follow_trusted(eqn)
            return
        if eqn.primitive is prims.add_p and 0.0 in map(self.constant, eqn.invars):
            self.results[out] = result
            return
        first = eqn.invars[0]
        if self.result(first) is None:
            return
        # A result has the axes of a view of the kernel: what rearranges one rearranges the other.
        entries = []
        for use, axes in result.entries:
            old = View(tuple(first.aval.shape), (Piece(use.root, axes),))
            new = rearranged(old, eqn, self.definitions)
            if new is None or new.shape != shape:
                return
            entries.append((use, new.pieces[0].axes if new.pieces else axes))
        self.results[out] = Result(tuple(entries), result.scale)

    def follow_trusted(self, eqn: Any) -> None:
        """What undoes the quantization of a product, between it and its bias."""
        for atom in eqn.invars:
            result, out = self.result(atom), eqn.outvars[0]
            if result is not None and all(use.trusted for use, _ in result.entries):
                if out.aval.shape == atom.aval.shape and out not in self.results:
                    self.results[out] = result
                return

    def follow_mark(self, eqn: Any) -> None:
        """What named inputs go through in their layer: casts, padding, quantization."""
        atoms = [atom for atom in eqn.invars if not isinstance(atom, Literal)]
        found = {self.marks[atom] for atom in atoms if atom in self.marks}
        out = eqn.outvars[0]
        if len(found) != 1 or not jnp.issubdtype(out.aval.dtype, jnp.inexact):
            return
        (mark,) = found
        same_axes = len(out.aval.shape) == len(mark.var.aval.shape)
        moves = eqn.primitive in (prims.transpose_p, prims.reshape_p)
        # Moved, they are the same rows in another shape.
        self.marks[out] = mark if same_axes and not moves else Mark(out, mark.trusted)

    # Products.

    def dot_general(self, index: int, eqn: Any) -> None:
        sides = [self.view(atom) for atom in eqn.invars[:2]]
        for side, view in enumerate(sides):
            if view is None:
                continue
            other = sides[1 - side]
            if other is not None and not other.data:
                self.note(view, "dot_general with another parameter")
            else:
                found = products.dot_general(eqn, side, view, self.options)
                self.multiply(index, eqn, view, found)

    def conv(self, index: int, eqn: Any) -> None:
        inputs, kernel = (self.view(atom) for atom in eqn.invars)
        if inputs is not None:
            self.note(inputs, "conv_general_dilated as its input")
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
        view = self.view(eqn.invars[0])
        assert view is not None  # as `is_lookup` has found
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
        mark = None if isinstance(found.inputs, Literal) else self.marks.get(found.inputs)
        trusted = mark is not None and mark.trusted
        if view.altered and not trusted:
            self.alter(view, view.altered)
            return
        inputs = self.measured(found, mark)
        kernel = self.numbers.of(*(self.numbers.atom(self.env, atom) for atom in eqn.invars[:2]))
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
                varying=self.varies(inputs),
                rows=(self.numbers.atom(self.env, inputs), kernel),
                input_axes=input_axes,
                stats_axes=piece.varying.union(*(piece.axes[axis] for axis in found.varying)),
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
            entries.append((use, axes))
        if entries:
            self.results[eqn.outvars[0]] = Result(tuple(entries))

    def measured(self, product: Product, mark: Mark | None) -> Any:
        """The variable to measure: the layer's inputs as it got them, before padding and casts."""
        inputs = product.inputs
        if mark is not None and _fits(mark.var, inputs, product):
            return mark.var
        # A small spread needs the digits that a cast drops.
        while not isinstance(inputs, Literal) and is_cast(self.definitions.get(inputs)):
            inputs = self.definitions[inputs].invars[0]
        return inputs

    # Calls.

    def inputs(
        self,
        eqn: Any,
        atoms: Sequence[Any],
        operands: Sequence[View | None],
        branch: int = 0,
        results: Sequence[Result | None] | None = None,
    ) -> list[Input]:
        """What is known of the inputs of a function called with `atoms`.

        Marks and results are followed if `results` are given.
        """
        read = [self.numbers.atom(self.env, atom) for atom in atoms]
        numbers = self.numbers.inside(eqn, read, branch)
        marks = [None if isinstance(a, Literal) else self.marks.get(a) for a in atoms]
        return [
            Input(
                tracked=view is not None,
                depends=self.is_dependent(atom),
                data=self.is_data(atom),
                number=number,
                varying=self.varies(atom),
                mark=mark.trusted if mark and results is not None else None,
                result=all(use.trusted for use, _ in result.entries) if result else None,
            )
            for atom, view, number, mark, result in zip(
                atoms, operands, numbers, marks, results or [None] * len(atoms), strict=True
            )
        ]

    def enter(
        self, index: int, closed: Any, inputs: Sequence[Input], branch: int = 0
    ) -> Trace:
        """The trace of a called function."""
        found = trace(closed, inputs, self.context.inside(index, branch))
        self.trace.calls.setdefault(index, []).append(found)
        return found

    def adopt(
        self,
        index: int,
        found: Trace,
        operands: Sequence[View | None],
        branch: int = 0,
        n_fixed: int | None = None,
        length: int = 1,
    ) -> dict[Use, list[Use]]:
        """Make the uses of a called function those of this jaxpr.

        Args:
          index: Of the equation.
          found: The function's trace.
          operands: For each of its inputs, the view that it is given.
          branch: Index of the branch.
          n_fixed: Inputs from this one on are scanned over: their leading axis is gone inside.
          length: Number of steps of the scan.

        Returns:
          For each of its uses, those that it becomes here.
        """

        def given(root: int) -> View:
            view = operands[root]
            assert view is not None  # Only views are followed.
            return view

        for root, names in found.altered.items():
            for name in names:
                self.alter(given(root), name)
        for root, names in found.consumers.items():
            for name in names:
                self.note(given(root), name)

        def is_scanned(root: int) -> bool:
            return n_fixed is not None and root >= n_fixed

        adopted: dict[Use, list[Use]] = {}
        for inner in found.uses:
            view, scanned = given(inner.root), is_scanned(inner.root)
            if view.altered and not inner.trusted:
                self.alter(view, view.altered)
                continue
            adopted[inner] = []
            for position, piece in enumerate(view.pieces):
                shown = inside(piece, scanned)
                biases = []
                for bias in inner.biases:
                    # A bias that all layers of a scan share is not that of any one of them.
                    other_view = given(bias.root)
                    if is_scanned(bias.root) != scanned or other_view.altered:
                        continue
                    if len(other_view.pieces) != len(view.pieces):
                        continue
                    other = other_view.pieces[position]
                    pairs = outside_pairs(bias.pairs, shown, inside(other, scanned))
                    leading = paired(other.axes[0], piece.axes[0]) if scanned else []
                    pairs = pairs.union(leading, paired_cuts(other, piece))
                    biases.append(Bias(other.root, pairs, bias.scale * other_view.scale))
                stacked = piece.axes[0] if scanned else frozenset()
                varying = piece.varying | stacked | outside(inner.stats_axes, shown)
                use = dataclasses.replace(
                    inner,
                    piece=piece,
                    scale=inner.scale * view.scale,
                    scaled=inner.scaled or view.scaled,
                    eqn=index,
                    branch=branch,
                    inner=inner,
                    input_axes=outside(inner.input_axes, shown),
                    stats_axes=varying,
                    count=inner.count if scanned else inner.count * length,
                    biases=biases,
                )
                adopted[inner].append(use)
            self.trace.uses += adopted[inner]
        return adopted

    def call(self, index: int, eqn: Any) -> None:
        """`jit`, `checkpoint`, and functions with derivatives of their own."""
        operands = [self.view(atom) for atom in eqn.invars]
        results = [self.result(atom) for atom in eqn.invars]
        if not any(operands) and not any(results):
            self.follow_mark(eqn)
            return
        closed = jaxprs.called(eqn)
        if closed is None:
            for view in filter(None, operands):
                self.note(view, eqn.primitive.name)
            return
        found = self.enter(index, closed, self.inputs(eqn, eqn.invars, operands, 0, results))
        adopted = self.adopt(index, found, operands)
        self.lift(found, eqn, adopted)
        self.varying.update(zip(eqn.outvars, found.out_varying, strict=True))
        for root, passed in found.passed.items():
            add_biases_of_call(passed, results[root], operands)
        self.follow_mark(eqn)
        self.follow_trusted(eqn)
        for out, view, result in zip(eqn.outvars, found.out_views, found.out_results, strict=True):
            if view is not None and (outer := compose(view, operands)) is not None:
                self.views[out] = outer
            if result is not None:
                taken = {passed: results[root] for root, passed in found.passed.items()}
                if (outer := outside_result(result, adopted, taken)) is not None:
                    self.results[out] = outer

    def lift(self, found: Trace, eqn: Any, adopted: dict[Use, list[Use]]) -> None:
        """Measure inputs here that a layer got here, whatever the function made of them."""
        roots = {var: i for i, var in enumerate(found.jaxpr.invars)}
        for inner, uses in adopted.items():
            if not inner.marked or inner.inner is not None or inner.piece.reads:
                continue
            atom = eqn.invars[roots[inner.inputs]] if inner.inputs in roots else None
            mark = self.marks.get(atom) if atom is not None else None
            if mark is None or not _fits(mark.var, atom, inner.product):
                continue
            for use in uses:
                use.inner, use.inputs = None, mark.var
                steps = (*use.piece.steps, *inner.piece.steps)
                use.piece = dataclasses.replace(use.piece, steps=steps)

    def scan(self, index: int, eqn: Any) -> None:
        n_consts, n_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        n_fixed = n_consts + n_carry
        closed = eqn.params["jaxpr"]
        operands = [self.view(atom) for atom in eqn.invars]
        changed = set()
        for position in range(n_consts, n_fixed):
            view, carry = operands[position], position - n_consts
            if closed.jaxpr.outvars[carry] is closed.jaxpr.invars[position]:
                if view is not None:
                    self.views[eqn.outvars[carry]] = view
                continue
            changed.add(position)
            if view is not None:
                self.note(view, "scan that carries and changes it")
                operands[position] = None
        if any(operands):
            inputs = self.inputs(eqn, eqn.invars, operands)
            # What is carried may come to depend on parameters, and on data.
            for position in changed:
                inputs[position] = inputs[position]._replace(depends=True, data=True)
            found = self.enter(index, closed, inputs)
            self.adopt(index, found, operands, 0, n_fixed, eqn.params["length"])

    def cond(self, index: int, eqn: Any) -> None:
        atoms = eqn.invars[1:]
        operands = [self.view(atom) for atom in atoms]
        if any(operands):
            for branch, closed in enumerate(eqn.params["branches"]):
                found = self.enter(index, closed, self.inputs(eqn, atoms, operands, branch), branch)
                self.adopt(index, found, operands, branch)

    def shard_map(self, index: int, eqn: Any) -> None:
        operands = [self.view(atom) for atom in eqn.invars]
        if any(operands):
            inputs = self.inputs(eqn, eqn.invars, operands)
            for i, spec in enumerate(eqn.params["in_specs"]):
                inputs[i] = inputs[i]._replace(varying=inputs[i].varying | set(mesh_axes(spec)))
            self.adopt(index, self.enter(index, eqn.params["jaxpr"], inputs), operands)


def _fits(named: Any, inputs: Any, product: Product) -> bool:
    """Whether named inputs have the shape of those that a product meets, but for padding."""
    pairs = zip(named.aval.shape, inputs.aval.shape, strict=True)
    return {axis for axis, (a, b) in enumerate(pairs) if a != b} <= set(product.window)
