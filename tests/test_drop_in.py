"""`drop_in`: trainers that own the step end where the explicit way does."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from bnp_cases import assert_trees_close, assert_trees_equal
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from quick_jit import jit

import bnp_optax

N_BATCH = 16


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (3,))(x))
        return nn.Dense(2, use_bias=False)(nn.tanh(nn.Dense(5)(x.reshape(len(x), -1))))


MODEL = Net()
BATCHES = np.random.default_rng(0).normal(size=(10, N_BATCH, 6, 3)).astype(np.float32) * 2 + 3
BARE = MODEL.init(jax.random.key(0), BATCHES[0])["params"]


def bare_loss(params, x):
    return jnp.mean((MODEL.apply({"params": params}, x) - 1.0) ** 2)


LAYERS = bnp_optax.find_layers(bare_loss, BARE, BATCHES[0])
OPTIMIZERS = {
    "bnp_sgd": lambda: bnp_optax.bnp_sgd(0.1, layers=LAYERS, batch_size=N_BATCH),
    # At Adam's usual eps, entries of the gradient that are zero but for rounding move too.
    "bnp_adam": lambda: bnp_optax.bnp_adam(1e-2, eps=1e-3, layers=LAYERS, batch_size=N_BATCH),
    "bnp_adamw": lambda: bnp_optax.bnp_adamw(1e-2, eps=1e-3, layers=LAYERS, batch_size=N_BATCH),
}


def wrapped(name="bnp_adam", loss_fn=bare_loss, args=(), **options) -> bnp_optax.DropIn:
    return bnp_optax.drop_in(loss_fn, BARE, OPTIMIZERS[name](), *(args or BATCHES[:1]), **options)


@functools.cache
def explicit(name: str = "bnp_adam", n_steps: int = 10) -> Any:
    """Parameters and state after steps with `value_and_grad`."""
    tx = OPTIMIZERS[name]()
    params, state = BARE, jit(tx.init)(BARE)

    @jit
    def step(params, state, x):
        _, grads, stats = bnp_optax.value_and_grad(bare_loss, layers=LAYERS)(params, x)
        updates, state = tx.update(grads, state, params, layer_stats=stats)
        return optax.apply_updates(params, updates), state

    for x in BATCHES[:n_steps]:
        params, state = step(params, state, x)
    return params, state


class Trainer:
    """One that takes the step itself, as they are written."""

    def __init__(self, loss_fn, params, tx, change=lambda grads: grads):
        self.params, self.state = params, jit(tx.init)(params)

        @functools.partial(jit, donate_argnums=(0, 1))
        def step(params, state, batch):
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            updates, state = tx.update(change(grads), state, params)
            return optax.apply_updates(params, updates), state, loss

        self.step = step

    def fit(self, batches):
        # Donated arrays are gone, and the start is used again.
        self.params, self.state = jax.tree.map(jnp.array, (self.params, self.state))
        for batch in batches:
            self.params, self.state, _ = self.step(self.params, self.state, batch)
        return self


def assert_ends_there(params, name="bnp_adam", n_steps=10, rtol=1e-6):
    assert set(params) == {"params", "layer_stats"}
    assert not params["layer_stats"].any()
    want, _ = explicit(name, n_steps)
    assert_trees_close(bnp_optax.bare_params(params), want, rtol)
    # What the tolerance is to tell apart.
    assert optax.tree.norm(optax.tree.sub(want, BARE)) > 1e-2 * optax.tree.norm(BARE)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_of_a_trainer_are_those_of_the_explicit_way(name):
    trainer = Trainer(*wrapped(name)).fit(BATCHES)
    assert_ends_there(trainer.params, name)
    assert_trees_close(trainer.state, explicit(name)[1], 1e-5)


def test_the_train_state_of_flax():
    loss_fn, params, tx = wrapped()
    state = TrainState.create(apply_fn=MODEL.apply, params=params, tx=tx)

    @jit
    def step(state, x):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, x)
        return state.apply_gradients(grads=grads), loss

    for x in BATCHES:
        state, _ = step(state, x)
    assert_ends_there(state.params)


@pytest.mark.parametrize("k", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_multi_steps_of_optax_take_the_step_of_the_whole_batch(name, k):
    loss_fn, params, tx = wrapped(name)
    parts = BATCHES.reshape(len(BATCHES) * k, N_BATCH // k, *BATCHES.shape[2:])
    assert_ends_there(Trainer(loss_fn, params, optax.MultiSteps(tx, k)).fit(parts).params, name)


def test_microbatches_in_a_scan_and_sums_in_place_of_means():
    loss_fn, params, tx = wrapped()

    def mean_loss(params, x):
        parts = x.reshape(4, -1, *x.shape[1:])
        _, losses = jax.lax.scan(lambda _, part: (None, loss_fn(params, part)), None, parts)
        return losses.mean()

    assert_ends_there(Trainer(mean_loss, params, tx).fit(BATCHES).params)

    def summed_gradients(params, x):
        parts = x.reshape(4, -1, *x.shape[1:])
        grads = jax.vmap(jax.grad(loss_fn), (None, 0))(params, parts)
        return jax.tree.map(lambda g: g.sum(0), grads)

    grads = jit(summed_gradients)(params, BATCHES[0])
    divided = {**grads, "params": jax.tree.map(lambda g: g / 4, grads["params"])}
    updates, _ = tx.update(divided, jit(tx.init)(params), params)
    assert_ends_there(optax.apply_updates(params, updates), n_steps=1)


def test_losses_of_groups_under_vmap():
    loss_fn, params, tx = wrapped()

    def mean_loss(params, x):
        return jax.vmap(lambda rows: loss_fn(params, rows))(x.reshape(8, 2, *x.shape[1:])).mean()

    assert_ends_there(Trainer(mean_loss, params, tx).fit(BATCHES).params)


@pytest.mark.parametrize("scale", [-1.0, 2.0**15])
def test_a_scaled_loss_has_the_same_statistics(scale):
    loss_fn, params, tx = wrapped()

    def scaled(params, x):
        return scale * loss_fn(params, x)

    def unscaled(grads):
        return jax.tree.map(lambda g: g / scale, grads)

    def unscaled_but_statistics(grads):
        return {**grads, "params": unscaled(grads["params"])}

    for change in (unscaled, unscaled_but_statistics):
        assert_ends_there(Trainer(scaled, params, tx, change).fit(BATCHES).params)


def test_the_dynamic_scale_of_flax():
    loss_fn, params, tx = wrapped()
    scale, state = DynamicScale(scale=2.0**16), jit(tx.init)(params)
    for x in BATCHES[:2]:
        scale, finite, _, grads = scale.value_and_grad(loss_fn)(params, x)
        assert finite
        updates, state = jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_ends_there(params, n_steps=2)


@pytest.mark.parametrize(
    "clip", [optax.clip_by_global_norm(0.05), optax.clip(0.01)], ids=["global norm", "entries"]
)
def test_clipping_inside_and_outside_is_that_of_the_bare_gradient(clip):
    def clipped(grads):
        return clip.update(grads, clip.init(grads))[0]

    preconditioner = bnp_optax.bnp(layers=LAYERS)
    with_clip = bnp_optax.in_zspace(optax.sgd(0.1), preconditioner, before=clip)
    params, state = BARE, jit(with_clip.init)(BARE)
    for x in BATCHES[:3]:
        _, grads, stats = jit(bnp_optax.value_and_grad(bare_loss))(params, x)
        assert optax.tree.norm(clipped(grads)) < 0.9 * optax.tree.norm(grads)
        updates, state = jit(with_clip.update)(grads, state, params, layer_stats=stats)
        params = optax.apply_updates(params, updates)

    without = bnp_optax.in_zspace(optax.sgd(0.1), preconditioner)
    loss_fn, start, inside = bnp_optax.drop_in(bare_loss, BARE, with_clip, BATCHES[0])
    outside = bnp_optax.drop_in(bare_loss, BARE, without, BATCHES[0]).tx
    for trainer in (
        Trainer(loss_fn, start, inside),
        Trainer(loss_fn, start, outside, clipped),
        Trainer(loss_fn, start, optax.chain(clip, outside)),
    ):
        found = trainer.fit(BATCHES[:3])
        assert_trees_close(bnp_optax.bare_params(found.params), params, 1e-6)


def test_statistics_do_not_count_in_the_norm_of_the_gradients():
    loss_fn, params, _ = wrapped()
    norm = optax.tree.norm(jit(jax.grad(loss_fn))(params, BATCHES[0] * 1e3))
    want = optax.tree.norm(jit(jax.grad(bare_loss))(BARE, BATCHES[0] * 1e3))
    assert float(norm) == pytest.approx(float(want), rel=1e-6)


def test_decay_masks_and_partitions_see_the_bare_parameters():
    def kernels(params):
        assert set(params) == set(BARE)
        return jax.tree.map(lambda p: p.ndim > 1, params)

    # Adam's usual eps makes steps of what rounding leaves of gradients near zero.
    decayed = bnp_optax.bnp_adamw(1e-2, eps=1e-3, weight_decay=0.1, mask=kernels, layers=LAYERS)
    labels = {**jax.tree.map(lambda _: "train", BARE), "Dense_0": {"kernel": "freeze"}}
    but_one = {name: layer for name, layer in LAYERS.items() if name != "Dense_0/kernel"}
    frozen = optax.partition(
        {
            "train": bnp_optax.bnp_adam(1e-2, eps=1e-3, layers=but_one),
            "freeze": optax.set_to_zero(),
        },
        labels,
    )
    for tx, layers in ((decayed, LAYERS), (frozen, but_one)):
        _, grads, stats = jit(bnp_optax.value_and_grad(bare_loss, layers=layers))(BARE, BATCHES[0])
        want, _ = jit(tx.update)(grads, jit(tx.init)(BARE), BARE, layer_stats=stats)
        loss_fn, params, in_trainer = bnp_optax.drop_in(
            bare_loss, BARE, tx, BATCHES[0], layers=layers
        )
        grads = jit(jax.grad(loss_fn))(params, BATCHES[0])
        got, _ = jit(in_trainer.update)(grads, jit(in_trainer.init)(params), params)
        assert_trees_close(bnp_optax.bare_params(got), want, 1e-6)
        assert want["Dense_0"]["kernel"].any() == (tx is decayed)


# ---------------------------------------------------------------------------------------------
# Losses.
# ---------------------------------------------------------------------------------------------


def rich_loss(params, x, key, n, name):
    """Arguments of every kind; `aux` with what is no array."""
    x = x + 0.01 * jax.random.normal(key, x.shape)
    out = MODEL.apply({"params": params}, x)
    return jnp.mean((out - n) ** 2), {"out": out, "n": n + 1, "name": name}


RICH_ARGS = (jax.ShapeDtypeStruct((2, 6, 3), jnp.float32), jax.random.key(3), 2.0, "a")


def test_arguments_and_aux_are_those_of_the_loss():
    loss_fn, params, _ = wrapped(loss_fn=rich_loss, args=RICH_ARGS, has_aux=True)
    args = (BATCHES[0], jax.random.key(3), jnp.float32(2))
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *args, "a")
    (want, want_aux), want_grads = jax.value_and_grad(rich_loss, has_aux=True)(BARE, *args, "a")
    assert float(loss) == pytest.approx(float(want), rel=1e-6)
    assert (aux.pop("name"), want_aux.pop("name")) == ("a", "a")
    assert_trees_close(aux, want_aux, 1e-6)
    assert_trees_close(bnp_optax.bare_params(grads), want_grads, 1e-6)
    assert loss_fn(params, *args, "b")[1]["name"] == "b"


def test_derivatives_by_arguments_and_through_aux_are_those_of_the_loss():
    loss_fn, params, _ = wrapped(loss_fn=rich_loss, args=RICH_ARGS, has_aux=True)

    def total(loss_fn, params, x):
        loss, aux = loss_fn(params, x, jax.random.key(3), 2, "a")
        return loss + jnp.sum(aux["out"] ** 2)

    got = jit(jax.grad(functools.partial(total, loss_fn), (0, 1)))(params, BATCHES[0])
    want = jit(jax.grad(functools.partial(total, rich_loss), (0, 1)))(BARE, BATCHES[0])
    assert_trees_close((bnp_optax.bare_params(got[0]), got[1]), want, 1e-6)


def test_derivatives_of_any_order_and_mode_are_those_of_the_bare_loss():
    loss_fn, params, _ = wrapped()
    x = BATCHES[0]
    v = jax.tree.map(jnp.ones_like, BARE)
    in_wrapped = {"params": v, "layer_stats": jnp.zeros_like(params["layer_stats"])}
    want_dot = jax.jvp(lambda p: bare_loss(p, x), (BARE,), (v,))
    assert_trees_close(jax.jvp(lambda p: loss_fn(p, x), (params,), (in_wrapped,)), want_dot, 1e-6)

    def by_forward(loss_fn, params, v):
        return jax.jvp(jax.grad(lambda p: loss_fn(p, x)), (params,), (v,))[1]

    def by_reverse(loss_fn, params, v):
        return jax.grad(lambda p: optax.tree.vdot(jax.grad(loss_fn)(p, x), v))(params)

    want = by_forward(bare_loss, BARE, v)
    for product in (by_forward, by_reverse):
        got = product(loss_fn, params, in_wrapped)
        assert_trees_close(bnp_optax.bare_params(got), want, 1e-5)
        assert not got["layer_stats"].any()


@pytest.mark.parametrize("around", [jax.jit, jax.checkpoint])
def test_under_jit_and_checkpoint_inside_the_gradient(around):
    loss_fn, params, tx = wrapped()
    assert_ends_there(Trainer(around(loss_fn), params, tx).fit(BATCHES).params)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8)(nn.tanh(nn.Dense(16)(x))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return nn.Dense(2)(block()(nn.Dense(8)(x), None)[0])


def scanned_loss(params, x):
    return jnp.mean(Scanned().apply({"params": params}, x) ** 2)


def test_costs_the_loss_alone_where_nothing_is_differentiated_and_the_capture_elsewhere():
    x = jnp.ones((32, 4))
    bare = Scanned().init(jax.random.key(0), x)["params"]
    loss_fn, params, _ = bnp_optax.drop_in(scanned_loss, bare, optax.identity(), x)

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    assert flops(loss_fn, params, x) == flops(scanned_loss, bare, x)
    captured = flops(bnp_optax.value_and_grad(scanned_loss), bare, x)
    assert flops(jax.value_and_grad(loss_fn), params, x) == pytest.approx(captured, rel=0.01)
    assert captured > 1.5 * flops(scanned_loss, bare, x)


def test_in_float64_the_gradient_is_jax_s_to_the_last_digits(x64):
    bare, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (BARE, BATCHES[0]))
    loss_fn, params, tx = bnp_optax.drop_in(bare_loss, bare, OPTIMIZERS["bnp_adam"](), x)
    grads = jit(jax.grad(loss_fn))(params, x)
    assert_trees_close(bnp_optax.bare_params(grads), jax.grad(bare_loss)(bare, x), 1e-14)
    _, want, stats = jit(bnp_optax.value_and_grad(bare_loss))(bare, x)
    explicit_tx = OPTIMIZERS["bnp_adam"]()
    want, _ = jit(explicit_tx.update)(want, jit(explicit_tx.init)(bare), bare, layer_stats=stats)
    got, _ = jit(tx.update)(grads, jit(tx.init)(params), params)
    assert_trees_close(bnp_optax.bare_params(got), want, 1e-10)


def test_options_of_the_capture():
    fixed = bnp_optax.dataset_statistics(bare_loss, BARE, list(BATCHES[:2]))
    options = {"sample_rows": 8, "fixed": fixed}
    tx = OPTIMIZERS["bnp_adam"]()
    _, grads, stats = jit(bnp_optax.value_and_grad(bare_loss, layers=LAYERS, **options))(
        BARE, BATCHES[0]
    )
    want, _ = jit(tx.update)(grads, jit(tx.init)(BARE), BARE, layer_stats=stats)
    loss_fn, params, in_trainer = wrapped(**options)
    grads = jit(jax.grad(loss_fn))(params, BATCHES[0])
    got, _ = jit(in_trainer.update)(grads, jit(in_trainer.init)(params), params)
    # Statistics travel in float32; fixed means are far from the batch's, where rounding cancels.
    assert_trees_close(bnp_optax.bare_params(got), want, 1e-5)


# ---------------------------------------------------------------------------------------------
# States.
# ---------------------------------------------------------------------------------------------


def test_without_statistics_the_running_ones_are_reused():
    loss_fn, params, tx = wrapped()
    grads = jit(jax.grad(loss_fn))(params, BATCHES[0])
    _, state = jit(tx.update)(grads, jit(tx.init)(params), params)
    others = jax.grad(lambda p: bare_loss(p["params"], BATCHES[1]))(params)
    got, after = jit(tx.update)(others, state, params)
    bare_tx = OPTIMIZERS["bnp_adam"]()
    want, _ = jit(bare_tx.update)(others["params"], state, BARE, layer_stats=None)
    assert_trees_close(bnp_optax.bare_params(got), want, 1e-6)
    assert_trees_equal(after.preconditioner.mean, state.preconditioner.mean)
    assert int(bnp_optax.metrics(tx.init(params))["layers_never_seen"]) == 3


def test_a_batch_that_is_not_finite_moves_no_running_statistics():
    loss_fn, params, tx = wrapped()
    _, state = jit(tx.update)(
        jit(jax.grad(loss_fn))(params, BATCHES[0]), jit(tx.init)(params), params
    )
    bad = np.full_like(BATCHES[1], np.nan)
    _, after = jit(tx.update)(jit(jax.grad(loss_fn))(params, bad), state, params)
    assert_trees_equal(after.preconditioner.mean, state.preconditioner.mean)
    assert int(bnp_optax.metrics(after)["batches_rejected"]) == 3
    skipping = optax.MultiSteps(tx, 2, should_skip_update_fn=optax.skip_not_finite)
    parts = [bad[:8], BATCHES[0][:8], bad[:8], BATCHES[0][8:]]
    found = Trainer(loss_fn, params, skipping).fit(parts)
    assert_ends_there(found.params, n_steps=1)


@pytest.mark.parametrize("library", ["flax", "orbax"])
def test_checkpoints(library, tmp_path):
    loss_fn, params, tx = wrapped()
    first = Trainer(loss_fn, params, tx).fit(BATCHES[:4])
    saved, like = (first.params, first.state), (params, jit(tx.init)(params))
    if library == "flax":
        restored = flax.serialization.from_bytes(like, flax.serialization.to_bytes(saved))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", saved)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", like)
    assert_trees_equal(restored, saved)
    second = Trainer(loss_fn, params, tx)
    second.params, second.state = restored
    assert_trees_equal(second.fit(BATCHES[4:]).params, first.fit(BATCHES[4:]).params)
    assert_ends_there(second.params)


def test_hyperparameters_and_params_of_the_state():
    def adam(learning_rate):
        return bnp_optax.bnp_adam(learning_rate, eps=1e-3, layers=LAYERS, batch_size=N_BATCH)

    injected = optax.inject_hyperparams(adam)(learning_rate=1e-2)
    loss_fn, params, tx = bnp_optax.drop_in(bare_loss, BARE, injected, BATCHES[0])
    trainer = Trainer(loss_fn, params, tx).fit(BATCHES)
    assert_ends_there(trainer.params)
    assert float(trainer.state.hyperparams["learning_rate"]) == pytest.approx(1e-2)
    seen: list[tuple[int, ...]] = []
    mapped = optax.tree.map_params(tx, lambda a: seen.append(a.shape) or a, trainer.state)
    assert jax.tree.structure(mapped) == jax.tree.structure(trainer.state)
    # The two moments of Adam among them.
    assert seen.count(BARE["Dense_0"]["kernel"].shape) == 2


class Recorded(NamedTuple):
    n: int = 0


def test_functions_of_parameters_are_given_bare_ones():
    seen = {}

    def update(updates, state, params=None, *, value_fn, grad_fn, grad, value, layer_stats):
        seen.update(value=value, grad=grad, fn=value_fn(params), by=grad_fn(params))
        assert set(layer_stats) == set(LAYERS)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: Recorded(), update)
    loss_fn, params, tx = bnp_optax.drop_in(bare_loss, BARE, tx, BATCHES[0])
    value_fn = functools.partial(loss_fn, x=BATCHES[0])
    value, grads = jax.value_and_grad(value_fn)(params)
    tx.update(
        grads,
        jit(tx.init)(params),
        params,
        value=value,
        grad=grads,
        value_fn=value_fn,
        grad_fn=jax.grad(value_fn),
    )
    assert float(seen["value"]) == pytest.approx(float(seen["fn"]), rel=1e-6)
    assert_trees_equal(seen["grad"], bnp_optax.bare_params(grads))
    assert_trees_close(seen["by"], bnp_optax.bare_params(grads), 1e-6)


# ---------------------------------------------------------------------------------------------
# Eight devices.
# ---------------------------------------------------------------------------------------------


def test_a_sharded_batch_under_jit():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    loss_fn, params, tx = wrapped()
    batches = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in BATCHES]
    trainer = Trainer(loss_fn, params, tx)
    trainer.params, trainer.state = jax.device_put(
        (trainer.params, trainer.state), NamedSharding(mesh, P())
    )
    assert_ends_there(trainer.fit(batches).params)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_also_where_shardings_are_types(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    bare = {"w": jnp.ones((8, 4)) / 9, "b": jnp.zeros(4), "v": jnp.ones((4, 1))}
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)

    def loss_fn(params, x):
        return jnp.mean((jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"] - 1.0) ** 2)

    layers = bnp_optax.find_layers(loss_fn, bare, x)
    tx = bnp_optax.bnp_adam(1e-2, eps=1e-3, layers=layers)
    loss_fn, params, tx = bnp_optax.drop_in(loss_fn, bare, tx, x)
    step = jit(stepped_on_devices(tx, jax.grad(loss_fn)))
    want, _ = step(params, jit(tx.init)(params), x)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        params = jax.device_put(params, NamedSharding(mesh, P()))
        params["params"]["w"] = jax.device_put(bare["w"], NamedSharding(mesh, P("data")))
        got, _ = step(params, jit(tx.init)(params), x)
    assert_trees_close(got, want, 1e-5)
    assert float(jnp.abs(want["params"]["w"] - bare["w"]).max()) > 1e-3


def stepped_on_devices(tx, grad_fn):
    def step(params, state, x):
        grads = grad_fn(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def test_gradients_averaged_by_pmean_in_pmap():
    loss_fn, params, tx = wrapped()
    step = stepped_on_devices(tx, lambda p, x: jax.lax.pmean(jax.grad(loss_fn)(p, x), "data"))
    mapped = jax.pmap(step, "data", in_axes=(None, None, 0), out_axes=None)
    state = jit(tx.init)(params)
    for x in BATCHES:
        params, state = mapped(params, state, x.reshape(8, 2, *x.shape[1:]))
    assert_ends_there(params)


def varying(a):
    """What is the same on all devices, with a gradient of its own on each."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(a, "data", to="varying")
    return jax.lax.pvary(a, "data")  # before jax 0.9


