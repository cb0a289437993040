"""Functions of arrays: what is followed, what is left as it was, and what is said not to be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnp_optax

X = jax.random.normal(jax.random.key(0), (4, 3)) + 1.0


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape)) / 2


PARAMS = {"w": normal(1, 3, 5), "b": normal(2, 5), "v": normal(3, 5, 3), "c": normal(4, 3)}
STACK = {"w": normal(1, 3, 3, 3), "b": normal(2, 3, 3)}


def capture(loss_fn, params=PARAMS, *args, **options):
    """Statistics, once loss and gradient are seen to be JAX's own."""
    captured = bnp_optax.value_and_grad(loss_fn, **options)
    loss, grads, stats = jax.jit(captured)(params, *args)
    plain_loss, plain_grads = jax.jit(jax.value_and_grad(loss_fn))(params, *args)
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, plain_grads
    )
    return stats


def check(stats, inputs, count=None, bias=None):
    """`stats` are those of the rows of `inputs`."""
    rows = np.asarray(inputs, np.float64).reshape(-1, np.shape(inputs)[-1])
    np.testing.assert_allclose(np.ravel(stats.mean), rows.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.ravel(stats.total_variance), rows.var(0), rtol=1e-3, atol=1e-5)
    assert stats.count == (len(rows) if count is None else count)
    assert stats.layer.bias == bias


def affine(x, w, b):
    return x @ w + b[None]


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, 7 * r[0].T @ g))


@jax.custom_jvp
def product_jvp(x, w):
    return x @ w


product_jvp.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + 5 * p[0] @ t[1]))

