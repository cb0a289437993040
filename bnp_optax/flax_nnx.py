"""Capture for Flax NNX: the functions of `bnp_optax`, of a model instead of its parameters."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from bnp_optax._optional import needs_flax

with needs_flax("bnp_optax.flax_nnx"):
    from flax import nnx

from bnp_optax import capture
from bnp_optax.capture import Summary
from bnp_optax.capture.api import SecondMoments
from bnp_optax.capture.moments import ConvStatistics
from bnp_optax.statistics import Layer, LayerStats


class _Pure:
    """A loss of a model as a function of the model's parameters.

    Attributes:
      params: The parameters, a `nnx.State`.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        model: nnx.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        wrt: Any,
    ) -> None:
        # Modules, streams of random numbers and metrics may be arguments too, share variables
        # with the model, and change. So all of them are taken apart together.
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
        self._places = [i for i, leaf in enumerate(leaves) if _is_node(leaf)]
        self._leaves, self._treedef = leaves, treedef
        self._nodes = (model, *(leaves[i] for i in self._places))
        self._loss_fn = loss_fn
        self._wrt = nnx.All(wrt, lambda path, _: path[0] == 0)
        self._graphdef, params, self._rest = nnx.split(self._nodes, self._wrt, ...)
        self.params = params[0] if len(params) else nnx.State({})

    def loss(self, params: Any) -> Any:
        """What the loss returns."""
        return self._run(params)[0]

    def loss_and_state(self, params: Any, has_aux: bool) -> tuple[Any, Any]:
        """The loss, and `(aux, state)`, all variables but the parameters after the pass."""
        value, nodes = self._run(params)
        loss, aux = value if has_aux else (value, None)
        return loss, (aux, nnx.split(nodes, self._wrt, ...)[2])

    def _run(self, params: Any) -> tuple[Any, tuple[Any, ...]]:
        params = nnx.State({0: params}) if len(params) else params
        # Copies belong to this trace and may change in it.
        nodes = nnx.merge(self._graphdef, params, self._rest, copy=True)
        leaves = list(self._leaves)
        for i, node in zip(self._places, nodes[1:], strict=True):
            leaves[i] = node
        args, kwargs = self._treedef.unflatten(leaves)
        return self._loss_fn(nodes[0], *args, **kwargs), nodes

    def update(self, state: Any) -> None:
        """Give the caller's objects the variables of `loss_and_state`."""
        nnx.update(self._nodes, state)


def _is_node(x: Any) -> bool:
    return isinstance(x, nnx.Pytree)


def find_layers(
    loss_fn: Callable[..., Any],
    model: nnx.Module,
    *args: Any,
    wrt: Any = nnx.Param,
    conv_statistics: ConvStatistics = "channel",
    embeddings: bool = False,
    **kwargs: Any,
) -> dict[str, Layer]:
    """`bnp_optax.find_layers` of a loss `loss_fn(model, *args, **kwargs)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnp_optax.flax_nnx
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
      >>> layers = bnp_optax.flax_nnx.find_layers(loss_fn, model, jnp.ones((4, 3)))
      >>> {name: (layer.bias, layer.fan_in) for name, layer in layers.items()}
      {'kernel': ('bias', 3)}
    """
    pure = _Pure(loss_fn, model, args, kwargs, wrt)
    return capture.find_layers(
        pure.loss, pure.params, conv_statistics=conv_statistics, embeddings=embeddings
    )


def summarize(
    loss_fn: Callable[..., Any],
    model: nnx.Module,
    *args: Any,
    wrt: Any = nnx.Param,
    conv_statistics: ConvStatistics = "channel",
    embeddings: bool = False,
    **kwargs: Any,
) -> Summary:
    """`bnp_optax.summarize` of a loss `loss_fn(model, *args, **kwargs)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnp_optax.flax_nnx
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
      >>> print(bnp_optax.flax_nnx.summarize(loss_fn, model, jnp.ones((4, 3))))
      kernel  layer  shape  fan-in  positions  q²  bias  covered
      ------  -----  -----  ------  ---------  --  ----  -------
      kernel  Dense  3x2    3       1          1   yes   yes
      1 of 1 kernels covered, 100.0% of their 6 entries.
    """
    pure = _Pure(loss_fn, model, args, kwargs, wrt)
    return capture.summarize(
        pure.loss, pure.params, conv_statistics=conv_statistics, embeddings=embeddings
    )


