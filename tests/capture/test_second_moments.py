"""Second moments of layers' inputs, against the rows themselves in float64."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from support.quick_jit import jit
from support.second_moment_cases import assert_of_rows, captured, draw, linen

import bnp_optax
from bnp_optax import flax_nnx


def test_dense():
    x = draw(0, 20, 5)
    assert_of_rows(linen(nn.Dense(3), x), x)


def test_a_kernel_held_the_other_way_round():
    x, params = draw(0, 20, 5), {"w": draw(1, 3, 5), "b": jnp.zeros(3)}
    stats = captured(lambda p, x: jnp.mean((x @ p["w"].T + p["b"][None]) ** 2), params, x)
    assert_of_rows(stats["w"], x)


def test_the_output_projection_of_attention():
    x = draw(0, 4, 6, 2, 3)  # Examples, positions, heads, features.
    stats = linen(nn.DenseGeneral(5, axis=(-2, -1)), x)
    assert stats.layer.kernel_shape == (2, 3, 5)
    assert_of_rows(stats, np.reshape(x, (24, 6)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(x.shape[-1])(x)), None


def test_layers_stacked_by_scan():
    x = draw(0, 12, 4)
    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    params = stack.init(jax.random.key(0), x, None)["params"]
    loss_fn = lambda p, x: jnp.mean(stack.apply({"params": p}, x, None)[0] ** 2)  # noqa: E731
    stats = captured(loss_fn, params, x)["Dense_0/kernel"]
    rows, h = [], np.asarray(x, np.float64)
    for kernel, bias in zip(*(params["Dense_0"][k] for k in ("kernel", "bias")), strict=True):
        rows.append(h)
        h = np.tanh(h @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64))
    assert_of_rows(stats, np.stack(rows))


def test_layers_stacked_by_vmap():
    x, params = draw(0, 3, 12, 4), {"w": draw(1, 3, 4, 2)}
    loss_fn = lambda p, x: jnp.mean(jax.vmap(jnp.dot)(x, p["w"]) ** 2)  # noqa: E731
    assert_of_rows(captured(loss_fn, params, x)["w"], x)


def test_steps_of_a_recurrent_network_are_rows():
    x, params = draw(0, 7, 6, 3), {"w": draw(1, 3, 2)}

    def loss_fn(p, x):
        steps = jax.lax.scan(lambda c, x: (c + jnp.mean((x @ p["w"]) ** 2), None), 0.0, x)
        return steps[0]

    assert_of_rows(captured(loss_fn, params, x)["w"], np.reshape(x, (42, 3)))


def test_calls_of_one_layer_are_of_one():
    x, y, params = draw(0, 7, 3), draw(1, 5, 3) * 2, {"w": draw(2, 3, 2)}
    loss_fn = lambda p, x, y: jnp.mean((x @ p["w"]) ** 2) + jnp.mean((y @ p["w"]) ** 2)  # noqa: E731
    assert_of_rows(captured(loss_fn, params, x, y)["w"], np.concatenate([x, y]))


def test_parts_of_one_kernel_are_one_layer():
    """As of queries, keys and values: no block for each of the outputs."""
    x, params = draw(0, 9, 4), {"w": draw(1, 4, 6)}

    def loss_fn(p, x):
        return sum(jnp.mean((x @ part) ** 2) for part in jnp.split(p["w"], 3, axis=1))

    assert_of_rows(captured(loss_fn, params, x)["w"], x)


def test_parts_of_the_inputs_are_blocks_of_the_matrix():
    x, y, params = draw(0, 9, 2), draw(1, 9, 3), {"w": draw(2, 5, 4)}
    loss_fn = lambda p, x, y: jnp.mean((x @ p["w"][:2] + y @ p["w"][2:]) ** 2)  # noqa: E731
    covariance = np.asarray(captured(loss_fn, params, x, y)["w"].covariance)
    want = np.zeros((5, 5))
    want[:2, :2], want[2:, 2:] = (np.cov(np.asarray(a, np.float64).T, bias=True) for a in (x, y))
    np.testing.assert_allclose(covariance, want, atol=1e-5)


def test_copies_of_a_kernel_that_meet_rows_of_their_own():
    x, params = draw(0, 3, 5, 4), {"w": draw(1, 4, 2)}
    product = jax.jit(lambda w, x: jnp.einsum("bri,bio->bro", x, w))
    loss_fn = lambda p, x: jnp.mean(product(jnp.broadcast_to(p["w"], (3, 4, 2)), x) ** 2)  # noqa: E731
    assert_of_rows(captured(loss_fn, params, x)["w"], np.reshape(x, (15, 4)))


@pytest.mark.parametrize("taken", [0, 1])
def test_a_branch(taken):
    x, params = draw(0, 9, 4), {"w": draw(1, 4, 2)}

    def loss_fn(p, x, index):
        branches = [lambda: jnp.mean((x @ p["w"]) ** 2), lambda: jnp.mean((2 * x @ p["w"]) ** 2)]
        return jax.lax.switch(index, branches)

    assert_of_rows(captured(loss_fn, params, x, taken)["w"], x * (1 + taken))


def test_an_embedding():
    x, params = jnp.array([0, 2, 2, 1, 2]), {"table": draw(0, 4, 3)}
    loss_fn = lambda p, x: jnp.mean(p["table"][x] ** 2)  # noqa: E731
    stats = captured(loss_fn, params, x, embeddings=True)["table"]
    assert_of_rows(stats, np.eye(4)[np.asarray(x)])


def test_bfloat16_inputs_have_float32_moments():
    x, params = draw(0, 64, 4).astype(jnp.bfloat16), {"w": draw(1, 4, 2).astype(jnp.bfloat16)}
    stats = captured(lambda p, x: jnp.mean((x @ p["w"]) ** 2), params, x)["w"]
    assert_of_rows(stats, np.asarray(x, np.float64))


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_covariance_keeps_its_digits_where_the_mean_is_large(offset):
    x = jnp.asarray(np.asarray(draw(0, 500, 3), np.float64) + offset, jnp.float32)
    params = {"w": draw(1, 3, 2)}

    def loss_fn(p, x):
        return jnp.mean((x @ p["w"]) ** 2)

    stats = captured(loss_fn, params, x, second_moment_rows=500)["w"]
    want = np.cov(np.asarray(x, np.float64).T, bias=True)
    assert np.abs(np.asarray(stats.total_covariance) - want).max() <= 1e-3 * np.abs(want).max()


def test_averages_are_moments_of_the_union():
    """Also of the covariance between batches, and whatever part of the batch has which mean."""
    parts = [draw(seed, 20, 4) + 3 * seed for seed in range(4)]
    params = {"w": draw(9, 4, 2)}
    loss_fn = lambda p, x: jnp.mean((x @ p["w"]) ** 2)  # noqa: E731
    every = [captured(loss_fn, params, x)["w"] for x in parts]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *every)
    rows = np.concatenate(parts).astype(np.float64)
    np.testing.assert_allclose(mean.second_moment, rows.T @ rows / 80, rtol=1e-5)
    np.testing.assert_allclose(mean.total_covariance, np.cov(rows.T, bias=True), atol=1e-3)
    np.testing.assert_array_equal(every[0].total_covariance, every[0].covariance)


def test_rows_are_sampled_evenly():
    """Of rows that rise steadily a sample of 64 has the moments, but for 1 / 64."""
    x, params = jnp.linspace(0.0, 1.0, 5000)[:, None], {"w": jnp.ones((1, 2))}
    loss_fn = lambda p, x: jnp.mean((x @ p["w"]) ** 2)  # noqa: E731
    stats = captured(loss_fn, params, x, second_moment_rows=64)["w"]
    np.testing.assert_allclose(stats.second_moment, 1 / 3, rtol=1 / 32)
    np.testing.assert_allclose(stats.rows_mean, 1 / 2, rtol=1 / 64)
    assert abs(float(stats.second_moment[0, 0]) - 1 / 3) > 1e-6


@pytest.mark.parametrize("limit", [1, 16, 1024])
def test_no_more_rows_are_carried_than_asked_for(limit):
    """Inside of a scan over many steps each step gives its part of the rows."""
    x, params = draw(0, 50, 100, 3), {"w": draw(1, 3, 2)}

    def loss_fn(p, x):
        return jax.lax.scan(lambda c, x: (c + jnp.mean((x @ p["w"]) ** 2), None), 0.0, x)[0]

    value_and_grad = bnp_optax.value_and_grad(
        loss_fn, second_moments=True, second_moment_rows=limit
    )
    jaxpr = str(jax.make_jaxpr(value_and_grad)(params, x))
    assert f"f32[50,{max(limit // 50, 1)},3" in jaxpr
    stats = jit(value_and_grad)(params, x)[2]["w"]
    want = np.einsum("tbi,tbj->ij", *[np.asarray(x, np.float64)] * 2) / 5000
    error = np.abs(stats.second_moment - want).max() / np.abs(want).max()
    assert error < {1: 2.0, 16: 0.6, 1024: 0.08}[limit]


@pytest.mark.parametrize("rows", [1024, 8, 4])
def test_rows_count_by_their_weights(rows):
    x, params = draw(0, 40, 3), {"w": draw(1, 3, 2)}
    w = np.zeros(40, np.float32)
    w[[3, 4, 17, 18, 19, 30, 33, 39]] = 1.0
    loss_fn = lambda p, x, w: jnp.mean((x @ p["w"]) ** 2)  # noqa: E731
    x = jnp.where(w[:, None] > 0, x, jnp.nan)  # What does not count may be anything.
    value_and_grad = bnp_optax.value_and_grad(
        loss_fn, weights=lambda x, w: w, second_moments=True, second_moment_rows=rows
    )
    stats = jit(value_and_grad)(params, x, w)[2]["w"]
    counting = np.asarray(x)[w > 0]
    if rows >= 8:
        assert_of_rows(stats, counting)
    else:
        chosen = [np.asarray(four, np.float64) for four in itertools.combinations(counting, 4)]
        found = min(np.abs(four.T @ four / 4 - stats.second_moment).max() for four in chosen)
        assert found < 1e-5


def test_unequal_weights():
    x, params = draw(0, 10, 3), {"w": draw(1, 3, 2)}
    w = np.arange(10.0, dtype=np.float32)
    loss_fn = lambda p, x, w: jnp.mean((x @ p["w"]) ** 2)  # noqa: E731
    stats = captured(loss_fn, params, x, w, weights=lambda x, w: w)["w"]
    rows = np.asarray(x, np.float64)
    want = np.einsum("r,ri,rj->ij", w / w.sum(), rows, rows)
    np.testing.assert_allclose(stats.second_moment, want, rtol=1e-5)


def test_shards_of_shard_map_are_one_batch():
    x, params = draw(0, 16, 4), {"w": draw(1, 4, 2)}
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=auto)
    product = jax.shard_map(
        lambda w, x: x @ w,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
    )
    loss_fn = lambda p, x: jnp.mean(product(p["w"], x) ** 2)  # noqa: E731
    assert_of_rows(captured(loss_fn, params, x)["w"], x)


def test_rows_sharded_in_their_type():
    mesh = jax.make_mesh(
        (4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Explicit,)
    )
    x, params = draw(0, 16, 4), {"w": draw(1, 4, 2)}
    with jax.set_mesh(mesh):
        shown = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec("data")))
        stats = captured(lambda p, x: jnp.mean((x @ p["w"]) ** 2), params, shown)["w"]
    assert_of_rows(stats, x)


def test_nnx():
    model, x = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), draw(0, 9, 4)
    value_and_grad = flax_nnx.value_and_grad(
        lambda model, x: jnp.mean(model(x) ** 2), second_moments=["kernel"]
    )
    assert_of_rows(value_and_grad(model, x)[2]["kernel"], x)


# Who asks and who does not.

X, PARAMS = draw(0, 8, 3), {"a": draw(1, 3, 3), "b": draw(2, 3, 2), "c": draw(3, 2)}


def loss_fn(p, x):
    return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] + p["c"][None]) ** 2)


def test_who_does_not_ask_pays_nothing():
    plain = jax.make_jaxpr(bnp_optax.value_and_grad(loss_fn))(PARAMS, X)
    for none in (None, False, [], {}):
        value_and_grad = bnp_optax.value_and_grad(loss_fn, second_moments=none)
        assert str(jax.make_jaxpr(value_and_grad)(PARAMS, X)) == str(plain)
        stats = value_and_grad(PARAMS, X)[2]
        assert stats["a"].second_moment is None
        assert stats["a"].total_covariance is None
        assert len(jax.tree.leaves(stats["a"])) == 4


@pytest.mark.parametrize("form", ["name", "names", "layers"])
def test_layers_are_chosen_by_name_or_as_layers(form):
    layers = bnp_optax.find_layers(loss_fn, PARAMS, X)
    asked = {"name": "b", "names": ("b",), "layers": {"b": layers["b"]}}[form]
    stats = captured(loss_fn, PARAMS, X, second_moments=asked)
    assert stats["a"].second_moment is None
    assert_of_rows(stats["b"], np.tanh(X @ PARAMS["a"]))


def test_a_layer_that_never_runs_has_moments_of_nothing():
    params = {"on": {"kernel": draw(0, 3, 2)}, "off": {"kernel": draw(1, 3, 2)}}
    loss_fn = lambda p, x: jnp.mean((x @ p["on"]["kernel"]) ** 2)  # noqa: E731
    stats = captured(loss_fn, params, X)["off/kernel"]
    assert stats.count == 0
    assert stats.second_moment.shape == (3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_moments": ["d"]}, "`second_moments` has `d`, but `params` has no such leaf"),
        ({"second_moments": ["c"]}, "`second_moments` has `c`, which is not captured: no product"),
        ({"second_moments": 3}, "`second_moments` must be True, None, names of kernels, or a dict"),
        ({"second_moments": {"a": 1}}, "`second_moments` must be a dict of `Layer`"),
        ({"second_moment_rows": 0}, "`second_moment_rows` must be an integer > 0"),
        ({"second_moment_rows": None}, "`second_moment_rows` must be an integer > 0, got None"),
    ],
)
def test_what_cannot_be_is_said(options, message):
    with pytest.raises(ValueError) as caught:
        bnp_optax.value_and_grad(loss_fn, **options)(PARAMS, X)
    assert message in str(caught.value)


def test_layers_that_are_left_out_have_none():
    layers = bnp_optax.find_layers(loss_fn, PARAMS, X)
    with pytest.raises(ValueError, match=r"`second_moments` has `b`.*not among `layers`"):
        bnp_optax.value_and_grad(loss_fn, layers={"a": layers["a"]}, second_moments=["b"])(
            PARAMS, X
        )


def test_the_loss_and_its_gradient_are_those_of_jax():
    ours = jit(bnp_optax.value_and_grad(loss_fn, second_moments=True))(PARAMS, X)
    theirs = jit(jax.value_and_grad(loss_fn))(PARAMS, X)
    for one, two in zip(jax.tree.leaves(ours[:2]), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)
