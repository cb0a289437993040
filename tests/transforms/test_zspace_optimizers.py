"""Every optimizer of Optax inside `in_zspace`, while P moves."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax
from bnp_optax import Layer, LayerStats, bnp, in_zspace

PARAMS = {"kernel": jnp.arange(6.0).reshape(3, 2) / 3 - 0.7, "bias": jnp.array([0.5, -1.0])}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)
STORING = {
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "mechanize": lambda: optax.contrib.mechanize(optax.sgd(0.1)),
    "sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05)),
    "dog": lambda: optax.contrib.dog(1.0),
    "prodigy": lambda: optax.contrib.prodigy(1.0),
    "lbfgs": lambda: optax.lbfgs(linesearch=None, learning_rate=0.1),
}
REFUSED = {
    "optax.lookahead": lambda: optax.lookahead(optax.sgd(0.1), 5, 0.5),
    "optax.contrib.cocob": optax.contrib.cocob,
    "optax.contrib.madgrad": lambda: optax.contrib.madgrad(0.1),
    "optax.contrib.scale_by_cocob": optax.contrib.scale_by_cocob,
    "optax.contrib.scale_by_madgrad": lambda: optax.contrib.scale_by_madgrad(0.1),
}
# NaN at a zero gradient, or a motion of their own that is no linear function of the parameters.
MOVE_ALONE = {
    "optax.contrib.normalize",
    "optax.contrib.dadapt_adamw",
    "optax.contrib.prodigy",
    "optax.fromage",
    "optax.keep_params_nonnegative",
    "optax.noisy_sgd",
    "optax.yogi",
    "optax.scale_by_yogi",
}
# They take no learning rate but a function, muon's dimension numbers, or (the last) promote ranks.
OTHERS = {
    "optax.scale_by_schedule",
    "optax.stateless",
    "optax.stateless_with_tree_map",
    "optax.contrib.scale_by_muon",
    "optax.scale_by_distance_over_gradients",
}


def found():
    """Whatever in Optax makes a transformation, from no argument or from a learning rate."""
    for module in (optax, optax.contrib):
        for name in dir(module):
            make, full = getattr(module, name), f"{module.__name__}.{name}"
            if inspect.isclass(make) or not callable(make) or name.startswith("_"):
                continue
            for args in ((), (0.1,)):
                try:
                    made = make(*args)
                    is_transformation = isinstance(made, optax.GradientTransformation)
                    if is_transformation:
                        made.init(PARAMS)
                except Exception:
                    continue
                if is_transformation:
                    yield full, functools.partial(make, *args)
                    break


OPTIMIZERS = {name: make for name, make in found() if name not in {*REFUSED, *MOVE_ALONE, *OTHERS}}
OPTIMIZERS |= STORING


def stats(t):
    """Statistics that drift."""
    mean = jnp.array([[1.0], [2.0], [-1.0]]) * (1.0 + t)
    var = jnp.array([[1.0], [4.0], [0.5]]) * (1.0 + 2.0 * t)
    layer = Layer("kernel", "bias", (-2,))
    return {"kernel": LayerStats.of_batch(mean, var, jnp.float32(8.0), layer)}


def extra_of(name, loss_fn, params):
    value, grad = jax.value_and_grad(loss_fn)(params)
    extra = {"value": value, "grad": grad, "value_fn": loss_fn}
    if name == "sam":
        return {"grad_fn": lambda p, i: jax.grad(loss_fn)(p)}
    if "hutchinson" in name or "sophia" in name:
        return {"obj_fn": loss_fn}
    return extra


def moved(name, tx, given, n_steps=4):
    """Parameters after some steps at zero gradients."""
    loss_fn = lambda p: 0.0 * (jnp.sum(p["kernel"]) + jnp.sum(p["bias"]))  # noqa: E731
    params, state = PARAMS, tx.init(PARAMS)
    for t in range(n_steps):
        extra = extra_of(name, loss_fn, params)
        updates, state = tx.update(ZEROS, state, params, layer_stats=given(t), **extra)
        params = optax.apply_updates(params, updates)
    return params


def test_the_enumeration_finds_the_known_ones():
    assert {"optax.adam", "optax.lion", "optax.lbfgs", "optax.contrib.muon"} <= set(OPTIMIZERS)
    assert len(OPTIMIZERS) > 60


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "prodigy"])
def test_with_zero_gradients_moving_statistics_move_no_parameters(name):
    """But for weight decay, which moves them as far as it does in p."""
    tx = in_zspace(OPTIMIZERS[name](), bnp(decay=0.5))
    drifting, still = moved(name, tx, stats), moved(name, tx, lambda t: None)
    for one, two in zip(jax.tree.leaves(drifting), jax.tree.leaves(still), strict=True):
        np.testing.assert_allclose(one, two, rtol=0.0, atol=5e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_cannot_run_in_z(name):
    for tx in (REFUSED[name](), optax.chain(optax.identity(), REFUSED[name]())):
        message = f"`{name.replace('scale_by_', '')}` cannot run inside `in_zspace`.*Use an opt"
        with pytest.raises(ValueError, match=message):
            in_zspace(tx, bnp()).init(PARAMS)


@pytest.mark.parametrize("name", STORING)
def test_optimizers_that_store_parameters_train_while_statistics_move(name):
    x = jnp.array([[1.0, 5.0, -2.0], [3.0, 4.0, -2.5], [2.0, 6.0, -1.5], [2.0, 5.0, -2.0]])

    def loss_fn(p):
        return jnp.mean((x @ p["kernel"] + p["bias"][None] - x[:, :2]) ** 2)

    tx = in_zspace(STORING[name](), bnp(decay=0.5))

    @jax.jit
    def step(params, state):
        _, grads, batch = bnp_optax.value_and_grad(loss_fn)(params)
        extra = extra_of(name, loss_fn, params)
        updates, state = tx.update(grads, state, params, layer_stats=batch, **extra)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(30):
        params, state = step(params, state)
    # Those that find their own learning rate start slowly.
    assert float(loss_fn(params)) < 0.9999 * float(loss_fn(PARAMS))


def test_points_are_followed_into_a_jitted_init():
    inner = STORING["schedule_free"]()
    jitted = optax.GradientTransformationExtraArgs(jax.jit(inner.init), inner.update)
    tx = in_zspace(jitted, bnp(decay=0.5))
    for one, two in zip(*map(jax.tree.leaves, (moved("", tx, stats), PARAMS)), strict=True):
        np.testing.assert_allclose(one, two, atol=5e-6)


@pytest.mark.parametrize("name", ["schedule_free", "mechanize", "lbfgs", "prodigy"])
def test_parameters_that_are_kept_in_another_form_are_refused(name):
    message = "state keeps at .*another form than theirs, such as `optax.flatten` makes.*Leave out"
    with pytest.raises(ValueError, match=message):
        in_zspace(optax.flatten(STORING[name]()), bnp()).init(PARAMS)


@pytest.mark.parametrize("jitted", [False, True])
def test_what_an_optimizer_makes_of_parameters_is_told_by_its_place(jitted):
    def init(params):
        halves = jax.tree.map(lambda p: 0.5 * p, params)
        return {"start": params, "halves": halves, "zeros": jax.tree.map(jnp.zeros_like, params)}

    inner = optax.GradientTransformation(
        jax.jit(init) if jitted else init, lambda updates, state, params=None: (updates, state)
    )
    message = r"keeps at `\['halves'\]\['bias'\]`, `\['halves'\]\['kernel'\]` parameters"
    with pytest.raises(ValueError, match=message):
        in_zspace(inner, bnp()).init(PARAMS)


def test_a_norm_of_the_parameters_and_a_flattened_memory_may_be_kept():
    for inner in (
        optax.contrib.dog(1.0, init_step=("heuristic", 1e-6)),
        optax.scale_by_distance_over_gradients(),
        optax.flatten(optax.adam(0.1)),
    ):
        in_zspace(inner, bnp()).init(PARAMS)


def test_the_last_parameters_of_a_masked_lbfgs_are_carried():
    inner = optax.masked(STORING["lbfgs"](), {"kernel": True, "bias": False})
    tx = in_zspace(inner, bnp(decay=0.5))
    state = tx.init(PARAMS)
    for t in range(3):
        _, state = tx.update(ZEROS, state, PARAMS, layer_stats=stats(t))
    (memory,) = (
        node
        for node in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "diff_params_memory"))
        if hasattr(node, "diff_params_memory")
    )
    # P moved z and not p, so no difference of parameters is to be remembered.
    np.testing.assert_allclose(memory.diff_params_memory["kernel"], 0.0, atol=5e-6)


@pytest.mark.parametrize("name", ["obj_fn", "value_fn"])
def test_functions_of_the_parameters_become_functions_of_z(name):
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(z=params, value=extra[name](params))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = in_zspace(inner, bnp(decay=0.0))
    loss_fn = lambda p: jnp.sum(p["kernel"] ** 2) + jnp.sum(p["bias"])  # noqa: E731
    tx.update(ZEROS, tx.init(PARAMS), PARAMS, layer_stats=stats(1), **{name: loss_fn})
    assert not np.allclose(seen["z"]["kernel"], PARAMS["kernel"], rtol=0.1)
    np.testing.assert_allclose(seen["value"], loss_fn(PARAMS), rtol=1e-5)


def test_sophia_in_z_is_sophia_of_the_loss_of_z():
    scale = jnp.array([[1.0], [3.0], [0.2]])
    loss_fn = lambda p: jnp.sum(scale * (p["kernel"] - 1.0) ** 4) + jnp.sum(p["bias"] ** 2)  # noqa: E731
    inner = optax.contrib.sophia(0.1, gamma=20.0, update_interval=1)
    layer = Layer("kernel", "bias", (-2,), kernel_shape=(3, 2))
    fixed = {"kernel": dataclasses.replace(stats(1.0)["kernel"], layer=layer)}
    P = bnp(fixed=fixed, scale=False)
    tx, op = in_zspace(inner, P), P.operator(P.init(PARAMS))
    in_z = lambda z: loss_fn(op.mv(z))  # noqa: E731
    p, state = PARAMS, tx.init(PARAMS)
    z, z_state = op.solve(p), inner.init(op.solve(p))
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss_fn)(p), state, p, layer_stats=None, obj_fn=loss_fn)
        p = optax.apply_updates(p, updates)
        updates, z_state = inner.update(jax.grad(in_z)(z), z_state, z, obj_fn=in_z)
        z = optax.apply_updates(z, updates)
    for one, two in zip(*map(jax.tree.leaves, (p, op.mv(z))), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_a_point_of_some_leaves_only_is_carried_with_the_others():
    mask = {"kernel": False, "bias": True}
    inner = optax.masked(STORING["schedule_free"](), mask)
    tx = in_zspace(inner, bnp(decay=0.5))
    for one, two in zip(*map(jax.tree.leaves, (moved("", tx, stats), PARAMS)), strict=True):
        np.testing.assert_allclose(one, two, atol=5e-6)


def test_the_gradient_that_a_line_search_keeps_is_not_taken_for_one_in_p():
    def loss_fn(p):
        return jnp.sum((p["kernel"] - 1.0) ** 2) + jnp.sum(jnp.cosh(p["bias"]))

    def trained(evaluate):
        tx = in_zspace(optax.lbfgs(), bnp(decay=0.0))
        params, state = PARAMS, tx.init(PARAMS)
        for t in range(4):
            value, grad = evaluate(params, state)
            extra = {"value": value, "grad": grad, "value_fn": loss_fn}
            given = stats(1.0) if t == 0 else None
            updates, state = tx.update(grad, state, params, layer_stats=given, **extra)
            params = optax.apply_updates(params, updates)
        return params

    from_state = optax.value_and_grad_from_state(loss_fn)
    one = trained(lambda params, state: from_state(params, state=state))
    two = trained(lambda params, state: jax.value_and_grad(loss_fn)(params))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)
