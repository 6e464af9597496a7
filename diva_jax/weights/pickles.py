"""Reads torch's pickle files without executing the code in them.

Loading a pickle can execute arbitrary code. State dicts are therefore loaded by torch with `weights_only=True`.
OpenAI's files are TorchScript archives, which `weights_only=True` does not support and which `torch.jit.load` would
compile. They are read here without torch, by an unpickler that only creates tensors and containers.
"""

import functools
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

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
      UserError: torch is not installed, the file is invalid, or it contains objects other than tensors.
    """
    torch = import_torch(f"reading {path}")
    load = functools.partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        # The file format before torch 1.6 does not support mmap.
        content = load(mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        if "Weights only load failed" not in str(e) and "Unsupported" not in str(e):
            raise UserError(f"{path} is truncated or corrupt ({e}): fetch the file again") from e
        raise UserError(
            f"{path} contains objects other than tensors, so opening it could run any code: save only its "
            "state_dict(), preferably as safetensors"
        ) from e
    except (RuntimeError, ValueError, KeyError, IndexError, EOFError, OSError, AssertionError) as e:
        raise UserError(f"{path} is truncated or corrupt ({e}): fetch the file again") from e
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    found = {}
    if isinstance(content, dict):
        found = {str(n): t for n, t in content.items() if isinstance(t, torch.Tensor)}
    if not found:
        raise UserError(f"{path} has no state dict: save the model's state_dict(), preferably as safetensors")
    return {n: _lazy(t) for n, t in found.items()}


def _lazy(tensor) -> Tensor:
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        dtype = np.dtype(name)
    except TypeError:
        dtype = np.dtype(getattr(jnp, name))
    return Tensor(tuple(tensor.shape), dtype, lambda: _numpy(tensor))


def zip_archive(path: Path) -> dict[str, Tensor]:
    """Opens a zip file written by torch: a TorchScript archive or a pickle.

    Returns:
      Name -> lazy tensor.

    Raises:
      UserError: the file is invalid or not supported; see `state_dict`.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as e:
        raise UserError(f"{path} is truncated or corrupt ({e}): fetch the file again") from e
    names = archive.namelist()
    if any("/code/" in n for n in names) and (data := [n for n in names if n.endswith("/data.pkl")]):
        return _torchscript(path, archive, data[0].removesuffix("data.pkl"))
    archive.close()
    return state_dict(path)


class _Module:
    """A placeholder for a TorchScript module, with its attributes only."""


class _Unpickler(pickle.Unpickler):
    """An unpickler that creates modules, tensors and containers only, and raises a UserError for other objects."""

    def __init__(self, file, path: Path, archive: zipfile.ZipFile, root: str):
        super().__init__(file)
        self._path, self._archive, self._root = path, archive, root

    def find_class(self, module: str, name: str):
        if module.startswith("__torch__"):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if module == "torch" and name in _STORAGES:
            return np.dtype(_STORAGES[name])
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":  # Attributes that are lists. None of them is a weight.
            return lambda *args: None
        raise UserError(
            f"{self._path} contains {module}.{name}, which is not part of a CLIP archive: give OpenAI's file or a "
            "state dict"
        )

    def persistent_load(self, pid):
        _, dtype, key, _, count = pid
        return dtype, f"{self._root}data/{key}", count

    def _tensor(self, storage, offset: int, shape: tuple, strides: tuple, *_) -> Tensor:
        dtype, member, count = storage
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if math.prod(shape) and not 0 <= last < count:
            raise UserError(f"{self._path} is corrupt (a tensor is larger than its storage): fetch the file again")

        def read() -> np.ndarray:
            try:
                flat = np.frombuffer(self._archive.read(member), dtype)
                steps = [s * dtype.itemsize for s in strides]
                return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)
            except (zipfile.BadZipFile, KeyError, OSError, ValueError) as e:
                raise UserError(f"{self._path} is truncated or corrupt ({e}): fetch the file again") from e

        return Tensor(tuple(shape), dtype, read)


def _torchscript(path: Path, archive: zipfile.ZipFile, root: str) -> dict[str, Tensor]:
    try:
        with archive.open(f"{root}data.pkl") as f:
            top = _Unpickler(f, path, archive, root).load()
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, AttributeError, TypeError, ValueError) as e:
        raise UserError(f"{path} is truncated or corrupt ({e}): fetch the file again") from e
    found: dict[str, Tensor] = {}

    def walk(module, prefix: str):
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                found[prefix + name] = value
            elif isinstance(value, _Module):
                walk(value, f"{prefix}{name}.")

    if isinstance(top, _Module):
        walk(top, "")
    if not found:
        raise UserError(f"{path} is a TorchScript archive without weights: give a CLIP checkpoint")
    return found
