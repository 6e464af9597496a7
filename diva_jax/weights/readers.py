"""Where weights come from: files and folders, read lazily, tensor by tensor."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from diva_jax.errors import UserError

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}


class Tensor:
    """A tensor of a safetensors file: shape at once, values when `np.asarray` asks for them."""

    def __init__(self, file, name: str):
        self._file, self._name = file, name
        piece = file.get_slice(name)
        self.shape = tuple(piece.get_shape())
        self.dtype = _DTYPES.get(piece.get_dtype(), piece.get_dtype())

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self._file.get_tensor(self._name)
        return array if dtype is None else array.astype(dtype)


class Tensors(Mapping):
    """Name -> lazy tensor, over one file or several shards.

    Attributes:
      files: the paths read, for fingerprints and messages.
    """

    def __init__(self, files: list[Path]):
        self.files = files
        self._tensors: dict[str, Tensor] = {}
        for path in files:
            try:
                handle = safe_open(path, framework="numpy")
                self._tensors.update({name: Tensor(handle, name) for name in handle.keys()})
            except (SafetensorError, OSError) as e:
                raise UserError(f"{path} cannot be read as safetensors ({e}): fetch the file again") from e

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def folder(source: str, field: str) -> Path:
    """The local folder of a source.

    Raises:
      UserError: it is not there; names `field`, the config field to set.
    """
    path = Path(source.removeprefix("local-dir:")).expanduser()
    if not path.exists():
        raise UserError(f"config.{field}={source!r} does not exist: set it to a folder with the weights")
    return path


def read_json(path: Path) -> dict:
    """A JSON file; a UserError where it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as e:
        raise UserError(f"{path} is missing: the folder is not complete, fetch it again") from e
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e}): fetch it again") from e


def safetensors_in(path: Path, *names: str) -> Tensors:
    """The first of `names` that exists in a folder, sharded or not (an index beside it names the shards)."""
    for name in names:
        if (index := path / f"{name}.index.json").exists():
            return Tensors(sorted({path / f for f in read_json(index)["weight_map"].values()}))
        if (path / name).exists():
            return Tensors([path / name])
    raise UserError(f"{path} holds none of {', '.join(names)}: fetch the weights again, as safetensors")


def fingerprint(files: list[Path]) -> str:
    """sha256 over the files' contents, in order, as 64 hex digits."""
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as f:
            total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()
