"""Questions about jaxprs: what an equation calls, which inputs reach the loss, what is equal.

Only primitives of `jax.extend.core` are known by identity; others, whose place in JAX has moved,
by name.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal
from jax.extend.core import primitives as prims

# Functions with derivatives of their own: evaluated as they are, so that these are kept.
CUSTOM = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "closed_call"}
# A derivative does not pass these, nor what has integers for a result.
FLAT = {"stop_gradient", "floor", "ceil", "round", "sign"}


# Identities; those that `shard_map` and explicit sharding put in have no public names.
_IDENTITIES = {
    prims.copy_p,
    prims.device_put_p,
    prims.reduce_precision_p,
    prims.sharding_constraint_p,
}
_IDENTITY_NAMES = {
    "layout_constraint",
    "mesh_cast",
    "name",
    "optimization_barrier",
    "pcast",
    "pvary",
    "reshard",
}


def is_remat(eqn: Any) -> bool:
    """Whether an equation is `jax.checkpoint`, whose name has changed over time."""
    return {"jaxpr", "policy", "prevent_cse"} <= set(eqn.params)


def is_call(eqn: Any) -> bool:
    """Whether an equation evaluates a jaxpr once, on its own operands."""
    return eqn.primitive is prims.jit_p or eqn.primitive.name in CUSTOM or is_remat(eqn)


def called(eqn: Any) -> Any:
    """The jaxpr that a call evaluates, or None if it cannot be told."""
    found = [
        value for value in eqn.params.values() if hasattr(getattr(value, "jaxpr", value), "eqns")
    ]
    if len(found) != 1:
        return None
    jaxpr = getattr(found[0], "jaxpr", found[0])
    fits = len(jaxpr.invars) == len(eqn.invars) and len(jaxpr.outvars) == len(eqn.outvars)
    closed = len(jaxpr.constvars) == len(getattr(found[0], "consts", ()))
    return found[0] if fits and closed else None


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried.

    From jax 0.11 on, the parameters of the equation give the operands' structure instead.
    """
    if "num_carry" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def is_identity(eqn: Any) -> bool:
    """Whether each result of an equation holds the values of the operand in its place."""
    return eqn.primitive in _IDENTITIES or eqn.primitive.name in _IDENTITY_NAMES


def bare(closed: Any) -> Any:
    """The `Jaxpr` of a `ClosedJaxpr`, or the `Jaxpr` that is given."""
    return getattr(closed, "jaxpr", closed)


class Liveness:
    """Which variables of a jaxpr some outputs depend on.

    As derivatives do: paths through `stop_gradient` or integers do not count, and functions with
    derivatives of their own pass them from every output to every input. Or, if `strict` is False,
    at all.
    """

    def __init__(self, closed: Any, out_live: Sequence[bool], strict: bool = True) -> None:
        """Walk backwards from the outputs.

        Args:
          closed: The jaxpr.
          out_live: Which of its outputs.
          strict: False if nothing stops a dependence, as inside a function with a derivative of
            its own.
        """
        jaxpr = bare(closed)
        self._strict = strict
        self._live: set[Any] = set()
        self._calls: dict[int, list[Liveness]] = {}
        self._mark(jaxpr.outvars, out_live)
        for index in range(len(jaxpr.eqns) - 1, -1, -1):
            eqn = jaxpr.eqns[index]
            live = [self(var) for var in eqn.outvars]
            reached = self._equation(index, eqn, live)
            # What is written to a mutable array may be read later on.
            if any(live) or any(_is_mutable(atom) and self(atom) for atom in eqn.invars):
                self._mark(eqn.invars, reached)

    def __call__(self, atom: Any) -> bool:
        """Whether the outputs depend on `atom`."""
        return not isinstance(atom, Literal) and atom in self._live

    def inside(self, index: int, branch: int = 0) -> "Liveness":
        """The same for what the equation at `index` calls."""
        return self._calls[index][branch]

    def _mark(self, atoms: Sequence[Any], live: Sequence[bool]) -> None:
        self._live.update(
            atom
            for atom, flag in zip(atoms, live, strict=True)
            if flag and not isinstance(atom, Literal) and not (self._strict and _is_integer(atom))
        )

    def _equation(self, index: int, eqn: Any, live: list[bool]) -> list[bool]:
        """Which operands the outputs depend on, given on which results they do."""
        every, name = [True] * len(eqn.invars), eqn.primitive.name
        if self._strict and name in FLAT:
            return [False] * len(every)
        if is_call(eqn) and (inner := called(eqn)) is not None:
            if name not in CUSTOM:
                return self._enter(index, inner, live)
            self._enter(index, inner, [any(live)] * len(live), strict=False)
            return every
        if name == "shard_map":
            return self._enter(index, eqn.params["jaxpr"], live)
        if eqn.primitive is prims.cond_p:
            found = [self._enter(index, branch, live) for branch in eqn.params["branches"]]
            return [False, *(any(flags) for flags in zip(*found, strict=True))]
        if eqn.primitive is prims.scan_p:
            return self._scan(index, eqn, live)
        return every

    def _enter(
        self, index: int, closed: Any, live: Sequence[bool], strict: bool = True
    ) -> list[bool]:
        inner = Liveness(closed, live, self._strict and strict)
        self._calls.setdefault(index, []).append(inner)
        return [inner(var) for var in bare(closed).invars]

    def _scan(self, index: int, eqn: Any, live: list[bool]) -> list[bool]:
        n_consts, n_carry = scan_counts(eqn)
        while True:
            self._calls.pop(index, None)
            found = self._enter(index, eqn.params["jaxpr"], live)
            carried = found[n_consts : n_consts + n_carry]
            grown = [a or b for a, b in zip(live[:n_carry], carried, strict=True)]
            if grown == live[:n_carry]:
                return found
            live = [*grown, *live[n_carry:]]


