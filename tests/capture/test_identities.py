"""What leaves values as they are is passed: at the kernel, the input, before and after the bias."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from support.capture_checks import X, assert_rows, assert_trees, capture, normal

import bnp_optax

ROWS = normal(0, 8, 4) + 1
PARAMS = {"w": normal(1, 4, 6), "b": normal(2, 6), "v": normal(3, 6, 2), "c": normal(4, 2)}
PLACES = ("kernel", "input", "product", "bias", "output", "all")


def mesh(n, kind=AxisType.Auto):
    return Mesh(np.array(jax.devices()[:n]), ("data",), axis_types=(kind,))


def constrained(a):
    return lax.with_sharding_constraint(a, NamedSharding(mesh(1), P()))


@jax.custom_vjp
def scaled_cotangent(a):
    return a


scaled_cotangent.defvjp(lambda a: (a, None), lambda _, g: (2 * g,))


@jax.custom_jvp
def by_custom_jvp(a):
    return a


by_custom_jvp.defjvp(lambda p, t: (p[0], t[0]))

IDENTITIES = {
    "checkpoint_name": lambda a: checkpoint_name(a, "name"),
    "checkpoint_name twice": lambda a: checkpoint_name(checkpoint_name(a, "one"), "two"),
    "a name like a mark": lambda a: checkpoint_name(a, "bnp_optax:"),
    "reduce_precision": lambda a: lax.reduce_precision(a, 8, 23),
    "with_sharding_constraint": constrained,
    "optimization_barrier": lax.optimization_barrier,
    "copy": jnp.copy,
    "device_put": lambda a: jax.device_put(a, jax.devices()[0]),
    "asarray": jnp.asarray,
    "real": jnp.real,
    "positive": jnp.positive,
    "custom_vjp": scaled_cotangent,
    "custom_jvp": by_custom_jvp,
    "jit": jax.jit(lambda a: a),
    "checkpoint": jax.checkpoint(lambda a: a),
    "named_call": jax.named_call(lambda a: a, name="inner"),
    "a round trip through a wider type": lambda a: a.astype(jnp.complex64).real,
    "transposed twice": lambda a: a.T.T,
    "one axis more and less": lambda a: a[None][0],
    "reshaped twice": lambda a: a.reshape(-1).reshape(a.shape),
    "all of it": lambda a: a[...],
}


def layer(p, x, identity, place):
    at = lambda here, a: identity(a) if place in (here, "all") else a  # noqa: E731
    product = at("product", at("input", x) @ at("kernel", p["w"]))
    return at("output", product + at("bias", p["b"])[None])


def two_layers(p, x, identity, place):
    h = jnp.tanh(layer(p, x, identity, place))
    return jnp.mean((h @ p["v"] + p["c"][None] - 1) ** 2)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", IDENTITIES)
def test_an_identity_is_passed(name, place):
    loss_fn = functools.partial(two_layers, identity=IDENTITIES[name], place=place)
    stats = capture(loss_fn, PARAMS, ROWS)
    assert_rows(stats["w"], ROWS)
    assert_rows(stats["v"], jnp.tanh(ROWS @ PARAMS["w"] + PARAMS["b"][None]))
    assert (stats["w"].layer.bias, stats["v"].layer.bias) == ("b", "c")


@pytest.mark.parametrize("place", PLACES)
def test_an_explicit_sharding_is_passed(place):
    """`reshard` in a mesh of one device whose axes are part of the types."""
    explicit = mesh(1, AxisType.Explicit)

    def identity(a):
        return jax.sharding.reshard(a, P(*[None] * a.ndim))

    with jax.set_mesh(explicit):
        params = jax.device_put(PARAMS, NamedSharding(explicit, P()))
        x = jax.device_put(ROWS, NamedSharding(explicit, P()))
        loss_fn = functools.partial(two_layers, identity=identity, place=place)
        stats = capture(loss_fn, params, x)
        assert_rows(stats["w"], ROWS)
        assert (stats["w"].layer.bias, stats["v"].layer.bias) == ("b", "c")


@pytest.mark.parametrize("place", ["kernel", "input", "product"])
def test_in_a_linen_layer(place):
    """Names that users give for their checkpoint policies, and constraints of their own."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            def product(x, w, *args, **kwargs):
                at = lambda here, a: checkpoint_name(a, "x") if here == place else a  # noqa: E731
                return at("product", lax.dot_general(at("input", x), at("kernel", w), *args))

            return nn.Dense(2, dot_general=product)(x)

    params = Layer().init(jax.random.key(0), X)["params"]
    stats = capture(lambda p, x: jnp.mean(Layer().apply({"params": p}, x) ** 2), params, X)
    assert_rows(stats["Dense_0/kernel"], X)
    assert stats["Dense_0/kernel"].layer.bias == "Dense_0/bias"


