"""The environment that a number was measured in, and numbers as JSON has them."""

import importlib.metadata
import math
import os
import platform
import subprocess
from typing import Any

import jax
import numpy as np


def environment() -> dict[str, Any]:
    """Versions, processor, devices and commit, for the results' JSON."""
    packages = ("jax", "jaxlib", "optax", "flax", "bnp-optax", "numpy")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "commit": _commit(),
    }


def plain(value: Any, digits: int) -> Any:
    """What JSON can hold: floats with so many digits, or None for those that are not finite."""
    if isinstance(value, dict):
        return {key: plain(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, digits) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), digits)
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """The commit of the working tree, marked if it has changes; None outside of git."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
