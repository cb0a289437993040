"""Names for what a product does not show of a Linen layer: its inputs as the layer got them.

The interpreter finds every product of inputs with a kernel by itself. Linen knows more: which
inputs are a layer's own, and not those of a derivative in the loss; what they were before a
circular or causal convolution padded them; and that a quantized kernel is one all the same. An
interceptor names the inputs of Linen's own layers, by an identity that leaves values and
derivatives alone.

Linen is never imported here: a loss that uses it has done so, and others may not have it.
"""

import contextlib
import functools
import inspect
import sys
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from bnp_optax.capture.tracer import MARK, TRUSTED

# With one of these, a module multiplies by a function that it was given, such as a quantized one.
_GIVEN = ("dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls")


def naming() -> contextlib.AbstractContextManager[Any]:
    """Within this context, Linen's layers name their inputs, if Linen was imported."""
    linen: Any = sys.modules.get("flax.linen")
    # A module whose import has failed, or is not done, has no interceptors yet.
    if not hasattr(linen, "intercept_methods"):
        return contextlib.nullcontext()
    return linen.intercept_methods(_name_inputs)


@functools.cache
def _layers() -> frozenset[Any]:
    """The methods of Linen's layers that multiply their argument with their kernel.

    By method, not by class: a subclass that calls `super().__call__` names its inputs there, and
    one that does not may do anything with them.
    """
    linen: Any = sys.modules["flax.linen"]
    layers = (linen.Dense, linen.DenseGeneral, linen.Einsum, linen.Conv, linen.ConvTranspose)
    return frozenset(inspect.unwrap(layer.__call__) for layer in layers)


def _name_inputs(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    method = getattr(context.orig_method, "func", context.orig_method)
    if method not in _layers() or context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    module, name = context.module, MARK
    if any(getattr(module, attribute, None) is not None for attribute in _GIVEN):
        name = TRUSTED
    name += "/".join((*module.path, "kernel"))
    if args:
        args = (_named(args[0], name), *args[1:])
    elif "inputs" in kwargs:
        kwargs = kwargs | {"inputs": _named(kwargs["inputs"], name)}
    return next_fun(*args, **kwargs)


def _named(inputs: Any, name: str) -> Any:
    if not isinstance(inputs, jax.Array):
        return inputs
    try:
        return checkpoint_name(inputs, name)
    except (KeyError, NotImplementedError):
        # A transformation that has no rule for names, such as `jax.experimental.jet`.
        return inputs
