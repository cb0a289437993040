"""`bnp(shrinkage=k)`: bias-corrected statistics, shrunk by their sample size, against an oracle.

The oracle has no recursion. It weights the rows of all batches, takes their mean and their variance
about it, and the sum of the squared weights, in float64.
"""

import inspect
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import oracles
from support.bnp_cases import CASES, assert_close, assert_trees_close, train

import bnp_optax
from bnp_optax.preconditioners.numbers import Numbers

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
    mean = np.kron(weight * mean, np.ones(window))
    center, scale = oracles.centering_matrix(mean), oracles.scaling_matrix(sigma2)
    if options["scale_bias"]:
        scale[0, 0] = math.sqrt(1 + (mean**2).mean())
    return (center @ scale if has_bias else scale[1:, 1:]) / math.sqrt(q2)


def q_squared(case, params, positions, examples, scale):
    fan_in = {name: math.prod(leaf["kernel"].shape[:-1]) for name, leaf in params.items()}
    if scale == "network":
        roots = math.prod(math.sqrt(p) for p in positions.values()) ** (1 / len(positions))
        one = max(sum(fan_in.values()) / 30 / examples, roots)
        return dict.fromkeys(fan_in, one)
    return {n: max(fan_in[n] / examples, math.sqrt(positions[n])) for n in fan_in}


def want_of(case, params, x, y, rows, options, scale):
    """The preconditioned gradients; `rows` has the inputs of all batches so far, by layer."""
    seen, want = oracles.gradients(case.layers, params, x, y), {}
    positions = {name: of_layer.positions for name, of_layer in seen.items()}
    for layer in case.layers:
        inputs = seen[layer.name].inputs
        rows.setdefault(layer.name, []).append(inputs.reshape(-1, inputs.shape[-1]))
    # Rows of a sequence are examples; those of one image are not.
    examples = {
        layer.name: len(x) if isinstance(layer, oracles.Conv) else len(rows[layer.name][-1])
        for layer in case.layers
    }
    q2 = q_squared(case, params, positions, max(examples.values()), scale)
    for name, of_layer in seen.items():
        has_bias = of_layer.grad_bias is not None
        mean, var = pooled(rows[name], options["decay"], has_bias)
        squares = (batch_weights(len(rows[name]), options["decay"]) ** 2).sum()
        inv_size = squares / (examples[name] * math.sqrt(positions[name]))
        *window, width, units = of_layer.grad_kernel.shape
        groups = len(mean) // width
        squared = []
        for group in np.arange(groups):
            part = slice(group * width, (group + 1) * width)
            size = (math.prod(window), inv_size)
            P = matrix(mean[part], var[part], *size, options, q2[name], has_bias)
            squared.append(P @ P.T)
        kernel, bias = oracles.by_unit(
            lambda unit, squared=squared, each=units // groups: squared[unit // each],
            of_layer.grad_kernel,
            of_layer.grad_bias,
        )
        want[name] = {"kernel": kernel, "bias": bias} if has_bias else {"kernel": kernel}
    return want


@pytest.mark.parametrize("scale", [True, "network"])
@pytest.mark.parametrize("decay", [0.99, 0.5])
@pytest.mark.parametrize(
    "name",
    [
        *("dense", "dense_one_example", "dense_on_sequences", "dense_without_bias"),
        *("conv_strided", "conv_grouped", "conv_grouped_without_bias", "cnn"),
    ],
)
def test_shrinkage_follows_the_oracle(name, decay, scale):
    options = {"shrinkage": K, "eps_rel": EPS_REL, "eps_abs": EPS_ABS, "decay": decay}
    options["scale_bias"] = scale != "network"
    rows, compared = {}, 0
    for params, x, y, updates in train(name, bnp_optax.bnp_precondition(scale=scale, **options)):
        want = want_of(CASES[name], params, x, y, rows, options, scale)
        assert_trees_close(updates, want)
        compared += 1
    assert compared >= 6


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
    assert float(state.numbers["kernel"][5]) == pytest.approx(1 / len(whole), rel=1e-5)


def test_shrinkage_0_and_none_have_the_whole_mean_and_their_own_floors():
    x = jnp.array([[1.0, 5.0, 0.0], [3.0, 9.0, 0.0]])
    eps = {"eps_rel": 0.5, "eps_abs": 0.25}
    [state] = states(bnp_optax.bnp(shrinkage=0.0, **eps), [x])
    numbers = Numbers(*state.numbers["kernel"].tolist())
    assert (numbers.weight, numbers.floor) == (1.0, pytest.approx(0.5 * (1 + 4 + 0) / 3 + 0.25))
    [state] = states(bnp_optax.bnp(decay=0.0, **eps), [x])
    numbers = Numbers(*state.numbers["kernel"].tolist())
    assert (numbers.weight, numbers.floor) == (1.0, 0.5 * 4 + 0.25)


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
    np.testing.assert_array_equal(one.numbers["kernel"][5], two.numbers["kernel"][5])
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
        ({"scale": "layer"}, r"`scale` must be one of True, False, 'network'; got 'layer'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        bnp_optax.bnp(**options)


def test_ready_made_optimizers_take_these_options():
    defaults = {
        name: p.default for name, p in inspect.signature(bnp_optax.bnp_adam).parameters.items()
    }
    assert defaults["shrinkage"] == K
    assert defaults["scale_bias"] is True
    x = jax.random.normal(jax.random.key(0), (6, 3)) * 5 + 7
    loss_fn, params = dense_setting(x)
    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, x)

    def updates_of(tx):
        return tx.update(grads, tx.init(params), params, layer_stats=stats)[0]

    options = {name: defaults[name] for name in inspect.signature(bnp_optax.bnp).parameters}
    want = updates_of(bnp_optax.in_zspace(optax.adam(1e-3), bnp_optax.bnp(**options)))
    assert_trees_close(updates_of(bnp_optax.bnp_adam(1e-3)), want)
    papers = updates_of(bnp_optax.in_zspace(optax.adam(1e-3), bnp_optax.bnp()))
    assert not np.allclose(papers["kernel"], want["kernel"], rtol=0.1)
    overridden = bnp_optax.bnp_adam(
        1e-3, shrinkage=None, scale_bias=False, eps_rel=1e-2, eps_abs=1e-4
    )
    assert_trees_close(updates_of(overridden), papers)
