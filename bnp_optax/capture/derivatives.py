"""Which products are a layer's own, and which are of derivatives that the loss takes.

A loss may hold derivatives by the network's input: forces, the residual of a differential
equation. Then a kernel meets more than its layer's inputs. For y = x @ W and h = tanh(y),

    forward mode   dy = dx @ W,   dh = (1 - h^2) dy        meets dx, along the same axis as x,
    reverse mode   gy = (1 - h^2) gh,   gx = gy @ W.T      meets gy, along the other axis.

What the kernel's statistics are of is x. JAX says of equations that it differentiated them, and of
others that it transposed them: a kernel that meets two inputs in a loss without derivatives has two
calls. Among the differentiated ones x is told from dx by what follows: y enters a nonlinear
function, or a bias is added to it, or a framework has named x, while dy is only ever multiplied by
what is known, until the next kernel. A product with what comes linearly from such a dy is one of a
derivative, too.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend.core import Literal
from jax.extend.core import primitives as prims

from bnp_optax.capture import jaxprs
from bnp_optax.capture.uses import Trace, Use

# Products by the numbers of what they multiply, so that one repeated is one.
Product = tuple[int, int]
Products = frozenset[Product]
_NONE: Products = frozenset()

# Linear in every operand, or in all of them together. So is a product of two results: those of a
# derivative are multiplied with one another in the second derivative.
_LINEAR = {
    *("add", "add_any", "sub", "neg", "mul", "dot_general", "conv_general_dilated", "reduce_sum"),
    *("transpose", "reshape", "broadcast_in_dim", "squeeze", "expand_dims", "rev", "slice"),
    *("convert_element_type", "dynamic_slice", "gather", "concatenate", "pad", "cumsum", "copy"),
    *("select_n", "name", "reduce_precision", "real", "imag", "optimization_barrier", "pvary"),
    *("pcast", "reshard", "sharding_constraint", "psum", "psum_invariant", "all_gather"),
    *("dynamic_update_slice", "scatter-add", "split", "stack", "unstack", "tile"),
}


def without_derivatives(trace: Trace) -> list[Use]:
    """The uses of a trace that are layers' own, each row of inputs once."""
    distinct: dict[Any, list[Use]] = {}
    for use in trace.uses:
        same_rows = distinct.setdefault((use.root, use.rows, use.input_axes), [])
        # One product may hold several parts of a parameter.
        if not same_rows or same_rows[0].product is use.product:
            same_rows.append(use)
        # The same rows may be held constant in one place and not in another.
        elif use.live and not same_rows[0].live:
            same_rows[:] = [use]
    by_root: dict[int, list[Use]] = collections.defaultdict(list)
    for same_rows in distinct.values():
        by_root[same_rows[0].root] += same_rows
    if all(len(uses) == 1 for uses in by_root.values()):
        return [use for (use,) in by_root.values() if use.live]
    flow, kept = _Flow(trace), []
    derived = _derived(list(by_root.values()), flow)
    for uses in by_root.values():
        own = [use for use in uses if use.rows not in derived]
        # A kernel may be used for nothing but what derivatives have given.
        own = own or [use for use in uses if use.rows not in flow.transposed]
        # Of a network whose derivatives alone are in the loss, such as forces, nothing needs the
        # last layer's own results.
        derivatives = any(use.live for use in uses if use not in own)
        kept += [use for use in own if use.live or (derivatives and not use.needed)]
    return kept


def _derived(kernels: Sequence[Sequence[Use]], flow: "_Flow") -> set[Product]:
    """The products that are of derivatives."""
    derived = set(flow.transposed)
    # By kernel, or by the part of it that is one: fused kernels are several.
    by_kernel: dict[Any, list[Use]] = collections.defaultdict(list)
    for uses in kernels:
        for use in uses:
            by_kernel[use.root, use.input_axes, use.rows[1]].append(use)
    groups = list(by_kernel.values())

    sorted_groups: set[int] = set()

    def is_bent(use: Use) -> bool:
        return use.rows in flow.bent

    def sort(is_own: Callable[[Use], bool]) -> None:
        """Where some products of a kernel are a layer's own, the others are not."""
        for group in groups:
            if id(group) in sorted_groups or not any(map(is_own, group)):
                continue
            sorted_groups.add(id(group))
            known = [use for use in group if use.rows not in derived]
            own = [use for use in known if is_own(use)]
            judged = [use for use in known if use.rows in flow.differentiated] if own else []
            rest = [use for use in judged if not is_own(use)]
            if own and not own[0].marked and not any(use.live for use in own):
                rest = [use for use in rest if use.constant or not is_bent(use)]
            derived.update(use.rows for use in rest)
            # So are those of inputs that come from these.
            while new := {p for p, sources in flow.sources.items() if sources & derived} - derived:
                derived.update(new)

    sort(lambda use: use.marked)
    sort(lambda use: bool(use.biases))
    sort(is_bent)
    return derived


