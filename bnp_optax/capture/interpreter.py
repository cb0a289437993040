"""Evaluate a jaxpr as it is, and measure the inputs of its products on the way.

What a trace has found becomes extra outputs: of this jaxpr, and of every function in between that
calls the one with the product. Values and derivatives are those of the equations as they are.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jax.extend.core import primitives as prims
from jax.sharding import PartitionSpec, Sharding

from bnp_optax.capture import groups, views
from bnp_optax.capture.devices import dimension_axes
from bnp_optax.capture.jaxprs import is_remat, scan_counts
from bnp_optax.capture.moments import Weights
from bnp_optax.capture.rows import Rows
from bnp_optax.capture.uses import Trace, Use
from bnp_optax.capture.views import Measure, Part

# Of one product: a `Measure`, and `Rows` where they are wanted.
Parts = list[Any]
# The products to measure, and how many rows each is to give: 0 for its statistics alone.
Wanted = Mapping[Use, int]


def evaluate(
    trace: Trace, wanted: Wanted, args: Sequence[Any], weights: Weights
) -> tuple[list[Any], dict[Use, Parts]]:
    """The outputs of a jaxpr, and the measurements `wanted`, in their parameters' layouts.

    Measurements have a leading axis of groups of rows (see `groups`); rows have none. Rows of
    inputs count by their `weights`, all alike if that is None.

    Equations are left to JAX, all but the calls that something is measured in. These are called
    again with the same options, as functions that return the measurements too.
    """
    jaxpr = trace.jaxpr
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, trace.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    by_equation: dict[int, list[Use]] = {}
    for use in wanted:
        by_equation.setdefault(use.eqn, []).append(use)
    calls = sorted(
        index for index, uses in by_equation.items() if any(use.inner is not None for use in uses)
    )
    last_use = _last_use(trace, wanted)
    measures: dict[Use, Parts] = {}
    start = 0
    for stop in (*calls, len(jaxpr.eqns)):
        _run(jaxpr, slice(start, stop), last_use, env)
        if stop < len(jaxpr.eqns):
            eqn = jaxpr.eqns[stop]
            inner = {use.inner: wanted[use] for use in by_equation[stop] if use.inner}
            outs, found = _call(trace, stop, inner, [read(atom) for atom in eqn.invars], weights)
            env.update(zip(eqn.outvars, outs, strict=True))
            for use in by_equation[stop]:
                if use.inner is not None:
                    measures[use] = _pulled(use, found[use.inner], read)
        start = stop + 1
    for use in wanted:
        if use.inner is None:
            # One product may hold several parameters; their measurement is one to the compiler.
            measures[use] = _pulled(use, _measured(use, read, weights, wanted[use]), read)
    return [read(atom) for atom in jaxpr.outvars], measures


def _measured(use: Use, read: views.Read, weights: Weights, n_rows: int) -> Parts:
    rows: list[Rows] = []
    try:
        inputs = lax.stop_gradient(read(use.inputs))
        mean, var, rest, share = use.product.measure(inputs, weights)
        if n_rows and use.product.rows is not None:
            rows = [use.product.rows(lax.stop_gradient(read(use.rows_from)), weights, n_rows)]
    except ValueError as error:
        error.add_note(f"This happened at the inputs of `{use.name}`.")
        raise
    count, layout = use.product.count, (-1,) + (1,) * (mean.ndim - 1)
    if isinstance(count, int) and weights is None:
        count = np.asarray(count / len(mean), np.float32)  # Nothing to trace.
    else:
        # The number of rows may be symbolic, as in `jax.export`.
        count = jnp.asarray(count).astype(jnp.float32) / len(mean)
        count = count if weights is None else count * share
    measure = Measure(mean, var, rest, count.reshape(layout))
    return [measure, *rows]


def _pulled(use: Use, parts: Parts, read: views.Read) -> Parts:
    if not use.piece.steps:
        return parts
    return [
        use.piece.pull(part, read)
        if isinstance(part, Rows)
        else groups.each(lambda group: use.piece.pull(group, read), part)
        for part in parts
    ]


def _last_use(trace: Trace, wanted: Wanted) -> dict[Any, int]:
    """For each variable, the index of the last equation that needs it."""
    jaxpr = trace.jaxpr
    last = {
        atom: index
        for index, eqn in enumerate(jaxpr.eqns)
        for atom in eqn.invars
        if not isinstance(atom, Literal)
    }
    here = [use for use in wanted if use.inner is None]
    kept = [*jaxpr.outvars, *(use.inputs for use in here)]
    kept += [use.rows_from for use in here if wanted[use]]
    if any(use.piece.reads for use in wanted):
        kept += [
            atom
            for eqn in jaxpr.eqns
            if eqn.primitive is prims.dynamic_slice_p
            for atom in eqn.invars[1:]
        ]
    last |= {atom: len(jaxpr.eqns) for atom in kept if not isinstance(atom, Literal)}
    return last


def _run(jaxpr: Any, part: slice, last_use: dict[Any, int], env: dict[Any, Any]) -> None:
    """Evaluate consecutive equations, by JAX."""
    eqns = jaxpr.eqns[part]
    if not eqns:
        return
    defined = {var for eqn in eqns for var in eqn.outvars}
    inputs = dict.fromkeys(
        atom
        for eqn in eqns
        for atom in eqn.invars
        if not isinstance(atom, Literal) and atom not in defined
    )
    outputs = [var for eqn in eqns for var in eqn.outvars if last_use.get(var, -1) >= part.stop]
    piece = jaxpr.replace(constvars=[], invars=list(inputs), outvars=outputs, eqns=list(eqns))
    results = jaxpr_as_fun(ClosedJaxpr(piece, []))(*(env[var] for var in inputs))
    env.update(zip(outputs, results, strict=True))


def _call(
    outer: Trace, index: int, inner: Wanted, args: list[Any], weights: Weights
) -> tuple[Sequence[Any], dict[Use, Parts]]:
    """The outputs of a call, and the measurements `inner` in its inputs' layouts."""
    eqn, traces = outer.jaxpr.eqns[index], outer.calls[index]
    trace = traces[0]

    def weighed(weights: Weights, *args: Any) -> tuple[list[Any], list[Parts]]:
        outs, found = evaluate(trace, inner, args, weights)
        return outs, [found[use] for use in inner]

    def measured(*args: Any) -> tuple[list[Any], list[Parts]]:
        return weighed(weights, *args)

    if eqn.primitive is prims.jit_p:
        outs, found = _jit(eqn, measured)(*args)
    elif is_remat(eqn):
        options = {key: eqn.params[key] for key in ("policy", "prevent_cse")}
        outs, found = jax.checkpoint(measured, **options)(*args)
    elif eqn.primitive is prims.scan_p:
        outs, found = _scan(eqn, weighed, inner, args, weights)
    elif eqn.primitive is prims.cond_p:
        outs, found = _cond(traces, inner, args, weights)
    elif eqn.primitive.name == "shard_map":
        outs, found = _shard_map(eqn, measured, inner, args)
    else:
        # A function with a derivative of its own stays as it is. What is measured in it is
        # computed a second time, which the compiler sees to be the same.
        env = {
            var: arg
            for var, arg in zip(eqn.invars, args, strict=True)
            if not isinstance(var, Literal)
        }
        after = index + 1
        _run(outer.jaxpr, slice(index, after), dict.fromkeys(eqn.outvars, after), env)
        outs = [env[var] for var in eqn.outvars]
        _, found = measured(*lax.stop_gradient(args))
    return outs, dict(zip(inner, found, strict=True))


