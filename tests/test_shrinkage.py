"""`bnp(shrinkage=k)`: bias-corrected statistics, shrunk by their sample size, against an oracle.

The oracle has no recursion. It weights the rows of all batches, takes their mean and their variance
about it, and the sum of the squared weights, in float64.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from bnp_cases import CASES, assert_close, assert_trees_close, train

import bnp_optax

K, EPS_REL, EPS_ABS = 10.0, 0.1, 1e-8


def batch_weights(n_batches, decay):
    """What each batch counts for: equally at first, and no less than 1 - decay when it comes."""
    weights = np.zeros(0)
    for t in range(n_batches):
        rate = max(1 - decay, 1 / (t + 1))
        weights = np.append((1 - rate) * weights, rate)
    assert weights.sum() == pytest.approx(1)
    return weights


def pooled(rows, decay, has_bias):
    """Mean and variance of all rows, weighted by batch; no mean, and E[h^2], without a bias."""
    weights = batch_weights(len(rows), decay)
    each = np.concatenate([np.full(len(r), w / len(r)) for r, w in zip(rows, weights, strict=True)])
    rows = np.concatenate(rows)
    mean = each @ rows if has_bias else np.zeros(rows.shape[1])
    return mean, each @ (rows - mean) ** 2


def matrix(mean, var, window, inv_size, options, q2, has_bias):
    """P of one unit, whose input features have this pooled mean and variance."""
    weight = (1 / inv_size) / (1 / inv_size + options["shrinkage"])
    var = var + (mean - weight * mean) ** 2
    var = weight * var + (1 - weight) * var.mean()
    sigma2 = np.kron(var + options["eps_rel"] * var.mean() + options["eps_abs"], np.ones(window))
    center = oracles.centering_matrix(np.kron(weight * mean, np.ones(window)))
    scale = oracles.scaling_matrix(sigma2)
    return (center @ scale if has_bias else scale[1:, 1:]) / math.sqrt(q2)


def q_squared(case, params, positions, examples, scale):
    fan_in = {name: math.prod(leaf["kernel"].shape[:-1]) for name, leaf in params.items()}
    if scale == "network":
        one = max(sum(fan_in.values()) / 30 / examples, math.sqrt(max(positions.values())))
        return dict.fromkeys(fan_in, one)
    return {n: max(fan_in[n] / examples, math.sqrt(positions[n])) for n in fan_in}


@pytest.mark.parametrize("scale", [True, "network"])
@pytest.mark.parametrize("decay", [0.99, 0.5])
@pytest.mark.parametrize(
    "name",
    ["dense", "dense_one_example", "dense_on_sequences", "dense_without_bias"]
    + ["conv_strided", "conv_grouped", "conv_grouped_without_bias", "cnn"],
)
def test_shrinkage_follows_the_oracle(name, decay, scale):
    options = {"shrinkage": K, "eps_rel": EPS_REL, "eps_abs": EPS_ABS, "decay": decay}
    tx = bnp_optax.bnp_precondition(scale=scale, **options)
    case, rows = CASES[name], {}
    for params, x, y, updates in train(name, tx):
        seen, want = oracles.gradients(case.layers, params, x, y), {}
        n = {at: s.inputs.size // s.inputs.shape[-1] for at, s in seen.items()}
        examples = {
            layer.name: len(x) if isinstance(layer, oracles.Conv) else n[layer.name]
            for layer in case.layers
        }
        positions = {at: s.positions for at, s in seen.items()}
        q2 = q_squared(case, params, positions, max(examples.values()), scale)
        for at, s in seen.items():
            rows.setdefault(at, []).append(s.inputs.reshape(-1, s.inputs.shape[-1]))
            mean, var = pooled(rows[at], decay, s.grad_bias is not None)
            squares = (batch_weights(len(rows[at]), decay) ** 2).sum()
            inv_size = squares / (examples[at] * math.sqrt(s.positions))
            *window, width, units = s.grad_kernel.shape

            def squared_matrix(unit, mean=mean, var=var, s=s, at=at, inv_size=inv_size):
                *window, width, units = s.grad_kernel.shape
                first = width * (unit // (units // (len(mean) // width)))
                part = slice(first, first + width)
                P = matrix(
                    *(mean[part], var[part], math.prod(window), inv_size, options, q2[at]),
                    has_bias=s.grad_bias is not None,
                )
                return P @ P.T

            kernel, bias = oracles.by_unit(squared_matrix, s.grad_kernel, s.grad_bias)
            want[at] = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
        assert_trees_close(updates, want)


def dense_setting(x):
    model = nn.Dense(2)
    params = model.init(jax.random.key(0), x)["params"]

    def loss_fn(params, x):
        return jnp.mean((model.apply({"params": params}, x) - 1.0) ** 2)

    return loss_fn, params


def states(bnp, batches):
    loss_fn, params = dense_setting(batches[0])
    state = bnp.init(params)
    for x in batches:
        _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, x)
        state = bnp.update(grads, state, params, layer_stats=stats)
        yield state


@pytest.mark.parametrize("batch_size", [1, 7])
def test_first_hundred_batches_count_alike(batch_size):
    x = np.asarray(np.random.default_rng(0).normal(7, [1, 5, 0.1], (60, 3)), np.float32)
    batches = x.reshape(-1, batch_size, 3) if batch_size == 1 else [x[i::8] for i in range(8)]
    batches = [b[: min(map(len, batches))] for b in batches]
    *_, state = states(bnp_optax.bnp(shrinkage=K), batches)
    whole = np.concatenate(batches).astype(np.float64)
    assert_close(state.mean["kernel"].ravel(), whole.mean(0))
    assert_close(state.var["kernel"].ravel(), whole.var(0))
    assert float(state.numbers["kernel"][4]) == pytest.approx(1 / len(whole), rel=1e-5)


def test_without_shrinkage_the_state_has_no_sample_size():
    *_, state = states(bnp_optax.bnp(), [jnp.ones((4, 3))])
    assert state.numbers["kernel"].shape == (4,)
    *_, state = states(bnp_optax.bnp(shrinkage=0.0), [jnp.ones((4, 3))])
    assert state.numbers["kernel"].shape == (5,)


def test_one_example_is_scaled_by_the_layer_alone():
    # Of one row nothing tells the inputs apart: with k >> 1 all have one scale.
    [state] = states(bnp_optax.bnp(shrinkage=1e6, eps_rel=0.0), [jnp.array([[1.0, 50.0, 0.1]])])
    P = bnp_optax.bnp(shrinkage=1e6, eps_rel=0.0).operator(state)
    scaled = P.mv({"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)})["kernel"]
    np.testing.assert_allclose(scaled, scaled[0, 0], rtol=1e-5)


def test_a_rejected_batch_changes_nothing():
    good, bad = jnp.ones((4, 3)), jnp.full((4, 3), jnp.nan)
    one, two = states(bnp_optax.bnp(shrinkage=K), [good, bad])
    for field in ("mean", "var"):
        np.testing.assert_array_equal(*(getattr(s, field)["kernel"] for s in (one, two)))
    np.testing.assert_array_equal(one.numbers["kernel"][4], two.numbers["kernel"][4])
    assert two.numbers["kernel"][1:3].tolist() == [1.0, 1.0]


def test_one_q_for_stacked_layers_as_for_the_same_layers_apart():
    depth, width, n = 5, 40, 2

    def stacked(params, x):
        def body(h, layer):
            return nn.tanh(h @ layer["kernel"] + layer["bias"][None]), None

        return jnp.mean(jax.lax.scan(body, x, params)[0] ** 2)

    def apart(params, x):
        for layer in params.values():
            x = nn.tanh(x @ layer["kernel"] + layer["bias"][None])
        return jnp.mean(x**2)

    kernels = jax.random.normal(jax.random.key(0), (depth, width, width)) / math.sqrt(width)
    whole = {"kernel": kernels, "bias": jnp.zeros((depth, width))}
    parts = {f"l{i}": jax.tree.map(lambda leaf, i=i: leaf[i], whole) for i in range(depth)}
    x = jax.random.normal(jax.random.key(1), (n, width))
    found = []
    for loss_fn, params in ((stacked, whole), (apart, parts)):
        _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, x)
        layers = bnp_optax.find_layers(loss_fn, params, x)
        tx = bnp_optax.bnp_precondition(shrinkage=K, scale="network", layers=layers)
        updates, state = tx.update(grads, tx.init(params), params, layer_stats=stats)
        found.append(updates)
        q = 1 / float(jax.tree.leaves(state.numbers)[0][0])
        assert q**2 == pytest.approx(depth * width / 30 / n, rel=1e-5)
    stacked_updates, apart_updates = found
    for i in range(depth):
        assert_trees_close(
            jax.tree.map(lambda leaf, i=i: leaf[i], stacked_updates), apart_updates[f"l{i}"]
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrinkage": -1.0}, r"`shrinkage` must be finite and >= 0, got -1\.0"),
        ({"scale": "layer"}, r"`scale` must be one of 'network'; got 'layer'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        bnp_optax.bnp(**options)
