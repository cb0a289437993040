"""Every way that JAX has of using many devices, for one training.

A *mode* places parameters and batches on eight devices, builds a training step of an optimizer,
and says how to read the parameters back.
"""

import contextlib
import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnp_optax
import bnp_optax.flax_nnx
from benchmarks.scale import training
from benchmarks.scale.training import WIDTHS, Optimizer, PlacedTraining, forward, loss_of, make_step

DEVICES = 8
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
RULES = (("features", "model"), ("batch", "data"))
# The name has moved.
reshard = getattr(jax, "reshard", None) or jax.sharding.reshard

Mode = Callable[[Optimizer, bool], PlacedTraining]


def mesh_of(names: tuple[str, ...], kind: AxisType = AUTO) -> Mesh:
    """Eight devices along `data`, or two along `data` and four along `model`."""
    shape = (2, DEVICES // 2) if len(names) == 2 else (DEVICES,)
    devices = np.array(jax.devices()[:DEVICES]).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


def specs(layout: str) -> dict[str, dict[str, P]]:
    """How the parameters are sharded.

    Args:
      layout: `'data'` for copies; `'fsdp'` along the first axis; `'columns'` and `'rows'` for the
        outputs and the inputs of all kernels over `model`; `'megatron'` for columns and rows in
        turn.
    """

    def of_layer(i: int) -> dict[str, P]:
        columns = layout == "columns" or (layout == "megatron" and i == 0)
        if layout == "fsdp":
            return {"kernel": P("data", None), "bias": P("data")}
        if columns:
            return {"kernel": P(None, "model"), "bias": P("model")}
        if layout == "rows" or (layout == "megatron" and i == 1):
            return {"kernel": P("model", None), "bias": P(None)}
        return {"kernel": P(None, None), "bias": P(None)}

    return {f"Dense_{i}": of_layer(i) for i in range(len(WIDTHS) - 1)}


def _shardings(mesh: Mesh, tree: Any) -> Any:
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), tree, is_leaf=lambda x: isinstance(x, P)
    )


def by_compiler(layout: str, kind: AxisType, constrain: bool = False) -> Mode:
    """`jax.jit` of sharded arrays: the compiler, or the types of explicit axes, do the rest."""

    def mode(method: Optimizer, is_plain: bool = False) -> PlacedTraining:
        names = ("data",) if layout in ("data", "fsdp") else ("data", "model")
        mesh = mesh_of(names, kind)

        def dense(i: int, layer: Any, x: jax.Array) -> jax.Array:
            kernel, bias = layer["kernel"], layer["bias"]
            if constrain:
                whole = NamedSharding(mesh, P())
                kernel, bias = jax.lax.with_sharding_constraint((kernel, bias), whole)
            if kind == AUTO:
                return x @ kernel + bias[None]
            if layout == "fsdp":
                kernel, bias = reshard(kernel, P(None, None)), reshard(bias, P(None))
            met, out = (
                ((None,), (None,)) if layout == "fsdp" else specs(layout)[f"Dense_{i}"].values()
            )
            x = reshard(x, P("data", met[0]))
            product = jnp.einsum("bi,io->bo", x, kernel, out_sharding=P("data", out[0]))
            return product + bias[None]

        def context() -> Any:
            return jax.set_mesh(mesh) if kind == EXPLICIT else contextlib.nullcontext()

        with context():
            tx, step = make_step(method, is_plain, loss_of(dense))
            params = jax.device_put(training.initial(), _shardings(mesh, specs(layout)))
            out = None
            if kind == EXPLICIT:
                state = jax.jit(tx.init)(params)
            else:
                state = _sharded(tx, params, mesh, layout)
                out = jax.tree.map(lambda x: x.sharding, (params, state))
            return PlacedTraining(
                jax.jit(step, out_shardings=out),
                (params, state),
                lambda a: jax.device_put(a, NamedSharding(mesh, P("data", None))),
                context=context,
            )

    return mode


def _sharded(tx: Any, params: Any, mesh: Mesh, layout: str) -> Any:
    shardings = bnp_optax.state_sharding(tx, params, _shardings(mesh, specs(layout)))
    return jax.jit(tx.init, out_shardings=shardings)(params)


