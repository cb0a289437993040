"""Which inputs of a traced function its outputs can depend on."""

from typing import Any


def _sub_jaxpr(params: dict[str, Any], n_inputs: int) -> Any:
    """The one jaxpr that an equation calls with exactly its own inputs, or None."""
    found = [
        getattr(value, "jaxpr", value)
        for value in params.values()
        if hasattr(getattr(value, "jaxpr", value), "eqns")
    ]
    if len(found) == 1 and len(found[0].invars) == n_inputs and not found[0].constvars:
        return found[0]
    return None


def is_used(jaxpr: Any) -> list[bool]:
    """For each input of a jaxpr, whether an output may depend on it.

    Calls such as `jit` are entered; in loops and branches every input counts as used.
    """
    needed = {var for var in jaxpr.outvars if not hasattr(var, "val")}
    for eqn in reversed(jaxpr.eqns):
        if not eqn.effects and needed.isdisjoint(eqn.outvars):
            continue
        inner = _sub_jaxpr(eqn.params, len(eqn.invars))
        enter = inner is not None and eqn.primitive.name not in {"while", "scan", "cond"}
        flags = is_used(inner) if enter else [True] * len(eqn.invars)
        needed.update(
            var
            for var, flag in zip(eqn.invars, flags, strict=True)
            if flag and not hasattr(var, "val")
        )
    return [var in needed for var in jaxpr.invars]
