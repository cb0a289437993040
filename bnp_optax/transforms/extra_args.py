"""Which of a step's extra arguments an inner transformation gets."""

import inspect
from typing import Any

import optax


def update_inner(
    inner: optax.GradientTransformationExtraArgs,
    updates: optax.Updates,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, Any]:
    """`inner.update` with those extra arguments that it has a parameter for.

    Some of Optax's transformations raise on any other keyword. `layer_stats` are not passed on:
    they describe the layers' inputs in p, and the preconditioner outside has used them.
    """
    parameters = inspect.signature(inner.update).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    accepted = {
        name: value
        for name, value in extra_args.items()
        if name != "layer_stats" and (takes_any or name in parameters)
    }
    return inner.update(updates, state, params, **accepted)
