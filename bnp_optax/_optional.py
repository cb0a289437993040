"""Packages that not everyone has."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs_flax(name: str) -> Iterator[None]:
    """Within this context, an import of Flax that fails says what to install.

    Raises:
      ModuleNotFoundError: If Flax, or something that it needs, is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        msg = (
            f"`{name}` needs Flax, of which `{error.name}` is not installed: "
            "`pip install 'bnp-optax[flax]'`. Losses in plain JAX, Equinox or Haiku need no Flax: "
            "use `bnp_optax.value_and_grad`."
        )
        raise ModuleNotFoundError(msg, name=error.name) from error
