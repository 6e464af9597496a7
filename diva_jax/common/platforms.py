"""Which platforms jax looks for."""

import glob
import importlib.util
import os
from pathlib import Path

import jax

_GOOGLE = "0x1ae0"  # PCI vendor.
_NO_TPU = ("0x0042", "0x001f")  # Google's network card and disk, which every machine of its cloud may have.
_NAMED = ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE", "PJRT_DEVICE")


def has_tpu() -> bool:
    """Whether something hints at a TPU: a device of Google's on the PCI bus, a device file, or a variable."""

    def read(device: str, name: str) -> str:
        try:
            return Path(device, name).read_text().strip()
        except OSError:
            return ""

    found = (d for d in glob.glob("/sys/bus/pci/devices/*") if read(d, "vendor") == _GOOGLE)
    if any(read(d, "device") not in _NO_TPU for d in found):
        return True
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")) or any(n in os.environ for n in _NAMED)


def without_tpu() -> None:
    """Lets jax use the CPU alone where libtpu is its only accelerator's library and there is no TPU.

    libtpu otherwise prints a page of messages about the TPU that it does not find. Nothing is changed where
    JAX_PLATFORMS is set.
    """
    if os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms or importlib.util.find_spec("libtpu") is None:
        return
    others = importlib.util.find_spec("jax_plugins")  # The namespace of the libraries of other accelerators.
    if not has_tpu() and not (others and any(os.listdir(p) for p in others.submodule_search_locations)):
        jax.config.update("jax_platforms", "cpu")
