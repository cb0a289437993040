"""Run any optimizer on z, where p = P z."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from bnp_optax._checks import check_transformation
from bnp_optax.preconditioners import Preconditioner
from bnp_optax.preconditioners.base import check_preconditioner
from bnp_optax.transforms.extra_args import update_inner
from bnp_optax.transforms.functions_of_z import GradientInZ, Point, ValueInZ
from bnp_optax.transforms.integers import integers_held
from bnp_optax.transforms.stored_points import (
    carry_points,
    check_runs_in_z,
    find_points,
    forget_value,
)


class InZspaceState(NamedTuple):
    """State of `in_zspace`.

    Attributes:
      preconditioner: State of P.
      inner: State of the optimizer that runs on z.
      before: State of the transformation that the gradient goes through in p.
    """

    preconditioner: Any
    inner: Any
    before: Any


def in_zspace(
    inner: optax.GradientTransformation,
    preconditioner: Preconditioner,
    before: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on z, where p = P z: updates = P inner(P^T g).

    This is how an adaptive optimizer meets a preconditioner. Whatever `inner` looks at is mapped:
    gradients and the extra argument `grad` by P^T, parameters by P^-1, and the functions
    `grad_fn`, `value_fn` and `obj_fn` become functions of z. So a regularizer in `inner` acts on z:
    with `optax.adamw`, decay shrinks z, which is decoupled decay of p. Extra arguments of other
    names come as they are. Parameters that are integers stay as they are.

    Parameters that `inner` keeps in its state, as schedule-free does, are carried along when P
    moves, so that they stand for the same p. `optax.value_and_grad_from_state` works, but
    computes the gradient anew.

    P mixes a layer's bias with its kernel: a zero gradient does not freeze half a layer. Put
    `optax.partition` or `optax.masked` around `in_zspace` for that, or leave the layer out of
    `layers`. A derivative through an update takes P's running statistics for constants.

    Args:
      inner: Any Optax transformation. It gets those extra arguments that its `update` takes,
        other than `layer_stats`.
      preconditioner: Such as `bnp()`. It is refreshed with the gradient as it comes.
      before: What the gradient goes through in p, before P^T, such as Adam's momentum; None for
        nothing. A `gradient_regularization` in `inner` would take that momentum for the gradient:
        use `before=optax.chain(zspace_grad_reg(strength, preconditioner), optax.ema(decay))`.

    Returns:
      A transformation with state `InZspaceState`.

    Raises:
      ValueError: If an argument is something else; at `init`, if `inner` is one of the few that
        cannot run in z: lookahead, COCOB, MADGRAD, and what keeps parameters in another form than
        theirs, as a vector in `optax.flatten` does.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import optax
      >>> import bnp_optax
      >>> model, x = nn.Dense(2), jax.random.normal(jax.random.key(1), (8, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
      >>> in_z = bnp_optax.in_zspace(optax.sgd(0.1), bnp_optax.bnp())
      >>> in_p = optax.chain(bnp_optax.bnp_precondition(), optax.sgd(0.1))
      >>> one, _ = in_z.update(grads, in_z.init(params), params, layer_stats=stats)
      >>> two, _ = in_p.update(grads, in_p.init(params), params, layer_stats=stats)
      >>> bool(jnp.allclose(one["kernel"], two["kernel"], rtol=1e-4))
      True

    Source: Ye, "Preconditioning for Accelerated Gradient Descent Optimization and
    Regularization", (4) and (9).
    """
    check_preconditioner(preconditioner)
    check_transformation("inner", inner)
    if before is not None:
        check_transformation("before", before)
    inner = optax.with_extra_args_support(inner)
    first = optax.with_extra_args_support(before or optax.identity())

    def init_fn(params: optax.Params) -> InZspaceState:
        state = preconditioner.init(params)
        z = preconditioner.operator(state).solve(params)
        inner_state = inner.init(z)
        check_runs_in_z(inner_state)
        points_in(z)
        return InZspaceState(state, inner_state, first.init(params))

    @functools.cache
    def points_of(treedef: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
        return find_points(inner.init, treedef.unflatten(shapes))

    def points_in(params: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        return points_of(treedef, tuple(map(jax.typeof, leaves)))

    def carried(state: InZspaceState, params: Any, P: Any) -> Any:
        """The inner state, whose points stand for the same parameters under the new P."""
        points = points_in(params)
        if not points:
            return state.inner
        old = preconditioner.operator(state.preconditioner)
        return carry_points(state.inner, points, params, old, P)

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, InZspaceState]:
        updates = integers_held(updates, params)
        p_state = preconditioner.update(updates, state.preconditioner, params, **extra_args)
        updates, first_state = update_inner(first, updates, state.before, params, extra_args)
        updates = integers_held(updates, params)
        P = preconditioner.operator(p_state)
        z = None if params is None else P.solve(params)
        inner_state = state.inner if params is None else carried(state, params, P)
        in_z = {
            "grad": P.transpose,
            "value_fn": lambda value_fn: ValueInZ(value_fn, Point(P, params, z)),
            "obj_fn": lambda obj_fn: ValueInZ(obj_fn, Point(P, params, z)),
            "grad_fn": lambda grad_fn: GradientInZ(grad_fn, Point(P, params, z)),
        }
        for name, mapped in in_z.items():
            if extra_args.get(name) is not None:
                extra_args[name] = mapped(extra_args[name])
        z_updates, inner_state = update_inner(
            inner, P.transpose(updates), inner_state, z, extra_args
        )
        updates = P.mv(integers_held(z_updates, params))
        if params is not None:
            updates = jax.tree.map(_exact_zero, updates, params)
        return updates, InZspaceState(p_state, forget_value(inner_state), first_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@jax.jit
def _exact_zero(update: Array, p: Array) -> Array:
    """`update`, but exactly -p where they cancel but for rounding.

    P(P^-1 p) is p up to rounding, so where the new z is 0, the new p would be about 1e-8 p.
    Elsewhere this moves it by no more than the rounding of `update`. It asks nothing of z, which
    most optimizers do not look at and which is then not computed.
    """
    if not jnp.issubdtype(jnp.result_type(p), jnp.inexact):
        return update
    vanishes = jnp.abs(p + update) <= 4 * jnp.finfo(jnp.result_type(p)).eps * jnp.abs(p)
    return jnp.where(vanishes, -p, update).astype(update.dtype)