def _jit(eqn: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled with the options of the call that it replaces."""
    params = eqn.params

    def given(shardings: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(s if isinstance(s, Sharding) else None for s in shardings)

    function.__name__ = function.__qualname__ = params["name"]
    options: dict[str, Any] = {
        "donate_argnums": tuple(i for i, donated in enumerate(params["donated_invars"]) if donated),
        "keep_unused": params["keep_unused"],
        "inline": params["inline"],
    }
    if any(isinstance(s, Sharding) for s in params["in_shardings"]):
        options["in_shardings"] = given(params["in_shardings"])
    if any(isinstance(s, Sharding) for s in params["out_shardings"]):
        options["out_shardings"] = (list(given(params["out_shardings"])), None)
    if params.get("compiler_options_kvs"):
        options["compiler_options"] = dict(params["compiler_options_kvs"])
    return jax.jit(function, **options)


def _scan(
    eqn: Any, function: Callable[..., Any], inner: Wanted, args: list[Any], weights: Weights
) -> tuple[list[Any], list[Parts]]:
    params = eqn.params
    n_consts, n_carry = scan_counts(eqn)
    consts, init, xs = args[:n_consts], args[n_consts:][:n_carry], args[n_consts + n_carry :]
    # Where all steps share their kernels and are as many as the positions of a sequence, they
    # are these positions, each with its own weights.
    shared = all(use.root < n_consts + n_carry for use in inner)
    over_time = (
        weights is not None and weights.ndim > 1 and shared and weights.shape[1] == params["length"]
    )
    by_step = jnp.moveaxis(weights, 1, 0) if weights is not None and over_time else None

    def body(carry: Any, x: Any) -> Any:
        x, step = x
        outs, found = function(weights if step is None else step, *consts, *carry, *x)
        return outs[:n_carry], (outs[n_carry:], found)

    options = {key: params[key] for key in ("_split_transpose",) if key in params}
    carry, (ys, stacked) = lax.scan(
        body,
        list(init),
        (list(xs), by_step),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
        **options,
    )
    found = []
    for use, parts in zip(inner, stacked, strict=True):
        is_shared = use.root < n_consts + n_carry
        found.append([_of_steps(part, is_shared) for part in parts])
    return [*carry, *ys], found


def _of_steps(part: Any, is_shared: bool) -> Any:
    """What the steps of a scan measured, stacked along the leading axis, in the layout outside."""
    if isinstance(part, Rows):
        part = Rows(jnp.swapaxes(part.values, 0, 1), jnp.swapaxes(part.shares, 0, 1), part.count)
    if is_shared:
        # One parameter for all steps: they are so many calls.
        return views.average(part, (0,)).map(lambda x: jnp.squeeze(x, 0))
    return part if isinstance(part, Rows) else part.map(lambda x: jnp.swapaxes(x, 0, 1))


def _cond(
    traces: list[Trace], inner: Wanted, args: list[Any], weights: Weights
) -> tuple[list[Any], list[Parts]]:
    index, *operands = args
    found_in = [{use: n for use, n in inner.items() if use in set(trace.uses)} for trace in traces]
    shapes = [
        _shapes(trace, here, operands, weights)
        for trace, here in zip(traces, found_in, strict=True)
    ]

    def branch(number: int) -> Callable[..., Any]:
        def taken(*operands: Any) -> tuple[list[Any], list[Parts]]:
            outs, found = evaluate(traces[number], found_in[number], operands, weights)
            return outs, [
                found[use]
                if use in found
                # What a branch not taken would have measured counts for nothing.
                else jax.tree.map(
                    lambda s: jnp.zeros(s.shape, s.dtype),
                    next(shape[use] for shape in shapes if use in shape),
                )
                for use in inner
            ]

        return taken

    return lax.switch(index, [branch(number) for number in range(len(traces))], *operands)


def _shapes(trace: Trace, uses: Wanted, args: list[Any], weights: Weights) -> dict[Use, Any]:
    def measured(*args: Any) -> list[Parts]:
        _, found = evaluate(trace, uses, args, weights)
        return [found[use] for use in uses]

    return dict(zip(uses, jax.eval_shape(measured, *args), strict=True))


def _shard_map(
    eqn: Any, function: Callable[..., Any], inner: Wanted, args: list[Any]
) -> tuple[list[Any], list[Parts]]:
    """Every device measures its shard; the shards' statistics come out side by side."""
    params = eqn.params
    # The name has changed over time.
    axes = tuple(params.get("newly_manual_axes", params.get("manual_axes")))
    mesh = params["mesh"]

    def local(*args: Any) -> tuple[list[Any], list[Parts]]:
        outs, found = function(*args)
        return outs, [[of_device(part) for part in parts] for parts in found]

    def of_device(part: Any) -> Any:
        if isinstance(part, Rows):
            return part.map(lambda x: x[None])
        return views.average(part, (0,))

    of_rows = Rows(PartitionSpec(None, axes), PartitionSpec(None, axes), PartitionSpec(axes))  # type: ignore[arg-type]
    parts = [[PartitionSpec(axes), *([of_rows] if n_rows else [])] for n_rows in inner.values()]
    specs = (list(params["out_specs"]), parts)
    outs, gathered = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=tuple(params["in_specs"]),
        out_specs=specs,
        axis_names=set(axes),
        check_vma=params["check_vma"],
    )(*args)
    sizes = dict(mesh.shape)
    found = []
    for use, parts in zip(inner, gathered, strict=True):
        spec = params["in_specs"][use.root]
        copied = {n: n in use.piece.gathered or n not in use.varying for n in axes}
        along = {
            name: dimension
            for dimension, names in enumerate(spec)
            for name in dimension_axes(names)
            if dimension in use.stats_axes
        }
        of_mesh = {name: sizes[name] for name in axes}
        found.append([_joined(part, of_mesh, along, copied) for part in parts])
    return outs, found