class _Flow:
    """How results of products go on.

    Attributes:
      bent: The products whose results enter a nonlinear function before the next product.
      sources: For each product, those that its inputs are linear in.
      transposed: The products that JAX transposed.
      differentiated: Those, and the products that it differentiated or made in doing so.
    """

    def __init__(self, trace: Trace) -> None:
        self.bent: set[Product] = set()
        self.sources: dict[Product, Products] = {}
        self.transposed: set[Product] = set()
        self.differentiated: set[Product] = set()
        none = [_NONE] * len(trace.jaxpr.invars)
        self._walk(trace.jaxpr, trace, none, _How(False, False))

    def _walk(
        self, jaxpr: Any, trace: Trace | None, inputs: Sequence[Products], called: "_How"
    ) -> list[Products]:
        """For each output of a jaxpr, the products that it is linear in."""
        env = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Products:
            return _NONE if isinstance(atom, Literal) else env.get(atom, _NONE)

        products: dict[int, list[Use]] = collections.defaultdict(list)
        for use in trace.uses if trace is not None else ():
            # A product may be measured at the call that holds it, but multiplies inside.
            if use.inner is None and trace is not None and use.eqn not in trace.calls:
                products[use.eqn].append(use)
        zeros: set[Any] = set()  # Taylor coefficients of what is constant, for example.
        for index, eqn in enumerate(jaxpr.eqns):
            operands = [read(atom) for atom in eqn.invars]
            if _is_zero(eqn, zeros):
                zeros.update(eqn.outvars)
                continue
            how = called.inside(eqn)
            if index in products:
                found = frozenset(use.rows for use in products[index])
                for use in products[index]:
                    known = self.sources.get(use.rows, _NONE)
                    self.sources[use.rows] = known | read(use.product.inputs)
                if how.transposed:
                    self.transposed |= found
                if how.differentiated or _is_taylor(eqn):
                    self.differentiated |= found
                results = [found] * len(eqn.outvars)
            elif any(operands) or (trace is not None and index in trace.calls):
                inner = trace.calls.get(index, []) if trace is not None else []
                results = self._equation(eqn, inner, operands, how)
            else:
                continue
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(
        self, eqn: Any, inner: Sequence[Trace], operands: list[Products], how: "_How"
    ) -> list[Products]:
        name = eqn.primitive.name
        every = _NONE.union(*operands)
        if inner or jaxprs.is_call(eqn):
            jaxpr = inner[0].jaxpr if inner else jaxprs.bare(jaxprs.called(eqn))
            if jaxpr is not None:
                first = 1 if eqn.primitive is prims.cond_p else 0
                found = [
                    self._walk(trace.jaxpr if trace else jaxpr, trace, operands[first:], how)
                    for trace in (inner or [None])
                ]
                return [_NONE.union(*parts) for parts in zip(*found, strict=True)]
        if name not in _LINEAR:
            if name == "div":
                self.bent |= operands[1]
                return [operands[0]]
            self.bent |= every
            return [_NONE] * len(eqn.outvars)
        return [every] * len(eqn.outvars)


class _How(NamedTuple):
    """How JAX made an equation, as the name stacks of it and of the calls around it tell.

    Attributes:
      transposed: Whether by transposing another.
      differentiated: Whether by that, or by differentiating one in either mode.
    """

    transposed: bool
    differentiated: bool

    def inside(self, eqn: Any) -> "_How":
        """How JAX made an equation of a function that was made so."""
        names = str(eqn.source_info.name_stack)
        # What `checkpoint` computes once more is as it was.
        again = "rematted_computation" in names
        transposed = "transpose(" in names or (self.transposed and not again)
        return _How(transposed, self.differentiated or transposed or "jvp(" in names)


def _is_taylor(eqn: Any) -> bool:
    """Whether an equation comes from `jax.experimental.jet`, which leaves no name."""
    traceback = eqn.source_info.traceback
    files = () if traceback is None else (frame.file_name for frame in traceback.frames)
    return any(file.replace("\\", "/").endswith("jax/experimental/jet.py") for file in files)


def _is_zero(eqn: Any, zeros: set[Any]) -> bool:
    """Whether an equation makes an array of zeros, or multiplies with one."""
    if eqn.primitive is prims.broadcast_in_dim_p and isinstance(eqn.invars[0], Literal):
        return eqn.invars[0].val == 0
    is_product = eqn.primitive in (prims.mul_p, prims.dot_general_p)
    return is_product and any(not isinstance(a, Literal) and a in zeros for a in eqn.invars)
