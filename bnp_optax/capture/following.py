"""Views of parameters, results of products, and named inputs on their way through a jaxpr."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal
from jax.extend.core import primitives as prims

from bnp_optax.capture.devices import is_sum_over_devices
from bnp_optax.capture.facts import Facts, Mark
from bnp_optax.capture.jaxprs import is_identity
from bnp_optax.capture.rearrangements import joined, parts, rearranged
from bnp_optax.capture.uses import Result, add_bias
from bnp_optax.capture.views import View

# Operations after which an array still has a parameter's entries in it, one way or another.
_MIXING = {
    *("add", "add_any", "sub", "neg", "mul", "div", "select_n", "concatenate", "pad", "tile"),
    *("convert_element_type", "reshape", "transpose", "broadcast_in_dim", "slice", "squeeze"),
    "dynamic_update_slice",
}


class Following(Facts):
    """The equations that neither multiply inputs with parameters nor call anything."""

    def follow(self, eqn: Any) -> None:
        """What becomes of the operands of an equation."""
        if is_identity(eqn) or is_sum_over_devices(eqn):
            self.carry_over(eqn)
        elif any(self.view(atom) for atom in eqn.invars):
            self.rearrange(eqn)
        elif any(self.result(atom) for atom in eqn.invars):
            self.follow_result(eqn)
        else:
            self.follow_mark(eqn)
        self.mix(eqn)

    def mix(self, eqn: Any) -> None:
        """Remember which matrices an array holds beside data: a frozen kernel's change, say."""
        out = eqn.outvars[0]
        if eqn.primitive.name not in _MIXING or out in self.views or out in self.results:
            return
        roots: dict[int, None] = {}
        for atom in eqn.invars:
            view = self.view(atom)
            if view is not None and sum(size > 1 for size in view.shape) >= 2:
                roots |= dict.fromkeys(piece.root for piece in view.pieces)
            else:
                roots |= self.mixed_in(atom)
        if roots:
            self.mixed[out] = roots

    def note_mixed(self, atom: Any, eqn: Any) -> None:
        """Remember a product that took an array with parameters in it, as it would a kernel."""
        for root in self.mixed_in(atom) if self.is_live else ():
            self.trace.consumers.setdefault(root, {})[f"{eqn.primitive.name} after that"] = None

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
        new = joined(taken, eqn) if len(taken) == len(eqn.invars) else None
        if new is None and (first := self.view(eqn.invars[0])) is not None:
            if (taken_apart := parts(first, eqn)) is not None:
                self.views.update(zip(eqn.outvars, taken_apart, strict=True))
                return
            new = rearranged(first, eqn, self.definitions)
            if new is not None and any(map(self.is_data, eqn.invars[1:])):
                new = dataclasses.replace(new, data=True)  # Of entries that data choose.
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
            aval: Any = atom.aval
            made = None if isinstance(atom, Literal) else self.definitions.get(atom)
            copied = made is not None and made.primitive is prims.broadcast_in_dim_p
            return aval.shape == shape and not copied

        whole = [atom for atom in eqn.invars if is_whole(atom)]
        n_views = sum(self.view(atom) is not None for atom in whole)
        return 0 < n_views < len(whole) and sum(size > 1 for size in shape) >= 2

    def scaled(self, view: View, eqn: Any) -> View | None:
        """`view` times a constant, if that is what the equation computes."""
        factor = self.factor(eqn)
        if factor is None or view.shape != tuple(eqn.outvars[0].aval.shape):
            return None
        scale = view.scale * factor
        return dataclasses.replace(view, scale=scale, scaled=eqn.primitive.name)

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
        for use, kernel in result.entries:
            old = View(tuple(first.aval.shape), (kernel,))
            new = rearranged(old, eqn, self.definitions)
            if new is None or new.shape != shape:
                return
            entries.append((use, new.pieces[0] if new.pieces else kernel))
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
