"""Strictness for the whole suite: array types checked at run time, no silent rank promotion."""

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The modules that compute; the others take traced or wrong values on purpose.
CHECKED = ["bnp_optax.preconditioners.centering"]

with install_import_hook(CHECKED, "beartype.beartype"):
    import bnp_optax  # noqa: F401


@pytest.fixture
def x64():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield
