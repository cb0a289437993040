"""Condition numbers: of a matrix, and of BNP's D from running statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from bnp_optax._tree import is_concrete, quoted
from bnp_optax.diagnostics.checks import check_matrix
from bnp_optax.layers import Layers
from bnp_optax.preconditioners.bnp_operator import Scaling, bnp_states, over_inputs, scalings
from bnp_optax.preconditioners.whiten_operator import roots, whiten_states


def condition_number(matrix: ArrayLike, *, symmetric: bool = False) -> float | Float[Array, ""]:
    r"""The largest singular value of a matrix over its smallest nonzero one.

        kappa(A) = sigma_max / sigma*_min

    A singular value counts as zero up to max(rows, columns) eps sigma_max, where eps is the
    spacing of the matrix's own dtype: what is below is rounding. So in float32 no kappa above
    about 8e6 / max(rows, columns) can be seen; compute Hessians of worse conditioned problems in
    float64.

    Args:
      matrix: Any shape (m, n), such as a Hessian or the hidden variables H of a layer.
      symmetric: Whether the matrix is symmetric, as a Hessian is. It must then be square, and its
        eigenvalues are found instead, which is faster.

    Returns:
      kappa >= 1: a float, or a traced scalar under `jax.jit`.

    Raises:
      ValueError: If the matrix has not two axes, is not finite, is zero, or is not square where
        it should be symmetric.

    Example:
      >>> import numpy as np
      >>> from bnp_optax.diagnostics import condition_number
      >>> A = np.diag([4.0, 2.0, 0.0])
      >>> condition_number(A) == 2.0
      True
      >>> condition_number(A.T @ A, symmetric=True) == condition_number(A) ** 2
      True

    Source: Lange, Helfrich, Ye, JMLR 2022, Section 1.
    """
    check_matrix("matrix", matrix, square=symmetric)
    given = jnp.result_type(matrix) if isinstance(matrix, jax.Array) else np.asarray(matrix).dtype
    inexact = jnp.issubdtype(given, jnp.inexact)
    eps = max(np.shape(matrix)) * float(jnp.finfo(given if inexact else np.float64).eps)
    # Known matrices are decomposed in double precision, which jnp has not unless it is told to.
    if not is_concrete(matrix):
        a = jnp.asarray(matrix).astype(jnp.promote_types(given, jnp.float32))
        sizes = jnp.abs(jnp.linalg.eigvalsh(a)) if symmetric else _singular(jnp, a)
        largest = jnp.max(sizes)
        return largest / jnp.min(jnp.where(sizes > eps * largest, sizes, jnp.inf))
    a = np.asarray(matrix, np.float64)
    sizes = np.abs(np.linalg.eigvalsh(a)) if symmetric else _singular(np, a)
    largest = sizes.max()
    if largest == 0.0:
        msg = "`matrix` is zero: it has no nonzero singular value and so no condition number."
        raise ValueError(msg)
    return float(largest / sizes[sizes > eps * largest].min())


def _singular(module: Any, a: Any) -> Any:
    return module.linalg.svd(a, compute_uv=False)


def extended_inputs(h: ArrayLike) -> Float[Array, "*batch n+1"]:
    r"""The extended hidden variables [1, h] that a unit multiplies by [b, w].

    For N examples, H^ = [e, H]. The Hessian of the mean loss in [b, w] is H^^T S H^ with S
    diagonal for a dense layer, so its conditioning is that of H^, squared, times that of S.

    Args:
      h: Inputs of a layer, (..., n); of a convolution its patches, one at each output position.

    Returns:
      The same with a one in front, (..., n + 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from bnp_optax.diagnostics import extended_inputs
      >>> h, b, w = jnp.array([[1.0, 2.0], [3.0, 5.0]]), 0.5, jnp.array([2.0, -1.0])
      >>> bool(jnp.allclose(extended_inputs(h) @ jnp.array([b, *w]), h @ w + b))
      True

    Source: Lange, Helfrich, Ye, JMLR 2022, (9) and (11).
    """
    h = jnp.asarray(h)
    if not h.ndim:
        msg = f"`h` must have the inputs of a layer on its last axis, got the scalar {h}."
        raise ValueError(msg)
    return jnp.concatenate([jnp.ones((*h.shape[:-1], 1), h.dtype), h], axis=-1)


def conditioning(state: Any, layers: Layers | None = None) -> dict[str, Float[Array, ""]]:
    r"""kappa(D) of every layer that `bnp` or `whiten` preconditions, from its running statistics.

        D = diag(1, 1/sigma~),   kappa(D) = max D / min D

    of `bnp`, and of `whiten` D = diag(1, S) with S = (C + lambda I)^(-exponent).

    Scaling by D can improve the condition number of a unit's Hessian by as much as kappa(D)^2.
    It costs O(n) for a layer of n inputs and no Hessian: cheap enough for every step, also under
    `jax.jit`.

    The floor sigma~^2 = sigma^2 + eps_rel max sigma^2 + eps_abs bounds what is seen: among the
    inputs of a layer, sigma~ varies by at most sqrt(1 + 1 / eps_rel), 10 by default. The 1 in D
    belongs to the bias, also where `scale_bias` has another number there; a layer without a bias
    has D = diag(1/sigma~), with sigma~ from the mean square of the inputs.

    Args:
      state: A `BNPState` or a `WhitenState`, or anything that contains one: a whole optimizer
        state, of `chain`, `in_zspace`, `masked`, `partition` and so on, or a `TrainState`.
      layers: The layers to tell of, from `find_layers`; None for all.

    Returns:
      A dict from kernel name to kappa(D) >= 1. The units of a grouped convolution, or of layers
      stacked by `nn.scan` or `nn.vmap`, have a D for each group or layer: the largest kappa is
      given. 1 before the first statistics.

    Raises:
      ValueError: If there is neither in `state`, or `layers` has a kernel that it has not.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import bnp_optax
      >>> from bnp_optax.diagnostics import conditioning
      >>> model, x = nn.Dense(2), jnp.array([[0.0, 0.0], [2.0, 20.0]])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> _, grads, stats = bnp_optax.value_and_grad(loss_fn)(params)
      >>> tx = bnp_optax.bnp_precondition(decay=0.0, eps_rel=0.0, eps_abs=0.0)
      >>> _, state = tx.update(grads, tx.init(params), params, layer_stats=stats)
      >>> {name: float(jnp.round(kappa, 3)) for name, kappa in conditioning(state).items()}
      {'kernel': 10.0}

    Source: Lange, Helfrich, Ye, JMLR 2022, Section 3.3, after Theorem 4, and Figure 8.
    """
    bnp, whiten = bnp_states(state), whiten_states(state)
    if not bnp and not whiten:
        msg = (
            f"`state` holds no `BNPState`, got a `{type(state).__name__}`, nor a `WhitenState`. "
            "Pass the state of `bnp` or `whiten`, or of an optimizer that contains one, such as "
            "`bnp_sgd`."
        )
        raise ValueError(msg)
    kappas = [(name, _kappa(one)) for of in bnp for name, one in scalings(of).items()]
    kappas += [(name, one.kappa) for of in whiten for name, one in roots(of).items()]
    result: dict[str, Array] = {}
    for name, kappa in kappas:
        if layers is None or name in layers:
            result[name] = jnp.maximum(kappa, result[name]) if name in result else kappa
    missing = [name for name in layers or () if name not in result]
    if missing:
        msg = f"`layers` has {quoted(missing)}, of which `state` holds no running statistics."
        raise ValueError(msg)
    return result


def _kappa(scaling: Scaling) -> Array:
    """The largest kappa(D) of the layer's groups."""
    ends = []
    for reduce, choose in ((jnp.max, jnp.maximum), (jnp.min, jnp.minimum)):
        end = over_inputs(reduce, scaling.diagonal, scaling.inputs)
        # The bias has a 1 in D.
        ends.append(end if scaling.mean is None else choose(end, 1.0))
    return jnp.max(ends[0] / ends[1])
