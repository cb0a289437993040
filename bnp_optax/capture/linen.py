"""The Linen engine: statistics ride the gradient out of interceptors.

Beside each kernel, the loss finds a *probe*, a leaf of zeros. When the layer runs, an interceptor
passes its output through an identity whose custom derivative for the probe is the statistics of
the layer's inputs. Whatever Flax does with parameters (stacking them for `nn.scan`, broadcasting,
sharing, rematerializing) it does with probes, and whatever JAX does with gradients, too.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax import lax
from jax.tree_util import DictKey, KeyPath

from bnp_optax._tree import BIAS, KERNEL, is_named, named_leaves, path_name, sibling
from bnp_optax.capture.layer import Layer, split_arrays, statistics
from bnp_optax.capture.linen_layers import read
from bnp_optax.capture.reading import NotCovered, Options, Reading
from bnp_optax.capture.usage import is_used
from bnp_optax.statistics import LayerStats

PROBE = "bnp_optax_probe"

# What a call adds to its probe. Sums over calls, so that shared layers add up.
Probe = dict[str, jax.Array]
Visit = Callable[[Any, Reading | NotCovered, str, Any], Any]

_tokens = itertools.count()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Say what a probe is where a loss fails over one."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if PROBE in str(error):
            error.add_note(
                f"While it is differentiated, the loss sees a leaf `{PROBE}` of zeros beside each "
                "kernel of `params`. If it compares `params` with another tree, drop the leaves "
                "of that name first, take that part of the gradient by `jax.grad`, or capture with "
                "`capture='jaxpr'`, which adds no leaves."
            )
        raise


@jax.custom_vjp
def _tap(outputs: jax.Array, sums: Probe, probe: Probe) -> jax.Array:
    """`outputs`; as a function of `probe`, one with derivative `sums`."""
    del sums, probe
    return outputs


def _tap_fwd(outputs: jax.Array, sums: Probe, probe: Probe) -> tuple[jax.Array, Probe]:
    del probe
    return outputs, sums


def _tap_bwd(sums: Probe, cotangent: jax.Array) -> tuple[jax.Array, None, Probe]:
    # Under `vmap`, JAX sums a cotangent over the batch only if it depends on batched values. Each
    # example's sums count, so they are tied to its cotangent; the compiler sees a factor of one.
    one = jnp.logical_or(cotangent[(0,) * cotangent.ndim] == 0, True).astype(jnp.float32)
    return cotangent, None, jax.tree.map(lambda x: one * x, sums)


_tap.defvjp(_tap_fwd, _tap_bwd)


def has_kernels(params: Any) -> bool:
    """Whether `params` could be those of Linen layers: dicts with leaves named as Flax does."""
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    return any(path and path[-1] == DictKey(KERNEL) for path in paths)


def _beside_kernels(node: Any, extra: Mapping[str, Any], path: KeyPath = ()) -> Any:
    """`node` with `extra[name]` under the key `PROBE` beside each kernel of that name."""
    new = jax.tree.map_with_path(
        lambda p, child: child if child is node else _beside_kernels(child, extra, path + p),
        node,
        is_leaf=lambda child: child is not node,
    )
    if isinstance(node, dict | FrozenDict) and KERNEL in node:
        name = path_name((*path, DictKey(KERNEL)))
        if name in extra:
            new = type(new)({**new, PROBE: extra[name]})
    return new


def _interceptor(visit: Visit, options: Options) -> Callable[..., Any]:
    """Call `visit(probe, reading, layer class, outputs)` when a module that holds one runs."""
    reparametrized: list[str] = []

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        wraps = isinstance(module, nn.WeightNorm | nn.SpectralNorm)
        if wraps:
            reparametrized.append(type(module).__name__)
        try:
            outputs = next_fun(*args, **kwargs)
        finally:
            if wraps:
                reparametrized.pop()
        if not module.has_variable("params", PROBE):
            return outputs
        reading: Reading | NotCovered
        try:
            if reparametrized:
                msg = f"its kernel is reparametrized by `{reparametrized[-1]}`"
                raise NotCovered(msg)
            reading = read(module, context.orig_method, args, kwargs, outputs, options)
        except NotCovered as reason:
            reading = reason
        probe = module.get_variable("params", PROBE)
        return visit(probe, reading, type(module).__name__, outputs)

    return intercept


def _stacked_axes(kernel: tuple[int, ...], local: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes, leading ones preferred, that `kernel` has and the slice that a layer sees lacks."""
    for axes in itertools.combinations(range(len(kernel)), len(kernel) - len(local)):
        if tuple(size for axis, size in enumerate(kernel) if axis not in axes) == local:
            return axes
    return None


def _stacked_shape(layer: Layer, local: tuple[int, ...]) -> tuple[int, ...]:
    """`local`, a shape in one slice of the layer, with the stacked axes put in."""
    rest = iter(local)
    return tuple(
        size if axis in layer.stacked_axes else next(rest)
        for axis, size in enumerate(layer.kernel_shape)
    )


