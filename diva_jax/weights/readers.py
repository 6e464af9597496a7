"""Files of weights, told apart by their first bytes, read lazily, tensor by tensor."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from diva_jax.common.errors import UserError
from diva_jax.weights import pickles
from diva_jax.weights.tensors import Tensor, Tensors

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        # Mapped pages would count as this process's memory, a second time the size of the weights.
        file = safe_open(path, framework="numpy", backend="pread")
        found = {}
        for name in file.keys():  # noqa: SIM118 - it is no dict
            piece = file.get_slice(name)
            dtype = _DTYPES.get(piece.get_dtype())
            if dtype is None:
                raise UserError(f"{path}: the tensor {name} is of type {piece.get_dtype()}, float weights are needed")
            read = lambda name=name: _read(path, file, name)  # noqa: E731
            found[name] = Tensor(tuple(piece.get_shape()), np.dtype(dtype), read)
        return found
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} cannot be read as safetensors ({e}): fetch the file again") from e


def _read(path: Path, file, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: the tensor {name} cannot be read ({e}): fetch the file again") from e


def open_file(path: Path) -> Tensors:
    """The tensors of one file: safetensors, a torch pickle, or a TorchScript archive.

    Raises:
      UserError: the file is missing, truncated, of no such kind, or needs torch and there is none.
    """
    try:
        with open(path, "rb") as f:
            start = f.read(64)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}): give a file of weights") from e
    if start[8:9] == b"{":
        return Tensors(_safetensors(path), [path])
    if start.startswith(b"PK\x03\x04"):
        return Tensors(pickles.zip_archive(path), [path])
    if start.startswith(b"\x80"):
        return Tensors(pickles.state_dict(path), [path])
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer, not the file itself: run git lfs pull")
    raise UserError(
        f"{path} is neither safetensors nor a torch file (it begins with {start[:12]!r}): fetch the file again"
    )


def read_json(path: Path) -> dict:
    """A JSON file; a UserError where it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as e:
        raise UserError(f"{path} is missing: the folder is not complete, fetch it again") from e
    except (ValueError, OSError) as e:
        raise UserError(f"{path} is not valid JSON ({e}): fetch it again") from e


def _spellings(stem: str) -> Iterator[str]:
    """Names of a weights file in order of preference: safetensors first, full precision first."""
    for suffix, shards in (("safetensors", "safetensors.index"), ("bin", "bin.index")):
        yield f"{stem}.{suffix}"
        yield f"{stem}.{shards}.json"
        for variant in ("fp16", "non_ema", "bf16"):
            yield f"{stem}.{variant}.{suffix}"
            # diffusers has written the index of a sharded variant both ways.
            yield f"{stem}.{shards}.{variant}.json"
            yield f"{stem}.{variant}.{shards}.json"


def weights_in(folder: Path, *stems: str) -> Tensors:
    """The weights in a folder: the first of `stems` that is there, in any spelling that diffusers, transformers or
    open_clip give it: `.safetensors` or `.bin`, an fp16 variant, sharded with an index beside it.

    Raises:
      UserError: none is there, a shard is missing, or a file is broken.
    """
    for name in (name for stem in stems for name in _spellings(stem)):
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".json"):
            return open_file(path)
        shards = sorted({folder / f for f in read_json(path).get("weight_map", {}).values()})
        if missing := [s.name for s in shards if not s.is_file()]:
            raise UserError(f"{path} names {missing[0]}, which is missing: fetch the folder again")
        return Tensors({n: t for shard in shards for n, t in open_file(shard).items()}, shards)
    raise UserError(f"{folder} holds no weights ({' or '.join(stems)}.safetensors or .bin): fetch them again")


def fingerprint(files: list[Path]) -> str:
    """sha256 over the sha256 of each file, in order, as 64 hex digits; the files are read in parallel."""

    def digest(path: Path) -> bytes:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").digest()

    with ThreadPoolExecutor(4) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, files))).hexdigest()
