"""Which kernels of a loss are covered, with which bias, and why others are not."""

import collections
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnp_optax._tree import named_leaves, split_arrays
from bnp_optax.capture import groups, interpreter, rows
from bnp_optax.capture.derivatives import without_derivatives
from bnp_optax.capture.facts import Context, Input
from bnp_optax.capture.jaxprs import Liveness, Numbers
from bnp_optax.capture.moments import Options, Weights
from bnp_optax.capture.tracer import trace
from bnp_optax.capture.uses import Trace, Use
from bnp_optax.statistics import Layer, LayerStats, Shape, square_below


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A covered kernel.

    Attributes:
      layer: What users see of it.
      uses: Its products with inputs.
      count: Batch size x positions x calls, as traced.
    """

    layer: Layer
    uses: list[Use]
    count: Any


@dataclasses.dataclass(frozen=True)
class Covered:
    """What is known of a traced loss.

    Attributes:
      trace: Its trace.
      kernels: The covered kernels by name.
      reasons: Why the other parameters are not covered.
      others: Those of them that no product takes and that no kernel can be.
      unused: Those on which the loss does not depend.
      rebuild: Makes what the loss returns of the outputs of its jaxpr.
    """

    trace: Trace
    kernels: dict[str, Kernel]
    reasons: dict[str, str]
    others: set[str]
    unused: list[str]
    rebuild: Callable[[Sequence[Any]], Any]


def find(
    loss_fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
) -> Covered:
    """Trace the loss abstractly; what it does with the parameters.

    Raises:
      ValueError: If a leaf of `params` is no array.
    """
    leaves = named_leaves(params)
    _check_arrays(leaves)
    dynamic, rebuild_args = split_arrays((args, kwargs))
    rebuild_outputs: list[Any] = []

    def traced(params: Any, dynamic: list[Any]) -> Any:
        args, kwargs = rebuild_args(dynamic)
        with _naming():
            returned = loss_fn(params, *args, **kwargs)
        leaves, treedef = jax.tree.flatten(returned)
        # The loss may be a constant.
        leaves[:1] = [jnp.asarray(leaf) for leaf in leaves[:1]]
        outputs, rebuild = split_arrays(treedef.unflatten(leaves))
        rebuild_outputs.append(rebuild)
        return outputs

    if any(isinstance(x, jax.ShapeDtypeStruct) for x in dynamic):
        closed = jax.make_jaxpr(traced)(params, dynamic)
    else:
        # Only what is differentiated is traced, so that the loss may look at the rest.
        closed = jax.make_jaxpr(lambda p: traced(p, dynamic))(params)
    jaxpr, numbers = closed.jaxpr, Numbers()
    inputs = [
        Input(
            tracked=i < len(leaves) and 0 not in var.aval.shape,
            depends=i < len(leaves),
            data=i >= len(leaves),
            number=numbers.of("input", i),
        )
        for i, var in enumerate(jaxpr.invars)
    ]
    # The loss is the first output; others are not differentiated.
    live = Liveness(closed, [i == 0 for i in range(len(jaxpr.outvars))])
    needed = Liveness(closed, [True] * len(jaxpr.outvars), strict=False)
    found = trace(closed, inputs, Context(live, needed, numbers, options))
    by_root = collections.defaultdict(list)
    for use in without_derivatives(found):
        by_root[use.root].append(use)
    multiplied = {use.root for use in found.uses}
    shapes = {name: tuple(jnp.shape(leaf)) for name, leaf in leaves.items()}
    used = [live(var) for var in jaxpr.invars]
    covered, reasons = {}, {}
    for root, (name, leaf) in enumerate(leaves.items()):
        uses = by_root[root]
        reason = _why_not(found, root, uses, jnp.result_type(leaf), shapes[name], used[root])
        if reason is None:
            covered[name] = uses
            for use in uses:
                use.innermost.name = use.name = name
        else:
            reasons[name] = reason
    return Covered(
        trace=found,
        kernels=_kernels(covered, list(leaves), shapes),
        reasons=reasons,
        others={
            name
            for root, name in enumerate(leaves)
            if name in reasons and root not in multiplied and not _may_be(found, root)
        },
        unused=[name for root, name in enumerate(leaves) if not used[root]],
        rebuild=rebuild_outputs[-1],
    )


def _naming() -> contextlib.AbstractContextManager[Any]:
    """Linen's interceptor, if there can be Linen layers; inside the trace, which has no cache."""
    if "flax.linen" not in sys.modules:
        return contextlib.nullcontext()
    from bnp_optax.capture import linen

    return linen.naming()


