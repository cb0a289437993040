"""The state of an optimizer takes the shardings of its parameters, in the flows that people use."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnp_optax
from benchmarks.scale.modes import NNX, RULES, AxisType, Linen

X = jnp.ones((8, 16))
SPECS = {
    "Dense_0": {"kernel": P(None, "model"), "bias": P("model")},
    "Dense_1": {"kernel": P("model", None), "bias": P(None)},
    "Dense_2": {"kernel": P("data", "model"), "bias": P("model")},
}
OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-3),
    "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=8),
    "bnp_sgd": lambda: bnp_optax.bnp_sgd(0.1, momentum=0.9),
    "bnp_adam": lambda: bnp_optax.bnp_adam(1e-3),
    "muon in z": lambda: bnp_optax.in_zspace(optax.contrib.muon(1e-3), bnp_optax.bnp()),
    "zspace_grad_reg": lambda: bnp_optax.zspace_grad_reg(0.1, bnp_optax.bnp()),
}
ON_EVERY_OPTIMIZER = pytest.mark.parametrize("optimizer", OPTIMIZERS)
# Adafactor's moments keep the boxes of parameters of other shapes.
IN_BOXES = pytest.mark.parametrize("optimizer", [n for n in OPTIMIZERS if n != "adafactor"])


def mesh():
    devices = np.array(jax.devices()[:8]).reshape(2, 4)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def params():
    shapes = {"Dense_0": (16, 32), "Dense_1": (32, 32), "Dense_2": (32, 8)}
    return {name: {"kernel": jnp.ones(s), "bias": jnp.zeros(s[1])} for name, s in shapes.items()}


def shardings():
    return jax.tree.map(lambda s: NamedSharding(mesh(), s), SPECS, is_leaf=is_spec)


def is_spec(x):
    return isinstance(x, P)


@ON_EVERY_OPTIMIZER
def test_a_state_is_made_in_the_shardings_of_the_parameters(optimizer):
    tx = OPTIMIZERS[optimizer]()
    found = bnp_optax.state_sharding(tx, params(), shardings())
    state = jax.jit(tx.init, out_shardings=found)(jax.device_put(params(), shardings()))
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params()))
    for array, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    placed = jax.device_put(tx.init(params()), found)
    assert jax.tree.structure(placed) == jax.tree.structure(state)


def test_statistics_are_sharded_along_the_kernel_s_inputs():
    found = bnp_optax.state_sharding(bnp_optax.bnp_adam(1e-3), params(), SPECS)
    state, (adam, *_) = found.preconditioner, found.inner
    assert adam.mu == adam.nu == SPECS
    assert adam.count == P()
    assert state.moments["Dense_0"]["kernel"] == P(None, None, None)
    assert state.moments["Dense_1"]["kernel"] == P(None, "model", None)
    assert state.moments["Dense_2"]["kernel"] == P(None, "data", None)
    assert set(jax.tree.leaves((state.numbers, state.eps), is_leaf=is_spec)) == {P()}


def test_a_kernel_with_an_axis_as_long_as_the_numbers_does_not_shard_them():
    tx = bnp_optax.bnp_adam(0.1)
    kernel = {"kernel": jnp.ones((11, 8)), "bias": jnp.zeros(8)}
    specs = {"kernel": P("data", None), "bias": P(None)}
    found = bnp_optax.state_sharding(tx, kernel, specs).preconditioner
    assert tx.init(kernel).preconditioner.numbers["kernel"].shape == (11,)
    assert found.numbers["kernel"] == P()
    assert found.moments["kernel"] == P(None, "data", None)


def test_a_memory_of_parameters_is_sharded_as_they_are():
    found = bnp_optax.state_sharding(optax.scale_by_lbfgs(memory_size=3), params(), SPECS)
    memory = found.diff_params_memory
    assert memory["Dense_2"]["kernel"] == P(None, "data", "model")
    assert memory["Dense_2"]["bias"] == P(None, "model")


def test_factored_moments_are_sharded_as_the_axis_that_they_are_of():
    tx = OPTIMIZERS["adafactor"]()
    found = bnp_optax.state_sharding(tx, params(), SPECS)
    shapes = jax.eval_shape(tx.init, params())
    by_shape = {}
    for spec, shape in zip(
        jax.tree.leaves(found, is_leaf=is_spec), jax.tree.leaves(shapes), strict=True
    ):
        by_shape.setdefault(shape.shape, set()).add(tuple(spec))
    assert {(), (16,), (32,), (1,), (8,)} <= set(by_shape)
    assert by_shape[(1,)] <= {(), (None,)}
    assert by_shape[(16,)] == {(None,)}
    # Of (16, 32), (32, 8), and (32, 32), which does not tell its axes apart; and a bias.
    assert by_shape[(32,)] >= {("model",), ("data",), (None,)}


def test_the_longest_name_is_the_parameter_s():
    nested = {"kernel": jnp.ones((8, 4)), "block": {"kernel": jnp.ones((8, 4))}}
    specs = {"kernel": P("data", None), "block": {"kernel": P(None, "model")}}
    found = bnp_optax.state_sharding(optax.adam(1e-3), nested, specs)
    assert found[0].mu == specs


def test_one_bare_array_and_none():
    found = bnp_optax.state_sharding(optax.adam(1e-3), jnp.ones((8, 4)), P("data", None))
    assert found[0].mu == P("data", None)
    found = bnp_optax.state_sharding(
        optax.adam(1e-3), params(), jax.tree.map(lambda _: None, params())
    )
    assert set(jax.tree.leaves(found, is_leaf=is_spec)) == {P()}


def test_a_drop_in_s_state_is_sharded_as_that_of_the_bare_optimizer():
    """The optimizer inside sees `Dense_0/kernel`, which is `params/Dense_0/kernel` outside."""
    tx = bnp_optax.bnp_adam(1e-3)
    specs = {"params": SPECS, "layer_stats": P()}
    _, wrapped, dropped = bnp_optax.drop_in(network_loss, params(), tx, X)
    found = bnp_optax.state_sharding(dropped, wrapped, specs)
    assert found == bnp_optax.state_sharding(tx, params(), SPECS)
    # What is around it sees all parameters.
    around = bnp_optax.state_sharding(optax.MultiSteps(dropped, 2), wrapped, specs)
    assert around.acc_grads == specs
    assert around.inner_opt_state == found


def network_loss(params, x):
    for layer in params.values():
        x = x @ layer["kernel"] + layer["bias"][None]
    return jnp.mean((x - 1.0) ** 2)


def test_a_drop_in_of_one_bare_array_and_of_one_called_as_the_vector_is():
    loss = lambda p, x: jnp.mean((x @ p - 1.0) ** 2)  # noqa: E731
    layers = bnp_optax.find_layers(loss, jnp.ones((16, 4)), X)
    tx = bnp_optax.bnp_adam(1e-3, layers=layers)
    _, wrapped, dropped = bnp_optax.drop_in(loss, jnp.ones((16, 4)), tx, X)
    specs = {"params": P("data", None), "layer_stats": P()}
    found = bnp_optax.state_sharding(dropped, wrapped, specs)
    assert found.inner[0].mu == P("data", None)

    bare = {"kernel": jnp.ones((16, 4)), "layer_stats": jnp.ones((4, 8))}
    loss = lambda p, x: jnp.mean((x @ p["kernel"] @ p["layer_stats"]) ** 2)  # noqa: E731
    tx = optax.adam(1e-3)
    _, wrapped, dropped = bnp_optax.drop_in(loss, bare, tx, X)
    specs = {
        "params": {"kernel": P("data", None), "layer_stats": P(None, "model")},
        "layer_stats": P(),
    }
    found = bnp_optax.state_sharding(optax.MultiSteps(dropped, 2), wrapped, specs)
    assert found.acc_grads == specs


@pytest.mark.parametrize("fan_in", [16, 8])
def test_what_multi_steps_keeps_for_whiten_is_replicated(fan_in):
    """A covariance of 16 inputs has the shape of a kernel (16, 16)."""
    kernel = {"kernel": jnp.ones((fan_in, 16)), "bias": jnp.zeros(16)}
    specs = {"kernel": P("data", "model"), "bias": P("model")}
    tx = bnp_optax.multi_steps(bnp_optax.whiten_adam(), 2)
    found = bnp_optax.state_sharding(tx, kernel, specs)
    assert found.mean["kernel"] == found.var["kernel"] == found.rows["kernel"] == P()
    assert found.multi_steps.acc_grads == specs
    whitening = found.multi_steps.inner_opt_state.preconditioner
    assert set(jax.tree.leaves(whitening, is_leaf=is_spec)) == {P()}
    of_bnp = bnp_optax.state_sharding(
        bnp_optax.multi_steps(bnp_optax.bnp_adam(1e-3), 2), kernel, specs
    )
    assert of_bnp.mean["kernel"] == of_bnp.var["kernel"] == P("data", None)
    assert of_bnp.multi_steps.inner_opt_state.preconditioner.moments["kernel"] == P(
        None, "data", None
    )


def test_what_cannot_be_fitted_raises():
    tx = optax.adam(1e-3)
    with pytest.raises(ValueError, match="nothing for `Dense_0/bias`"):
        bnp_optax.state_sharding(tx, params(), {**SPECS, "Dense_0": {"kernel": P()}})
    mixed = {**SPECS, "Dense_0": shardings()["Dense_0"]}
    with pytest.raises(ValueError, match="NamedSharding"):
        bnp_optax.state_sharding(tx, params(), mixed)


# The flows.


@ON_EVERY_OPTIMIZER
def test_map_params_by_the_helper(optimizer):
    """Of `optax.tree.map_params` with specs; which maps an array alike whatever its shape is."""
    tx = OPTIMIZERS[optimizer]()
    state = tx.init(params())
    found = bnp_optax.state_sharding(tx, params(), shardings())
    sharded = jax.jit(lambda state: state, out_shardings=found)(state)
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def train_state(box, axis, tx):
    model = Linen(box, axis)

    def init(key):
        boxed = model.init(key, X)["params"]
        return bnp_optax.TrainState.create(apply_fn=model.apply, params=boxed, tx=tx)

    def step(state, x):
        def loss_fn(p):
            return jnp.mean(model.apply({"params": p}, x) ** 2)

        _, grads, stats = bnp_optax.value_and_grad(loss_fn)(state.params)
        extra = {"layer_stats": stats} if uses_statistics(tx) else {}
        if not uses_statistics(tx):
            return state.apply_gradients(grads=grads)
        bound = optax.GradientTransformationExtraArgs(
            tx.init, lambda *args, **kw: tx.update(*args, grad_fn=jax.grad(loss_fn), **kw)
        )
        return state.replace(tx=bound).apply_gradients(grads=grads, **extra).replace(tx=tx)

    return init, step


def uses_statistics(tx):
    with jax.ensure_compile_time_eval():
        state = tx.init(params())
    nodes = jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, bnp_optax.BNPState))
    return any(isinstance(n, bnp_optax.BNPState) for n in nodes)


def check(state, step, found):
    """A step of a state in its shardings, which stay."""
    after = jax.jit(step, out_shardings=found)(state, X)
    kernel = after.params["Dense_0"]["kernel"].value
    assert kernel.sharding.spec == P(None, "model")
    assert not np.array_equal(kernel, state.params["Dense_0"]["kernel"].value)


@IN_BOXES
def test_flax_get_sharding_of_the_train_state(optimizer):
    init, step = train_state(nn.with_partitioning, "model", OPTIMIZERS[optimizer]())
    found = nn.get_sharding(jax.eval_shape(init, jax.random.key(0)), mesh())
    check(jax.jit(init, out_shardings=found)(jax.random.key(0)), step, found)


@IN_BOXES
def test_logical_names_of_the_abstract_state(optimizer):
    init, step = train_state(nn.with_logical_partitioning, "features", OPTIMIZERS[optimizer]())
    with jax.set_mesh(mesh()), nn.logical_axis_rules(RULES):
        specs = nn.get_partition_spec(jax.eval_shape(init, jax.random.key(0)))
        found = nn.logical_to_mesh_sharding(specs, mesh(), RULES)
        check(jax.jit(init, out_shardings=found)(jax.random.key(0)), step, found)


@ON_EVERY_OPTIMIZER
def test_boxed_parameters_by_the_helper(optimizer):
    tx = OPTIMIZERS[optimizer]()
    boxed = Linen(nn.with_partitioning, "model").init(jax.random.key(0), X)["params"]
    found = bnp_optax.state_sharding(tx, boxed, nn.get_sharding(boxed, mesh()))
    state = jax.jit(tx.init, out_shardings=found)(boxed)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(boxed))


@IN_BOXES
def test_nnx_optimizer_in_a_mesh(optimizer):
    tx = OPTIMIZERS[optimizer]()
    with jax.set_mesh(mesh()):
        model = NNX(nnx.Rngs(0))
        before = np.asarray(model.Dense_0.kernel[...])
        made = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, made, x):
            loss_fn = lambda model: jnp.mean(model(x) ** 2)  # noqa: E731
            _, grads, stats = bnp_optax.flax_nnx.value_and_grad(loss_fn)(model)
            extra = {}
            if uses_statistics(tx):
                graph, _, rest = nnx.split(model, nnx.Param, ...)
                gradient = jax.grad(lambda p: loss_fn(nnx.merge(graph, p, rest)))
                extra = {"layer_stats": stats, "grad_fn": gradient}
            made.update(model, grads, **extra)

        step(model, made, X)
        assert model.Dense_0.kernel[...].sharding.spec == P(None, "model")
        assert not np.array_equal(model.Dense_0.kernel[...], before)