def _is_integer(atom: Any) -> bool:
    return not jnp.issubdtype(getattr(atom.aval, "dtype", jnp.int32), jnp.inexact)


def _is_mutable(atom: Any) -> bool:
    """Whether a variable is an array of `jax.new_ref`."""
    return hasattr(atom.aval, "inner_aval")


class Numbers:
    """Numbers for values, equal where two values are computed alike from the same values.

    A loss that evaluates a network for its value and again for its derivatives multiplies the
    same rows by the same kernel several times. Their numbers tell that they are the same rows.
    """

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}
        self._walked: dict[Any, dict[Any, int]] = {}
        self._stacks: dict[int, int] = {}  # From what a scan stacked to what a step gave.
        self._kept: list[Any] = []  # What is known by its `id` must not be freed.

    def of(self, *key: Any) -> int:
        """The number of whatever `key` describes."""
        return self._known.setdefault(key, len(self._known))

    def walk(self, closed: Any, inputs: Sequence[int]) -> dict[Any, int]:
        """The numbers of all variables of a jaxpr, given those of its inputs."""
        key = (id(closed), *inputs)
        if key in self._walked:
            return self._walked[key]
        jaxpr = bare(closed)
        env = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, const in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=False):
            env[var] = self._by_id("const", const)
        for eqn in jaxpr.eqns:
            read = [self.atom(env, atom) for atom in eqn.invars]
            env.update(zip(eqn.outvars, self._equation(eqn, read), strict=True))
        self._kept.append(closed)
        self._walked[key] = env
        return env

    def atom(self, env: dict[Any, int], atom: Any) -> int:
        """The number of a variable or a literal."""
        if isinstance(atom, Literal):
            return self.of("literal", str(atom.aval), repr(atom.val))
        return env[atom] if atom in env else self._by_id("free", atom)

    def _by_id(self, kind: str, value: Any) -> int:
        self._kept.append(value)
        return self.of(kind, id(value))

    def _outputs(self, closed: Any, inputs: Sequence[int]) -> list[int]:
        env = self.walk(closed, inputs)
        return [self.atom(env, atom) for atom in bare(closed).outvars]

    def _equation(self, eqn: Any, read: list[int]) -> list[int]:
        if is_call(eqn) and (inner := called(eqn)) is not None:
            return self._outputs(inner, read)
        if eqn.primitive is prims.scan_p:
            return self._scan(eqn, read)
        if is_identity(eqn):
            return read
        key = (eqn.primitive.name, *self._params(eqn), *read)
        return [self.of(key, i) for i in range(len(eqn.outvars))]

    def _params(self, eqn: Any) -> Sequence[Any]:
        params = tuple(sorted(eqn.params.items()))
        try:
            hash(params)
        except TypeError:
            return (self._by_id("equation", eqn),)
        self._kept.append(params)
        return params if not eqn.effects else (*params, self._by_id("equation", eqn))

    def inside(self, eqn: Any, read: list[int], branch: int = 0) -> list[int]:
        """The numbers of a called jaxpr's inputs, given those of the equation's operands."""
        if is_call(eqn):
            return read
        if eqn.primitive is prims.scan_p:
            return self._scan_inputs(eqn, read)
        key = self.of(eqn.primitive.name, self._by_id("equation", eqn), branch, *read)
        return [self.of("inside", key, number) for number in read]

    def _scan_inputs(self, eqn: Any, read: list[int]) -> list[int]:
        n_consts, n_carry = scan_counts(eqn)
        how = eqn.params["reverse"], eqn.params["length"]
        init = read[n_consts : n_consts + n_carry]
        # Backwards, the steps see the same slices, and those of a stack are what was stacked.
        slices = [
            self._stacks.get(number, self.of("slice", number))
            for number in read[n_consts + n_carry :]
        ]
        # What is carried is what the body makes of it, from its start on.
        carry = [self.of("carried from", number) for number in init]
        closed = eqn.params["jaxpr"]
        made = self._outputs(closed, [*read[:n_consts], *carry, *slices])[:n_carry]
        carry = [self.of("carried", *pair, how) for pair in zip(init, made, strict=True)]
        return [*read[:n_consts], *carry, *slices]

    def _scan(self, eqn: Any, read: list[int]) -> list[int]:
        outputs = self._outputs(eqn.params["jaxpr"], self._scan_inputs(eqn, read))
        (_, n_carry), length = scan_counts(eqn), eqn.params["length"]
        stacks = [self.of("stack", number, length) for number in outputs[n_carry:]]
        self._stacks.update(zip(stacks, outputs[n_carry:], strict=True))
        return [*(self.of("last", number, length) for number in outputs[:n_carry]), *stacks]
