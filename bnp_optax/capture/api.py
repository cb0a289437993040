"""`find_layers` and `value_and_grad`: what users call to capture statistics."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bnp_optax._checks import check_choice, check_count
from bnp_optax._tree import BIAS, KERNEL, is_named, named_leaves, quoted
from bnp_optax.capture import covered
from bnp_optax.capture.covered import Covered
from bnp_optax.capture.moments import ConvStatistics, Options
from bnp_optax.capture.rows import Limits
from bnp_optax.layers import by_convention, check_layers
from bnp_optax.statistics import Layer, LayerStats

# Layers whose second moments are captured.
SecondMoments = bool | Collection[str] | Mapping[str, Layer] | None


def options_of(
    conv_statistics: ConvStatistics, sample_rows: int | None, embeddings: bool
) -> Options:
    """The options, checked."""
    check_choice("conv_statistics", conv_statistics, ("channel", "patch"))
    check_count("sample_rows", sample_rows)
    return Options(conv_statistics, sample_rows, embeddings)


def find_layers(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    conv_statistics: ConvStatistics = "channel",
    embeddings: bool = False,
    **kwargs: Any,
) -> dict[str, Layer]:
    """The layers whose input statistics can be captured, found by an abstract trace (no FLOPs).

    Pass the result, or a part of it, as `layers=` to choose what is captured and preconditioned,
    and to give the optimizer its final shapes before the first step.

    Args:
      loss_fn: A loss, `loss_fn(params, *args, **kwargs)`, that returns a scalar, or a tuple with
        the scalar first.
      params: The parameters, arrays or `jax.ShapeDtypeStruct`s.
      *args: Further arguments, likewise.
      conv_statistics: As in `value_and_grad`; it decides the statistics' shapes.
      embeddings: As in `value_and_grad`.
      **kwargs: Further keyword arguments.

    Returns:
      A dict from kernel name to `Layer`.

    Raises:
      ValueError: If a leaf of `params` is no array, or an option is not one of those above.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import bnp_optax
      >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> layers = bnp_optax.find_layers(loss_fn, params)
      >>> {name: (layer.kind, layer.fan_in) for name, layer in layers.items()}
      {'layers_0/kernel': ('Dense', 3), 'layers_2/kernel': ('Dense', 8)}
    """
    options = options_of(conv_statistics, None, embeddings)
    found = covered.find(loss_fn, params, args, kwargs, options)
    return {name: kernel.layer for name, kernel in found.kernels.items()}


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    layers: Mapping[str, Layer] | None = None,
    *,
    conv_statistics: ConvStatistics = "channel",
    sample_rows: int | None = None,
    embeddings: bool = False,
    weights: Callable[..., Any] | None = None,
    fixed: Mapping[str, LayerStats] | None = None,
    second_moments: SecondMoments = None,
    second_moment_rows: int = 256,
    second_moment_fan_in: int = 1024,
) -> Callable[..., tuple[Any, Any, dict[str, LayerStats]]]:
    """`jax.value_and_grad` that also returns the statistics of every layer's inputs.

    The network is run once and is not changed. The value and the gradient are those that
    `jax.value_and_grad` gives, for every loss.

    It works for any JAX code: Flax Linen and NNX, Equinox, Haiku, functions of arrays. The loss is
    traced, and the parameters are followed into the products that they enter, through `jit`,
    `checkpoint`, `scan`, `cond`, `vmap`, `shard_map`, and functions with derivatives of their own.
    Statistics are of the rows that the kernel's gradient comes from: those that reach the loss only
    through `stop_gradient` do not count, nor do the products of derivatives that the loss takes
    by its inputs, nor the same rows again. Use it under `jax.jit`.

    On many devices the batch is to be sharded along its leading axis, of which each device then
    measures its own part. Under data parallelism with explicit collectives, average the statistics
    like the gradients: `jax.lax.pmean(stats, axis_name)`. Derivatives through `value_and_grad` hold
    the statistics constant, so a loss that returns them as its `aux` may be scaled and
    differentiated by others, such as Flax's `DynamicScale`.

    Args:
      loss_fn: The loss, `loss_fn(params, *args, **kwargs)`; returns a scalar, or
        `(scalar, aux)` with `has_aux`.
      has_aux: As in `jax.value_and_grad`.
      layers: The layers to capture: what `find_layers` returns, or a part of it; None finds all of
        them at trace time.
      conv_statistics: Of convolutions: `'channel'` takes the moments of each channel of the
        feature map, (21) and (22) of the JMLR paper; `'patch'` those of the entries that each
        kernel entry meets, zeros of the padding included, (19) and (20). They differ at the map's
        border only (Proposition 10).
      sample_rows: Take the statistics from this many rows of the batch (examples, positions of a
        sequence, pixels), spread evenly and always the same; None for all. `count` stays that
        of the whole batch. A number of at least that of the devices is rounded up to as many from
        each. All where the number of rows is not known, as in `jax.export`.
      embeddings: Whether to cover tables that rows are looked up in, as layers without a bias of
        one-hot inputs, whose mean is the row's frequency.
      weights: A function of the loss's arguments, `weights(*args, **kwargs)`, that returns weights
        >= 0 of shape (batch,), or (batch, length) such as a padding mask: rows of weight 0 do not
        count. It changes the statistics only, not the loss.
      fixed: Statistics from `dataset_statistics` or `start_in_zspace`, returned with the
        `count` of the batch, all its rows, for layers that then cost nothing.
      second_moments: Of which layers to capture E[h h^T] too, which `whiten` needs: True for all,
        their names, or layers as `layers` takes them; None or False for none, which costs nothing.
        Of a convolution h are the patches that the kernel meets, zeros of the padding included,
        at a sample of the output positions.
      second_moment_rows: From how many rows at most, of all calls of a layer together, E[h h^T] is
        taken, spread evenly over the rows (of those whose weight is positive) and always the same.
        On as many devices as share one `shard_map`, at most so many of each enter the sample.
        All where their number is not known, as in `jax.export`.
      second_moment_fan_in: The largest fan-in whose E[h h^T] is returned as a matrix. Of a wider
        layer it is a sketch of 32 rows, which is what `whiten` needs and costs less; see
        `LayerStats`.

    Returns:
      A function of `(params, *args, **kwargs)` that returns `(loss, grads, stats)`; `loss` is
      `(loss, aux)` with `has_aux`; `stats` is a dict from kernel name to `LayerStats`. A layer
      that exists but never runs has statistics with `count == 0`.

    Raises:
      ValueError: If no layer is found, `layers` or `second_moments` names one that `params` has
        not, or an option is not one of those above.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p, x: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> loss, grads, stats = jax.jit(bnp_optax.value_and_grad(loss_fn))(params, x)
      >>> sorted(stats), stats["kernel"].mean.shape
      (['kernel'], (3, 1))
      >>> bool(jnp.allclose(loss, loss_fn(params, x)))
      True

      Without a framework, each product with a parameter is a layer:

      >>> loss_fn = lambda p, x: jnp.mean((jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]) ** 2)
      >>> params = {"w1": jnp.ones((3, 2)), "b1": jnp.zeros(2), "w2": jnp.ones((2, 1))}
      >>> loss, grads, stats = jax.jit(bnp_optax.value_and_grad(loss_fn))(params, x)
      >>> {name: (s.layer.bias, s.mean.shape) for name, s in stats.items()}
      {'w1': ('b1', (3, 1)), 'w2': (None, (2, 1))}

      Second moments of some layers, or of all:

      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> _, _, stats = bnp_optax.value_and_grad(loss_fn, second_moments=["w1"])(params, x)
      >>> bool(jnp.allclose(stats["w1"].second_moment, x.T @ x / 8, atol=1e-6))
      True
    """
    return _captured(
        lambda instrumented: jax.value_and_grad(instrumented, has_aux=True),
        loss_fn,
        has_aux,
        layers,
        conv_statistics=conv_statistics,
        sample_rows=sample_rows,
        embeddings=embeddings,
        weights=weights,
        fixed=fixed,
        second_moments=second_moments,
        second_moment_rows=second_moment_rows,
        second_moment_fan_in=second_moment_fan_in,
    )


def value_and_stats(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    layers: Mapping[str, Layer] | None = None,
    **options: Any,
) -> Callable[..., tuple[Any, dict[str, LayerStats]]]:
    """The value and the statistics alone, for others to differentiate; options of `value_and_grad`.

    Derivatives hold the statistics constant.
    """
    captured = _captured(_undifferentiated, loss_fn, has_aux, layers, **options)

    @functools.wraps(loss_fn)
    def wrapped(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, LayerStats]]:
        value, _, stats = captured(params, *args, **kwargs)
        return value, stats

    return wrapped


def _undifferentiated(instrumented: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, None]]:
    return lambda params: (instrumented(params), None)


def _captured(
    differentiate: Callable[[Callable[[Any], Any]], Callable[[Any], Any]],
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    layers: Mapping[str, Layer] | None = None,
    *,
    conv_statistics: ConvStatistics = "channel",
    sample_rows: int | None = None,
    embeddings: bool = False,
    weights: Callable[..., Any] | None = None,
    fixed: Mapping[str, LayerStats] | None = None,
    second_moments: SecondMoments = None,
    second_moment_rows: int = 256,
    second_moment_fan_in: int = 1024,
) -> Callable[..., tuple[Any, Any, dict[str, LayerStats]]]:
    """The loss with its statistics, and what `differentiate` makes of it beside the value."""
    options = options_of(conv_statistics, sample_rows, embeddings)
    check_layers(layers)
    check_second_moments(second_moments, second_moment_rows, second_moment_fan_in)
    limits = Limits(second_moment_rows, second_moment_fan_in)

    @functools.wraps(loss_fn)
    def wrapped(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, dict[str, LayerStats]]:
        leaves = named_leaves(params)
        known = dict(fixed or {})
        _check_names("fixed", dict.fromkeys(known, ()), leaves)
        if layers is not None:
            _check_names("layers", {n: layer.kernel_shape for n, layer in layers.items()}, leaves)
        found = covered.find(loss_fn, params, args, kwargs, options)
        wanted = found.kernels if layers is None else [n for n in layers if n in found.kernels]
        names = [name for name in wanted if name not in known]
        row_weights = None if weights is None else jnp.asarray(weights(*args, **kwargs))
        second = _of_second_moments(second_moments, leaves, found, layers)
        limited = {name: limits for name in names if name in second}

        def instrumented(params: Any) -> tuple[Any, Any]:
            flat = jax.tree.leaves(params)
            outputs, measures = covered.measure(found, names, flat, row_weights, limited)
            # The loss is the first array; what is no array never leaves the function.
            return outputs[0], (outputs, measures)

        (_, (outputs, measures)), grads = differentiate(instrumented)(params)
        # After JAX has said what it does not differentiate.
        _check_found(found, layers)
        value = found.rebuild(outputs)
        _check_value(value, has_aux)
        stats = covered.statistics(found, measures, limited)
        for name in found.unused:
            of_idle = limits if name in second else None
            if layers is not None and name in layers:
                stats[name] = covered.idle_statistics(layers[name], of_idle)
            elif layers is None and is_named(name, KERNEL):
                idle = by_convention(name, tuple(jnp.shape(leaves[name])), leaves)
                stats |= {name: covered.idle_statistics(idle, of_idle)} if idle else {}
        for name, of_data in known.items():
            if name in found.kernels:
                count = jnp.asarray(found.kernels[name].count, jnp.float32)
                of_data = dataclasses.replace(of_data, count=count)
            stats[name] = of_data
        return value, grads, stats

    return wrapped


def check_second_moments(second_moments: Any, rows: Any, fan_in: Any) -> None:
    """Raise unless the options are of the kinds that `value_and_grad` takes."""
    for name, count in (("second_moment_rows", rows), ("second_moment_fan_in", fan_in)):
        check_count(name, count)
        if count is None:
            msg = f"`{name}` must be an integer > 0, got None."
            raise ValueError(msg)
    if second_moments is None or isinstance(second_moments, bool | str):
        return
    if isinstance(second_moments, Mapping):
        check_layers(second_moments, "second_moments")
    elif not isinstance(second_moments, Collection) or not all(
        isinstance(name, str) for name in second_moments
    ):
        msg = (
            "`second_moments` must be True, None, names of kernels, or a dict from `find_layers`; "
            f"got {second_moments!r}."
        )
        raise ValueError(msg)


def _of_second_moments(
    second_moments: SecondMoments,
    leaves: Mapping[str, Any],
    found: Covered,
    layers: Mapping[str, Layer] | None,
) -> set[str]:
    """Names of the kernels whose second moments are wanted."""
    if second_moments is None or second_moments is False:
        return set()
    if second_moments is True:
        return set(leaves)
    if isinstance(second_moments, str):
        second_moments = [second_moments]
    if isinstance(second_moments, Mapping):
        shapes = {name: layer.kernel_shape for name, layer in second_moments.items()}
    else:
        shapes = dict.fromkeys(second_moments, ())
    _check_names("second_moments", shapes, leaves)
    captured = found.kernels if layers is None else layers
    for name in shapes:
        if name not in captured and name not in found.unused:
            reason = found.reasons.get(name, "it is not among `layers`")
            msg = (
                f"`second_moments` has `{name}`, which is not captured: {reason}. Captured are "
                f"{quoted(captured)}."
            )
            raise ValueError(msg)
    return set(shapes)


def _check_value(value: Any, has_aux: bool) -> None:
    """Raise unless the loss returned what `has_aux` says."""
    if has_aux and not (isinstance(value, tuple) and len(value) == 2):
        msg = f"With `has_aux=True` the loss must return `(scalar, aux)`, got a {type(value)}."
        raise TypeError(msg)
    if not has_aux and not isinstance(value, jax.Array):
        msg = f"The loss must return a scalar, got a {type(value)}; for aux pass `has_aux=True`."
        raise TypeError(msg)


def _check_found(found: Covered, layers: Mapping[str, Layer] | None) -> None:
    """Raise if nothing, or not all that was asked for, can be measured."""
    if layers is not None:
        for name in layers:
            if name in found.reasons and name not in found.unused:
                msg = (
                    f"`layers` has `{name}`, whose inputs cannot be captured: "
                    f"{found.reasons[name]}. Leave it out, or call `bnp_optax.find_layers` on this "
                    "loss."
                )
                raise ValueError(msg)
    elif not found.kernels:
        shown = [f"`{n}`: {why}" for n, why in found.reasons.items() if not is_named(n, BIAS)][:8]
        msg = (
            "The loss multiplies no inputs with a parameter, so there is nothing to capture "
            f"({'; '.join(shown) or 'there are no parameters'}). Compute the loss from the "
            "`params` that it is given, or use `jax.value_and_grad` if there is nothing to "
            "precondition."
        )
        raise ValueError(msg)


def _check_names(
    argument: str, shapes: Mapping[str, tuple[int, ...]], leaves: Mapping[str, Any]
) -> None:
    """Raise unless `params` has kernels of these names, and of these shapes if given."""
    for name, expected in shapes.items():
        shape = tuple(jnp.shape(leaves[name])) if name in leaves else None
        if shape is None or expected not in ((), shape):
            kernels = [leaf for leaf in leaves if is_named(leaf, KERNEL)] or list(leaves)
            of_shape = f" of shape {expected}" if expected else ""
            msg = (
                f"`{argument}` has `{name}`{of_shape}, but `params` has "
                f"{'no such leaf' if shape is None else f'it with shape {shape}'}. The kernels "
                f"of `params` are {quoted(kernels)}. Call `find_layers` on these `params`."
            )
            raise ValueError(msg)