@pytest.mark.parametrize("by", ["pmean", "mean loss", "unchecked pmean"])
def test_gradients_averaged_in_shard_map(by):
    loss_fn, params, tx = wrapped()

    def grad_fn(p, x):
        if by == "mean loss":  # JAX adds up the gradients of what is the same on all devices.
            return jax.grad(lambda p: jax.lax.pmean(loss_fn(p, x), "data"))(p)
        if by == "pmean":
            p = jax.tree.map(varying, p)
        return jax.lax.pmean(jax.grad(loss_fn)(p, x), "data")

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jit(
        jax.shard_map(
            stepped_on_devices(tx, grad_fn),
            mesh=mesh,
            in_specs=(P(), P(), P("data")),
            out_specs=P(),
            check_vma=by != "unchecked pmean",
        )
    )
    state = jit(tx.init)(params)
    for x in BATCHES:
        params, state = mapped(params, state, x)
    assert_ends_there(params)


# ---------------------------------------------------------------------------------------------
# Other frameworks.
# ---------------------------------------------------------------------------------------------


def trained_both_ways(loss_fn, params, x):
    """Parameters after three steps of a trainer, and of the explicit way."""
    layers = bnp_optax.find_layers(loss_fn, params, x)
    tx = bnp_optax.bnp_adam(1e-2, eps=1e-3, layers=layers)
    found = Trainer(*bnp_optax.drop_in(loss_fn, params, tx, x)).fit([x] * 3)
    state = jit(tx.init)(params)
    for _ in range(3):
        _, grads, stats = jit(bnp_optax.value_and_grad(loss_fn))(params, x)
        updates, state = jit(tx.update)(grads, state, params, layer_stats=stats)
        params = optax.apply_updates(params, updates)
    return bnp_optax.bare_params(found.params), params


