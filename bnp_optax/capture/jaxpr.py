"""The jaxpr engine: statistics of any JAX function, found in what it is traced to.

The loss is traced once. In the trace, parameters are followed into the products that take them
(`plan`); then it is evaluated with the products' inputs measured (`evaluation`).
"""

import collections
import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bnp_optax._tree import BIAS, KERNEL, is_named, named_leaves
from bnp_optax.capture import views
from bnp_optax.capture.analysis import make_plan
from bnp_optax.capture.evaluation import evaluate
from bnp_optax.capture.layer import Layer, idle_statistics, split_arrays, statistics
from bnp_optax.capture.plan import Plan, Use, innermost
from bnp_optax.capture.reading import Options, Weights
from bnp_optax.capture.usage import is_used
from bnp_optax.capture.views import Measure
from bnp_optax.statistics import LayerStats


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A covered kernel: the measurements that count, and its bias."""

    uses: list[Use]
    bias: str | None
    shape: tuple[int, ...]

    @property
    def input_axes(self) -> tuple[int, ...]:
        """Axes that are summed over, negative."""
        return tuple(sorted(axis - len(self.shape) for axis in self.uses[0].input_axes))

    @property
    def positions(self) -> int:
        """Output positions that share the kernel; on average, where calls differ in them."""
        n_examples = sum(use.count / use.positions for use in self.uses)
        return round(sum(use.count for use in self.uses) / n_examples) if n_examples else 1


@dataclasses.dataclass(frozen=True)
class Found:
    """What is known of a traced loss.

    Attributes:
      plan: Its plan.
      kernels: The covered kernels by name.
      reasons: Why the other parameters are not covered.
      unused: Those on which the loss does not depend.
      out_tree: Structure of its outputs.
    """

    plan: Plan
    kernels: dict[str, Kernel]
    reasons: dict[str, str]
    unused: list[str]
    out_tree: Any


def find(
    loss_fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
) -> Found:
    """Trace the loss abstractly; what it does with the parameters."""
    dynamic, rebuild = split_arrays((args, kwargs))

    def traced(params: Any, dynamic: list[Any]) -> Any:
        args, kwargs = rebuild(dynamic)
        return loss_fn(params, *args, **kwargs)

    if any(isinstance(x, jax.ShapeDtypeStruct) for x in dynamic):
        closed, out = jax.make_jaxpr(traced, return_shape=True)(params, dynamic)
    else:
        # Only what is differentiated is traced, so that the loss may look at the rest.
        closed, out = jax.make_jaxpr(lambda p: traced(p, dynamic), return_shape=True)(params)
    leaves = named_leaves(params)
    n_others = len(closed.jaxpr.invars) - len(leaves)
    dtypes = [jnp.result_type(leaf) for leaf in leaves.values()]
    is_param = [jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes] + [False] * n_others
    plan = make_plan(closed, is_param, is_param, options)
    used = is_used(closed.jaxpr)
    uses: dict[str, list[Use]] = {}
    reasons: dict[str, str] = {}
    by_root: dict[int, list[Use]] = collections.defaultdict(list)
    for use in plan.uses:
        by_root[use.root].append(use)
    for root, name in enumerate(leaves):
        # The layer is where the bias is added. Other products are of derivatives, say.
        with_bias = [use for use in by_root[root] if use.biases]
        mine = with_bias or by_root[root]
        reason = _why_not(plan, root, mine, dtypes[root], used[root])
        if reason is None:
            uses[name] = mine
            for use in mine:
                innermost(use).name = name
        else:
            reasons[name] = reason
    names = list(leaves)
    shapes = {name: tuple(jnp.shape(leaf)) for name, leaf in leaves.items()}
    biases = {name: _bias(shapes[name], mine, names, shapes) for name, mine in uses.items()}
    n_served = collections.Counter(biases.values())
    kernels = {
        name: Kernel(mine, bias if n_served[bias] == 1 else None, shapes[name])
        for (name, mine), bias in zip(uses.items(), biases.values(), strict=True)
    }
    unused = [name for root, name in enumerate(leaves) if not used[root]]
    return Found(plan, kernels, reasons, unused, jax.tree.structure(out))


def _why_not(plan: Plan, root: int, uses: list[Use], dtype: Any, used: bool) -> str | None:
    """Why a parameter is not covered, or None if it is."""
    consumers = plan.consumers.get(root, {})
    if not used:
        return "the loss does not depend on it"
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return "it is complex"
    if root in plan.altered:
        changes = " and ".join(f"`{name}`" for name in plan.altered[root])
        return f"{changes} changes it before it meets the inputs"
    if "gather" in consumers:
        return "it is an embedding: `gather` looks its rows up"
    if not uses:
        taken = ", ".join(f"`{name}`" for name in consumers) or "nothing known"
        return f"no product with inputs takes it as it is, but {taken}"
    axes = sorted({tuple(sorted(use.input_axes)) for use in uses})
    if len(axes) > 1:
        return f"it is tied: summed over its axes {' and over its axes '.join(map(str, axes))}"
    return None


def _bias(
    kernel: tuple[int, ...], uses: list[Use], names: list[str], shapes: dict[str, tuple[int, ...]]
) -> str | None:
    """The bias that every use of a kernel adds, if it runs along the kernel's output axes."""
    added = {bias for use in uses for bias in use.biases}
    if len({bias.root for bias in added}) != 1 or any(len(use.biases) != 1 for use in uses):
        return None
    (name,) = {names[bias.root] for bias in added}
    shape, inputs = shapes[name], uses[0].input_axes
    # Axes of size 1 come and go in reshapes.
    ours = [axis for axis, size in enumerate(shape) if size > 1]
    theirs = [axis for axis, size in enumerate(kernel) if axis not in inputs and size > 1]
    if [shape[axis] for axis in ours] != [kernel[axis] for axis in theirs]:
        return None
    expected = set(zip(ours, theirs, strict=True))
    fits = ({pair for pair in bias.pairs if pair[0] in ours} == expected for bias in added)
    return name if all(fits) else None