WRAPPED = {
    "plain": affine,
    "jit": jax.jit(affine),
    "checkpoint": jax.checkpoint(affine),
    "checkpoint, policy": jax.checkpoint(
        affine, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "custom_vjp": lambda x, w, b: product(x, w) + b[None],
    "custom_jvp": lambda x, w, b: product_jvp(x, w) + b[None],
    "vmap": lambda x, w, b: jax.vmap(lambda row: row @ w + b)(x),
    "vmap, transposed": lambda x, w, b: jax.vmap(lambda row: w.T @ row + b)(x),
    "einsum": lambda x, w, b: jnp.einsum("bi,io->bo", x, w) + b[None],
    "bias first": lambda x, w, b: b[None] + x @ w,
    "cast": lambda x, w, b: x @ w.astype(jnp.float16).astype(jnp.float32) + b[None],
    "barrier": lambda x, w, b: affine(x, *lax.optimization_barrier((w, b))),
    "reversed twice": lambda x, w, b: x[:, ::-1] @ w[::-1] + b[None],
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_product_is_found_through(name):
    def loss_fn(p, x):
        h = jnp.tanh(WRAPPED[name](x, p["w"], p["b"]))
        return jnp.sum(jnp.square(h @ p["v"]))

    stats = capture(loss_fn, PARAMS, X)
    check(stats["w"], X, bias="b")
    w = PARAMS["w"].astype(jnp.float16 if name == "cast" else jnp.float32)
    check(stats["v"], jnp.tanh(affine(X, w, PARAMS["b"])))


def test_layers_stacked_for_slices_loops_and_scans_are_kept_apart():
    def sliced(p, x):
        for i in range(3):
            x = jnp.tanh(affine(x, p["w"][i], p["b"][i]))
        return jnp.sum(x**2)

    def looped(p, x):
        def body(i, x):
            return jnp.tanh(affine(x, p["w"][i], p["b"][i]))

        return jnp.sum(lax.fori_loop(0, 3, body, x) ** 2)

    def scanned(p, x):
        def body(x, layer):
            return jnp.tanh(affine(x, layer["w"], layer["b"])), None

        return jnp.sum(lax.scan(jax.checkpoint(body), x, p)[0] ** 2)

    def scanned_back(p, x):
        flipped = jax.tree.map(lambda a: a[::-1], p)
        body = lambda x, layer: (jnp.tanh(affine(x, layer["w"], layer["b"])), None)  # noqa: E731
        return jnp.sum(lax.scan(body, x, flipped, reverse=True)[0] ** 2)

    inputs = [X]
    for i in range(2):
        inputs.append(jnp.tanh(affine(inputs[-1], STACK["w"][i], STACK["b"][i])))
    for loss_fn in (sliced, looped, scanned, scanned_back):
        stats = capture(loss_fn, STACK, X)["w"]
        assert stats.mean.shape == (3, 3, 1)
        assert stats.layer.bias == "b"
        assert stats.count == 4
        for i, x in enumerate(inputs):
            x = np.asarray(x, np.float64)
            np.testing.assert_allclose(stats.mean[i, :, 0], x.mean(0), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(stats.total_variance[i, :, 0], x.var(0), rtol=1e-3)


def test_a_bias_at_another_place_of_the_stack_is_not_the_layers():
    def loss_fn(p, x):
        return jnp.sum(affine(x, p["w"][0], p["b"][1]) ** 2)

    assert capture(loss_fn, STACK, X)["w"].layer.bias is None


def test_what_a_scan_carries_unchanged_is_one_parameter():
    def loss_fn(p, x):
        def body(carry, _):
            p, x = carry
            return (p, jnp.tanh(affine(affine(x, p["w"], p["b"]), p["v"], p["c"]))), None

        (_, x), _ = lax.scan(body, (p, x), None, length=2)
        return jnp.sum(x**2)

    stats = capture(loss_fn, PARAMS, X)
    second = jnp.tanh(affine(affine(X, PARAMS["w"], PARAMS["b"]), PARAMS["v"], PARAMS["c"]))
    check(stats["w"], jnp.concatenate([X, second]), bias="b")


@pytest.mark.parametrize("taken", [0, 1])
def test_of_two_branches_the_one_taken_counts(taken):
    def loss_fn(p, x):
        def other(x):
            return jnp.tanh(x) @ p["v"].T

        return jnp.sum(lax.cond(taken == 0, lambda x: affine(x, p["w"], p["b"]), other, x) ** 2)

    stats = capture(loss_fn, PARAMS, X + taken)
    if taken:
        assert stats["w"].count == 0
        check(stats["v"], jnp.tanh(X + 1))
    else:
        assert stats["v"].count == 0
        check(stats["w"], X, bias="b")
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(stats))


def test_a_parameter_repeated_over_the_batch_has_the_statistics_of_all_rows():
    def loss_fn(p, x):
        w = jnp.broadcast_to(p["w"], (4, 3, 5))
        return jnp.sum(jnp.einsum("bi,bio->bo", x, w) ** 2)

    check(capture(loss_fn, PARAMS, X)["w"], X)


def test_products_of_derivatives_in_the_loss_do_not_count():
    """A gradient penalty takes the kernel in products with cotangents; they add no bias."""

    def loss_fn(p, x):
        net = lambda x: jnp.sum(jnp.tanh(affine(x, p["w"], p["b"])) ** 2)  # noqa: E731
        value, slope = jax.value_and_grad(net)(x)
        return value + jnp.sum(slope**2)

    check(capture(loss_fn, PARAMS, X)["w"], X, bias="b")


def test_a_vector_and_a_scalar_are_a_layer_of_one_unit():
    def loss_fn(p, x):
        return jnp.mean((x @ p["w"] + p["b"]) ** 2)

    params = {"w": normal(1, 3), "b": normal(2)}
    stats = capture(loss_fn, params, X)
    check(stats["w"], X, bias="b")
    tx = bnp_optax.bnp_sgd(0.1, layers=bnp_optax.find_layers(loss_fn, params, X))
    state, first = tx.init(params), loss_fn(params, X)
    for _ in range(20):
        _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, X)
        updates, state = tx.update(grads, state, params, layer_stats=stats)
        params = jax.tree.map(jnp.add, params, updates)
    assert loss_fn(params, X) < 0.1 * first


def mesh(n):
    return Mesh(np.array(jax.devices()[:n]), ("data",))


def test_shards_of_a_batch_make_one_statistic():
    batch = jnp.concatenate([X, X * 3 - 1])

    def loss_fn(p, x):
        sharded = jax.shard_map(
            lambda p, x: lax.psum(jnp.sum(affine(x, p["w"], p["b"]) ** 2), "data"),
            mesh=mesh(4),
            in_specs=(P(), P("data")),
            out_specs=P(),
        )
        return sharded(p, x)

    check(capture(loss_fn, PARAMS, batch)["w"], batch, bias="b")


def test_shards_of_a_kernel_make_one_statistic():
    """Tensor parallel: the first kernel is split by columns, the second by rows."""

    def loss_fn(p, x):
        def local(w, v, x):
            return lax.psum(jnp.tanh(x @ w) @ v, "data")

        specs = (P(None, "data"), P("data", None), P())
        y = jax.shard_map(local, mesh=mesh(2), in_specs=specs, out_specs=P())(p["w"], p["v"], x)
        return jnp.sum(y**2)

    params = {"w": normal(1, 3, 6), "v": normal(3, 6, 2)}
    stats = capture(loss_fn, params, X)
    check(stats["w"], X)
    check(stats["v"], jnp.tanh(X @ params["w"]))


def test_sharding_constraints_names_and_donation_stay():
    sharding = NamedSharding(mesh(2), P("data"))

    @functools.partial(jax.jit, donate_argnums=0)
    def my_layer(x, w):
        with jax.named_scope("my_scope"):
            return lax.with_sharding_constraint(x, sharding) @ w

    def loss_fn(p, x):
        return jnp.sum(my_layer(jnp.tanh(x), p["w"]) ** 2)

    captured = bnp_optax.value_and_grad(loss_fn)
    texts = [
        jax.jit(f).lower(PARAMS, X).as_text(debug_info=True)
        for f in (jax.value_and_grad(loss_fn), captured)
    ]
    for text in texts:
        assert text.count("my_layer") > 0
        assert text.count("my_scope") > 0
        assert "sharding_constraint" in text or "Sharding" in text
    calls = [str(jax.make_jaxpr(f)(PARAMS, X)) for f in (jax.value_and_grad(loss_fn), captured)]
    assert all("donated_invars=(True" in text for text in calls)


def test_a_checkpoint_keeps_its_policy():
    """What a policy says to recompute is not saved for the statistics' sake."""
    policy = jax.checkpoint_policies.nothing_saveable

    def loss_fn(p, x):
        layer = jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(x) @ w), policy=policy)
        return jnp.sum(layer(x, p["w"]) ** 2)

    def residuals(f):
        text = str(jax.make_jaxpr(f)(PARAMS, X))
        return text.count("dot_general"), text.count("nothing_saveable")

    plain = residuals(jax.value_and_grad(loss_fn))
    captured = residuals(bnp_optax.value_and_grad(loss_fn))
    assert captured == plain
    assert plain[1] > 0