def by_shard_map(check_vma: bool) -> Mode:
    """The whole step inside `jax.shard_map`, which sees one device's part of the batch."""
    mean = functools.partial(jax.lax.pmean, axis_name="data")

    def mode(method: Optimizer, is_plain: bool = False) -> PlacedTraining:
        loss, mesh = loss_of(), mesh_of(("data",))
        if check_vma:
            # A derivative by what is the same on all devices is summed over them by JAX.
            tx, step = make_step(method, is_plain, lambda *args: mean(loss(*args)), mean)
        else:
            tx, step = make_step(method, is_plain, loss, mean, mean)
        sharded = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P(), P("data"), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
        params = jax.device_put(training.initial(), NamedSharding(mesh, P()))
        return PlacedTraining(
            jax.jit(sharded),
            jax.device_put((params, tx.init(params)), NamedSharding(mesh, P())),
            lambda a: jax.device_put(a, NamedSharding(mesh, P("data"))),
        )

    return mode


def by_pmap(method: Optimizer, is_plain: bool = False) -> PlacedTraining:
    """`jax.pmap`, with a copy of parameters and state on each device."""
    mean = functools.partial(jax.lax.pmean, axis_name="data")
    tx, step = make_step(method, is_plain, loss_of(), mean, mean)
    params = jax.tree.map(jnp.asarray, training.initial())
    copies = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (DEVICES, *x.shape)), (params, tx.init(params))
    )
    return PlacedTraining(
        jax.pmap(step, axis_name="data"),
        copies,
        lambda a: jnp.reshape(a, (DEVICES, -1, a.shape[-1])),
        lambda carry: jax.tree.map(lambda x: x[0], carry[0]),
    )


def with_psum_before_bias(method: Optimizer, is_plain: bool = False) -> PlacedTraining:
    """Megatron's layers: a `shard_map` in the loss, and a `psum` between rows and bias."""
    mesh = mesh_of(("data", "model"))
    layout = specs("megatron")

    def local(params: Any, x: jax.Array) -> jax.Array:
        def dense(i: int, layer: Any, x: jax.Array) -> jax.Array:
            product = x @ layer["kernel"]
            if i == 1:
                product = jax.lax.psum(product, "model")
            return product + layer["bias"][None]

        return forward(params, x, dense)

    outputs = jax.shard_map(
        local, mesh=mesh, in_specs=(layout, P("data", None)), out_specs=P("data", None)
    )
    tx, step = make_step(
        method, is_plain, lambda params, x, y: jnp.mean((outputs(params, x) - y) ** 2)
    )
    params = jax.device_put(training.initial(), _shardings(mesh, layout))
    state = _sharded(tx, params, mesh, "megatron")
    out = jax.tree.map(lambda x: x.sharding, (params, state))
    return PlacedTraining(
        jax.jit(step, out_shardings=out),
        (params, state),
        lambda a: jax.device_put(a, NamedSharding(mesh, P("data", None))),
    )


class Linen(nn.Module):
    """The network in Linen, with boxed parameters.

    Attributes:
      box: `nn.with_partitioning` or `nn.with_logical_partitioning`.
      axis: Name of the axis that kernels are sharded along, one after the other in turn.
    """

    box: Any
    axis: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs."""
        kernel_init, bias_init = nn.initializers.lecun_normal(), nn.initializers.zeros
        names = ((None, self.axis), (self.axis, None), (None, None))
        for i, (kernel, width) in enumerate(zip(names, WIDTHS[1:], strict=True)):
            layer = nn.Dense(
                width,
                kernel_init=self.box(kernel_init, kernel),
                bias_init=self.box(bias_init, kernel[1:]),
            )
            x = layer(x) if i == len(names) - 1 else jnp.tanh(layer(x))
        return x


def _outputs(model: Linen, params: Any, x: jax.Array) -> Any:
    return model.apply({"params": params}, x)


def by_linen(is_logical: bool) -> Mode:
    """Flax's flow: boxes in the parameters, and shardings read off the abstract state."""
    model = Linen(
        nn.with_logical_partitioning if is_logical else nn.with_partitioning,
        "features" if is_logical else "model",
    )

    def mode(method: Optimizer, is_plain: bool = False) -> PlacedTraining:
        mesh = mesh_of(("data", "model"))

        @contextlib.contextmanager
        def context() -> Any:
            with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
                yield

        def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.mean((_outputs(model, params, x) - y) ** 2)

        tx, step = make_step(method, is_plain, loss)

        def init() -> Any:
            boxed = model.init(jax.random.key(0), jnp.ones((1, WIDTHS[0])))["params"]
            params = jax.tree.unflatten(
                jax.tree.structure(boxed), jax.tree.leaves(training.initial())
            )
            return params, tx.init(params)

        with context():
            found = nn.get_partition_spec(jax.eval_shape(init))
            shardings = nn.spmd.logical_to_mesh_sharding(found, mesh, RULES)
            carry = jax.jit(init, out_shardings=shardings)()
        return PlacedTraining(
            jax.jit(step, out_shardings=shardings),
            carry,
            lambda a: jax.device_put(a, NamedSharding(mesh, P("data", None))),
            context=context,
        )

    return mode


