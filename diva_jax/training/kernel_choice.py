"""Which of this package's Pallas kernels a program uses on a TPU: `config.kernels`, and what `selfcheck` has found."""

import functools
import importlib.metadata
import importlib.util
import json
import re
import zlib
from pathlib import Path

from etils import epath

from diva_jax import __version__
from diva_jax.common import json_files, paths
from diva_jax.common.log import say
from diva_jax.models import platform
from diva_jax.training import compiler, distributed

AUTO, XLA, OWN = "auto", "xla", "own"
_SOURCES = Path(platform.__file__).parent / "kernels"
_CHECK = "python -m diva_jax.selfcheck --config=FILE --workdir=DIR"


class Found(json_files.Record):
    """What a check of a device has found: kernel, as in `platform.allowed`, -> whether it computes what XLA does."""

    kernels: dict[str, bool]


def kept_in(kind: str, workdir: epath.Path | None = None) -> epath.Path:
    """The file with the results of a kind of device, `device.device_kind`; other versions or kernels have another."""
    packages = [p for p in ("jax", "jaxlib", "libtpu") if importlib.util.find_spec(p)]
    versions = [__version__, *map(importlib.metadata.version, packages)]
    code = [file.read_bytes() for file in sorted(_SOURCES.glob("*.py"))]
    crc = zlib.crc32(b"".join([json.dumps([kind, *versions]).encode(), *code]))
    return compiler.kept(workdir) / f"selfcheck-{re.sub(r'[^A-Za-z0-9]+', '-', kind)}-{crc:08x}.json"


def read(kind: str, workdir: epath.Path | None = None) -> dict[str, bool]:
    """The kept results of a kind of device; a UserError where the file is damaged."""
    file = kept_in(kind, workdir)
    return dict(json_files.read(file, Found, f"remove it, {_CHECK} writes it again", Found(kernels={})).kernels)


def keep(kind: str, found: dict[str, bool], workdir: epath.Path | None = None) -> epath.Path:
    """Adds results to those that are kept; returns the file."""
    file = kept_in(kind, workdir)
    paths.write_whole(file, json.dumps({"kernels": read(kind, workdir) | found}, indent=1))
    return file


@functools.cache
def _tell(sentence: str) -> None:
    say(sentence)


def chosen(setting: str, mesh, workdir: epath.Path | None = None) -> frozenset[str] | None:
    """The kernels that a program of `config.kernels` uses on an abstract mesh, for `platform.traced_on`; None for all.

    With auto these are the ones that passed the check on this kind of device, on a process and failed on none; a
    line says which. Every process of a run must call it.
    """
    if setting != AUTO:
        return None if setting == OWN else frozenset()
    if platform.traced_for(mesh) != "tpu":
        return frozenset()
    found: dict[str, bool] = {}
    for results in distributed.gathered(read(mesh.abstract_device.device_kind, workdir)):
        found = {name: ok and found.get(name, True) for name, ok in (found | results).items()}
    passed = frozenset(name for name, ok in found.items() if ok)
    if passed:
        _tell(f"kernels: this package's for {', '.join(sorted(passed))}, which passed the check of this device")
    else:
        why = "failed the check of this device" if found else f"were not checked on this device: run {_CHECK}"
        _tell(f"kernels: XLA's and jax's, since this package's {why} (config.kernels=auto)")
    return passed