def _check_arrays(leaves: Mapping[str, Any]) -> None:
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray | float | np.generic):
            msg = (
                f"`params` has at `{name}` a `{type(leaf).__name__}`, which is no array to "
                "differentiate by. Of an Equinox model, pass the arrays: `params, static = "
                "eqx.partition(model, eqx.is_inexact_array)`, and call "
                "`eqx.combine(params, static)` in the loss."
            )
            raise ValueError(msg)


# Equations that take norm scales, class tokens, position tables, and the like, but no kernels.
_ELEMENTWISE = {
    *("add", "add_any", "sub", "concatenate", "mul", "div", "select_n", "pow", "exp", "tile"),
}


def _may_be(found: Trace, root: int) -> bool:
    """Whether a parameter that is not covered may be a kernel."""
    taken = found.consumers.get(root, {})
    return not taken or root in found.altered or not set(taken) <= _ELEMENTWISE


def _why_not(
    found: Trace, root: int, uses: list[Use], dtype: Any, shape: Shape, used: bool
) -> str | None:
    """Why a parameter is not covered, or None if it is."""
    consumers = found.consumers.get(root, {})
    if 0 in shape:
        return "it has no entries"
    if not used:
        return "the loss does not depend on it"
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return "it is complex"
    if root in found.altered:
        changes = " and ".join(f"`{name}`" for name in found.altered[root])
        return f"{changes} changes it before it meets the inputs"
    if "product with complex inputs" in consumers:
        return "its inputs are complex"
    if "while" in consumers:
        return (
            "it is used in a `while_loop`, whose steps cannot be measured: loop by `lax.scan`, or "
            "in diffrax choose `adjoint=DirectAdjoint()`"
        )
    if "gather" in consumers:
        return "it is an embedding: `gather` looks its rows up"
    if not uses:
        taken = ", ".join(f"`{name}`" for name in consumers) or "nothing known"
        return f"no product with inputs takes it as it is, but {taken}"
    for use in uses:
        # A layer whose kernel and bias are scaled alike is one with scaled outputs.
        if use.scale != (use.biases[0].scale if use.biases else 1.0):
            rest = ", not its bias" if use.biases else ""
            return f"`{use.scaled or 'mul'}` changes it before it meets the inputs{rest}"
    axes = sorted({tuple(sorted(use.input_axes)) for use in uses})
    if len(axes) > 1:
        return f"it is tied: summed over its axes {' and over its axes '.join(map(str, axes))}"
    return None


def _kernels(
    covered: Mapping[str, list[Use]], names: list[str], shapes: Mapping[str, Shape]
) -> dict[str, Kernel]:
    found = {name: _bias(shapes[name], uses, names, shapes) for name, uses in covered.items()}
    n_served = collections.Counter(bias[0] for bias in found.values() if bias)
    kernels = {}
    for name, uses in covered.items():
        bias, ndim = found[name], len(shapes[name])
        if bias is not None and n_served[bias[0]] > 1:
            bias = None
        n_examples = sum(use.count / use.product.positions for use in uses)
        positions = {use.product.positions for use in uses}
        layer = Layer(
            kernel=name,
            bias=bias and bias[0],
            input_axes=tuple(sorted(axis - ndim for axis in uses[0].input_axes)),
            # On average, where calls differ in them.
            positions=positions.pop()
            if len(positions) == 1
            else round(sum(use.count for use in uses) / n_examples),
            stats_axes=tuple(
                sorted(axis - ndim for axis in frozenset().union(*(u.stats_axes for u in uses)))
            ),
            bias_axes=bias and bias[1],
            kernel_shape=shapes[name],
            kind=uses[0].product.kind,
            blocks=_blocks(shapes[name], uses),
        )
        kernels[name] = Kernel(layer, uses, sum(use.count for use in uses))
    return kernels


def _blocks(kernel: Shape, uses: list[Use]) -> tuple[tuple[int, int], ...]:
    """The axes along which layers lie that meet inputs of their own, and how many these are.

    Not those that a product takes a part of, such as the queries' of one kernel for queries, keys
    and values: these meet the same inputs, or count as calls of one layer.
    """
    varying = frozenset().union(*(use.stats_axes - use.partial_axes for use in uses))
    grouped = frozenset().union(*(use.group_axes for use in uses))
    n_groups = max(use.product.n_groups for use in uses)
    return tuple(
        (axis - len(kernel), n_groups if axis in grouped else kernel[axis])
        for axis in sorted(varying - uses[0].input_axes)
    )


