"""Writes weights in the formats of other libraries: safetensors files, open_clip folders, and folders in general."""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from diva_jax.common import paths
from diva_jax.common.errors import UserError, explained

_TEMPORARY = ".unfinished"  # At the end of the names of folders that are being written.
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
OPEN_CLIP_CONFIG = "open_clip_config.json"


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes arrays, or lazy tensors, to a file that appears when it is complete; an OSError where it cannot."""
    # save_file ignores strides, so that a transposed view would be written in the wrong order.
    dense = {name: np.asarray(t, order="C") for name, t in tensors.items()}
    with paths.whole_file(path) as temporary:
        # Of a full disk, for example.
        with explained(f"{path} is not written", "make room", SafetensorError, kind=OSError):
            save_file(dense, temporary, metadata={"format": "pt"})
        temporary.chmod(0o666 & ~_umask())  # save_file makes files that only their owner can read.


def write_json(path: str | Path, content: Mapping) -> None:
    """Writes an indented JSON file."""
    Path(path).write_text(json.dumps(content, indent=2) + "\n")


def write_open_clip(folder: str | Path, tensors: Mapping[str, np.ndarray], config: Mapping) -> None:
    """Writes a folder that open_clip reads as "local-dir:...": tensors by open_clip's names, and the config."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / OPEN_CLIP_WEIGHTS, tensors)
    write_json(folder / OPEN_CLIP_CONFIG, config)


def refuse_taken(out: str | Path) -> None:
    """Raises a UserError if `out` exists and is not an empty folder."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} exists already: remove it, or give another folder")


def _lock(folder: Path) -> int | None:
    """Locks a folder until the descriptor is closed or the process ends; None where it is locked by another one."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # Locked, or of a file system without locks.
        os.close(fd)
        return None
    return fd


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `out` if the block succeeds and removed otherwise; a UserError
    where `out` is there and not an empty folder, or cannot be written."""
    refuse_taken(out)
    out = Path(out).absolute()
    with explained(f"--out={out} cannot be written", "give a folder that you may write"):
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f".{glob.escape(out.name)}.*{_TEMPORARY}"):  # Of exports that were killed.
            with contextlib.suppress(OSError):
                if (fd := _lock(left)) is not None:
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(fd)
        tmp = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=_TEMPORARY, dir=out.parent))
        locked = _lock(tmp)
        tmp.chmod(0o777 & ~_umask())  # mkdtemp creates folders that only their owner can read.
    try:
        with explained(f"--out={out} cannot be written", "give a folder with enough room"):
            yield tmp
            # This replaces an empty folder, and fails if files were added to it in the meantime.
            os.replace(tmp, out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        if locked is not None:
            os.close(locked)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