def test_arguments_that_are_no_arrays_stay_what_they_are():
    def loss_fn(p, x, depth):
        for _ in range(depth):
            x = jnp.tanh(x)
        return jnp.sum(affine(x, p["w"], p["b"]) ** 2)

    _, _, stats = bnp_optax.value_and_grad(loss_fn)(PARAMS, X, 1)
    check(stats["w"], jnp.tanh(X), bias="b")


def why_not(loss_fn, params=PARAMS, name="w"):
    summary = bnp_optax.summarize(loss_fn, params, X)
    assert name not in summary.layers
    assert f"no: {summary.uncovered[name]}" in str(summary)
    return summary.uncovered[name]


UNCOVERED = {
    "weight normalized": (
        lambda p, x: jnp.sum((x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))) ** 2),
        "`div` changes it before it meets the inputs",
    ),
    "scaled": (lambda p, x: jnp.sum((x @ (0.5 * p["w"])) ** 2), "`mul` changes it before it meets"),
    "embedding": (
        lambda p, x: jnp.sum((p["w"][jnp.array([0, 2])] @ p["v"]) ** 2),
        "it is an embedding: `gather` looks its rows up",
    ),
    "tied": (
        lambda p, x: jnp.sum((jnp.tanh(x @ p["w"]) @ p["w"].T) ** 2),
        "it is tied: summed over its axes (0,) and over its axes (1,)",
    ),
    "unused": (lambda p, x: jnp.sum(x @ p["v"].T), "the loss does not depend on it"),
    "no product": (
        lambda p, x: jnp.sum(jnp.exp(p["w"])) + jnp.sum(x @ p["v"].T),
        "no product with inputs takes it as it is, but `exp`",
    ),
    "product of parameters": (
        lambda p, x: jnp.sum((x @ (p["w"] @ p["v"])) ** 2),
        "but `dot_general with another parameter`",
    ),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_why_a_parameter_is_not_covered(name):
    loss_fn, reason = UNCOVERED[name]
    assert reason in why_not(loss_fn)


@jax.custom_vjp
def three_steps(x, w):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ w), (0, x))[1]


def three_steps_by_hand(x, w):
    return x @ w @ w @ w


three_steps.defvjp(
    lambda x, w: (three_steps(x, w), (x, w)),
    lambda residuals, g: jax.vjp(three_steps_by_hand, *residuals)[1](g),
)


def test_a_loop_that_is_not_followed_is_named():
    def loss_fn(p, x):
        return jnp.sum(three_steps(x, p["w"][:, :3]) ** 2) + jnp.sum(x @ p["v"].T)

    assert "used in a `while_loop`, whose steps cannot be measured" in why_not(loss_fn)
    check(capture(loss_fn, PARAMS, X)["v"], X)


def test_layers_that_cannot_be_captured_are_refused_by_name():
    loss_fn = UNCOVERED["scaled"][0]
    layers = bnp_optax.find_layers(lambda p, x: jnp.sum((x @ p["w"]) ** 2), PARAMS, X)
    with pytest.raises(
        ValueError, match="`layers` has `w`, whose inputs cannot be captured: `mul`"
    ):
        bnp_optax.value_and_grad(loss_fn, layers=layers)(PARAMS, X)


