"""Where training starts: initial values of z instead of p."""

from collections.abc import Callable, Iterable
from typing import Any

from bnp_optax.capture.dataset import dataset_statistics
from bnp_optax.preconditioners.bnp import bnp
from bnp_optax.statistics import LayerStats


def start_in_zspace(
    loss_fn: Callable[..., Any], params: Any, batches: Iterable[Any]
) -> tuple[Any, dict[str, LayerStats]]:
    r"""Start as a network on standardized inputs does, on inputs in any units.

    The usual initial values suit inputs of mean 0 and variance 1. Taken for z, they stand for

        p_0 = P z_0,   P = U D,   U = [[1, -mu^T], [0, I]],   D = diag(1, 1/sigma)

    in the layers that the data enter: w = z_w / sigma, b = z_b - sum_i mu_i w_i, so that at the
    start each unit computes from raw inputs what it would from standardized ones. An optimizer in
    z keeps it so: with P held, every step of training is the same in whatever units the inputs
    come. No preconditioner can make up for initial values that saturate the units.

    A layer that gets data joined with hidden values, as over a skip connection, keeps its initial
    values: its inputs depend on parameters, so they change in training. Scale such data by hand.
    Of two inputs that share one bias, neither is centered.

    Give the statistics to the optimizer as `fixed`, which holds P in these layers:
    `bnp_adam(fixed=fixed)`. Given to `value_and_grad` too, they need not be measured again.

    Args:
      loss_fn: The loss, `loss_fn(params, *batch)`, in any framework.
      params: The usual initial values, arrays in any tree.
      batches: The data, or a part of it: tuples of arguments of the loss, or single ones.

    Returns:
      The parameters to start from, in the tree of `params`, and the statistics of the layers that
      were changed, by kernel. Constant inputs are divided by their size. Layers without a bias are
      divided by the root mean square of their inputs, and not centered.

    Raises:
      ValueError: If there is no batch, or no layer whose inputs are the data's alone, or if these
        are not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import bnp_optax
      >>> x = jnp.array([[1000.0, 0.001], [3000.0, 0.003]])  # metres, seconds
      >>> model, standardized = nn.Dense(4), jnp.array([[-1.0, -1.0], [1.0, 1.0]])
      >>> z = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p, x: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> params, fixed = bnp_optax.start_in_zspace(loss_fn, z, [x])
      >>> bool(jnp.allclose(loss_fn(params, x), loss_fn(z, standardized), rtol=1e-4))
      True

    Source: Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization", (4), applied to the initial values; LeCun et al., "Efficient BackProp", for
    inputs of mean 0 and variance 1.
    """
    statistics = dataset_statistics(loss_fn, params, batches)
    layers = {name: stats.layer for name, stats in statistics.items()}
    exact = bnp(scale=False, layers=layers, fixed=statistics)
    return exact.operator(exact.init(params)).mv(params), statistics