# Collectives between a parameter and its product, or a product and its bias.


def sharded(local, n, in_specs, check_vma):
    return jax.shard_map(local, mesh=mesh(n), in_specs=in_specs, out_specs=P(), check_vma=check_vma)


CHECK_VMA = pytest.mark.parametrize("check_vma", [True, False])


@CHECK_VMA
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("tiled", [True, False])
def test_a_kernel_gathered_from_its_shards(tiled, axis, check_vma):
    """Fully sharded data parallelism: each device has part of the rows, and of the kernel."""

    def gathered(w):
        if tiled:
            return lax.all_gather(w, "data", axis=axis, tiled=True)
        whole = lax.all_gather(w, "data")
        return jnp.concatenate([whole[0], whole[1]], axis)

    def loss_fn(p, x):
        def local(w, b, x):
            return lax.pmean(jnp.mean((x @ gathered(w) + b[None]) ** 2), "data")

        spec = P("data", None) if axis == 0 else P(None, "data")
        return sharded(local, 2, (spec, P(), P("data")), check_vma)(p["w"], p["b"], x)

    stats = capture(loss_fn, {k: PARAMS[k] for k in "wb"}, ROWS)
    assert_rows(stats["w"], ROWS)
    assert stats["w"].layer.bias == "b"


@CHECK_VMA
def test_a_bias_gathered_from_its_shards(check_vma):
    def loss_fn(p, x):
        def local(w, b, x):
            y = x @ w + lax.all_gather(b, "data", tiled=True)[None]
            return lax.pmean(jnp.mean(y**2), "data")

        return sharded(local, 2, (P(), P("data"), P("data")), check_vma)(p["w"], p["b"], x)

    stats = capture(loss_fn, {k: PARAMS[k] for k in "wb"}, ROWS)
    assert_rows(stats["w"], ROWS)
    assert stats["w"].layer.bias == "b"


@CHECK_VMA
@pytest.mark.parametrize("collective", ["psum", "psum_scatter"])
def test_a_sum_over_devices_between_product_and_bias(collective, check_vma):
    """Megatron: the first kernel is split by columns, the second by rows.

    Each entry of a kernel that is split over the devices meets the rows of one of them, so these
    count once, whether the types tell copies from parts or not.
    """

    def loss_fn(p, x):
        def local(w, b, v, c, x):
            product = jnp.tanh(x @ w + b[None]) @ v
            if collective == "psum":
                y = lax.psum(product, "data") + c[None]
                return jnp.mean((y - 1) ** 2)
            y = lax.psum_scatter(product, "data", tiled=True) + c[None]
            return lax.pmean(jnp.mean((y - 1) ** 2), "data")

        specs = (P(None, "data"), P("data"), P("data", None), P(), P())
        return sharded(local, 2, specs, check_vma)(p["w"], p["b"], p["v"], p["c"], x)

    stats = capture(loss_fn, PARAMS, ROWS)
    assert_rows(stats["w"], ROWS)
    assert_rows(stats["v"], jnp.tanh(ROWS @ PARAMS["w"] + PARAMS["b"][None]))
    assert (stats["w"].layer.bias, stats["v"].layer.bias) == ("b", "c")