def discover(
    loss_fn: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
) -> tuple[dict[str, Layer], dict[str, str], list[str]]:
    """Trace the loss abstractly; what ran over each kernel.

    Returns:
      The layers by kernel name; why the other kernels are not covered; and those kernels on
      which the loss does not depend.
    """
    leaves = named_leaves(params)
    kernels = {name: leaf for name, leaf in leaves.items() if is_named(name, KERNEL)}
    is_complex = {n: jnp.issubdtype(leaf.dtype, jnp.complexfloating) for n, leaf in kernels.items()}
    # Tokens make the traced tree new each time: a loss that is itself under `jax.jit` is traced
    # again and so seen by the interceptor. A marker is sliced as its kernel is.
    tokens = {f"{next(_tokens)}": name for name in kernels}
    markers = {
        name: {token: jax.ShapeDtypeStruct(kernels[name].shape, jnp.float32)}
        for token, name in tokens.items()
    }
    layers: dict[str, Layer] = {}
    reasons: dict[str, str] = {}

    def record(probe: Any, reading: Reading | NotCovered, kind: str, outputs: Any) -> Any:
        ((token, marker),) = probe.items()
        name = tokens[token]
        shape = tuple(kernels[name].shape)
        stacked = _stacked_axes(shape, marker.shape)
        if is_complex[name]:
            reasons[name] = "it is complex"
        elif isinstance(reading, NotCovered):
            reasons.setdefault(name, str(reading))
        elif stacked is None:
            reasons.setdefault(name, f"`{kind}` sees it in the shape {marker.shape}")
        elif stacked != tuple(range(len(stacked))):
            reasons.setdefault(name, f"it is stacked along axes {stacked}, not the leading ones")
        else:
            bias = sibling(name, BIAS)
            layer = Layer(
                kernel=name,
                bias=bias if bias in leaves else None,
                kind=kind,
                kernel_shape=shape,
                stats_shape=jax.eval_shape(lambda: reading.moments(None))[0].shape,
                stacked_axes=stacked,
                input_axes=reading.input_axes,
                positions=reading.positions,
                count=max(reading.count, layers[name].count if name in layers else 0),
                engine="linen",
            )
            layers[name] = dataclasses.replace(
                layer, stats_shape=_stacked_shape(layer, layer.stats_shape)
            )
        return outputs

    marked = _beside_kernels(params, markers)
    dynamic, rebuild = split_arrays((args, kwargs))

    def traced(params: Any, dynamic: list[Any]) -> Any:
        args, kwargs = rebuild(dynamic)
        with nn.intercept_methods(_interceptor(record, options)):
            return loss_fn(params, *args, **kwargs)

    with _explained():
        jaxpr = jax.make_jaxpr(traced)(marked, dynamic).jaxpr
    used = dict(zip(named_leaves(marked), is_used(jaxpr), strict=False))
    unused = [name for name in kernels if name not in layers and not used[name]]
    for name in kernels:
        if name in unused:
            reasons[name] = "the loss does not depend on it"
        elif name not in layers:
            reasons.setdefault(name, "no known layer class uses it")
    return layers, {n: reason for n, reason in reasons.items() if n not in layers}, unused


def _sums(reading: Reading) -> Probe:
    mean, var, _ = reading.moments(None)
    count = jnp.full((1,) * mean.ndim, float(reading.count), jnp.float32)
    sums = {
        "mean": count * mean,
        "var": count * var,
        "sq_mean": count * mean**2,
        "count": count,
        "calls": jnp.ones_like(count),
    }
    return jax.tree.map(lax.stop_gradient, sums)


def _zero_probe(layer: Layer) -> Probe:
    n_local = len(layer.kernel_shape) - len(layer.stacked_axes)
    scalar = _stacked_shape(layer, (1,) * n_local)
    shapes = dict.fromkeys(("mean", "var", "sq_mean"), layer.stats_shape)
    shapes |= dict.fromkeys(("count", "calls"), scalar)
    return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}


def _finalize(layer: Layer, sums: Probe) -> LayerStats:
    """From sums over calls to statistics."""
    count = jnp.maximum(sums["count"], 1.0)
    mean = lax.optimization_barrier(sums["mean"] / count)
    stats = statistics(
        mean,
        sums["var"] / count,
        None,
        jnp.max(sums["count"]),
        kernel=layer.kernel,
        kernel_shape=layer.kernel_shape,
        bias=layer.bias,
        input_axes=layer.input_axes,
        positions=layer.positions,
    )
    sq_mean = jnp.where(sums["calls"] <= 1.0, stats.sq_mean, sums["sq_mean"] / count)
    return dataclasses.replace(stats, sq_mean=sq_mean)


def _tap_outputs(probe: Any, reading: Reading | NotCovered, kind: str, outputs: Any) -> Any:
    if isinstance(reading, NotCovered):
        return outputs
    leaves, treedef = jax.tree.flatten(outputs)
    leaves[0] = _tap(leaves[0], _sums(reading), dict(probe))
    return treedef.unflatten(leaves)


def value_and_grad(
    loss_fn: Callable[..., Any],
    layers: Mapping[str, Layer],
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    has_aux: bool,
    options: Options,
) -> tuple[Any, Any, dict[str, LayerStats]]:
    """Value, gradient and the statistics of `layers`."""

    def probed(params: Any, probes: dict[str, Probe]) -> Any:
        # Inside the function under `jax.jit`, whose cache does not know of interceptors.
        with nn.intercept_methods(_interceptor(_tap_outputs, options)):
            return loss_fn(_beside_kernels(params, probes), *args, **kwargs)

    probes = {name: _zero_probe(layer) for name, layer in layers.items()}
    with _explained():
        value, (grads, sums) = jax.value_and_grad(probed, argnums=(0, 1), has_aux=has_aux)(
            params, probes
        )
    return value, grads, {name: _finalize(layers[name], sums[name]) for name in layers}
