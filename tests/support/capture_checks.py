"""What every capture owes: the loss and gradient of JAX, right rows, no kernel without a word."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnp_optax
from support.quick_jit import jit


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape)) / 2


# Rows, and one affine layer in three frameworks.
X = normal(0, 16, 3) + 1.0
D = nn.Dense(2)
PARAMS = {"kernel": normal(2, 3, 2), "bias": normal(3, 2)}


def linen(p, z):
    return D.apply({"params": p}, z)


def plain(p, z):
    return z @ p["kernel"] + p["bias"][None]


def through_nnx(p, z):
    model = nnx.eval_shape(lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    nnx.update(model, p)
    return model(z)


FRAMEWORKS = {"linen": linen, "plain": plain, "nnx": through_nnx}


def mean_square(f, p):
    return jnp.mean(f(p, X) ** 2)


def named(tree):
    """Leaves by slash-separated name, without the `value` of a box."""
    leaves = jax.tree.leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {
        name.removesuffix("/value"): leaf for name, (_, leaf) in zip(names, leaves, strict=True)
    }


def assert_trees(got, want, tolerance=1e-6):
    """The same structure, types and numbers, up to `tolerance` of the tree's largest entry."""
    assert jax.tree.structure(got) == jax.tree.structure(want), "another structure"
    scale = max(np.abs(np.asarray(b, np.float64)).max(initial=0) for b in jax.tree.leaves(want))
    for (path, b), a in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
        assert a.dtype == b.dtype, f"{path} is of {a.dtype}, not {b.dtype}"
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale, err_msg=str(path))


def capture(loss_fn, params, *args, layers=None, **kwargs):
    """Statistics, once loss and gradient are seen to be those of `jax.value_and_grad`."""
    return grads_and_stats(loss_fn, params, *args, layers=layers, **kwargs)[1]


def grads_and_stats(loss_fn, params, *args, layers=None, **kwargs):
    """As `capture`, and the gradient."""
    loss, grads, stats = jit(
        lambda p, a, k: bnp_optax.value_and_grad(loss_fn, layers=layers)(p, *a, **k)
    )(params, args, kwargs)
    plain = jit(lambda p, a, k: jax.value_and_grad(loss_fn)(p, *a, **k))
    plain_loss, plain_grads = plain(params, args, kwargs)
    assert_trees(loss, plain_loss)
    assert_trees(grads, plain_grads)
    return grads, stats


def assert_rows(stats, *calls, count=None, tolerance=1e-4):
    """`stats` are those of the rows of all `calls`, features last."""
    rows = [np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1]) for x in calls]
    rows = np.concatenate(rows)
    count = len(rows) if count is None else count
    assert stats.count == count, f"count {stats.count}, not {count}"
    scale = np.abs(rows).max(initial=0.0)
    mean, var = np.ravel(stats.mean), np.ravel(stats.total_variance)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=tolerance, atol=1e-6 * scale)
    np.testing.assert_allclose(var, rows.var(0), rtol=10 * tolerance, atol=1e-5 * scale**2)


def assert_nothing_is_lost(loss_fn, params, *args, kernels=None, **kwargs):
    """Whatever has a gradient has statistics, or is reported with a reason.

    If no kernel at all can be covered, the capture raises and names each with its reason. Returns
    the statistics and the reasons. `kernels` defaults to all leaves of two or more axes.
    """
    summary = bnp_optax.summarize(loss_fn, params, *args, **kwargs)
    if summary.layers:
        grads, stats = grads_and_stats(loss_fn, params, *args, **kwargs)
    else:
        grads, stats = jax.grad(loss_fn)(params, *args, **kwargs), {}
        with pytest.raises(ValueError) as caught:
            capture(loss_fn, params, *args, **kwargs)
        for name, reason in summary.uncovered.items():
            assert f"`{name}`: {reason}" in str(caught.value)
    for name, grad in named(grads).items():
        is_kernel = grad.ndim > 1 if kernels is None else name in kernels
        if not (is_kernel and jnp.any(grad != 0)):
            continue
        if name in summary.layers:
            assert name not in summary.uncovered, f"`{name}` is said to be both"
            assert name in stats, f"`{name}` is said to be covered"
            assert stats[name].count > 0, f"`{name}` is said to be covered"
        else:
            assert summary.uncovered.get(name), f"`{name}` is lost without a reason"
            assert name not in stats or stats[name].count == 0, f"`{name}` is said not to be"
    for leaf in jax.tree.leaves(stats):
        assert np.isfinite(leaf).all(), "statistics that are no numbers"
    return stats, summary.uncovered


def assert_covered_or_said(stats, reasons, name, *calls, count=None):
    """`name` has the statistics of exactly these rows, or there is a reason why it has none."""
    if reasons.get(name):
        assert name not in stats or stats[name].count == 0, reasons[name]
    else:
        assert_rows(stats[name], *calls, count=count)
