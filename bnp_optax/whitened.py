"""Ready-made optimizers in the z of `whiten`."""

from collections.abc import Mapping
from typing import Any, Unpack

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from bnp_optax._checks import check_adam
from bnp_optax._tree import named_leaves, quoted, replace_leaves
from bnp_optax.layers import Layers
from bnp_optax.preconditioners import (
    Preconditioner,
    WhitenOptions,
    bnp,
    compose,
    takes_options,
    whiten,
)
from bnp_optax.preconditioners.layout import layers_of
from bnp_optax.statistics import LayerStats
from bnp_optax.transforms.orthogonalize import orthogonalize
from bnp_optax.transforms.weight_decay import Mask, zspace_weight_decay
from bnp_optax.transforms.zspace import in_zspace


@takes_options(whiten)
def whiten_adam(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    fixed: Mapping[str, LayerStats] | None = None,
    **whiten_options: Unpack[WhitenOptions],
) -> optax.GradientTransformationExtraArgs:
    """Adam in the z of `whiten`, of which a layer's step is divided by sqrt(fan-in + 1).

    In z a unit's inputs have mean 0 and about covariance I, and Adam moves each of its weights by
    about the learning rate. The division makes the change of its output about the same in layers
    of any width; it is that of P by sqrt(fan-in + 1), of which Adam sees nothing else.

    Args:
      learning_rate: Step size >= 0, or a schedule of it. The default is for batches of 16 to 128;
        about sqrt(N / 60) times that for a smaller batch of N. Convolutional networks at large
        batches and transformers with LayerNorm bear three times that.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment, >= 0.
      weight_decay: Strength >= 0, or a schedule of it: a step shrinks z, and so p, by learning_rate
        times that.
      mask: Which parameters decay: a tree of booleans, or a function of the parameters.
      fixed: Statistics of input layers from `start_in_zspace`, for raw inputs: P is that of
        `bnp(fixed=fixed)` there, exactly and for good, and `whiten` behind. It needs `layers`.
      **whiten_options: Options of `whiten`.

    Returns:
      A transformation whose `update` takes `layer_stats` from `value_and_grad(loss_fn,
      second_moments=True)`.

    Raises:
      ValueError: If a hyper-parameter is out of its range, or `fixed` is given and `layers` is not,
        or lacks one of its layers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import optax
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jax.random.normal(jax.random.key(1), (8, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> tx = bnp_optax.whiten_adam()
      >>> state = tx.init(params)
      >>> _, grads, stats = bnp_optax.value_and_grad(loss_fn, second_moments=True)(params)
      >>> updates, state = tx.update(grads, state, params, layer_stats=stats)
      >>> bool(loss_fn(optax.apply_updates(params, updates)) < loss_fn(params))
      True

    Source: Kingma and Ba, "Adam", ICLR 2015, in the z of `whiten`, by Ye, "Preconditioning for
    Accelerated Gradient Descent Optimization and Regularization", (4).
    """
    check_adam(learning_rate, b1, b2, eps)
    inner = optax.chain(
        optax.scale_by_adam(b1, b2, eps),
        _divided_by_fan_in(whiten_options.get("layers")),
        *_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return in_zspace(inner, _whitened(fixed, **whiten_options))


@takes_options(whiten)
def whiten_muon(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    momentum: ArrayLike = 0.95,
    nesterov: bool = True,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    fixed: Mapping[str, LayerStats] | None = None,
    **whiten_options: Unpack[WhitenOptions],
) -> optax.GradientTransformationExtraArgs:
    """Orthogonalized momentum in the z of `whiten`; Adam, there, for all else than kernels.

    Args:
      learning_rate: Step size >= 0, or a schedule of it, on the scale of Adam's. The default is for
        batches of 16 to 128; about sqrt(N / 60) times that for a smaller batch of N. Convolutional
        networks at large batches and transformers with LayerNorm want three times that.
      momentum: Decay of the momentum, in [0, 1).
      nesterov: Whether to use Nesterov momentum.
      b1: Adam's.
      b2: Adam's.
      eps: As in `orthogonalize`.
      weight_decay: Strength >= 0, or a schedule of it: a step shrinks z, and so p, by learning_rate
        times that. It pays where training loss is cheap and accuracy is not: 1 gains one to three
        points on fully connected CIFAR-10 (`docs/family.md`).
      mask: Which parameters decay: a tree of booleans, or a function of the parameters.
      fixed: Statistics of input layers from `start_in_zspace`, for raw inputs: P is that of
        `bnp(fixed=fixed)` there, exactly and for good, and `whiten` behind. It needs `layers`.
      **whiten_options: Options of `whiten`; its `layers` are those that are orthogonalized too.

    Returns:
      A transformation whose `update` takes `layer_stats` from `value_and_grad(loss_fn,
      second_moments=True)`.

    Raises:
      ValueError: If a hyper-parameter is out of its range, or `fixed` is given and `layers` is not,
        or lacks one of its layers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import optax
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jax.random.normal(jax.random.key(1), (8, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> tx = bnp_optax.whiten_muon()
      >>> state = tx.init(params)
      >>> _, grads, stats = bnp_optax.value_and_grad(loss_fn, second_moments=True)(params)
      >>> updates, state = tx.update(grads, state, params, layer_stats=stats)
      >>> bool(loss_fn(optax.apply_updates(params, updates)) < loss_fn(params))
      True

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, in the z
    of `whiten`, by Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization", (4).
    """
    check_adam(learning_rate, b1, b2, eps)
    inner = optax.chain(
        orthogonalize(
            momentum=momentum,
            nesterov=nesterov,
            eps=eps,
            b1=b1,
            b2=b2,
            layers=whiten_options.get("layers"),
        ),
        *_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return in_zspace(inner, _whitened(fixed, **whiten_options))


def _decay(
    weight_decay: optax.ScalarOrSchedule, mask: Mask
) -> list[optax.GradientTransformationExtraArgs]:
    """Weight decay in z, if there is to be any: it takes z, which costs P^-1 p."""
    decay = zspace_weight_decay(weight_decay, mask)
    return [] if isinstance(weight_decay, int | float) and weight_decay == 0 else [decay]


def _whitened(
    fixed: Mapping[str, LayerStats] | None, **options: Unpack[WhitenOptions]
) -> Preconditioner:
    """`whiten`, behind layers whose statistics are known."""
    if not fixed:
        return whiten(**options)
    layers = options.get("layers")
    if layers is None or not set(fixed) <= set(layers):
        has = "are not given" if layers is None else f"have {quoted(layers)}"
        msg = (
            f"`fixed` has {quoted(fixed)}, but `layers` {has}: which others there are must be "
            "known. Pass `layers=bnp_optax.find_layers(loss_fn, params, ...)`."
        )
        raise ValueError(msg)
    inputs = {name: layers[name] for name in fixed}
    rest = {name: layer for name, layer in layers.items() if name not in fixed}
    held = bnp(layers=inputs, fixed=fixed, scale=False)
    return compose(held, whiten(**(options | {"layers": rest})))


def _divided_by_fan_in(layers: Layers | None) -> optax.GradientTransformation:
    """Divide the updates of each layer by the root of the number of its inputs, the 1 included."""

    def update(updates: Any, params: Any = None) -> Any:
        del params
        leaves, new = named_leaves(updates), {}
        for name, layer in layers_of(updates, layers).items():
            for leaf in (name, layer.bias):
                if leaf is not None:
                    factor = jnp.asarray((layer.fan_in + 1) ** -0.5, leaves[leaf].dtype)
                    new[leaf] = factor * leaves[leaf]
        return replace_leaves(updates, new)

    return optax.stateless(update)
