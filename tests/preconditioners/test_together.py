"""Layers of one shape are computed at once, and each gets what it would get alone."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.bnp_cases import assert_trees_close

import bnp_optax
from bnp_optax.preconditioners.together import together


def scaled(factor, vector, pair):
    x, n = pair
    return {"sum": factor * (vector + x), "of": (jnp.max(x), n + 1.0), "none": None}


def layer(seed, size):
    keys = jax.random.split(jax.random.key(seed), 3)
    vector, x = (jax.random.normal(key, (size,)) for key in keys[:2])
    return vector, (x, jax.random.normal(keys[2]))


@pytest.mark.parametrize("jit", [False, True])
def test_each_layer_gets_what_it_would_get_alone(jit):
    sizes = {"a": 3, "b": 3, "c": 5, "d": 3, "e": 3, "f": 5}
    arguments = {name: layer(i, size) for i, (name, size) in enumerate(sizes.items())}
    kinds = {name: 2.0 if name == "d" else 3.0 for name in sizes}
    function = lambda arguments: together(scaled, arguments, kinds)  # noqa: E731
    found = (jax.jit(function) if jit else function)(arguments)
    assert list(found) == list(sizes)
    for name, args in arguments.items():
        expected = scaled(kinds[name], *args)
        jax.tree.map(np.testing.assert_array_equal, found[name], expected)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_one_layer_has_does_not_reach_another(bad):
    arguments = {name: layer(i, 4) for i, name in enumerate("abc")}
    arguments["b"] = jax.tree.map(lambda x: jnp.full_like(x, bad), arguments["b"])
    found = jax.jit(lambda args: together(scaled, args, dict.fromkeys(args, 1.0)))(arguments)
    for name in "abc":
        expected = scaled(1.0, *arguments[name])
        jax.tree.map(np.testing.assert_array_equal, found[name], expected)


class Chain(nn.Module):
    """Layers of one shape, one of another, and one without a bias."""

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = nn.tanh(nn.Dense(6, name=f"same_{i}")(x))
        x = nn.tanh(nn.Dense(4, name="other")(x))
        return nn.Dense(4, use_bias=False, name="no_bias")(x)


@pytest.mark.parametrize(
    "make", [bnp_optax.bnp_sgd, bnp_optax.bnp_adam, bnp_optax.bnp_precondition]
)
def test_a_network_moves_as_its_layers_do_one_by_one(make):
    model, x = Chain(), jax.random.normal(jax.random.key(0), (16, 6)) * 3 + 1
    params = model.init(jax.random.key(1), x)["params"]
    loss_fn = lambda p: jnp.mean((model.apply({"params": p}, x) - 1.0) ** 2)  # noqa: E731
    tx = make(scale=True)
    alone = {name: make(scale=True) for name in params}
    state, states = tx.init(params), {name: alone[name].init(params[name]) for name in params}
    for _ in range(4):
        _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, layer_stats=stats)
        for name in params:
            # The same statistics, under the names that they have in this layer's tree.
            of = stats[f"{name}/kernel"]
            bias = None if of.layer.bias is None else "bias"
            renamed = bnp_optax.Layer(**{**vars(of.layer), "kernel": "kernel", "bias": bias})
            of = bnp_optax.LayerStats(of.mean, of.var, of.sq_mean, of.count, renamed)
            one, states[name] = alone[name].update(
                grads[name], states[name], params[name], layer_stats={"kernel": of}
            )
            assert_trees_close(updates[name], one, rtol=1e-6)
        params = jax.tree.map(jnp.add, params, jax.tree.map(lambda u: 0.1 * u, updates))


def test_kernels_of_one_number():
    """Two of one axis, whose only size is 1."""
    params = {"v": jnp.ones(1), "w": jnp.ones(1), "b": jnp.zeros(())}
    x = jnp.arange(4.0)[:, None]
    loss_fn = lambda p: jnp.mean((x @ p["v"] + x @ p["w"] + p["b"][None] - 1.0) ** 2)  # noqa: E731
    tx = bnp_optax.bnp_adam(layers=bnp_optax.find_layers(loss_fn, params))
    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
    updates, _ = tx.update(grads, tx.init(params), params, layer_stats=stats)
    assert jax.tree.map(jnp.shape, updates) == {"v": (1,), "w": (1,), "b": ()}
    assert float(updates["v"][0]) == float(updates["w"][0]) < 0.0


def test_second_moments_that_came_for_another():
    params = {name: {"kernel": jnp.ones((3, 3)), "bias": jnp.zeros(3)} for name in "ab"}
    x = jax.random.normal(jax.random.key(0), (8, 3))

    def loss_fn(p):
        y = x
        for layer in p.values():
            y = jnp.tanh(y @ layer["kernel"] + layer["bias"][None])
        return jnp.mean(y**2)

    tx = bnp_optax.bnp_sgd()
    found = []
    for second in (None, True):
        _, grads, stats = bnp_optax.value_and_grad(loss_fn, second_moments=second)(params)
        found.append(tx.update(grads, tx.init(params), params, layer_stats=stats)[0])
    assert_trees_close(*found)


@pytest.mark.parametrize(
    ("make", "second_moments"), [(bnp_optax.bnp_adam, None), (bnp_optax.whiten_adam, True)]
)
def test_an_update_outside_jit_compiles_nothing_once_it_has_run(make, second_moments):
    """A function that is made in each call would be compiled in each."""
    params = Chain().init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    x, tx, compiled = jax.random.normal(jax.random.key(1), (8, 4)), make(), []

    def loss_fn(params):
        return jnp.mean(Chain().apply({"params": params}, x) ** 2)

    value_and_grad = bnp_optax.value_and_grad(loss_fn, second_moments=second_moments)
    _, grads, stats = jax.jit(value_and_grad)(params)
    state = tx.init(params)

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    _, state = tx.update(grads, state, params, layer_stats=stats)
    assert compiled
    _, state = tx.update(grads, state, params, layer_stats=stats)
    compiled.clear()
    tx.update(grads, state, params, layer_stats=stats)
    assert not compiled


@pytest.mark.parametrize("spec", [None, P("rows", None), P(None, "columns")])
@pytest.mark.parametrize("bias", [True, False])
def test_operator_of_many_layers_is_that_of_each(bias, spec):
    """Also where kernels are sharded in their types, as in a mesh of explicit axes."""
    shapes = {f"many_{i}": (4, 6) for i in range(24)} | {"few": (4, 2)}

    def drawn(seed):
        rng = np.random.default_rng(seed)
        tree = {
            n: {"kernel": jnp.asarray(rng.normal(size=s), np.float32)} for n, s in shapes.items()
        }
        for name, (_, n_outputs) in shapes.items():
            if bias:
                tree[name]["bias"] = jnp.asarray(rng.normal(size=n_outputs), np.float32)
        return tree

    def loss_fn(params, x):
        return sum(
            jnp.mean((x[i] @ of["kernel"]) ** 2 + of.get("bias", jnp.zeros(1)).mean())
            for i, of in enumerate(params.values())
        )

    params, z = drawn(0), drawn(1)
    scale = np.arange(1.0, 26.0, dtype=np.float32)[:, None, None]
    x = jnp.asarray(np.random.default_rng(2).normal(scale, scale, (25, 8, 4)), np.float32)
    layers = {
        f"{name}/kernel": bnp_optax.Layer(f"{name}/kernel", f"{name}/bias" if bias else None, (-2,))
        for name in shapes
    }
    bnp = bnp_optax.bnp(shrinkage=10.0, scale_bias=True, scale_others=True)
    _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, x)
    stats = {n: dataclasses.replace(of, layer=layers[n]) for n, of in stats.items()}
    state = bnp.update(grads, bnp.init(params), params, layer_stats=stats)

    def of_layer(name):
        """The operator of one layer alone, with the state's part of it."""
        part = bnp_optax.BNPState._make([*({name: field[name]} for field in state[:-1]), state.eps])
        return bnp_optax.bnp(scale_bias=True).operator(part)

    def applied(operator, z):
        return [operator.mv(z), operator.transpose(z), operator.solve(z), operator.gram(z)]

    got = placed_in_a_mesh(lambda z: applied(bnp.operator(state), z), z, spec)
    for name in shapes:
        want = applied(of_layer(name), {name: z[name]})
        assert_trees_close([tree[name] for tree in got], [tree[name] for tree in want], 1e-5)


def placed_in_a_mesh(function, z, spec):
    """`function(z)`, on kernels of a given sharding, in a mesh of explicit axes."""
    if spec is None:
        return function(z)
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Explicit,) * 2)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, spec if x.ndim > 1 else P()))  # noqa: E731
    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(function)(jax.tree.map(place, z)))