def test_a_traced_value_that_escapes_is_an_error_of_jax():
    kept = []

    def loss_fn(p, x):
        kept.append(x @ p["w"])
        return jnp.sum(kept[-1] ** 2)

    captured = bnp_optax.value_and_grad(loss_fn)
    captured(PARAMS, X)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        jnp.sum(kept[-1]) + 1.0


def test_the_second_call_is_not_traced_again():
    traces = []

    def loss_fn(p, x):
        traces.append(1)
        return jnp.sum(affine(x, p["w"], p["b"]) ** 2)

    step = jax.jit(bnp_optax.value_and_grad(loss_fn))
    step(PARAMS, X)
    step(PARAMS, X + 1)
    assert len(traces) == 1


def test_auxiliary_outputs_pass():
    def loss_fn(p, x):
        y = x @ p["w"]
        return jnp.sum(y**2), {"logits": y, "name": 3}

    (loss, aux), _, _ = bnp_optax.value_and_grad(loss_fn, has_aux=True)(PARAMS, X)
    np.testing.assert_allclose(aux["logits"], X @ PARAMS["w"], rtol=1e-6)
    assert aux["name"] == 3
    np.testing.assert_allclose(loss, loss_fn(PARAMS, X)[0], rtol=1e-6)


# Numbers and arrays that depend on nothing, between a product and its bias or after it.

CONSTANTS = {
    "sum of an array": lambda: jnp.ones(5).sum(),
    "product of arrays": lambda: jnp.dot(jnp.ones(4), jnp.ones(4)),
    "random number": lambda: jax.random.uniform(jax.random.key(0), ()),
    "old random numbers": lambda: jax.random.normal(jax.random.PRNGKey(0), (4, 5)),
    "cond": lambda: lax.cond(True, lambda: 1.0, lambda: 2.0),
    "loop": lambda: lax.while_loop(lambda c: c < 8, lambda c: 2 * c, 1.0),
    "of integers": lambda: jnp.asarray(jnp.arange(3).shape[0] * jnp.int32(2), jnp.float32),
    "callback": lambda: jax.pure_callback(np.cos, jax.ShapeDtypeStruct((), jnp.float32), 1.0),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_what_a_result_is_multiplied_by(name):
    check(capture(lambda p: jnp.mean(jnp.tanh((X @ p["w"]) * CONSTANTS[name]())))["w"], X)
    stats = capture(lambda p: jnp.mean(jnp.tanh((X @ p["w"]) / CONSTANTS[name]() @ p["v"])))
    check(stats["w"], X)


def test_constants_computed_in_many_operations_take_no_time():
    """Each operand is looked at once: 2^40 are too many."""

    def loss_fn(p):
        scale = jnp.float32(1.0)
        for _ in range(40):
            scale = scale * scale
        return jnp.mean(jnp.tanh(X @ p["w"] * scale + p["b"][None]))

    check(capture(loss_fn)["w"], X, bias="b")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int4", "uint8", "bool"])
def test_data_of_few_bits(dtype):
    x = jnp.clip(jnp.round(X), 0, 3).astype(dtype)
    loss_fn = lambda p, x: jnp.mean(jnp.tanh(x.astype(jnp.float32) @ p["w"]))  # noqa: E731
    check(capture(loss_fn, PARAMS, x)["w"], x)


# One example of an online learner, without an axis of examples.


def test_row_of_an_embedding_that_data_choose_is_an_input():
    params = {"embedding": normal(5, 7, 3), **PARAMS}

    def loss_fn(p, token):
        h = jnp.tanh(affine(p["embedding"][token][None], p["w"], p["b"]))
        return jnp.mean((h @ p["v"]) ** 2)

    stats = capture(loss_fn, params, jnp.asarray(3))
    check(stats["w"], params["embedding"][3], bias="b")
    assert "embedding" not in stats


@pytest.mark.parametrize("groups", [1, 3])
def test_convolution_mapped_over_kernels(groups):
    """As in an ensemble: `vmap` makes one grouped convolution of all."""
    x, params = normal(6, 3, 2, 6, 6), {"k": normal(7, 3, 3, 6 // groups, 3)}

    def convolution(k, x):
        numbers = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(
            x, k, (1,), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    def loss_fn(p):
        return jnp.mean(jnp.tanh(jax.vmap(convolution)(p["k"], x)))

    stats = capture(loss_fn, params)["k"]
    mean = np.asarray(x).mean((1, 2))  # Of each member of the ensemble.
    want = mean if groups == 1 else mean.reshape(3, 3, 2)
    got = np.asarray(stats.mean)[:, 0]
    got = got[..., 0] if groups == 1 else np.moveaxis(got, -1, 1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