class NNX(nnx.Module):
    """The network in NNX, with axis names at its variables."""

    def __init__(self, rngs: nnx.Rngs):
        """Variables."""
        names = ((None, "model"), ("model", None), (None, None))
        kernel_init, bias_init = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()
        for i, (kernel, n, m) in enumerate(
            zip(names, *zip(*pairwise(WIDTHS), strict=True), strict=True)
        ):
            layer = nnx.Linear(
                n,
                m,
                kernel_init=nnx.with_partitioning(kernel_init, kernel),
                bias_init=nnx.with_partitioning(bias_init, kernel[1:]),
                rngs=rngs,
            )
            setattr(self, f"Dense_{i}", layer)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs."""
        last = len(WIDTHS) - 2
        for i in range(last):
            x = jnp.tanh(getattr(self, f"Dense_{i}")(x))
        return getattr(self, f"Dense_{last}")(x)


def by_nnx(method: Optimizer, is_plain: bool = False) -> PlacedTraining:
    """`nnx.Optimizer` made under `jax.set_mesh`."""
    mesh = mesh_of(("data", "model"))
    tx = optax.with_extra_args_support(method.plain() if is_plain else method.make())

    def loss(model: NNX, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((model(x) - y) ** 2)

    with jax.set_mesh(mesh):
        model = NNX(nnx.Rngs(0))
        values = jax.tree.leaves(training.initial())
        state = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), values))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def update(model: NNX, optimizer: Any, x: jax.Array, y: jax.Array) -> None:
        extra: dict[str, Any] = {}
        if is_plain:
            grads = nnx.grad(loss)(model, x, y)
        else:
            capture = bnp_optax.flax_nnx.value_and_grad(loss, second_moments=method.second_moments)
            _, grads, extra["layer_stats"] = capture(model, x, y)
        if method.needs_grad_fn:
            graph, _, rest = nnx.split(model, nnx.Param, ...)
            extra["grad_fn"] = jax.grad(lambda p: loss(nnx.merge(graph, p, rest), x, y))
        optimizer.update(model, grads, **extra)

    step: Any = nnx.jit(update)

    def stepped(carry: Any, x: jax.Array, y: jax.Array) -> Any:
        model, optimizer = carry
        step(model, optimizer, x, y)
        return carry

    return PlacedTraining(
        stepped,
        (model, optimizer),
        lambda a: jax.device_put(a, NamedSharding(mesh, P("data", None))),
        lambda carry: nnx.state(carry[0], nnx.Param),
        lambda: jax.set_mesh(mesh),
    )


MODES: dict[str, Mode] = {
    "auto, data": by_compiler("data", AUTO),
    "auto, FSDP": by_compiler("fsdp", AUTO),
    "auto, columns": by_compiler("columns", AUTO),
    "auto, rows": by_compiler("rows", AUTO),
    "auto, constraint in the loss": by_compiler("fsdp", AUTO, constrain=True),
    "explicit, data": by_compiler("data", EXPLICIT),
    "explicit, FSDP": by_compiler("fsdp", EXPLICIT),
    "explicit, columns": by_compiler("columns", EXPLICIT),
    "explicit, rows": by_compiler("rows", EXPLICIT),
    "shard_map": by_shard_map(check_vma=True),
    "shard_map, check_vma=False": by_shard_map(check_vma=False),
    "shard_map, psum before bias": with_psum_before_bias,
    "pmap": by_pmap,
    "Linen, Partitioned": by_linen(is_logical=False),
    "Linen, logical rules": by_linen(is_logical=True),
    "NNX, with_partitioning": by_nnx,
}
