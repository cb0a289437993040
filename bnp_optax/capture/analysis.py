"""Where the inputs of a jaxpr meet data: its products with parameters, and their biases.

An abstract walk over a traced function. Parameters are followed as views through whatever only
rearranges them, into products and into the functions that the jaxpr calls.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Literal
from jax.extend.core import primitives as prims

from bnp_optax.capture import products, views
from bnp_optax.capture.pairing import (
    add_bias,
    compose,
    inside,
    outside,
    outside_pairs,
    paired,
    paired_cuts,
    partners,
)
from bnp_optax.capture.plan import Bias, Plan, Product, Use
from bnp_optax.capture.products import Multiplied
from bnp_optax.capture.reading import Options
from bnp_optax.capture.rearrangements import is_cast, rearranged
from bnp_optax.capture.views import Piece, View

# Evaluated as they are, and once more for the statistics, so that their derivatives are kept.
_SHADOWED = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "closed_call"}


def is_remat(eqn: Any) -> bool:
    """Whether an equation is `jax.checkpoint`, whose name has changed over time."""
    return {"jaxpr", "policy", "prevent_cse"} <= set(eqn.params)


def make_plan(
    closed: Any, tracked: Sequence[bool], depends: Sequence[bool], options: Options
) -> Plan:
    """Analyze a jaxpr.

    Args:
      closed: A `ClosedJaxpr`, or a `Jaxpr` without constants.
      tracked: Which inputs are parameters, or views of some.
      depends: Which inputs depend on parameters.
      options: How finely to take the statistics.
    """
    return _Analysis(closed, tracked, depends, options).run()


class _Analysis:
    """The state of a walk over one jaxpr."""

    def __init__(
        self, closed: Any, tracked: Sequence[bool], depends: Sequence[bool], options: Options
    ) -> None:
        jaxpr = getattr(closed, "jaxpr", closed)
        self.plan = Plan(jaxpr, getattr(closed, "consts", ()))
        self.options = options
        self.views: dict[Any, View] = {}
        self.products: dict[Any, Product] = {}
        self.dependent: set[Any] = set()
        self.definitions: dict[Any, Any] = {}
        for root, (var, follow, dependent) in enumerate(
            zip(jaxpr.invars, tracked, depends, strict=True)
        ):
            if follow:
                self.views[var] = views.root_view(root, tuple(var.aval.shape))
            if dependent:
                self.dependent.add(var)

    def run(self) -> Plan:
        plan = self.plan
        for index, eqn in enumerate(plan.jaxpr.eqns):
            self.equation(index, eqn)
            self.definitions.update(dict.fromkeys(eqn.outvars, eqn))
            if any(self.depends(atom) for atom in eqn.invars):
                self.dependent.update(eqn.outvars)
        plan.out_views = [self.view(atom) for atom in plan.jaxpr.outvars]
        plan.out_products = [self.product(atom) for atom in plan.jaxpr.outvars]
        return plan

    def view(self, atom: Any) -> View | None:
        return None if isinstance(atom, Literal) else self.views.get(atom)

    def product(self, atom: Any) -> Product | None:
        return None if isinstance(atom, Literal) else self.products.get(atom)

    def depends(self, atom: Any) -> bool:
        return not isinstance(atom, Literal) and atom in self.dependent

    def note(self, view: View, primitive: str) -> None:
        for piece in view.pieces:
            self.plan.consumers.setdefault(piece.root, {})[primitive] = None

    def equation(self, index: int, eqn: Any) -> None:
        primitive, name = eqn.primitive, eqn.primitive.name
        if primitive is prims.dot_general_p:
            self.dot_general(index, eqn)
        elif primitive is prims.conv_general_dilated_p:
            self.conv(index, eqn)
        elif primitive is prims.jit_p or name in _SHADOWED or is_remat(eqn):
            self.call(index, eqn)
        elif primitive is prims.scan_p:
            self.scan(index, eqn)
        elif primitive is prims.cond_p:
            self.cond(index, eqn)
        elif primitive is prims.gather_p and self.is_lookup(eqn):
            self.lookup(index, eqn)
        elif name == "shard_map":
            self.shard_map(index, eqn)
        elif name == "optimization_barrier":
            for atom, out in zip(eqn.invars, eqn.outvars, strict=True):
                self.carry_over(atom, out)
        elif any(self.view(atom) for atom in eqn.invars):
            self.rearrange(eqn)
        elif any(self.product(atom) for atom in eqn.invars):
            self.follow_product(eqn)

    def carry_over(self, atom: Any, out: Any) -> None:
        view, product = self.view(atom), self.product(atom)
        if view:
            self.views[out] = view
        if product:
            self.products[out] = product

    def rearrange(self, eqn: Any) -> None:
        """An equation that takes views and is neither a product nor a call."""
        (out, *others), first = eqn.outvars, eqn.invars[0]
        view, primitive = self.view(first), eqn.primitive
        new = None
        if primitive is prims.concatenate_p:
            operands = [(tuple(atom.aval.shape), self.view(atom)) for atom in eqn.invars]
            new = views.concatenate(operands, eqn.params["dimension"])
        elif view is not None:
            new = rearranged(view, eqn, self.definitions)
        if new is not None:
            self.views[out] = new
            return
        # A sum with a product may add a bias.
        pair = [(self.product(a), self.view(b)) for a, b in _both_orders(eqn.invars)]
        for product, bias in pair:
            if product and bias and primitive in (prims.add_p, prims.add_jaxvals_p):
                add_bias(product, bias)
                return
        for atom in eqn.invars:
            taken = self.view(atom)
            if taken is None:
                continue
            self.note(taken, primitive.name)
            if not others and out.aval.shape == taken.shape:
                altered = taken.altered or primitive.name
                self.views[out] = dataclasses.replace(taken, altered=altered)

    def follow_product(self, eqn: Any) -> None:
        """What a product's result goes through on its way to the bias."""
        product = self.product(eqn.invars[0])
        shape = tuple(eqn.outvars[0].aval.shape)
        if product is None:
            return
        # A result has the axes of a view of the kernel: what rearranges one rearranges the other.
        entries = []
        for use, axes in product.entries:
            old = View(tuple(eqn.invars[0].aval.shape), (Piece(use.root, axes),))
            new = rearranged(old, eqn, self.definitions)
            if new is None or new.shape != shape or new.altered:
                return
            entries.append((use, new.pieces[0].axes))
        self.products[eqn.outvars[0]] = Product(tuple(entries))

    def dot_general(self, index: int, eqn: Any) -> None:
        sides = [self.view(atom) for atom in eqn.invars[:2]]
        for side, view in enumerate(sides):
            if view is None:
                continue
            if all(sides):
                self.note(view, "dot_general with another parameter")
            else:
                found = products.dot_general(eqn, side, view, self.options)
                self.multiply(index, eqn, view, found)

    def conv(self, index: int, eqn: Any) -> None:
        inputs, kernel = (self.view(atom) for atom in eqn.invars)
        if inputs is not None:
            self.note(inputs, "conv_general_dilated as its input")
        if kernel is not None and (inputs is None or kernel.altered):
            self.multiply(index, eqn, kernel, products.conv(eqn, kernel, self.options))

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

    def multiply(self, index: int, eqn: Any, view: View, found: Multiplied | str) -> None:
        """Note a product with `view`, or why it is none that is measured."""
        if view.altered:
            self.alter(view, view.altered)
            return
        if isinstance(found, str):
            self.note(view, found)
            return
        view, inputs = found.view, found.inputs
        ndim = len(view.shape)
        reading = found.measure(jax.ShapeDtypeStruct(inputs.aval.shape, inputs.aval.dtype))
        summed = [axis % ndim for axis in reading.input_axes]
        # What is measured is what came before a cast, whose digits a small spread needs, and before
        # `shard_map` made it vary over devices.
        while not isinstance(inputs, Literal) and is_cast(self.definitions.get(inputs)):
            inputs = self.definitions[inputs].invars[0]
        entries = []
        for piece in view.pieces:
            input_axes = frozenset().union(*(piece.axes[axis] for axis in summed))
            others = [axis for axis in range(ndim) if axis not in summed]
            if any(piece.axes[axis] & input_axes for axis in others):
                self.note(View(view.shape, (piece,)), "reshape that splits its input axis")
                continue
            use = Use(
                piece=piece,
                eqn=index,
                inner=None,
                branch=0,
                input_axes=input_axes,
                stacked_axes=frozenset().union(*(piece.axes[axis] for axis in found.batch)),
                positions=reading.positions,
                count=reading.count,
                kind=found.kind,
                measure=found.measure,
                inputs=inputs,
                depends=self.depends(inputs),
            )
            self.plan.uses.append(use)
            axes = tuple(
                frozenset() if axis is None else piece.axes[axis] for axis in found.out_axes
            )
            entries.append((use, axes))
        if entries:
            self.products[eqn.outvars[0]] = Product(tuple(entries))

    def alter(self, view: View, primitive: str) -> None:
        for piece in view.pieces:
            self.plan.altered.setdefault(piece.root, {})[primitive] = None

    def enter(
        self, index: int, closed: Any, atoms: Sequence[Any], tracked: Sequence[View | None]
    ) -> Plan:
        """The plan of a function called with `atoms`, of which those with a view are followed."""
        depends = [self.depends(atom) for atom in atoms]
        plan = make_plan(closed, [view is not None for view in tracked], depends, self.options)
        self.plan.calls.setdefault(index, []).append(plan)
        return plan

    def adopt(
        self,
        index: int,
        plan: Plan,
        operands: Sequence[View | None],
        branch: int = 0,
        n_fixed: int | None = None,
    ) -> dict[Use, list[Use]]:
        """Make the measurements of a called function those of this jaxpr.

        Args:
          index: Of the equation.
          plan: Of the function.
          operands: For each of its inputs, the view that it is given.
          branch: Index of the branch.
          n_fixed: Inputs from this one on are scanned over: their leading axis is gone inside.

        Returns:
          For each of its measurements, those that it becomes here.
        """
        for root, names in plan.altered.items():
            for name in names:
                self.alter(_given(operands, root), name)
        for root, names in plan.consumers.items():
            for name in names:
                self.note(_given(operands, root), name)

        def is_scanned(root: int) -> bool:
            return n_fixed is not None and root >= n_fixed

        adopted: dict[Use, list[Use]] = {}
        for inner in plan.uses:
            view = _given(operands, inner.root)
            if view.altered:
                self.alter(view, view.altered)
                continue
            scanned = is_scanned(inner.root)
            adopted[inner] = []
            for position, piece in enumerate(view.pieces):
                shown = inside(piece, scanned)
                biases = []
                for bias in inner.biases:
                    # A bias that all layers of a scan share is not that of any one of them.
                    if is_scanned(bias.root) != scanned:
                        continue
                    for other in partners(operands[bias.root], position, len(view.pieces)):
                        pairs = outside_pairs(bias.pairs, shown, inside(other, scanned))
                        leading = paired(other.axes[0], piece.axes[0]) if scanned else []
                        cuts = paired_cuts(other, piece)
                        biases.append(Bias(other.root, pairs.union(leading, cuts)))
                stacked = outside(inner.stacked_axes, shown)
                use = dataclasses.replace(
                    inner,
                    piece=piece,
                    eqn=index,
                    inner=inner,
                    branch=branch,
                    input_axes=outside(inner.input_axes, shown),
                    stacked_axes=stacked | piece.axes[0] if scanned else stacked,
                    measure=None,
                    inputs=None,
                    biases=biases,
                )
                adopted[inner].append(use)
            self.plan.uses += adopted[inner]
        return adopted

    def call(self, index: int, eqn: Any) -> None:
        """`jit`, `checkpoint`, and functions with derivatives of their own."""
        operands = [self.view(atom) for atom in eqn.invars]
        closed = _sub_jaxpr(eqn)
        if not any(operands):
            return
        if closed is None:
            self.not_followed(eqn)
            return
        plan = self.enter(index, closed, eqn.invars, operands)
        adopted = self.adopt(index, plan, operands)
        for out, view, product in zip(eqn.outvars, plan.out_views, plan.out_products, strict=True):
            if view is not None:
                outer = compose(view, operands)
                if outer is not None:
                    self.views[out] = outer
            if product is not None:
                entries = [
                    (use, tuple(outside(axis, use.piece) for axis in axes))
                    for inner, axes in product.entries
                    for use in adopted.get(inner, [])
                ]
                if entries:
                    self.products[out] = Product(tuple(entries))

    def scan(self, index: int, eqn: Any) -> None:
        n_consts, n_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        n_fixed = n_consts + n_carry
        closed = eqn.params["jaxpr"]
        operands: list[View | None] = []
        depends: list[bool] = []
        for position, (atom, var) in enumerate(zip(eqn.invars, closed.jaxpr.invars, strict=True)):
            view, is_carry = self.view(atom), n_consts <= position < n_fixed
            if view is not None and is_carry:
                if closed.jaxpr.outvars[position - n_consts] is var:
                    self.views[eqn.outvars[position - n_consts]] = view
                else:
                    self.note(view, "scan that carries and changes it")
                    view = None
            operands.append(view)
            # What is carried may come to depend on parameters.
            depends.append(self.depends(atom) or is_carry)
        if any(operands):
            tracked = [view is not None for view in operands]
            plan = make_plan(closed, tracked, depends, self.options)
            self.plan.calls[index] = [plan]
            self.adopt(index, plan, operands, n_fixed=n_fixed)

    def cond(self, index: int, eqn: Any) -> None:
        atoms = eqn.invars[1:]
        operands = [self.view(atom) for atom in atoms]
        if not any(operands):
            return
        for branch, closed in enumerate(eqn.params["branches"]):
            plan = self.enter(index, closed, atoms, operands)
            self.adopt(index, plan, operands, branch)

    def shard_map(self, index: int, eqn: Any) -> None:
        operands = [self.view(atom) for atom in eqn.invars]
        if any(operands):
            plan = self.enter(index, eqn.params["jaxpr"], eqn.invars, operands)
            self.adopt(index, plan, operands)

    def not_followed(self, eqn: Any) -> None:
        for atom in eqn.invars:
            view = self.view(atom)
            if view is not None:
                self.note(view, eqn.primitive.name)


def _sub_jaxpr(eqn: Any) -> Any:
    """The jaxpr that a call evaluates on its own operands, or None."""
    found = [
        value for value in eqn.params.values() if hasattr(getattr(value, "jaxpr", value), "eqns")
    ]
    if len(found) != 1:
        return None
    jaxpr = getattr(found[0], "jaxpr", found[0])
    fits = len(jaxpr.invars) == len(eqn.invars) and len(jaxpr.outvars) == len(eqn.outvars)
    return found[0] if fits and not (jaxpr.constvars and found[0] is jaxpr) else None


def _both_orders(atoms: Sequence[Any]) -> list[tuple[Any, Any]]:
    return [(atoms[0], atoms[1]), (atoms[1], atoms[0])] if len(atoms) == 2 else []


def _given(operands: Sequence[View | None], root: int) -> View:
    """The view given for an input that is followed, which therefore is there."""
    view = operands[root]
    if view is None:
        msg = f"input {root} of a called function was followed without a view"
        raise AssertionError(msg)
    return view
