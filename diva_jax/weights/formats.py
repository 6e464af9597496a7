"""Files of weights: read lazily, one tensor at a time, in a format that is detected from a file's first bytes; and
written in the formats of other libraries, safetensors files, open_clip folders, and folders in general."""

import contextlib
import dataclasses
import fcntl
import functools
import glob
import hashlib
import importlib
import json
import os
import pickle
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diva_jax.common import json_files, paths
from diva_jax.common.errors import UserError, explained, listing, reason
from diva_jax.common.log import say_once

# Types that are read; complex numbers and types of 8 bits and less are not weights.
_DTYPES = dict(F64=np.float64, F32=np.float32, F16=np.float16, BF16=jnp.bfloat16, U8=np.uint8, BOOL=np.bool_)
_DTYPES |= dict(I64=np.int64, I32=np.int32, I16=np.int16, I8=np.int8)
_TORCH_TYPES = {np.dtype(dtype).name for dtype in _DTYPES.values()}
# Where training states keep the state dict of the model, in order of preference.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
# A pickle in an archive has names and shapes, without values.
_MAX_PICKLE_BYTES = 2**26
_MAX_COMPRESSED_BYTES = 2**28
_TEMPORARY = ".unfinished"  # At the end of the names of folders that are being written.
OPEN_CLIP_CONFIG = "open_clip_config.json"
_CORRUPT = "is truncated or corrupt"
_DAMAGE = (SafetensorError, OSError, ValueError, OverflowError, MemoryError)  # Of files that safetensors reads.


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, whose shape and dtype are known, and whose values are read by `np.asarray`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype)

    def reshape(self, shape: tuple[int, ...]) -> "Tensor":
        """The tensor in another shape, read as lazily; a numpy array has this method too."""
        return Tensor(shape, self.dtype, lambda: self.read().reshape(shape))


class Tensors(dict[str, Tensor]):
    """Name -> lazy tensor, with the files that contain them, for fingerprints and messages."""

    def __init__(self, tensors: Mapping[str, Tensor], files: list[Path]):
        super().__init__(tensors)
        self.files = files

    def renamed(self, rename: Callable[[str], str | None]) -> "Tensors":
        """Returns the tensors under new names, without those for which `rename` returns None."""
        return Tensors({new: t for old, t in self.items() if (new := rename(old)) is not None}, self.files)


def import_torch(why: str):
    """Imports and returns torch; a UserError, whose first words are `why`, where it is not installed."""
    with explained(f"{why} needs torch", "pip install -e '.[torch]', or use safetensors", ImportError):
        return importlib.import_module("torch")


