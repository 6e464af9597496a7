"""Reads torch's pickle files without executing the code in them.

Loading a pickle can execute arbitrary code. State dicts are therefore loaded by torch with `weights_only=True`.
OpenAI's files are TorchScript archives, which `weights_only=True` does not support and which `torch.jit.load` would
compile. They are read here without torch, by an unpickler that only creates tensors and containers.
"""

import functools
import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diva_jax.common.errors import UserError
from diva_jax.weights.tensors import Tensor

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}

# Names of torch's types that are read; complex numbers and types of 8 bits and less are not weights.
_TORCH_TYPES = frozenset(
    ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
)
_MAX_PICKLE = 2**26  # Bytes of a pickle in an archive: names and shapes, without values.
_MAX_PACKED = 2**28  # Bytes of all compressed members of an archive.
_MAX_AXES = 16
_MAX_DEPTH, _MAX_MODULES = 100, 100_000  # Of a TorchScript archive; OpenAI's largest has 500 modules, 7 deep.


def import_torch(why: str):
    """Imports and returns torch.

    Args:
      why: the purpose, as the first words of the error message.

    Raises:
      UserError: torch is not installed.
    """
    try:
        import torch
    except ImportError as e:
        raise UserError(f"{why} needs torch: pip install 'diva_jax[torch]', or use safetensors") from e
    return torch


def _numpy(tensor) -> np.ndarray:
    """Returns a copy of a tensor as a numpy array. The tensor's own memory is a mapped file, which may change."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.detach().contiguous().view(torch.int16).numpy().view(jnp.bfloat16).copy()
    return tensor.detach().numpy().copy()


def state_dict(path: Path) -> dict[str, Tensor]:
    """Opens a state dict saved with `torch.save`, at the top level or under the key `state_dict`.

    Returns:
      Name -> lazy tensor.

    Raises:
      UserError: torch is not installed, the file is invalid, or it contains objects other than dense tensors.
    """
    torch = import_torch(f"reading {path}")
    load = functools.partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        # The file format before torch 1.6 does not support mmap.
        content = load(mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        if "Weights only load failed" not in str(e) and "Unsupported" not in str(e):
            raise _corrupt(path, e) from e
        raise UserError(
            f"{path} contains objects other than tensors, so opening it could run any code: save only its "
            "state_dict(), preferably as safetensors"
        ) from e
    except Exception as e:  # A damaged file raises any type: torch rebuilds tensors from whatever is written there.
        raise _corrupt(path, e) from e
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    found = {}
    if isinstance(content, dict):
        found = {str(n): t for n, t in content.items() if isinstance(t, torch.Tensor)}
    if not found:
        raise UserError(f"{path} has no state dict: save the model's state_dict(), preferably as safetensors")
    for name, tensor in found.items():
        if kind := _unsupported(tensor):
            raise UserError(f"{path}: the tensor {name} is {kind}: save dense float tensors, preferably as safetensors")
    return {n: _lazy(t) for n, t in found.items()}


def _corrupt(path: Path, e: Exception | str) -> UserError:
    why = e if isinstance(e, str) else " ".join(f"{type(e).__name__}: {e}".split())[:200]
    return UserError(f"{path} is truncated or corrupt ({why}): fetch the file again")


def _unsupported(tensor) -> str | None:
    """What keeps a torch tensor from being read as an array; None for dense tensors of a type that numpy has."""
    import torch

    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.is_quantized:
        return "quantised"
    if tensor.layout != torch.strided:
        return "sparse"
    name = str(tensor.dtype).removeprefix("torch.")
    return None if name in _TORCH_TYPES else f"of type {name}"


def _lazy(tensor) -> Tensor:
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        dtype = np.dtype(name)
    except TypeError:
        dtype = np.dtype(getattr(jnp, name))
    return Tensor(tuple(tensor.shape), dtype, lambda: _numpy(tensor))


def _check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuses archives whose members are together larger than the file that they are in.

    torch stores the values of tensors without compression. Only code and pickles may be compressed, and are small.

    Raises:
      UserError: a member is too large.
    """
    length, stored, packed = path.stat().st_size, 0, 0
    for info in archive.infolist():
        if info.compress_type == zipfile.ZIP_STORED:
            stored += info.file_size
        else:
            packed += info.file_size
        if info.filename.endswith(".pkl") and info.file_size > _MAX_PICKLE:
            raise _corrupt(path, f"its {info.filename} has {info.file_size} bytes, {_MAX_PICKLE} at most are allowed")
    if stored > length or packed > _MAX_PACKED:
        raise _corrupt(path, f"its members declare {stored + packed} bytes, the file has {length}")


