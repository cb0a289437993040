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
from typing import Any

from jax.extend.core import Literal
from jax.extend.core import primitives as prims

from bnp_optax.capture import jaxprs
from bnp_optax.capture.devices import mesh_axes
from bnp_optax.capture.facts import Context, Input, Mark
from bnp_optax.capture.multiplying import Multiplying, fits
from bnp_optax.capture.uses import (
    Bias,
    Result,
    Trace,
    Use,
    add_biases_of_call,
    alike,
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


def trace(closed: Any, inputs: Sequence[Input], context: Context) -> Trace:
    """Find the uses of the tracked inputs of a jaxpr.

    Args:
      closed: A `ClosedJaxpr`, or a `Jaxpr` without constants.
      inputs: What is known of each of its inputs.
      context: What is known of the whole loss.
    """
    return _Tracer(closed, inputs, context).run()


class _Tracer(Multiplying):
    """The walk itself, and the functions that it enters."""

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
        found.out_mixed = [self.mixed_in(atom) for atom in found.jaxpr.outvars]
        found.out_varying = [self.varies(atom) for atom in found.jaxpr.outvars]
        return found

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
        elif name not in jaxprs.FLAT:  # Parameters that are held constant are none.
            self.follow(eqn)

    def is_mark(self, eqn: Any) -> bool:
        """Whether an equation names inputs; a parameter may be a layer's input, but is none."""
        if eqn.primitive.name != "name" or not eqn.params["name"].startswith(MARK):
            return False
        return self.view(eqn.invars[0]) is None

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

    def enter(self, index: int, closed: Any, inputs: Sequence[Input], branch: int = 0) -> Trace:
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
                    pairs = alike(pairs.union(leading, paired_cuts(other, piece)), other, piece)
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
                    partial_axes=piece.partial | outside(inner.partial_axes, shown),
                    group_axes=outside(inner.group_axes, shown),
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
        given = {p: of for root, p in found.passed.items() if (of := results[root]) is not None}
        for passed, of in given.items():
            add_biases_of_call(passed, of, operands)
        self.follow_mark(eqn)
        self.follow_trusted(eqn)
        outs = zip(eqn.outvars, found.out_views, found.out_results, found.out_mixed, strict=True)
        for out, view, result, mixed in outs:
            if view is not None:
                self.views[out] = compose(view, operands) or self.lost(out, [view], operands, eqn)
            elif mixed:
                views = (operands[root] for root in mixed)
                roots = (piece.root for view in views if view is not None for piece in view.pieces)
                self.mixed[out] = dict.fromkeys(roots)
            if result is not None:
                outer_result = outside_result(result, adopted, given)
                if outer_result is not None:
                    self.results[out] = outer_result

    def lift(self, found: Trace, eqn: Any, adopted: dict[Use, list[Use]]) -> None:
        """Measure inputs here that a layer got here, whatever the function made of them."""
        roots = {var: i for i, var in enumerate(found.jaxpr.invars)}
        for inner, uses in adopted.items():
            if not inner.marked or inner.inner is not None or inner.piece.reads:
                continue
            atom = eqn.invars[roots[inner.inputs]] if inner.inputs in roots else None
            mark = self.marks.get(atom) if atom is not None else None
            if mark is None or not fits(mark.var, atom, inner.product):
                continue
            for use in uses:
                use.inner, use.inputs = None, mark.var
                rows_from = inner.rows_from
                same = rows_from is not None and rows_from.aval.shape == mark.var.aval.shape
                use.rows_from = mark.var if same else None
                steps = (*use.piece.steps, *inner.piece.steps)
                use.piece = dataclasses.replace(use.piece, steps=steps)

    def scan(self, index: int, eqn: Any) -> None:
        n_consts, n_carry = jaxprs.scan_counts(eqn)
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
            for out, view in zip(eqn.outvars[n_carry:], found.out_views[n_carry:], strict=True):
                if view is not None:
                    self.views[out] = self.lost(out, [view], operands, eqn)

    def cond(self, index: int, eqn: Any) -> None:
        atoms = eqn.invars[1:]
        operands = [self.view(atom) for atom in atoms]
        if any(operands):
            out_views = []
            for branch, closed in enumerate(eqn.params["branches"]):
                found = self.enter(index, closed, self.inputs(eqn, atoms, operands, branch), branch)
                self.adopt(index, found, operands, branch)
                out_views.append(found.out_views)
            for out, *views in zip(eqn.outvars, *out_views, strict=True):
                if any(views):
                    self.views[out] = self.lost(out, views, operands, eqn)

    def lost(
        self,
        out: Any,
        views: Sequence[View | None],
        operands: Sequence[View | None],
        eqn: Any,
    ) -> View:
        """What a called function returns of parameters, where it cannot be told how they lie."""
        roots = {
            piece.root: None
            for view in filter(None, views)
            for inner in view.pieces
            if (outer := operands[inner.root]) is not None
            for piece in outer.pieces
        }
        nowhere = (frozenset(),) * len(out.aval.shape)
        pieces = tuple(Piece(root, nowhere) for root in roots)
        return View(tuple(out.aval.shape), pieces, eqn.primitive.name, data=True)

    def shard_map(self, index: int, eqn: Any) -> None:
        operands = [self.view(atom) for atom in eqn.invars]
        if any(operands):
            inputs = self.inputs(eqn, eqn.invars, operands)
            for i, spec in enumerate(eqn.params["in_specs"]):
                inputs[i] = inputs[i]._replace(varying=inputs[i].varying | set(mesh_axes(spec)))
            self.adopt(index, self.enter(index, eqn.params["jaxpr"], inputs), operands)
