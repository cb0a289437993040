"""`jax.jit` for programs that run once: compilation is most of the time, what it yields little."""

import functools

import jax

# Without the newer code generator, where there is a choice, it takes a quarter of the time.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
try:
    jax.jit(lambda: 0, compiler_options=OPTIONS)()
except jax.errors.JaxRuntimeError:
    del OPTIONS["xla_cpu_use_fusion_emitters"]

jit = functools.partial(jax.jit, compiler_options=OPTIONS)
