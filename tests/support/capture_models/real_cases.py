"""Models with the structure of public ones: the list of cases, and how their inputs are recorded.

A loss runs once more in float64, compiled without the library, while a tape is on. Linen's layers
are seen by an interceptor that knows each class from its documentation; other code says by `note`
what it multiplies. `scan` and `over_examples` stand for JAX's transformations in such code.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from support.capture_models.by_hand import by_output
from support.capture_models.record import DENSE, KEY, Record, filled, inputs, score  # noqa: F401
from support.quick_jit import jit


class RealModel(NamedTuple):
    """A loss, where to evaluate it, and what a correct capture reports.

    `expected` maps each kernel that is covered to its record. `loss` is that of the run in float64
    that was recorded.
    """

    loss_fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    expected: dict[str, Record]
    loss: float
    has_aux: bool = False


@dataclasses.dataclass(frozen=True)
class RealCase:
    """A model by name.

    Attributes:
      name: Name of the case.
      make: Builds the model for a batch size.
      uncovered: Regular expression for the reason, by name of each kernel that is not covered.
      rounding: Of the network's arithmetic, relative to the largest entry of an array.
      exact: Whether it is known what must be covered.
      optional: Kernels that may be covered or not: no data reach their inputs.
    """

    name: str
    make: Callable[[int], RealModel]
    uncovered: Mapping[str, str]
    rounding: float
    exact: bool
    optional: frozenset[str]


REAL: list[RealCase] = []


def real(
    uncovered: Mapping[str, str] | None = None,
    rounding: float = 1e-6,
    exact: bool = True,
    optional: Sequence[str] = (),
) -> Callable[[Callable[[int], RealModel]], Callable[[int], RealModel]]:
    """Add the decorated `make(batch)` to `REAL`."""

    def register(make: Callable[[int], RealModel]) -> Callable[[int], RealModel]:
        name, reasons, may = make.__name__, uncovered or {}, frozenset(optional)
        REAL.append(RealCase(name, make, reasons, rounding, exact, may))
        return make

    return register


# ---------------------------------------------------------------------------------------------
# The tape.
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tape:
    """Inputs by kernel, and the other fields of its record.

    Attributes:
      calls: The inputs of each call.
      fields: Keywords of `Record`, with the groups and the features of a grouped convolution.
      skip: Regular expression of Linen layers to leave out, or an empty one for none.
      prefix: Of the names that Linen's layers have.
      muted: Whether what runs now is not to be recorded.
    """

    calls: dict[str, list[Any]]
    fields: dict[str, dict[str, Any]]
    skip: str = ""
    prefix: str = ""
    muted: bool = False


TAPES: list[Tape] = []


def note(name, x, axes=DENSE, bias=None, positions=1, groups=None):
    """`x`, which the kernel called `name` is about to multiply; on the tape if one is on."""
    if TAPES and not TAPES[-1].muted:
        tape = TAPES[-1]
        tape.calls.setdefault(name, []).append(x)
        tape.fields[name] = {"axes": axes, "bias": bias, "positions": positions, "groups": groups}
    return x


@contextlib.contextmanager
def muted():
    """What runs in here reaches the loss without a derivative."""
    tape = TAPES[-1] if TAPES else Tape({}, {})
    before, tape.muted = tape.muted, True
    yield
    tape.muted = before


@contextlib.contextmanager
def under(prefix):
    """Linen's layers that run in here have parameters below `prefix`."""
    tape = TAPES[-1] if TAPES else Tape({}, {})
    before, tape.prefix = tape.prefix, f"{prefix}/"
    yield
    tape.prefix = before


def over_examples(function):
    """`jax.vmap` of a function that notes its inputs."""

    def mapped(*args):
        if not TAPES:
            return jax.vmap(function)(*args)

        def noted(*args):
            TAPES.append(Tape({}, fields, muted=outer.muted))
            try:
                out = function(*args)
            finally:
                tape = TAPES.pop()
            return out, tape.calls

        outer, fields = TAPES[-1], {}
        out, calls = jax.vmap(noted)(*args)
        for name, seen in calls.items():
            for call in seen:
                note(name, call, **fields[name])
        return out

    return mapped


def scan(step, carry, xs=None, length=None):
    """`lax.scan` of a function that notes its inputs: one step after the other then."""
    if not TAPES:
        return lax.scan(step, carry, xs, length)
    ys = []
    for i in range(len(jax.tree.leaves(xs)[0]) if length is None else length):
        carry, y = step(carry, jax.tree.map(lambda leaf: leaf[i], xs))  # noqa: B023
        ys.append(y)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)