def layers(found: Found) -> dict[str, Layer]:
    """The covered layers."""
    shapes = jax.eval_shape(
        lambda args: _measure(found, found.kernels, args, None)[1],
        [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in found.plan.jaxpr.invars],
    )
    return {
        name: Layer(
            kernel=name,
            bias=kernel.bias,
            kind=kernel.uses[0].kind,
            kernel_shape=kernel.shape,
            stats_shape=tuple(shapes[name].mean.shape),
            stacked_axes=tuple(sorted(kernel.uses[0].stacked_axes)),
            input_axes=kernel.input_axes,
            positions=kernel.positions,
            count=max(use.count for use in kernel.uses),
            engine="jaxpr",
        )
        for name, kernel in found.kernels.items()
    }


def _measure(
    found: Found, chosen: Collection[str], args: list[Any], weights: Weights
) -> tuple[list[Any], dict[str, Measure]]:
    wanted = [use for name in chosen for use in found.kernels[name].uses]
    outs, measures = evaluate(found.plan, wanted, args, weights)
    return outs, {
        name: views.union([measures[use] for use in found.kernels[name].uses]) for name in chosen
    }


def _statistics(found: Found, measures: dict[str, Measure]) -> dict[str, LayerStats]:
    return {
        name: statistics(
            measure.mean,
            measure.var,
            measure.sq_mean,
            jnp.max(measure.count),
            kernel=name,
            kernel_shape=found.kernels[name].shape,
            bias=found.kernels[name].bias,
            input_axes=found.kernels[name].input_axes,
            positions=found.kernels[name].positions,
        )
        for name, measure in measures.items()
    }


def measured(found: Found, chosen: Collection[str], params: Any) -> dict[str, LayerStats]:
    """The statistics of the kernels `chosen`, without a gradient."""
    return _statistics(found, _measure(found, chosen, jax.tree.leaves(params), None)[1])


def value_and_grad(
    loss_fn: Callable[..., Any],
    chosen: Collection[str] | None,
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    has_aux: bool,
    options: Options,
    *,
    left_out: Collection[str] = (),
    weights: Weights = None,
) -> tuple[Any, Any, dict[str, LayerStats]]:
    """Value, gradient and the statistics of the kernels `chosen`, or of all but `left_out`."""
    found = find(loss_fn, params, args, kwargs, options)
    _check_found(found, chosen)
    wanted = found.kernels if chosen is None else [n for n in chosen if n in found.kernels]
    names = [name for name in wanted if name not in left_out]

    def instrumented(params: Any) -> tuple[Any, tuple[Any, dict[str, Measure]]]:
        outs, measures = _measure(found, names, jax.tree.leaves(params), weights)
        value = jax.tree.unflatten(found.out_tree, outs)
        loss, aux = value if has_aux else (value, None)
        return loss, (aux, lax.stop_gradient(measures))

    (loss, (aux, measures)), grads = jax.value_and_grad(instrumented, has_aux=True)(params)
    stats = _statistics(found, measures)
    leaves = named_leaves(params)
    for name in found.unused:
        if is_named(name, KERNEL) and (chosen is None or name in chosen):
            stats[name] = idle_statistics(name, leaves)
    return (loss, aux) if has_aux else loss, grads, stats


def _check_found(found: Found, chosen: Collection[str] | None) -> None:
    """Raise if nothing, or not all that was asked for, can be measured."""
    reasons = {n: r for n, r in found.reasons.items() if chosen is None or n in chosen}
    if chosen is not None and set(reasons) - set(found.unused):
        name, reason = next((n, r) for n, r in reasons.items() if n not in found.unused)
        msg = (
            f"`layers` has `{name}`, whose inputs cannot be captured: {reason}. Leave it out, or "
            "call `bnp_optax.find_layers` on this loss."
        )
        raise ValueError(msg)
    if not found.kernels and chosen is None:
        shown = [f"`{n}`: {why}" for n, why in found.reasons.items() if not is_named(n, BIAS)][:8]
        msg = (
            "The loss multiplies no inputs with a parameter, so there is nothing to capture "
            f"({'; '.join(shown) or 'there are no parameters'}). Compute the loss from the "
            "`params` that it is given, or use `jax.value_and_grad` if there is nothing to "
            "precondition."
        )
        raise ValueError(msg)