def dataset_statistics(
    loss_fn: Callable[..., Any],
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    wrt: Any = nnx.Param,
    conv_statistics: ConvStatistics = "channel",
    embeddings: bool = False,
) -> dict[str, LayerStats]:
    """`bnp_optax.dataset_statistics` of a loss `loss_fn(model, *batch)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnp_optax.flax_nnx
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
      >>> data = jnp.arange(24.0).reshape(2, 4, 3)  # two batches of four
      >>> fixed = bnp_optax.flax_nnx.dataset_statistics(loss_fn, model, data)
      >>> bool(jnp.allclose(fixed["kernel"].mean[:, 0], data.mean((0, 1))))
      True
    """

    def of_params(params: Any, *batch: Any) -> Any:
        return _Pure(loss_fn, model, batch, {}, wrt).loss(params)

    params = _Pure(loss_fn, model, (), {}, wrt).params
    return capture.dataset_statistics(
        of_params, params, batches, conv_statistics=conv_statistics, embeddings=embeddings
    )


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    layers: Mapping[str, Layer] | None = None,
    *,
    wrt: Any = nnx.Param,
    conv_statistics: ConvStatistics = "channel",
    sample_rows: int | None = None,
    embeddings: bool = False,
    weights: Callable[..., Any] | None = None,
    fixed: Mapping[str, LayerStats] | None = None,
    second_moments: SecondMoments = None,
    second_moment_rows: int = 256,
    second_moment_fan_in: int = 1024,
) -> Callable[..., tuple[Any, nnx.State, dict[str, LayerStats]]]:
    """`nnx.value_and_grad` that also returns the statistics of every layer's inputs.

    Use it under `nnx.jit`, or under `jax.jit` after `nnx.split`. Batch statistics, random number
    streams and other variables of the model, and of modules among the arguments, change as they
    do in `nnx.value_and_grad`. Hand the statistics on by
    `optimizer.update(model, grads, layer_stats=stats)`.

    Args:
      loss_fn: The loss, `loss_fn(model, *args, **kwargs)`.
      has_aux: As in `nnx.value_and_grad`.
      layers: As in `bnp_optax.value_and_grad`.
      wrt: Filter for the variables to differentiate by; give `nnx.Optimizer` the same.
      conv_statistics: As in `bnp_optax.value_and_grad`.
      sample_rows: As in `bnp_optax.value_and_grad`.
      embeddings: As in `bnp_optax.value_and_grad`.
      weights: As in `bnp_optax.value_and_grad`, a function of the loss's arguments but the model.
      fixed: As in `bnp_optax.value_and_grad`.
      second_moments: As in `bnp_optax.value_and_grad`.
      second_moment_rows: As in `bnp_optax.value_and_grad`.
      second_moment_fan_in: As in `bnp_optax.value_and_grad`.

    Returns:
      A function of `(model, *args, **kwargs)` that returns `(loss, grads, stats)`; `loss` is
      `(loss, aux)` with `has_aux`; `grads` is a `nnx.State`; `stats` is a dict from kernel name,
      such as `'linear/kernel'`, to `LayerStats`.

    Raises:
      ValueError: As `bnp_optax.value_and_grad`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import bnp_optax.flax_nnx
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, bnp_optax.bnp_adam(1e-3), wrt=nnx.Param)
      >>> loss_fn = lambda model, x: jnp.mean((model(x) - 1.0) ** 2)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x):
      ...     loss, grads, stats = bnp_optax.flax_nnx.value_and_grad(loss_fn)(model, x)
      ...     optimizer.update(model, grads, layer_stats=stats)
      ...     return loss
      >>> x = jnp.ones((4, 3))
      >>> bool(train_step(model, optimizer, x) > loss_fn(model, x))
      True
    """

    @functools.wraps(loss_fn)
    def wrapped(
        model: nnx.Module, *args: Any, **kwargs: Any
    ) -> tuple[Any, nnx.State, dict[str, LayerStats]]:
        pure = _Pure(loss_fn, model, args, kwargs, wrt)
        (loss, (aux, state)), grads, stats = capture.value_and_grad(
            functools.partial(pure.loss_and_state, has_aux=has_aux),
            has_aux=True,
            layers=layers,
            conv_statistics=conv_statistics,
            sample_rows=sample_rows,
            embeddings=embeddings,
            weights=None if weights is None else functools.partial(weights, *args, **kwargs),
            fixed=fixed,
            second_moments=second_moments,
            second_moment_rows=second_moment_rows,
            second_moment_fan_in=second_moment_fan_in,
        )(pure.params)
        pure.update(state)
        return (loss, aux) if has_aux else loss, grads, stats

    return wrapped