def state_dict(path: Path, zipped: bool) -> dict[str, Tensor]:
    """Name -> lazy tensor of a state dict saved with `torch.save`, bare or in a training state. `zipped`: whether the
    file begins as a zip file does; the format of PyTorch before 1.6 is a bare pickle. A UserError where torch is not
    installed, the file is invalid, or it contains objects other than dense tensors."""
    if zipped:
        _check_archive(path)
    torch = import_torch(f"reading {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as e:  # A damaged file raises any type: torch rebuilds tensors from whatever is written there.
        problem, advice = f"{path} {_CORRUPT} ({reason(e)})", "fetch the file again"
        if isinstance(e, pickle.UnpicklingError) and re.search("Weights only load failed|Unsupported", str(e)):
            problem = f"{path} contains objects other than tensors, so opening it could run any code"
            advice = "save only its state_dict(), preferably as safetensors"
        raise UserError(f"{problem}: {advice}") from e
    tensors = _unwrapped(content, torch.Tensor)
    if not tensors:
        keys = f"a dict of {listing(list(content), 10)}" if isinstance(content, dict) and content else "no state dict"
        problem = f"{path} holds {keys}, where tensors by name are wanted, bare or under {' or '.join(_WRAPPERS)}"
        raise UserError(f"{problem}: save the model's state_dict(), preferably as safetensors")
    inside = [key for key, value in content.items() if _unwrapped(value, torch.Tensor)]
    if others := set(inside) - set([key for key in _WRAPPERS if key in inside][:1]):  # Such as an average of weights.
        say_once(f"note: {path}: the tensors under {listing(sorted(others, key=str))} are not read")
    return {name: _lazy(f"{path}: the tensor {name}", tensor) for name, tensor in tensors.items()}


def _unwrapped(content, kind: type, depth: int = 3) -> dict:
    """The tensors of a state dict, by name, in at most `depth` dicts of a training state."""
    if not isinstance(content, dict):
        return {}
    inner = (_unwrapped(content.get(key), kind, depth - 1) for key in _WRAPPERS if depth)
    return next(filter(None, inner), None) or {str(name): t for name, t in content.items() if isinstance(t, kind)}


def _check_archive(path: Path) -> None:
    """Refuses TorchScript, and archives with more content than the file; torch compresses no values of tensors."""
    # zipfile raises NotImplementedError, struct.error and others on damaged directories.
    with explained(f"{path} {_CORRUPT}", "fetch the file again", Exception):
        members = zipfile.ZipFile(path).infolist()
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
        why = f"its members declare {stored + packed} bytes, {largest} in a pickle; it has {length}"
        raise UserError(f"{path} {_CORRUPT} ({why}): fetch the file again")


def _lazy(where: str, tensor) -> Tensor:
    """A dense torch tensor of a type that numpy has; a UserError, which begins with `where`, for others."""
    import torch

    name, kind = str(tensor.dtype).removeprefix("torch."), None
    if tensor.is_meta:
        kind = "on the meta device, without values"
    elif tensor.is_quantized:
        kind = "quantised"
    elif tensor.layout != torch.strided:
        kind = "sparse"
    elif tensor.nbytes > tensor.untyped_storage().nbytes():
        kind = f"of shape {tuple(tensor.shape)}, which has more values than are stored"
    elif name not in _TORCH_TYPES:
        kind = f"of type {name}"
    if kind:
        raise UserError(f"{where} is {kind}: save dense float tensors, preferably as safetensors")
    dtype = np.dtype(getattr(jnp, name.replace("bool", "bool_")))

    def read() -> np.ndarray:
        dense = tensor.detach().contiguous()
        dense = dense.view(torch.int16) if tensor.dtype == torch.bfloat16 else dense
        # A copy, because the tensor's own memory is a mapped file, which may change.
        return dense.numpy().view(dtype).copy()

    return Tensor(tuple(tensor.shape), dtype, read)


def _safetensors(path: Path) -> dict[str, Tensor]:
    def read(name: str) -> np.ndarray:
        with explained(f"{path}: the tensor {name} cannot be read", "fetch the file again", *_DAMAGE):
            return file.get_tensor(name)

    with explained(f"{path} cannot be read as safetensors", "fetch the file again", *_DAMAGE):
        # With mmap, the mapped pages would count as memory of this process, in addition to the arrays.
        file = safe_open(path, framework="numpy", backend="pread")
        tensors = {}
        for name in file.keys():  # noqa: SIM118 - file is not a dict
            piece = file.get_slice(name)
            if (kind := piece.get_dtype()) not in _DTYPES:
                raise UserError(f"{path}: the tensor {name} is of type {kind}, give a file of float weights")
            shape, dtype = tuple(piece.get_shape()), np.dtype(_DTYPES[kind])
            tensors[name] = Tensor(shape, dtype, functools.partial(read, name))
        return tensors


def open_file(path: Path) -> Tensors:
    """Opens a local file, safetensors or a state dict that PyTorch has saved: name -> lazy tensor, read when it is
    requested. A UserError where it is missing, truncated or of another format, or needs torch, which is not there."""
    advice = "give a file of weights"
    with explained(f"{path} cannot be read", advice), open(path, "rb", opener=json_files.open_regular) as f:
        start = f.read(64)
    if start[8:9] == b"{":
        return Tensors(_safetensors(path), [path])
    zipped = start.startswith(b"PK\x03\x04")
    if zipped or start.startswith(b"\x80"):
        return Tensors(state_dict(path, zipped), [path])
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer and not the file itself: run git lfs pull")
    problem = f"{path} is neither safetensors nor a torch file (it begins with {start[:12]!r})"
    raise UserError(f"{problem}: fetch the file again")


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
    """Opens the weights in a local folder under the first of the file names `stems`, without suffix, that exists. All
    file names that diffusers, transformers and open_clip use are supported: `.safetensors` or `.bin`, variants such as
    fp16, and sharded files with an index. A UserError where there is none, a shard is missing, or a file is invalid."""
    for path in (folder / name for stem in stems for name in _spellings(stem)):
        if path.is_file():
            files = _shards(path) if path.suffix == ".json" else [path]
            return Tensors({n: t for file in files for n, t in open_file(file).items()}, files)
    advice = next((f"give the file itself, {file}" for file in sorted(folder.glob("*.pth"))), "fetch them again")
    raise UserError(f"{folder} has no weights ({' or '.join(stems)}.safetensors or .bin): {advice}")


def fingerprint(files: list[Path]) -> str:
    """Returns the SHA-256 of the concatenated SHA-256 digests of `files`, in order, as 64 hex digits."""

    def digest(path: Path) -> bytes:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").digest()

    with ThreadPoolExecutor(4) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, files))).hexdigest()


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes arrays, or lazy tensors, to a file that appears when it is complete; an OSError where it cannot."""
    # save_file ignores strides, so that a transposed view would be written in the wrong order.
    dense = {name: np.asarray(t, order="C") for name, t in tensors.items()}
    with paths.whole_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        with explained(f"{path} is not written", "make room", SafetensorError, kind=OSError):
            save_file(dense, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)  # save_file makes files that only their owner can read.


def write_json(path: str | Path, content: Mapping) -> None:
    """Writes an indented JSON file."""
    Path(path).write_text(json.dumps(content, indent=2) + "\n")


def write_open_clip(folder: str | Path, tensors: Mapping[str, np.ndarray], config: Mapping) -> None:
    """Writes a folder that open_clip reads as "local-dir:...": tensors by open_clip's names, and the config."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "open_clip_model.safetensors", tensors)
    write_json(folder / OPEN_CLIP_CONFIG, config)


def refuse_taken(out: str | Path) -> None:
    """Raises a UserError if `out` exists and is not an empty folder, is a mount point, or may not be written."""
    out = Path(out)
    if (taken := out.exists() and (not out.is_dir() or any(out.iterdir()))) or out.resolve().is_mount():
        said = "exists already: remove it, or give another folder" if taken else "is a mount point: give a folder in it"
        raise UserError(f"--out={out} {said}")
    paths.check_writable(out, "--out")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder; an OSError where another process does, or the file system has no locks."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `out` if the block succeeds and removed otherwise; a UserError
    where `out` is there and not an empty folder, or cannot be written."""
    refuse_taken(out)
    out = Path(out).resolve()  # A link stays.
    with explained(f"--out={out} cannot be written", "give a folder that you may write"):
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f".{glob.escape(out.name)}.*{_TEMPORARY}"):  # Killed exports have left these.
            with contextlib.suppress(OSError), _locked(left):
                shutil.rmtree(left, ignore_errors=True)
        tmp = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}{_TEMPORARY}")
        tmp.mkdir()
    with contextlib.ExitStack() as held:
        held.callback(shutil.rmtree, tmp, ignore_errors=True)
        with contextlib.suppress(OSError):
            held.enter_context(_locked(tmp))
        with explained(f"--out={out} cannot be written", "give a folder with enough room"):
            yield tmp
            # This replaces an empty folder, and fails if files were added to it in the meantime.
            os.replace(tmp, out)
