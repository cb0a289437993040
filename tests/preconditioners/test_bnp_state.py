"""What `bnp` keeps: few arrays, none derived, and numbers to log."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax import diagnostics


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(11)(nn.LayerNorm()(x))


def test_adam_in_z_keeps_few_arrays_more_than_adam():
    params = Transformer().init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    ours = jax.tree.leaves(bnp_optax.bnp_adam(1e-3).init(params))
    adams = jax.tree.leaves(optax.adam(1e-3).init(params))
    assert len(ours) <= 1.6 * len(adams)
    assert sum(leaf.size for leaf in ours) <= 1.2 * sum(leaf.size for leaf in adams)


def test_the_state_of_an_older_version_is_refused():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    bnp = bnp_optax.bnp()
    state = bnp.init(params)
    old = state._replace(numbers={**state.numbers, "kernel": state.numbers["kernel"][:6]})
    with pytest.raises(ValueError, match=r"has 6 numbers for a layer, but this version keeps 11"):
        bnp.operator(old)


def test_the_state_is_at_the_kernels():
    params = {"a": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "b": {"kernel": jnp.eye(2)}}
    state = bnp_optax.bnp().init(params)
    mask = optax.MaskedNode()
    shapes = jax.tree.map(jnp.shape, state)
    assert shapes.moments == {"a": {"kernel": (2, 3, 1), "bias": mask}, "b": {"kernel": (1, 2, 1)}}
    mean, var = (jax.tree.map(jnp.shape, of) for of in (state.mean, state.var))
    assert mean == {"a": {"kernel": (3, 1), "bias": mask}, "b": {"kernel": mask}}
    assert var == {"a": {"kernel": (3, 1), "bias": mask}, "b": {"kernel": (2, 1)}}
    assert shapes.numbers == {"a": {"kernel": (11,), "bias": mask}, "b": {"kernel": (11,)}}
    assert shapes.inputs == jax.tree.map(lambda _: mask, params)
    abstract = jax.eval_shape(bnp_optax.bnp().init, params)
    assert jax.tree.map(lambda x: x.shape, (abstract.mean, abstract.var)) == (mean, var)
    assert shapes.eps == (2,)


X = jax.random.normal(jax.random.key(0), (6, 3)) * 3 + 1
PLAIN = {"w1": jnp.ones((3, 2)), "b1": jnp.zeros(2), "w2": jnp.ones((2, 1))}


def plain_loss(p):
    return jnp.mean((jnp.tanh(X @ p["w1"] + p["b1"][None]) @ p["w2"]) ** 2)


def stepped(spoil=lambda stats: stats, n_steps=2):
    layers = bnp_optax.find_layers(plain_loss, PLAIN)
    tx = bnp_optax.bnp_adam(1e-3, layers=layers)
    state = tx.init(PLAIN)
    _, grads, stats = bnp_optax.value_and_grad(plain_loss)(PLAIN)
    for _ in range(n_steps):
        _, state = tx.update(grads, state, PLAIN, layer_stats=spoil(stats))
    return state, layers


def test_metrics_count_what_entered():
    def spoil(stats):
        bad = dataclasses.replace(stats["w1"], var=jnp.full_like(stats["w1"].var, -1.0))
        return stats | {"w1": bad}

    state, layers = stepped(spoil)
    logged = jax.jit(bnp_optax.metrics)(state)
    assert set(logged) == {
        *("layers_never_seen", "batches_rejected", "kappa_max", "gain_spread"),
        *("kappa/w1", "kappa/w2", "q/w1", "q/w2", "gain/w1", "gain/w2"),
    }
    assert all(value.shape == () for value in logged.values())
    assert (int(logged["layers_never_seen"]), int(logged["batches_rejected"])) == (1, 2)
    assert float(logged["kappa/w1"]) == 1.0
    assert float(logged["kappa_max"]) == float(logged["kappa/w2"])
    part = bnp_optax.metrics({"any": [state]}, {"w2": layers["w2"]})
    assert int(part["layers_never_seen"]) == int(part["batches_rejected"]) == 0
    assert set(part) & {"q/w1", "kappa/w1"} == set()


def test_metrics_of_gains_and_updates():
    layers = bnp_optax.find_layers(plain_loss, PLAIN)
    bnp = bnp_optax.bnp(layers=layers)
    tx = bnp_optax.in_zspace(optax.sgd(0.1), bnp)
    _, grads, stats = bnp_optax.value_and_grad(plain_loss)(PLAIN)
    updates, state = tx.update(grads, tx.init(PLAIN), PLAIN, layer_stats=stats)
    logged = jax.jit(lambda state, updates: bnp_optax.metrics(state, updates=updates))(
        state, updates
    )
    P = bnp.operator(state.preconditioner)
    # P moves each entry of a kernel by its own factor: that of a tree of ones without biases.
    factors = P.mv({n: jnp.ones_like(p) if n in layers else 0.0 * p for n, p in PLAIN.items()})
    in_z = P.solve(updates)
    gains = {name: np.sqrt(np.mean(np.square(factors[name]))) for name in layers}
    for name, gain in gains.items():
        np.testing.assert_allclose(logged[f"gain/{name}"], gain, rtol=1e-5)
        for key, tree in (("update_norm", updates), ("update_norm_in_z", in_z)):
            want = np.linalg.norm(np.asarray(tree[name], np.float64))
            np.testing.assert_allclose(logged[f"{key}/{name}"], want, rtol=1e-5)
    spread = max(gains.values()) / min(gains.values())
    np.testing.assert_allclose(logged["gain_spread"], spread, rtol=1e-5)
    with pytest.raises(ValueError, match=r"`updates` has no `w1`, but `w2`\. Pass what `update`"):
        bnp_optax.metrics(state, updates={"w2": updates["w2"]})


@pytest.mark.parametrize("preconditioner", [bnp_optax.bnp(), bnp_optax.whiten()])
def test_metrics_of_several_networks_at_once(preconditioner):
    params = {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}
    stacked = jax.vmap(preconditioner.init)(params)
    with pytest.raises(ValueError, match=r"is that of several networks, stacked.*jax\.vmap\(bnp_o"):
        bnp_optax.metrics(stacked)
    assert jax.vmap(bnp_optax.metrics)(stacked)["kappa/kernel"].shape == (2,)


def test_metrics_of_a_layer_that_did_not_run_and_of_no_state():
    def idle(stats):
        zeros = jnp.zeros_like(stats["w1"].count)
        return stats | {"w1": dataclasses.replace(stats["w1"], count=zeros)}

    logged = bnp_optax.metrics(stepped(idle)[0])
    assert (int(logged["layers_never_seen"]), int(logged["batches_rejected"])) == (1, 0)
    with pytest.raises(ValueError, match="`state` holds no `BNPState`"):
        bnp_optax.metrics(optax.adam(0.1).init(PLAIN))
    with pytest.raises(ValueError, match="`layers` has `w3`, of which `state` holds no running"):
        bnp_optax.metrics(stepped()[0], {"w3": None})


def test_conditioning_needs_no_names():
    x = jnp.array([[0.0, 0.0], [2.0, 20.0]])
    params = {"w1": jnp.ones((2, 2)), "b1": jnp.zeros(2)}

    def loss_fn(p):
        return jnp.mean((x @ p["w1"] + p["b1"][None]) ** 2)

    layers = bnp_optax.find_layers(loss_fn, params)
    tx = bnp_optax.bnp_precondition(decay=0.0, eps_rel=0.0, eps_abs=0.0, layers=layers)
    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
    _, state = tx.update(grads, tx.init(params), params, layer_stats=stats)
    for given in (None, layers):
        kappa = diagnostics.conditioning(state, given)
        assert float(kappa["w1"]) == pytest.approx(10.0, rel=1e-5)


def test_the_report_shows_what_was_seen():
    state, layers = stepped()
    preconditioner = bnp_optax.bnp(layers=layers)
    report = diagnostics.report(
        plain_loss,
        PLAIN,
        preconditioner=preconditioner,
        state=state.preconditioner,
        layers=layers,
        num_lanczos=5,
    )
    assert [(row.seen, row.rejected) for row in report.layers] == [(2, 0), (2, 0)]
    assert str(report).splitlines()[0].endswith("of PᵀHP  seen  rejected")
    P = preconditioner.operator(state.preconditioner)
    given = {"layers": layers}
    one = diagnostics.unit_hessian(plain_loss, PLAIN, "w1", 0, preconditioner=P, **given)
    given |= {"preconditioner": preconditioner, "state": state.preconditioner}
    two = diagnostics.unit_hessian(plain_loss, PLAIN, "w1", 0, **given)
    assert jnp.array_equal(one, two)


def test_a_derivative_through_an_update_takes_the_statistics_for_constants():
    def loss_fn(params, x):
        return jnp.mean((x @ params["kernel"] + params["bias"][None]) ** 2)

    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
    tx = bnp_optax.bnp_precondition(warm_start=True)
    ones = jax.tree.map(jnp.ones_like, params)

    def update(scale):
        _, _, stats = bnp_optax.value_and_grad(loss_fn)(params, scale * X)
        return tx.update(ones, tx.init(params), params, layer_stats=stats)[0]["kernel"].sum()

    assert float(jax.grad(update)(1.0)) == 0.0


def test_layers_whose_axes_only_the_statistics_tell():
    """Stacked or not, without a bias: a relative floor for each layer, or one for all inputs."""
    var = jnp.array([[[1.0], [4.0]], [[100.0], [400.0]]])
    ones = {"kernel": jnp.ones((2, 2, 3))}
    floors = {}
    for axes in ((-2,), (-3, -2)):
        layer = bnp_optax.Layer("kernel", None, axes)
        stats = bnp_optax.LayerStats.of_batch(0.0 * var, var, jnp.float32(8.0), layer)
        bnp = bnp_optax.bnp(decay=0.0, eps_rel=1.0, eps_abs=0.0, scale=False)
        state = bnp.init(ones)
        after = bnp.update(ones, state, ones, layer_stats={"kernel": stats})
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        floors[axes] = 1.0 / bnp.operator(after).gram(ones)["kernel"][..., :1]
    assert jnp.allclose(floors[(-2,)], var + jnp.array([4.0, 400.0])[:, None, None])
    assert jnp.allclose(floors[(-3, -2)], var + 400.0)