def test_equinox():
    mlp = eqx.nn.MLP(3, 2, width_size=8, depth=1, key=jax.random.key(0))
    params, static = eqx.partition(mlp, eqx.is_inexact_array)

    def loss_fn(params, x):
        return jnp.mean(jax.vmap(eqx.combine(params, static))(x) ** 2)

    got, want = trained_both_ways(loss_fn, params, BATCHES[0][:, 0])
    assert_trees_close(got, want, 1e-6)
    assert eqx.combine(got, static)(jnp.ones(3)).shape == (2,)


def test_nnx():
    graphdef, params = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)

    def loss_fn(params, x):
        return jnp.mean((nnx.merge(graphdef, params)(x) - 1.0) ** 2)

    got, want = trained_both_ways(loss_fn, params, BATCHES[0][:, 0])
    assert_trees_close(got, want, 1e-6)
    assert nnx.merge(graphdef, got)(jnp.ones((1, 3))).shape == (1, 2)


# ---------------------------------------------------------------------------------------------
# Errors.
# ---------------------------------------------------------------------------------------------


def test_layers_that_are_not_layers():
    with pytest.raises(ValueError, match=r"`layers` must be a dict of `Layer`.*got a `list`"):
        wrapped(layers=["Dense_0/kernel"])


def test_parameters_that_are_not_wrapped():
    loss_fn, params, tx = wrapped()
    message = r"a dict of `params` and `layer_stats`; got a `dict` with the keys \['Conv_0'"
    for call in (
        lambda: loss_fn(BARE, BATCHES[0]),
        lambda: jit(tx.init)(BARE),
        lambda: tx.update(BARE, jit(tx.init)(params), params),
        lambda: tx.update(params, jit(tx.init)(params), BARE),
        lambda: bnp_optax.bare_params(BARE),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="got a `ArrayImpl`"):
        bnp_optax.bare_params(jnp.ones(3))