def _see_linen(module, x, out):
    """Note the input of a Linen layer."""
    tape, path = TAPES[-1], "/".join(module.path)
    if tape.skip and re.match(tape.skip, path):
        return
    match module:
        case nn.Dense():
            axes, positions, groups = DENSE, 1, None
        case nn.DenseGeneral():
            n_in = 1 if isinstance(module.axis, int) else len(module.axis)
            n_out = 1 if isinstance(module.features, int) else len(module.features)
            axes = f"...{'ijk'[:n_in]},{'ijk'[:n_in]}{'opq'[:n_out]}"
            positions, groups = 1, None
        case nn.Conv() | nn.ConvTranspose():
            n = len(module.kernel_size)
            groups = getattr(module, "feature_group_count", 1)
            groups = None if groups == 1 else (groups, module.features)
            kept = "" if groups is None else "O"
            axes = f"b{'xy'[:n]}i{kept},{'_' * n}i{kept or 'o'}"
            positions = math.prod(out.shape[1:-1])
        case _:
            return
    name = tape.prefix + path
    bias = f"{name}/bias" if module.use_bias else None
    note(f"{name}/kernel", x, axes, bias, positions, groups)


def _interceptor(next_fun, args, kwargs, context):
    out = next_fun(*args, **kwargs)
    if context.method_name == "__call__":
        _see_linen(context.module, args[0], out)
    return out


def float64(tree):
    """The arrays of `tree` with those of floating-point numbers in float64."""

    def convert(leaf):
        is_float = jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
        return np.asarray(leaf, np.float64) if is_float else leaf

    return jax.tree.map(convert, tree)


def record(function, *args, skip="", wide=True):
    """What `function` returns in float64, or as it is, and the records of what it multiplies."""
    fields = {}

    def recorded(*args):
        TAPES.append(Tape({}, fields, skip))
        try:
            with nn.intercept_methods(_interceptor):
                out = function(*args)
        finally:
            tape = TAPES.pop()
        return out, tape.calls

    with jax.enable_x64(wide):
        out, calls = jax.device_get(jit(recorded)(*(float64(args) if wide else args)))
    records = {}
    for name, seen in calls.items():
        groups = fields[name].pop("groups")
        seen = seen if groups is None else [by_output(call, *groups) for call in seen]
        records[name] = Record(seen, **fields[name])
    return out, records


def recorded(loss_fn, params, *args, has_aux=False, skip="", more=None, watch=None, wide=True):
    """A model whose loss is run once more to record it.

    Args:
      loss_fn: The loss.
      params: Its parameters.
      *args: Its other arguments.
      has_aux: Whether it also returns other outputs.
      skip: Regular expression of Linen layers that run within a loop, which `more` must have.
      more: Further records.
      watch: What to run instead of the loss, if the loss takes derivatives of the network.
      wide: Whether to run in float64, for which Flax's cells make no carry.
    """
    args = jax.tree.map(jnp.asarray, args)
    out, expected = record(watch or loss_fn, params, *args, skip=skip, wide=wide)
    loss = out[0] if has_aux else out
    return RealModel(loss_fn, params, args, expected | (more or {}), float(loss), has_aux)


def variables(model, *args, **keywords):
    """Random parameters of a Linen model and, at rest, its other variables."""
    init = functools.partial(model.init, **keywords)
    shapes = dict(jax.eval_shape(init, {"params": KEY, "dropout": KEY}, *args))
    params = filled(shapes.pop("params"))
    return params, jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)


def linen_model(model, *args, objective=score, targets=(), **keywords):
    """A Linen model of `args` with the loss `objective(outputs, *targets)`."""
    params, _ = variables(model, *args)

    def loss_fn(params, args, targets):
        return objective(model.apply({"params": params}, *args), *targets)

    return recorded(loss_fn, params, args, targets, **keywords)


# ---------------------------------------------------------------------------------------------
# What models share.
# ---------------------------------------------------------------------------------------------


def whole_numbers(*shape, below, seed=2):
    """Labels or tokens."""
    return np.random.default_rng(seed).integers(0, below, shape).astype(np.int32)


def cross_entropy(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def squared_error(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def classified(model, x, n_classes=3):
    """A Linen model of one input, and labels."""
    labels = whole_numbers(len(x), below=n_classes)
    return linen_model(model, x, objective=cross_entropy, targets=(labels,))


def dense(p, name, x):
    """A dense layer of arrays, `p[name]` being a dict of `w` and perhaps `b`."""
    layer = p
    for key in name.split("/"):
        layer = layer[int(key) if isinstance(layer, list) else key]
    note(f"{name}/w", x, DENSE, f"{name}/b" if "b" in layer else None)
    return x @ layer["w"] + layer["b"] if "b" in layer else x @ layer["w"]


def dense_shapes(*sizes, bias=True):
    """Shapes of dense layers one after the other."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return [
        {"w": shape((n_in, n_out))} | ({"b": shape((n_out,))} if bias else {})
        for n_in, n_out in itertools.pairwise(sizes)
    ]


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def mlp(p, name, x, activation=jnp.tanh):
    """Dense layers in the list `p[name]`, the last one linear."""
    n = len(p[name])
    for i in range(n):
        x = dense(p, f"{name}/{i}", x)
        x = activation(x) if i < n - 1 else x
    return x


def normalize(x, eps=1e-6):
    """A layer norm without parameters."""
    centered = x - jnp.mean(x, -1, keepdims=True)
    return centered * lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + eps)
