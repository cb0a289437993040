"""What a walk over a jaxpr knows of its variables, and what it asks of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.extend.core import primitives as prims

from bnp_optax.capture import jaxprs, views
from bnp_optax.capture.devices import different_along, equal_along
from bnp_optax.capture.jaxprs import Liveness, Numbers
from bnp_optax.capture.moments import Options
from bnp_optax.capture.uses import Passed, Result, Trace
from bnp_optax.capture.views import View

# Operations on real numbers by which constants, such as scales, are computed in a loss.
_ARITHMETIC = {
    *("add", "sub", "mul", "div", "neg", "abs", "sign", "max", "min", "square", "sqrt", "rsqrt"),
    *("cbrt", "pow", "integer_pow", "exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic"),
    *("sin", "cos", "floor", "ceil", "round"),
}


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


class Facts:
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
        self.constants: dict[Any, float | None] = {}
        self.mixed: dict[Any, dict[int, None]] = {}  # Parameters that are in what is no view.
        self.varying = {var: known.varying for var, known in zip(jaxpr.invars, inputs, strict=True)}
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
                whole = views.root_view(root, tuple(var.aval.shape)).pieces[0]
                self.results[var] = Result(((passed, whole),))

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
        """The view of parameters that `atom` is, or None."""
        return None if isinstance(atom, Literal) else self.views.get(atom)

    def result(self, atom: Any) -> Result | None:
        """The result of products that `atom` is, or None."""
        return None if isinstance(atom, Literal) else self.results.get(atom)

    def mixed_in(self, atom: Any) -> dict[int, None]:
        """The parameters that are in `atom` beside data."""
        return {} if isinstance(atom, Literal) else self.mixed.get(atom, {})

    def is_dependent(self, atom: Any) -> bool:
        """Whether `atom` depends on parameters."""
        return not isinstance(atom, Literal) and atom in self.dependent

    def is_data(self, atom: Any) -> bool:
        """Whether `atom` depends on anything but parameters and constants."""
        return not isinstance(atom, Literal) and atom in self.data

    def note(self, view: View, primitive: str) -> None:
        """Remember what took a view and is neither a product nor a rearrangement."""
        for piece in view.pieces if self.is_live else ():
            self.trace.consumers.setdefault(piece.root, {})[primitive] = None

    def alter(self, view: View, primitive: str) -> None:
        """Remember what changed the values of a view before a product took it."""
        for piece in view.pieces if self.is_live else ():
            self.trace.altered.setdefault(piece.root, {})[primitive] = None

    def is_number(self, atom: Any) -> bool:
        """Whether all entries are copies of one number."""
        eqn = self.definitions.get(atom)
        if eqn is not None and eqn.primitive is prims.broadcast_in_dim_p:
            atom = eqn.invars[0]
        return not atom.aval.shape

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
        if atom.aval.shape or eqn.primitive.name not in _ARITHMETIC:
            return None
        if atom not in self.constants:
            self.constants[atom] = self._computed(eqn)
        return self.constants[atom]

    def _computed(self, eqn: Any) -> float | None:
        """The number that an equation of real numbers gives."""
        values = [self.constant(operand) for operand in eqn.invars]
        if None in values or any(operand.aval.shape for operand in eqn.invars):
            return None
        with jax.ensure_compile_time_eval():
            operands = [
                jnp.asarray(value, operand.aval.dtype)
                for value, operand in zip(values, eqn.invars, strict=True)
            ]
            return float(eqn.primitive.bind(*operands, **eqn.params))
