"""Reads files of weights lazily, one tensor at a time. The format is detected from the first bytes of a file."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from diva_jax.common import json_files
from diva_jax.common.errors import UserError
from diva_jax.weights import pickles
from diva_jax.weights.tensors import Tensor, Tensors

_DTYPES = dict(F64=np.float64, F32=np.float32, F16=np.float16, BF16=jnp.bfloat16, U8=np.uint8, BOOL=np.bool_)
_DTYPES |= dict(I64=np.int64, I32=np.int32, I16=np.int16, I8=np.int8)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        # With mmap, the mapped pages would count as memory of this process, in addition to the arrays.
        file = safe_open(path, framework="numpy", backend="pread")
        tensors = {}
        for name in file.keys():  # noqa: SIM118 - file is not a dict
            piece = file.get_slice(name)
            dtype = _DTYPES.get(piece.get_dtype())
            if dtype is None:
                raise UserError(
                    f"{path}: the tensor {name} is of type {piece.get_dtype()}, give a file of float weights"
                )
            read = lambda name=name: _read(path, file, name)  # noqa: E731
            tensors[name] = Tensor(tuple(piece.get_shape()), np.dtype(dtype), read)
        return tensors
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as e:
        raise UserError(f"{path} cannot be read as safetensors ({e}): fetch the file again") from e


def _read(path: Path, file, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (SafetensorError, OSError, ValueError, MemoryError) as e:
        raise UserError(f"{path}: the tensor {name} cannot be read ({e}): fetch the file again") from e


def open_file(path: Path) -> Tensors:
    """Opens a local file, safetensors or a state dict that PyTorch has saved: name -> lazy tensor, read when it is
    requested.

    A UserError where it is missing, truncated or of another format, or it needs torch and torch is not installed.
    """
    if path.exists() and not path.is_file():  # A pipe, a device or a socket, whose reading may never end, or a folder.
        raise UserError(f"{path} is not a regular file: give a file of weights")
    try:
        with open(path, "rb") as f:
            start = f.read(64)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}): give a file of weights") from e
    if start[8:9] == b"{":
        return Tensors(_safetensors(path), [path])
    zipped = start.startswith(b"PK\x03\x04")
    if zipped or start.startswith(b"\x80"):
        return Tensors(pickles.state_dict(path, zipped), [path])
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer and not the file itself: run git lfs pull")
    raise UserError(
        f"{path} is neither safetensors nor a torch file (it begins with {start[:12]!r}): fetch the file again"
    )


def read_json(path: Path) -> dict:
    """A JSON file whose content is an object; a UserError where it is missing, anything else, or larger than 64 MiB."""
    content = json_files.read(path, dict[str, Any], "fetch it again", None)
    if content is None:
        raise UserError(f"{path} is missing: the folder is not complete, fetch it again")
    return content


def _shards(index: Path) -> list[Path]:
    """The files that an index lists, all of which must lie beside it."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map from tensors to files: fetch the folder again")
    for name in names.values():
        if not isinstance(name, str) or name in ("", ".", "..") or len(name) > 255 or any(c in name for c in "/\\\0"):
            raise UserError(f"{index} lists {str(name)[:100]!r}, which is not a file of its own folder: fetch it again")
    shards = sorted({index.parent / name for name in names.values()})
    if missing := [s.name for s in shards if not s.is_file()]:
        raise UserError(f"{index} lists {missing[0]}, which is missing: fetch the folder again")
    return shards


def _spellings(stem: str) -> Iterator[str]:
    """Yields the possible names of a weights file, in order of preference: safetensors and full precision first."""
    for suffix, shards in (("safetensors", "safetensors.index"), ("bin", "bin.index")):
        yield f"{stem}.{suffix}"
        yield f"{stem}.{shards}.json"
        for variant in ("fp16", "non_ema", "bf16"):
            yield f"{stem}.{variant}.{suffix}"
            # The index of a sharded variant has one of two names, depending on the version of diffusers.
            yield f"{stem}.{shards}.{variant}.json"
            yield f"{stem}.{variant}.{shards}.json"


def weights_in(folder: Path, *stems: str) -> Tensors:
    """Opens the weights in a local folder under the first of the file names `stems`, without suffix, that exists.

    All file names that diffusers, transformers and open_clip use are supported: `.safetensors` or `.bin`, variants such
    as fp16, and sharded files with an index. A UserError where there is none, a shard is missing, or a file is invalid.
    """
    for name in (name for stem in stems for name in _spellings(stem)):
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".json"):
            return open_file(path)
        shards = _shards(path)
        return Tensors({n: t for shard in shards for n, t in open_file(shard).items()}, shards)
    raise UserError(f"{folder} has no weights ({' or '.join(stems)}.safetensors or .bin): fetch them again")


def fingerprint(files: list[Path]) -> str:
    """Returns the SHA-256 of the concatenated SHA-256 digests of `files`, in order, as 64 hex digits."""

    def digest(path: Path) -> bytes:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").digest()

    with ThreadPoolExecutor(4) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, files))).hexdigest()