def zip_archive(path: Path) -> dict[str, Tensor]:
    """Opens a zip file written by torch: a TorchScript archive or a pickle.

    Returns:
      Name -> lazy tensor.

    Raises:
      UserError: the file is invalid or not supported; see `state_dict`.
    """
    try:
        archive = zipfile.ZipFile(path)
    except Exception as e:  # zipfile raises NotImplementedError, struct.error and others on damaged directories.
        raise _corrupt(path, e) from e
    _check_archive(path, archive)
    names = archive.namelist()
    if any("/code/" in n for n in names) and (data := [n for n in names if n.endswith("/data.pkl")]):
        return _torchscript(path, archive, data[0].removesuffix("data.pkl"))
    archive.close()
    return state_dict(path)


class _Module:
    """A placeholder for a TorchScript module, with its attributes only."""


class _View(NamedTuple):
    """A tensor in a member of an archive: it cannot be changed by the pickle that it is in.

    Attributes:
      member: of the archive.
      dtype: of the values.
      offset: of the first value [elements].
      shape, strides: of the tensor [elements].
    """

    member: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """An unpickler that creates modules, tensors and containers only, and raises a UserError for other objects."""

    def __init__(self, file, path: Path, archive: zipfile.ZipFile, root: str):
        super().__init__(file)
        self._path, self._archive, self._root = path, archive, root

    def find_class(self, module: str, name: str):
        if module.startswith("__torch__"):
            return type("_Module", (_Module,), {})  # A class of its own: a pickle can set attributes of classes.
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if module == "torch" and name in _STORAGES:
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":  # Attributes that are lists. None of them is a weight.
            return lambda *args: None
        raise UserError(
            f"{self._path} contains {module}.{name}, which is not part of a CLIP archive: give OpenAI's file or a "
            "state dict"
        )

    def persistent_load(self, pid):
        _, kind, key, _, count = pid
        return np.dtype(_STORAGES[kind]), f"{self._root}data/{key}", count

    def _tensor(self, storage, offset: int, shape: tuple, strides: tuple, *_) -> _View:
        dtype, member, count = storage
        numbers = (offset, count, *shape, *strides)
        if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers) or len(shape) > _MAX_AXES:
            raise _corrupt(self._path, "a tensor's shape, strides or offset are not numbers from 0 on")
        there = self._archive.getinfo(member).file_size // dtype.itemsize
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if math.prod(shape) and last >= min(count, there):
            raise _corrupt(self._path, f"a tensor of shape {tuple(shape)} is larger than its storage")
        return _View(member, dtype, offset, tuple(shape), tuple(strides))


def _values(path: Path, archive: zipfile.ZipFile, view: _View) -> np.ndarray:
    """Reads a tensor, which is copied where its strides are not those of a dense array.

    Raises:
      UserError: the member is damaged, or shorter than the archive declares.
    """
    try:
        flat = np.frombuffer(archive.read(view.member), view.dtype)
    except Exception as e:  # zipfile raises zlib.error, EOFError, NotImplementedError and others.
        raise _corrupt(path, e) from e
    if not math.prod(view.shape):
        return np.zeros(view.shape, view.dtype)
    if view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True)) >= flat.size:
        raise _corrupt(path, f"{view.member} has {flat.size} values, fewer than its tensor")
    steps = [s * view.dtype.itemsize for s in view.strides]
    return np.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, steps, writeable=False)


def _check_pickle(path: Path, data: bytes) -> None:
    """Refuses pickles that ask for more memory than their own size justifies.

    Raises:
      UserError: an entry of the memo, or an object, is numbered or sized beyond the pickle's length.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(data):
            raise _corrupt(path, f"its pickle has {len(data)} bytes and an object of number {argument}")


def _torchscript(path: Path, archive: zipfile.ZipFile, root: str) -> dict[str, Tensor]:
    try:
        data = archive.read(f"{root}data.pkl")
        _check_pickle(path, data)
        top = _Unpickler(io.BytesIO(data), path, archive, root).load()
    except UserError:
        raise
    except Exception as e:  # A damaged pickle calls what it contains with arguments of any type.
        raise _corrupt(path, e) from e
    found: dict[str, Tensor] = {}
    pending: list[tuple[object, str, int]] = [(top, "", 0)]
    walked = 0
    while pending:
        module, prefix, depth = pending.pop()
        walked += 1
        if depth > _MAX_DEPTH or walked > _MAX_MODULES:
            raise _corrupt(path, "its modules are nested without end")
        for name, value in reversed(list(vars(module).items())) if isinstance(module, _Module) else ():
            if isinstance(value, _View):
                read = functools.partial(_values, path, archive, value)
                found[f"{prefix}{name}"] = Tensor(value.shape, value.dtype, read)
            elif isinstance(value, _Module):
                pending.append((value, f"{prefix}{name}.", depth + 1))
    if not found:
        raise UserError(f"{path} is a TorchScript archive without weights: give a CLIP checkpoint")
    return found