def _bias(
    kernel: Shape, uses: list[Use], names: list[str], shapes: Mapping[str, Shape]
) -> tuple[str, tuple[int, ...] | None] | None:
    """The bias that every use of a kernel adds, and its axes if they are not in order.

    It must run along all of the kernel's output axes.
    """
    added = {bias for use in uses for bias in use.biases}
    if len({bias.root for bias in added}) != 1 or any(len(use.biases) != 1 for use in uses):
        return None
    (name,) = {names[bias.root] for bias in added}
    shape, inputs = shapes[name], uses[0].input_axes
    # Axes of size 1 come and go in reshapes.
    ours = [axis for axis, size in enumerate(shape) if size > 1]
    theirs = [axis for axis, size in enumerate(kernel) if axis not in inputs and size > 1]
    along = {tuple(sorted(pair for pair in bias.pairs if pair[0] in ours)) for bias in added}
    if len(along) != 1:
        return None
    pairs = along.pop()
    order = [axis for _, axis in pairs]
    fits = all(axis >= 0 and shape[our] == kernel[axis] for our, axis in pairs)
    if not fits or [axis for axis, _ in pairs] != ours or sorted(order) != theirs:
        return None
    if order == theirs:
        return name, None
    if len(ours) < len(shape):
        return None
    return name, tuple(axis - len(kernel) for axis in order)


# Of each kernel, the measurements of its calls.
Measures = dict[str, list[interpreter.Parts]]


def measure(
    found: Covered,
    chosen: Sequence[str],
    args: list[Any],
    weights: Weights,
    second: Mapping[str, rows.Limits] | None = None,
) -> tuple[list[Any], Measures]:
    """The outputs of the loss's jaxpr, and measurements of the kernels `chosen`.

    Args:
      found: What is known of the loss.
      chosen: Names of the kernels.
      args: Of the jaxpr.
      weights: Of the rows.
      second: Kernels whose second moments are wanted, and how finely.

    Raises:
      ValueError: If the rows of a kernel cannot be told.
    """
    second = second or {}
    wanted = {
        use: _n_rows(found.kernels[name], use, second[name].rows if name in second else 0)
        for name in chosen
        for use in found.kernels[name].uses
    }
    outputs, parts = interpreter.evaluate(found.trace, wanted, args, weights)
    return outputs, {name: [parts[use] for use in found.kernels[name].uses] for name in chosen}


def _n_rows(kernel: Kernel, use: Use, limit: int) -> int:
    """How many rows a call is to give, so that all calls of a kernel give no more than `limit`."""
    if not limit:
        return 0
    if use.innermost.rows_from is None or use.product.rows is None:
        msg = (
            f"`second_moments` are wanted of `{kernel.layer.kernel}`, whose product takes its "
            "inputs in another form than the layer got them (patches, or a padded map). Give "
            "`second_moments` the names of the other layers."
        )
        raise ValueError(msg)
    counts = [(of.count, of.product.count) for of in kernel.uses]
    if not all(isinstance(count, int) for pair in counts for count in pair):
        return max(limit // len(kernel.uses), 1)  # A number may be symbolic, as in `jax.export`.
    n_calls = sum(count // max(of_one, 1) for count, of_one in counts)
    return max(limit // max(n_calls, 1), 1)


def statistics(
    found: Covered, measures: Measures, second: Mapping[str, rows.Limits] | None = None
) -> dict[str, LayerStats]:
    """Measurements as the statistics of layers; `second` as `measure` had it."""
    unions = {name: groups.union([call[0] for call in of]) for name, of in measures.items()}
    joined = groups.joined(unions)
    layers = {name: found.kernels[name].layer for name in joined}
    # As `LayerStats.of_batch`, whose barrier for each layer would be as many to the compiler.
    means = lax.optimization_barrier(
        {name: jnp.broadcast_to(of.mean, layers[name].stats_shape) for name, of in joined.items()}
    )
    result = {}
    for name, of in joined.items():
        layer, mean, moments = layers[name], means[name], {}
        if second and name in second:
            of_calls = rows.union([call[1] for call in measures[name]])
            moments = rows.second_moments(of_calls, layer, second[name])
        var = jnp.broadcast_to(of.var, layer.stats_shape)
        # The same wherever it was measured; a constant's maximum is nothing to trace.
        count = jnp.asarray(of.count.max(), jnp.float32)
        result[name] = LayerStats(mean, var, square_below(mean), count, layer, **moments)
    return result


def idle_statistics(layer: Layer, second: rows.Limits | None = None) -> LayerStats:
    """Statistics of a layer that never runs: of no input at all."""
    zeros = jnp.zeros(layer.stats_shape, jnp.float32)
    moments = rows.no_second_moments(layer, second) if second else {}
    return LayerStats(zeros, zeros, zeros, jnp.zeros((), jnp.float32), layer, **moments)