@CHECK_VMA
def test_inputs_gathered_before_a_product(check_vma):
    """Sequence parallelism: each device has part of the rows, and of the kernel's columns."""

    def loss_fn(p, x):
        def local(w, b, x):
            x = lax.all_gather(x, "data", tiled=True)
            return lax.pmean(jnp.mean((x @ w + b[None]) ** 2), "data")

        specs = (P(None, "data"), P("data"), P("data"))
        return sharded(local, 2, specs, check_vma)(p["w"], p["b"], x)

    stats = capture(loss_fn, {k: PARAMS[k] for k in "wb"}, ROWS)
    assert_rows(stats["w"], ROWS)
    assert stats["w"].layer.bias == "b"


# Layers stacked on any axis.


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + jnp.tanh(nn.Dense(3, name="dense")(x)), None


def scanned_linen(axis):
    over = nn.scan(Block, variable_axes={"params": axis}, split_rngs={"params": True}, length=2)
    model = over()
    return lambda p, x: model.apply({"params": p}, x, None)[0]


def scanned_plain(axis):
    def f(p, x):
        stack = jax.tree.map(lambda a: jnp.moveaxis(a, axis, 0), p["dense"])
        body = lambda h, q: (h + jnp.tanh(h @ q["kernel"] + q["bias"][None]), None)  # noqa: E731
        return lax.scan(body, x, stack)[0]

    return f


def indexed_plain(axis):
    def f(p, x):
        for i in range(2):
            q = jax.tree.map(lambda a: jnp.moveaxis(a, axis, 0)[i], p["dense"])  # noqa: B023
            x = x + jnp.tanh(x @ q["kernel"] + q["bias"][None])
        return x

    return f


def mapped_linen(axis):
    """An ensemble: the same rows into every member."""
    model = nn.vmap(
        nn.Dense,
        variable_axes={"params": axis},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=2,
    )(3)
    return lambda p, x: model.apply({"params": p["dense"]}, x)


STACKED = [scanned_linen, scanned_plain, indexed_plain, mapped_linen]
FIRST = {"dense": {"kernel": normal(5, 2, 3, 3), "bias": normal(6, 2, 3)}}
BY_AXIS = pytest.mark.parametrize("axis", [1, -1])


def stacked_case(make, axis):
    params = jax.tree.map(lambda a: jnp.moveaxis(a, 0, axis), FIRST)
    f = make(axis)
    return lambda p, x: jnp.mean((f(p, x) - 1) ** 2), params


@BY_AXIS
@pytest.mark.parametrize("make", STACKED)
def test_stacked_layers_have_the_same_statistics_on_any_axis(make, axis):
    first, other = (capture(*stacked_case(make, a), X)["dense/kernel"] for a in (0, axis))
    assert first.layer.bias == other.layer.bias == "dense/bias"
    assert first.count == other.count
    for field in ("mean", "total_variance"):
        want, got = getattr(first, field), getattr(other, field)
        np.testing.assert_allclose(jnp.moveaxis(got, axis, 0), want, rtol=1e-5)


@BY_AXIS
@pytest.mark.parametrize("make", STACKED)
def test_stacked_layers_are_moved_alike_on_any_axis(make, axis):
    updates = []
    for a in (0, axis):
        loss_fn, params = stacked_case(make, a)
        tx = bnp_optax.bnp_precondition(layers=bnp_optax.find_layers(loss_fn, params, X))
        _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params, X)
        moved, _ = tx.update(grads, tx.init(params), params, layer_stats=stats)
        updates.append(jax.tree.map(lambda u: jnp.moveaxis(u, a, 0), moved))  # noqa: B023
    assert_trees(updates[1], updates[0], 1e-5)
