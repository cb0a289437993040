"""Strictness for the whole suite: array types checked at run time, no silent rank promotion."""

import collections
import zlib

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


def pytest_addoption(parser):
    parser.addoption(
        "--every",
        type=int,
        default=1,
        help="of each test with more than 12 cases run one in so many, always the same ones",
    )


def pytest_collection_modifyitems(config, items):
    """Thin out long sweeps; a case is in or out by its name, in whatever test it is."""
    every = config.getoption("--every")
    sizes = collections.Counter(_test_of(item) for item in items)

    def is_chosen(item):
        if every == 1 or sizes[_test_of(item)] <= 12:
            return True
        return zlib.crc32(item.callspec.id.encode()) % every == 0

    chosen = [item for item in items if is_chosen(item)]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if not is_chosen(item)])
        items[:] = chosen


def _test_of(item):
    return item.path, getattr(item, "originalname", item.name)
