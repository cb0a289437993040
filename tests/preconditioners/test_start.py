"""Starting in z: raw units in, no scaling by hand."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnp_optax

UNITS = [  # x -> scale x + shift, one for each input.
    (np.array([1e3, 1e-4, 1.0]), np.array([5e3, 0.0, -2.0])),
    (np.array([2.0, 30.0, 1e-2]), np.array([0.0, 7.0, 0.5])),
]
X = np.random.default_rng(0).normal(size=(8, 16, 3)) * [1.0, 2.0, 0.5] + [0.3, -1.0, 0.0]
Y = jnp.asarray(np.sin(X.sum(-1)), jnp.float32)
OPTIMIZERS = {
    "bnp_adam": lambda fixed: bnp_optax.bnp_adam(1e-2, fixed=fixed),
    "bnp_adamw": lambda fixed: bnp_optax.bnp_adamw(1e-2, weight_decay=0.1, fixed=fixed),
    "bnp_sgd": lambda fixed: bnp_optax.bnp_sgd(0.03, fixed=fixed),
    "muon": lambda fixed: bnp_optax.in_zspace(optax.contrib.muon(1e-2), bnp_optax.bnp(fixed=fixed)),
    "the paper's": lambda fixed: bnp_optax.in_zspace(optax.adam(1e-2), bnp_optax.bnp(fixed=fixed)),
}


class Net(nn.Module):
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(8, use_bias=self.use_bias, name="first")(x))
        return nn.Dense(1, name="last")(x)[..., 0]


def in_units(units):
    scale, shift = units
    return jnp.asarray(X * scale + shift, jnp.float32)


def standardized():
    mean, std = X.mean((0, 1)), X.std((0, 1))
    return jnp.asarray((X - mean) / std, jnp.float32)


def loss_fn(params, x, y):
    return jnp.mean((Net().apply({"params": params}, x) - y) ** 2)


def trained(x, make, n_steps=200, known=True):
    """The losses of training on batches `x` from z, with P of the input layer held."""
    z = Net().init(jax.random.key(0), x[0])["params"]
    params, fixed = bnp_optax.start_in_zspace(loss_fn, z, list(zip(x, Y, strict=True)))
    captured = bnp_optax.value_and_grad(loss_fn, fixed=fixed if known else None)
    tx = make(fixed)

    def step(carry, batch):
        params, state = carry
        loss, grads, stats = captured(params, *batch)
        updates, state = tx.update(grads, state, params, layer_stats=stats)
        return (optax.apply_updates(params, updates), state), loss

    order = np.arange(n_steps) % len(x)
    return jax.jit(lambda carry: jax.lax.scan(step, carry, (x[order], Y[order])))(
        (params, tx.init(params))
    )[1]


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_does_not_depend_on_units(name, units):
    losses = trained(standardized(), OPTIMIZERS[name])
    np.testing.assert_allclose(trained(in_units(units), OPTIMIZERS[name]), losses, rtol=5e-3)
    assert losses[-8:].mean() < 0.8 * losses[:8].mean()


def test_statistics_that_are_measured_all_the_same_do_not_enter():
    make = OPTIMIZERS["bnp_adam"]
    x = in_units(UNITS[0])
    np.testing.assert_allclose(trained(x, make, 50), trained(x, make, 50, known=False), rtol=1e-5)


@pytest.mark.parametrize("units", UNITS)
def test_the_network_at_the_start_is_the_one_on_standardized_inputs(units):
    x, wanted = in_units(units), standardized()
    z = Net().init(jax.random.key(0), x[0])["params"]
    params, fixed = bnp_optax.start_in_zspace(loss_fn, z, list(zip(x, Y, strict=True)))
    assert set(fixed) == {"first/kernel"}
    out = Net().apply({"params": params}, x)
    np.testing.assert_allclose(out, Net().apply({"params": z}, wanted), atol=1e-4)
    for name in ("kernel", "bias"):
        assert np.array_equal(params["last"][name], z["last"][name])


def test_constant_inputs_and_inputs_of_zero():
    x = jnp.stack([jnp.linspace(0.0, 9.0, 16), jnp.full(16, 1e4), jnp.zeros(16)], axis=-1)
    z = Net().init(jax.random.key(0), x)["params"]
    params, _ = bnp_optax.start_in_zspace(loss_fn, z, [(x, Y[0])])
    kernel = params["first"]["kernel"] / z["first"]["kernel"]
    np.testing.assert_allclose(kernel[:, 0], [1 / x[:, 0].std(), 1e-4, 1.0], rtol=1e-5)
    out = Net().apply({"params": params}, x)
    other = Net().apply({"params": params}, x.at[:, 1].set(1e4 * (1 + 1e-6)))
    np.testing.assert_allclose(out, other, atol=1e-3)


def test_a_layer_without_a_bias_is_divided_by_the_root_mean_square():
    model = Net(use_bias=False)

    def loss_fn(params, x):
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    x = in_units(UNITS[0])[0]
    z = model.init(jax.random.key(0), x)["params"]
    params, _ = bnp_optax.start_in_zspace(loss_fn, z, [x])
    kernel = params["first"]["kernel"] / z["first"]["kernel"]
    np.testing.assert_allclose(kernel[:, 0], 1 / np.sqrt(np.mean(x**2, 0)), rtol=1e-4)


def fixed_of(count, *, bias=True):
    """Statistics of a kernel (3, 2) whose third input is constant."""
    layer = bnp_optax.Layer("kernel", "bias" if bias else None, (-2,), kernel_shape=(3, 2))
    mean, var = jnp.array([[50.0], [0.1], [4.0]]), jnp.array([[1e4], [1e-8], [0.0]])
    return {"kernel": bnp_optax.LayerStats.of_batch(mean, var, jnp.float32(count), layer)}


@pytest.mark.parametrize("scale", [True, "network", False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [bnp_optax.alias.ADAM_OPTIONS, {}])
def test_fixed_statistics_make_p_without_floors(options, bias, scale):
    fixed = fixed_of(7, bias=bias)
    bnp = bnp_optax.bnp(**options | {"scale": scale, "fixed": fixed})
    params = {"kernel": jnp.ones((3, 2)), **({"bias": jnp.ones(2)} if bias else {})}
    state = bnp.init(params)
    mean, var = np.array([50.0, 0.1, 4.0]), np.array([1e4, 1e-8, 16.0])
    P = np.diag(1 / np.sqrt(np.r_[1.0, var if bias else [1e4 + 2500, 1e-8 + 0.01, 16.0]]))
    if bias:
        P[0, 1:] = -mean * P[1:, 1:].diagonal()
    else:
        P = P[1:, 1:]

    def check(state, q):
        found = bnp.operator(state).mv(params)
        want = P @ np.ones(len(P)) / q
        got = np.concatenate([found.get("bias", jnp.ones(0))[:1], found["kernel"][:, 0]])
        np.testing.assert_allclose(got, want, rtol=1e-5)

    check(state, 1.0)
    # A batch with other statistics: of it only N counts.
    other = jax.tree.map(lambda x: 3.0 * x + 1.0, fixed)
    other["kernel"] = dataclasses.replace(other["kernel"], count=jnp.float32(1.0))
    state = bnp.update(params, state, params, layer_stats=other)
    check(state, {True: np.sqrt(3), "network": 1.0, False: 1.0}[scale])
    logged = bnp_optax.metrics(state)
    assert int(logged["layers_never_seen"]) == 0
    np.testing.assert_allclose(float(logged["q/kernel"]), np.sqrt(3) if scale is True else 1.0)


def test_the_count_of_fixed_statistics_is_the_batch_s():
    x = in_units(UNITS[0])
    params = Net().init(jax.random.key(0), x[0])["params"]
    whole = (x.reshape(-1, 3), Y.reshape(-1))  # as one batch
    fixed = bnp_optax.dataset_statistics(loss_fn, params, [whole])
    _, _, stats = bnp_optax.value_and_grad(loss_fn, fixed=fixed)(params, x[0], Y[0])
    assert float(stats["first/kernel"].count) == len(x[0])
    assert np.array_equal(stats["first/kernel"].mean, fixed["first/kernel"].mean)


@pytest.mark.parametrize(
    ("params", "has"),
    [
        ({"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}, r"has it with shape \(4, 2\)"),
        ({"other": {"kernel": jnp.ones((3, 2))}}, "has no such layer, but `other/kernel`"),
    ],
)
def test_fixed_statistics_of_another_network(params, has):
    with pytest.raises(
        ValueError, match=rf"`fixed` has `kernel` of shape \(3, 2\), and `bnp` {has}"
    ):
        bnp_optax.bnp_adam(fixed=fixed_of(7)).init(params)


def test_of_a_convolution():
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, lambda x: x.mean((1, 2)), nn.Dense(1)])
    x = jax.random.normal(jax.random.key(0), (16, 5, 5, 2))

    def losses(x):
        def loss_fn(params, x):
            return jnp.mean((model.apply({"params": params}, x)[:, 0] - Y[0]) ** 2)

        z = model.init(jax.random.key(1), x)["params"]
        params, fixed = bnp_optax.start_in_zspace(loss_fn, z, [x])
        tx = bnp_optax.bnp_adam(fixed=fixed)
        state, found = tx.init(params), []
        step = jax.jit(bnp_optax.value_and_grad(loss_fn, fixed=fixed))
        for _ in range(5):
            loss, grads, stats = step(params, x)
            updates, state = tx.update(grads, state, params, layer_stats=stats)
            params, found = optax.apply_updates(params, updates), [*found, float(loss)]
        return found

    # A scale alone: zeros of the padding are no mean of the inputs in other units.
    np.testing.assert_allclose(losses(x * jnp.array([[[[1e3, 1e-3]]]])), losses(x), rtol=1e-3)


def test_of_nnx():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graph, z = nnx.split(model)
    x = in_units(UNITS[1])[0]

    def loss_fn(params, x):
        return jnp.mean(nnx.merge(graph, params)(x) ** 2)

    params, _ = bnp_optax.start_in_zspace(loss_fn, z, [x])
    out = nnx.merge(graph, params)(x)
    wanted = model((x - x.mean(0, keepdims=True)) / x.std(0, keepdims=True))
    np.testing.assert_allclose(out, wanted, atol=1e-4)


def test_errors():
    params = Net().init(jax.random.key(0), X[0])["params"]
    with pytest.raises(ValueError, match="`batches` is empty"):
        bnp_optax.start_in_zspace(loss_fn, params, [])
    with pytest.raises(ValueError, match="`batches` is empty"):
        bnp_optax.start_in_zspace(loss_fn, params, [(jnp.zeros((0, 3)), jnp.zeros(0))])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_number_that_is_not_finite_is_told_by_its_batch_and_layer(value):
    x = in_units(UNITS[0])
    z = Net().init(jax.random.key(0), x[0])["params"]
    batches = [(x[0], Y[0]), (x[1].at[3, 1].set(value), Y[1])]
    message = "Batch 1 of `batches`, counted from 0, has inputs of `first/kernel` that are not fin"
    for function in (bnp_optax.start_in_zspace, bnp_optax.dataset_statistics):
        with pytest.raises(ValueError, match=message):
            function(loss_fn, z, batches)


def test_a_batch_of_no_rows_counts_for_nothing():
    x = in_units(UNITS[0])
    z = Net().init(jax.random.key(0), x[0])["params"]
    none = (x[0][:0], Y[0][:0])
    _, fixed = bnp_optax.start_in_zspace(loss_fn, z, [none, (x[0], Y[0])])
    _, expected = bnp_optax.start_in_zspace(loss_fn, z, [(x[0], Y[0])])
    np.testing.assert_array_equal(fixed["first/kernel"].mean, expected["first/kernel"].mean)


@pytest.mark.parametrize("field", ["mean", "var", "sq_mean"])
def test_fixed_statistics_that_are_not_finite(field):
    fixed = fixed_of(7)
    broken = getattr(fixed["kernel"], field).at[1].set(jnp.nan)
    fixed = {"kernel": dataclasses.replace(fixed["kernel"], **{field: broken})}
    message = "`fixed` has statistics of `kernel` that are not finite.*`dataset_statistics`"
    for make in (bnp_optax.bnp_adam, bnp_optax.bnp):
        with pytest.raises(ValueError, match=message):
            make(fixed=fixed)


def test_traced_fixed_statistics_are_not_looked_at():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    jax.eval_shape(lambda fixed: bnp_optax.bnp(fixed=fixed).init(params), fixed_of(7))


WHITENED = {"whiten_adam": bnp_optax.whiten_adam, "whiten_muon": bnp_optax.whiten_muon}


@pytest.mark.parametrize("name", WHITENED)
def test_whitening_behind_layers_that_are_held(name):
    def losses(x):
        z = Net().init(jax.random.key(0), x[0])["params"]
        params, fixed = bnp_optax.start_in_zspace(loss_fn, z, list(zip(x, Y, strict=True)))
        layers = bnp_optax.find_layers(loss_fn, params, x[0], Y[0])
        tx = WHITENED[name](1e-2, fixed=fixed, layers=layers)
        captured = bnp_optax.value_and_grad(loss_fn, fixed=fixed, second_moments=["last/kernel"])

        def step(carry, batch):
            params, state = carry
            loss, grads, stats = captured(params, *batch)
            updates, state = tx.update(grads, state, params, layer_stats=stats)
            return (optax.apply_updates(params, updates), state), loss

        order = np.arange(60) % len(x)
        carry = params, tx.init(params)
        return jax.jit(lambda carry: jax.lax.scan(step, carry, (x[order], Y[order])))(carry)[1]

    expected = losses(standardized())
    np.testing.assert_allclose(losses(in_units(UNITS[0])), expected, rtol=5e-3)
    assert expected[-8:].mean() < 0.8 * expected[:8].mean()


@pytest.mark.parametrize(
    ("options", "has"),
    [
        ({}, "are not given"),
        ({"layers": {"other": fixed_of(7)["kernel"].layer}}, "have `other`"),
    ],
)
def test_whitening_needs_to_know_the_other_layers(options, has):
    with pytest.raises(ValueError, match=f"`fixed` has `kernel`, but `layers` {has}"):
        bnp_optax.whiten_adam(fixed=fixed_of(7), **options)


def test_optimizer_with_known_statistics_is_made_inside_jit():
    """As in a search over rates that is one program."""
    x = jnp.asarray(np.random.default_rng(0).normal(7.0, 3.0, (8, 3)), jnp.float32)
    loss_fn = lambda p, x: jnp.mean((x @ p["kernel"] + p["bias"][None]) ** 2)  # noqa: E731
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
    fixed = bnp_optax.dataset_statistics(loss_fn, params, [(x,)])
    init = lambda p: bnp_optax.bnp_sgd(fixed=fixed).init(p)  # noqa: E731
    of_jit, alone = jax.tree.leaves(jax.jit(init)(params)), jax.tree.leaves(init(params))
    for a, b in zip(of_jit, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