def test_parameters_of_other_layers():
    one = {"Dense_0/kernel": LAYERS["Dense_0/kernel"]}
    other = bnp_optax.drop_in(bare_loss, BARE, optax.identity(), BATCHES[0], layers=one)
    loss_fn, _, tx = wrapped()
    message = r"`layer_stats` of shape \(17,\), but its layers need \(100,\)"
    with pytest.raises(ValueError, match=message):
        loss_fn(other.params, BATCHES[0])
    with pytest.raises(ValueError, match=message):
        tx.init(other.params)


def test_statistics_of_other_layers_than_those_of_the_start():
    def either(params, x, which):
        return jnp.mean(x @ params[which])

    params = {"one": jnp.ones((3, 2)), "two": jnp.ones((3, 2))}
    x = jnp.ones((4, 3))
    loss_fn, params, _ = bnp_optax.drop_in(either, params, optax.identity(), x, "one")
    message = r"statistics of the layers `two`, which are not those.*was given: `one`"
    with pytest.raises(ValueError, match=message):
        loss_fn(params, x, "two")


def test_a_batch_of_other_sizes_has_its_own_number_of_examples():
    """`count` is of positions too: of twice as long sequences it is twice that."""

    def loss_fn(params, x):
        return jnp.mean(nn.Conv(2, (3,)).apply({"params": params}, x) ** 2)

    params = nn.Conv(2, (3,)).init(jax.random.key(0), BATCHES[0])["params"]
    seen = {}

    def update(updates, state, params=None, *, layer_stats):
        seen.update(layer_stats)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: Recorded(), update)
    loss_fn, params, tx = bnp_optax.drop_in(loss_fn, params, tx, BATCHES[0])
    x = np.concatenate([BATCHES[0], BATCHES[1]], axis=1)[:5]
    tx.update(jit(jax.grad(loss_fn))(params, x), tx.init(params), params)
    assert float(seen["kernel"].batch_size) == pytest.approx(5.0)
    np.testing.assert_allclose(seen["kernel"].mean.ravel(), x.mean((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_fewer_digits_than_variances_need(dtype):
    loss_fn, params, tx = wrapped()
    half = jax.tree.map(lambda a: a.astype(dtype), params)
    message = f"got `layer_stats` in {jnp.dtype(dtype)}, where variances have no digits left"
    with pytest.raises(ValueError, match=message):
        loss_fn(half, BATCHES[0])
    with pytest.raises(ValueError, match=message):
        tx.update(half, jit(tx.init)(params), params)


def test_an_option_that_is_not_one_and_a_loss_without_its_aux():
    with pytest.raises(ValueError, match="`sample_rows` must be an integer > 0"):
        wrapped(sample_rows=0)
    with pytest.raises(TypeError, match="With `has_aux=True` the loss must return"):
        wrapped(has_aux=True)
