"""Whether a checkpoint is what was saved: its files are there, and its arrays have the checksums written with it.

The checksum of an array is the sum over its 32-bit words of word times an odd number that depends on the position,
modulo 2**32. It is the same for every sharding and number of processes, and a change of a single element always changes
it, since an odd number has an inverse modulo 2**32.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from diva_jax.common import json_files, paths
from diva_jax.common.errors import UserError

ITEMS = ("state", "data", "meta")
# Odd numbers, by axis, that positions are multiplied by; those of Weyl sequences in several dimensions.
_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)


class Damaged(Exception):
    """A checkpoint is not what was saved; the message says in what."""


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as uint32; values of 64 bits become two of them, in a new last axis."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if x.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        multiplier = jnp.uint32(_MULTIPLIERS[axis % len(_MULTIPLIERS)])
        place = (place ^ (place >> 15)) * multiplier + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (place * jnp.uint32(2) + jnp.uint32(1)), dtype=jnp.uint32)


def checksums(tree) -> dict[str, int]:
    """Path of each array in a tree, as `jax.tree_util.keystr` writes it -> its checksum, 0 to 2**32 - 1."""

    def narrow(x):  # jax would round values of 64 bits on the host.
        wide = isinstance(x, np.ndarray) and x.itemsize == 8 and x.ndim
        return np.ascontiguousarray(x)[..., None].view(np.uint32) if wide else x

    # One after another: programs that wait for each other's devices can block when many run at once on CPU devices.
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): int(_checksum(narrow(a))) for path, a in leaves}


def text_checksum(*content) -> int:
    """The checksum of values as JSON, 0 to 2**32 - 1."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def verify(tree, written: dict[str, int]) -> None:
    """Raises `Damaged` where an array of the tree, or of a part of it, has another checksum than was written."""
    wrong = [path for path, value in checksums(tree).items() if written.get(path) != value]
    if wrong:
        raise Damaged(f"{len(wrong)} arrays are not those that were saved, the first of them {wrong[0]}")


def read_text(folder: epath.Path, item: str) -> dict:
    """The JSON of an item of a checkpoint; `Damaged` where it is missing or none, a UserError where a bucket does not
    give it.
    """
    try:
        content = json_files.read(folder / item / "metadata", dict[str, Any], "restore it", None)
    except UserError as e:
        if paths.is_remote(folder) and not isinstance(e.__cause__, ValueError | None):
            raise  # A bucket that cannot be reached, whose checkpoints may be good.
        raise Damaged(f"its part {item}: {e}") from e
    if content is None:
        raise Damaged(f"its part {item} is missing")
    return content


def damage(folder: epath.Path) -> str | None:
    """What is wrong with a checkpoint, as far as `check_files` sees it; None: nothing."""
    try:
        check_files(folder)
    except Damaged as e:
        return str(e)
    return None


def check_files(folder: epath.Path) -> None:
    """What a few small reads can tell of a checkpoint, in a folder named by its step: `Damaged` where a part is
    missing, empty or not readable, or the folder is a copy of another step's.
    """
    for file in () if paths.is_remote(folder) else Path(folder).rglob("*"):
        if not file.is_dir() and not file.is_file():
            if not os.path.lexists(file):
                raise Damaged("it was deleted meanwhile")
            raise Damaged(f"{file.name} is not a regular file")
        if file.parent.name != "d" and file.stat().st_size > json_files.MAX_BYTES:
            raise Damaged(f"{file.name} has more than {json_files.MAX_BYTES} bytes")
    data, meta = read_text(folder, "data"), read_text(folder, "meta")
    if not (folder / "state").is_dir():
        raise Damaged("its part state is missing")
    for name in ("manifest.ocdbt", "_METADATA"):
        file = folder / "state" / name
        if not file.exists() or not file.stat().length:
            raise Damaged(f"state/{name} is missing or empty")
    written = meta.pop("text_checksum", None)
    if (written is not None or "checksums" in meta) and written != text_checksum(data, meta):
        raise Damaged("its parts data and meta are not those that were saved")
    step = int(folder.name)
    if (there := data.get("batches", step)) != step:
        raise Damaged(f"it is a copy of the checkpoint of step {there}")
