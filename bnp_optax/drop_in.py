"""Statistics for trainers that take the step themselves.

Such a trainer calls `jax.grad` of a loss and `update` of an optimizer, and has no way to hand
statistics from the one to the other. What it does hand on are gradients, and what it does to them
on the way, averaging over devices or microbatches, scaling, clipping by their norm, multiplies and
adds them. Averages of `LayerStats` are statistics of the union of the batches. So statistics travel
as the gradient of one more parameter, a vector of zeros: its gradient is c w (1, statistics), where
c is the cotangent of the loss and w a small number, so that norms do not notice. All factors gather
in the first entry; the optimizer divides by it, and has the weighted average of the statistics.

Example: two microbatches with means 1 and 3, and a trainer that averages gradients and multiplies
them by a fifth. The vector arrives as w 0.2 (1, 2): the mean of the union is 2.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bnp_optax._checks import check_transformation
from bnp_optax._tree import quoted, split_arrays
from bnp_optax.capture.api import value_and_stats
from bnp_optax.statistics import Layer, LayerStats

PARAMS = "params"
LAYER_STATS = "layer_stats"
# A power of two, which is exact. Of statistics from 1e-26 on it makes numbers that are not
# subnormal, and of those up to 1e4 a norm that a gradient's of 1e-4 does not notice in float32.
_WEIGHT = 2.0**-40
Stats = dict[str, LayerStats]


class DropIn(NamedTuple):
    """What to give to a trainer in place of a loss, its parameters and an optimizer.

    Attributes:
      loss_fn: The loss, of the parameters below. Value and gradient are those of the bare loss.
      params: `{"params": the bare parameters, "layer_stats": a vector of zeros}`.
      tx: The optimizer, of the parameters below; its state is that of the bare optimizer.
    """

    loss_fn: Callable[..., Any]
    params: dict[str, Any]
    tx: optax.GradientTransformationExtraArgs


def drop_in(
    loss_fn: Callable[..., Any],
    params: Any,
    tx: optax.GradientTransformation,
    *args: Any,
    has_aux: bool = False,
    layers: Mapping[str, Layer] | None = None,
    **capture_options: Any,
) -> DropIn:
    """Wrap loss, parameters and optimizer for a trainer that calls `jax.grad` and `update` itself.

    Such are Flax's own `TrainState`, `optax.MultiSteps`, and trainers that cannot be changed.
    Where the training step is yours, `value_and_grad` is simpler and says more.

    The statistics travel to the optimizer as the gradient of one more parameter, a vector that is
    zero and stays zero. On the way, gradients may be averaged, added, scaled, clipped by their
    norm or entry by entry, and skipped where they are not finite; microbatches that are scaled
    differently count accordingly. What treats all leaves of the gradient in another way (noise,
    centralization, a sign, fewer digits than float32) belongs inside `tx`, as do masks, partitions
    and weight decay, which then see the bare parameters. Derivatives of any order, forward and
    reverse, are those of the bare loss. Under `jax.jit` a loss that is not differentiated costs no
    more than the bare one.

    Under `pmean`, and with microbatches, `count` is that of one part of the batch: give `bnp` the
    whole `batch_size`, and `variance="batch"` where a part is a single row. A gradient of another
    loss brings no statistics, and the running ones are reused; `metrics` tells in
    `layers_never_seen`.

    Args:
      loss_fn: The whole loss, `loss_fn(params, *args, **kwargs)`; returns a scalar, or
        `(scalar, aux)` with `has_aux`. What a trainer computes from several losses may add and
        scale them, but where it subtracts one from another, put the difference into the loss.
      params: The bare parameters, in any framework.
      tx: An optimizer that takes `layer_stats`, such as `bnp_adam(1e-3)`.
      *args: Further arguments of the loss, such as a batch, or `jax.ShapeDtypeStruct`s of their
        shapes. They are traced and not computed with; other batches may have other sizes.
      has_aux: As in `jax.value_and_grad`.
      layers: The layers to capture: what `find_layers` returns, or a part of it; None for all.
      **capture_options: Options of `value_and_grad`: `sample_rows`, `weights`, `fixed` and others.

    Returns:
      A `DropIn`, to be unpacked: `loss_fn, params, tx`. `bare_params` takes the parameters out.

    Raises:
      ValueError: Whatever `value_and_grad` raises; if `tx` is no transformation; when used, if the
        loss or the optimizer gets other parameters than these, or in less than float32.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax
      >>> import bnp_optax
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> bare_loss = lambda p, x: jnp.mean((x @ p["kernel"] + p["bias"] - 1.0) ** 2)
      >>> loss_fn, wrapped, tx = bnp_optax.drop_in(
      ...     bare_loss, params, bnp_optax.bnp_adam(1e-3), x
      ... )
      >>> grads = jax.grad(loss_fn)(wrapped, x)
      >>> updates, state = tx.update(grads, tx.init(wrapped), wrapped)
      >>> wrapped = optax.apply_updates(wrapped, updates)
      >>> bool(bare_loss(bnp_optax.bare_params(wrapped), x) < bare_loss(params, x))
      True
      >>> bool(wrapped["layer_stats"].any())
      False
    """
    check_transformation("tx", tx)
    capture = value_and_stats(loss_fn, has_aux, layers, **capture_options)
    arrays, rebuild = split_arrays(args)
    like = jax.eval_shape(lambda p, arrays: capture(p, *rebuild(arrays))[1], params, arrays)
    size = 1 + sum(math.prod(x.shape) for x in jax.tree.leaves(like))

    @functools.wraps(loss_fn)
    def wrapped_loss(wrapped: Any, *args: Any, **kwargs: Any) -> Any:
        _check("The loss", wrapped, size)
        value, stats = capture(wrapped[PARAMS], *args, **kwargs)
        loss, *aux = value if has_aux else (value,)
        loss = _carry(loss, wrapped[LAYER_STATS], _packed(stats, like))
        return (loss, *aux) if has_aux else loss

    return DropIn(
        wrapped_loss,
        {PARAMS: params, LAYER_STATS: jnp.zeros(size, jnp.float32)},
        _unwrapping(optax.with_extra_args_support(tx), like, size),
    )


def bare_params(wrapped: Any) -> Any:
    """The bare parameters among those of a `DropIn`, for evaluation; also of gradients of these.

    Args:
      wrapped: Parameters, gradients or updates of the structure of `DropIn.params`.

    Returns:
      Those of the structure of the bare parameters.

    Raises:
      ValueError: If there are none.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnp_optax
      >>> bnp_optax.bare_params({"params": {"kernel": 1.0}, "layer_stats": jnp.zeros(5)})
      {'kernel': 1.0}
    """
    _check("`bare_params`", wrapped)
    return wrapped[PARAMS]


@jax.custom_jvp
def _carry(
    loss: Float[Array, ""], carrier: Float[Array, " size"], vector: Float[Array, " size"]
) -> Float[Array, ""]:
    """`loss`, whose derivative by `carrier` is `vector`, whatever the numbers in `carrier`."""
    del carrier, vector
    return loss


@_carry.defjvp
def _carry_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    loss, _, vector = primals
    loss_dot, carrier_dot, _ = tangents
    carried = jnp.vdot(jax.lax.stop_gradient(vector), carrier_dot)
    return loss, loss_dot + carried.astype(loss_dot.dtype)


def _packed(stats: Stats, like: Stats) -> Array:
    """The vector w (1, statistics), of the structure and the layers of `like`."""
    comparable = {}
    for name, found in stats.items():
        # N is count / positions, of which a batch of larger images has others.
        layer = like[name].layer if name in like else found.layer
        count = found.batch_size * layer.positions
        comparable[name] = dataclasses.replace(found, count=count, layer=layer)
    leaves, treedef = jax.tree.flatten(comparable)
    if treedef != jax.tree.structure(like) or [x.shape for x in leaves] != [
        x.shape for x in jax.tree.leaves(like)
    ]:
        msg = (
            f"The loss gives statistics of the layers {quoted(stats)}, which are not those, or not "
            f"of the shapes, of the arguments that `drop_in` was given: {quoted(like)}. Give "
            "`drop_in` arguments like those of training, or choose by `layers=`."
        )
        raise ValueError(msg)
    parts = [x.reshape(-1).astype(jnp.float32) for x in leaves]
    return _WEIGHT * jnp.concatenate([jnp.ones(1, jnp.float32), *parts])


def _unpacked(vector: Array, like: Stats) -> Stats:
    """The average of the statistics; of `count` 0 if none came."""
    weight = vector[0]
    vector = jnp.where(weight == 0.0, 0.0, vector / jnp.where(weight == 0.0, 1.0, weight))
    leaves, start = [], 1
    for x in jax.tree.leaves(like):
        end = start + math.prod(x.shape)
        leaves.append(vector[start:end].reshape(x.shape).astype(x.dtype))
        start = end
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _unwrapping(
    tx: optax.GradientTransformationExtraArgs, like: Stats, size: int
) -> optax.GradientTransformationExtraArgs:
    """`tx` on wrapped parameters."""

    def init_fn(params: Any) -> Any:
        # Optax makes placeholders for parameters, to find those in a state.
        if not jax.tree.leaves(params):
            return tx.init(params)
        _check("The optimizer's `init`", params, size)
        return tx.init(params[PARAMS])

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[dict[str, Any], Any]:
        _check("The optimizer's `update`", updates, size)
        if params is not None:
            _check("The optimizer's `update`", params, size)
        vector = updates[LAYER_STATS]

        def wrap(params: Any) -> dict[str, Any]:
            return {PARAMS: params, LAYER_STATS: jnp.zeros_like(vector)}

        for name, bare in _OF_WRAPPED.items():
            if extra_args.get(name) is not None:
                extra_args[name] = bare(extra_args[name], wrap)
        new, state = tx.update(
            updates[PARAMS],
            state,
            None if params is None else params[PARAMS],
            layer_stats=_unpacked(vector, like),
            **extra_args,
        )
        return wrap(new), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _value_fn(value_fn: Callable[..., Any], wrap: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda params, *args, **kwargs: value_fn(wrap(params), *args, **kwargs)


def _grad_fn(grad_fn: Callable[..., Any], wrap: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda params, *args, **kwargs: grad_fn(wrap(params), *args, **kwargs)[PARAMS]


def _grad(grad: Any, wrap: Callable[[Any], Any]) -> Any:
    del wrap
    return grad[PARAMS]


# Extra arguments that are functions of the parameters, or of their structure.
_OF_WRAPPED = {"value_fn": _value_fn, "obj_fn": _value_fn, "grad_fn": _grad_fn, "grad": _grad}


def _check(who: str, wrapped: Any, size: int | None = None) -> None:
    """Raise unless these are wrapped parameters, with a vector of `size` in full precision."""
    if not (isinstance(wrapped, Mapping) and set(wrapped) == {PARAMS, LAYER_STATS}):
        keys = f" with the keys {sorted(map(str, wrapped))}" if isinstance(wrapped, Mapping) else ""
        msg = (
            f"{who} takes parameters as `drop_in` returned them, a dict of `{PARAMS}` and "
            f"`{LAYER_STATS}`; got a `{type(wrapped).__name__}`{keys}. Train "
            "`bnp_optax.drop_in(...).params`; masks and partitions go inside its `tx`."
        )
        raise ValueError(msg)
    if size is None:
        return
    shape, dtype = jnp.shape(wrapped[LAYER_STATS]), jnp.result_type(wrapped[LAYER_STATS])
    if shape != (size,):
        msg = (
            f"{who} got `{LAYER_STATS}` of shape {shape}, but its layers need {(size,)}: these are "
            "parameters of another `drop_in`. Use loss, parameters and optimizer of one call."
        )
        raise ValueError(msg)
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
        msg = (
            f"{who} got `{LAYER_STATS}` in {dtype}, where variances have no digits left. Cast "
            f"`params['{PARAMS}']` alone, inside the loss, and gradients not at all."
        )
        raise ValueError(msg)
