"""What a result was computed with: time, versions and devices, as results.json and sessions.json record them."""

import datetime
import importlib.metadata
import platform
from typing import Any

import jax

from diva_jax import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow", "transformers")


def now() -> str:
    """Returns the time in UTC: `2026-01-31T12:00:00+00:00`."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def describe() -> dict[str, Any]:
    """Returns {"versions": package -> version, "devices": such as "8 x TPU v5e"}; the devices of all processes."""
    devices = jax.devices()
    versions = {p: importlib.metadata.version(p) for p in _PACKAGES}
    return {
        "versions": {"diva_jax": __version__, "python": platform.python_version()} | versions,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }
