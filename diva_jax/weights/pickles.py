"""Reads state dicts that PyTorch has saved, with PyTorch, without executing the code that a pickle may contain."""

import pickle
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from diva_jax.common.errors import UserError, listing
from diva_jax.weights.tensors import Tensor

# Names of torch's types that are read; complex numbers and types of 8 bits and less are not weights.
_TORCH_TYPES = frozenset(
    ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
)
# Where training states keep the state dict of the model, in order of preference.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
# A pickle in an archive has names and shapes, without values.
_MAX_PICKLE_BYTES = 2**26
_MAX_COMPRESSED_BYTES = 2**28


def import_torch(why: str):
    """Imports and returns torch; a UserError, whose first words are `why`, where it is not installed."""
    try:
        import torch
    except ImportError as e:
        raise UserError(f"{why} needs torch: pip install -e '.[torch]', or use safetensors") from e
    return torch


def state_dict(path: Path, zipped: bool) -> dict[str, Tensor]:
    """Name -> lazy tensor of a state dict saved with `torch.save`, bare or in a training state.

    `zipped`: whether the file begins as a zip file does; the format of PyTorch before 1.6 is a bare pickle. A UserError
    where torch is not installed, the file is invalid, or it contains objects other than dense tensors.
    """
    if zipped:
        _check_archive(path)
    torch = import_torch(f"reading {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as e:
        if "Weights only load failed" not in str(e) and "Unsupported" not in str(e):
            raise _corrupt(path, e) from e
        raise UserError(
            f"{path} contains objects other than tensors, so opening it could run any code: save only its "
            "state_dict(), preferably as safetensors"
        ) from e
    except Exception as e:  # A damaged file raises any type: torch rebuilds tensors from whatever is written there.
        raise _corrupt(path, e) from e
    tensors = _unwrapped(content, torch.Tensor)
    if not tensors:
        keys = f"a dict of {listing(list(content), 10)}" if isinstance(content, dict) and content else "no state dict"
        raise UserError(
            f"{path} holds {keys}, where tensors by name are wanted, bare or under {' or '.join(_WRAPPERS)}: save the "
            "model's state_dict(), preferably as safetensors"
        )
    for name, tensor in tensors.items():
        if kind := _unsupported(tensor):
            raise UserError(f"{path}: the tensor {name} is {kind}: save dense float tensors, preferably as safetensors")
    return {name: _lazy(tensor) for name, tensor in tensors.items()}


def _unwrapped(content, kind: type, depth: int = 3) -> dict:
    """The tensors of a state dict, by name, in at most `depth` dicts of a training state."""
    if not isinstance(content, dict):
        return {}
    inner = (_unwrapped(content.get(key), kind, depth - 1) for key in _WRAPPERS if depth)
    return next(filter(None, inner), None) or {str(name): t for name, t in content.items() if isinstance(t, kind)}


def _corrupt(path: Path, e: Exception | str) -> UserError:
    why = e if isinstance(e, str) else " ".join(f"{type(e).__name__}: {e}".split())[:200]
    return UserError(f"{path} is truncated or corrupt ({why}): fetch the file again")


def _check_archive(path: Path) -> None:
    """Refuses TorchScript, and archives whose members are together larger than the file that they are in.

    torch stores the values of tensors without compression. Only code and pickles may be compressed, and are small.
    """
    try:
        members = zipfile.ZipFile(path).infolist()
    except Exception as e:  # zipfile raises NotImplementedError, struct.error and others on damaged directories.
        raise _corrupt(path, e) from e
    if any("/code/" in info.filename for info in members):
        raise UserError(
            f"{path} is a TorchScript archive, which is a program and is not run here: the hub has OpenAI's weights "
            "as safetensors (hf-hub:timm/vit_large_patch14_clip_224.openai), and a file that you trust is converted "
            f"by: import torch; torch.save(torch.jit.load({str(path)!r}, 'cpu').state_dict(), 'weights.pt')"
        )
    length = path.stat().st_size
    stored = sum(info.file_size for info in members if info.compress_type == zipfile.ZIP_STORED)
    packed = sum(info.file_size for info in members) - stored
    largest = max((info.file_size for info in members if info.filename.endswith(".pkl")), default=0)
    if stored > length or packed > _MAX_COMPRESSED_BYTES or largest > _MAX_PICKLE_BYTES:
        raise _corrupt(path, f"its members declare {stored + packed} bytes, {largest} in a pickle; it has {length}")


def _unsupported(tensor) -> str | None:
    """What keeps a torch tensor from being read as an array; None for dense tensors of a type that numpy has."""
    import torch

    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.is_quantized:
        return "quantised"
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return f"of shape {tuple(tensor.shape)}, which has more values than are stored"
    name = str(tensor.dtype).removeprefix("torch.")
    return None if name in _TORCH_TYPES else f"of type {name}"


def _lazy(tensor) -> Tensor:
    import torch

    bfloat16 = tensor.dtype == torch.bfloat16

    def read() -> np.ndarray:
        # A copy, because the tensor's own memory is a mapped file, which may change.
        if bfloat16:
            return tensor.detach().contiguous().view(torch.int16).numpy().view(jnp.bfloat16).copy()
        return tensor.detach().numpy().copy()

    dtype = np.dtype(jnp.bfloat16 if bfloat16 else str(tensor.dtype).removeprefix("torch."))
    return Tensor(tuple(tensor.shape), dtype, read)