def _joined(
    measure: Part, sizes: dict[str, int], along: dict[str, int], copied: dict[str, bool]
) -> Part:
    """The devices' measurements, stacked along the leading axis, as those of groups of rows.

    Rows themselves are in no groups, and are joined.

    Args:
      measure: The stacked measurements.
      sizes: The size of each mesh axis.
      along: The mesh axes that shard the measurement, each with the axis that it shards.
      copied: Whether the devices along a mesh axis have measured the same rows.
    """
    n_axes = len(sizes)
    measure = measure.map(lambda x: x.reshape(*sizes.values(), *x.shape[1:]))
    position = {name: i for i, name in enumerate(sizes)}
    for name, axis in reversed(along.items()):
        size = measure.shape[n_axes + axis]
        merge = functools.partial(_merged, source=position[name], axis=n_axes + axis, size=size)
        measure = measure.map(merge)
    # Rows that several devices have measured count once.
    copies = math.prod(n for name, n in sizes.items() if copied[name] and name not in along)
    measure = measure.map(lambda x: x.reshape(-1, *x.shape[n_axes:]))
    measure = dataclasses.replace(measure, count=measure.count / copies)
    if isinstance(measure, Rows):
        return measure.average((0,)).map(lambda x: jnp.squeeze(x, 0))
    return measure


def _merged(x: jax.Array, source: int, axis: int, size: int) -> jax.Array:
    """Shards of `size` side by side: the axis `source`, which stays with size 1, in `axis`."""
    x = jnp.broadcast_to(x, (*x.shape[:axis], size, *x.shape[axis + 1 :]))
    moved = jnp.moveaxis(x, source, axis - 1)
    merged = moved.reshape(*moved.shape[: axis - 1], -1, *moved.shape[axis + 1 :])
    return jnp.expand_dims(merged, source)
