"""Small networks to diagnose, and the dense Hessian and P of each."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bnp_optax


class MLP(nn.Module):
    features: tuple[int, ...] = (4, 3)
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        for features in self.features[:-1]:
            x = nn.tanh(nn.Dense(features, use_bias=self.bias, param_dtype=float)(x))
        return nn.Dense(self.features[-1], use_bias=self.bias, param_dtype=float)(x)


class CNN(nn.Module):
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), feature_group_count=self.groups, param_dtype=float)(x)
        return nn.Dense(2, param_dtype=float)(nn.tanh(x).mean((1, 2)))


def problem(model, shape, seed=0):
    """A loss, parameters away from any minimum, and the arguments of the loss."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=shape) * rng.uniform(0.3, 3.0, shape[-1]) + 1.5)
    params = jax.eval_shape(model.init, jax.random.key(seed), x)["params"]
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.5), params)
    outputs = jax.eval_shape(model.apply, {"params": params}, x)
    y = jnp.asarray(rng.normal(size=outputs.shape))

    def loss_fn(params, x, y):
        error = model.apply({"params": params}, x) - y
        return jnp.mean(jnp.sum(error**2, axis=-1) + 0.1 * jnp.sum(error**4, axis=-1))

    return loss_fn, params, (x, y)


def dense_hessian(loss_fn, params, args):
    """The whole Hessian by reverse- over reverse-mode, and the flat parameters' functions."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.jit(jax.jacrev(jax.grad(lambda v: loss_fn(unravel(v), *args))))(flat)
    return np.asarray(hessian), unravel


def dense_preconditioner(preconditioner, state, params):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    P = preconditioner.operator(state)

    def column(e):
        return jax.flatten_util.ravel_pytree(P.mv(unravel(e)))[0]

    return np.asarray(jax.jit(jax.vmap(column, out_axes=1))(jnp.eye(flat.size)))


def bnp_state(loss_fn, params, args, preconditioner):
    _, grads, stats = jax.jit(bnp_optax.value_and_grad(loss_fn))(params, *args)
    return preconditioner.update(grads, preconditioner.init(params), params, layer_stats=stats)


def unit_indices(params, name, unit):
    """Places of [b, w] of a unit among the flat parameters."""
    places, _ = jax.flatten_util.ravel_pytree(params)
    _, unravel = jax.flatten_util.ravel_pytree(params)
    places = unravel(jnp.arange(places.size, dtype=places.dtype))[name]
    bias = [int(places["bias"][unit])] if "bias" in places else []
    return bias + np.asarray(places["kernel"])[..., unit].ravel().astype(int).tolist()
