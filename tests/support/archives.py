"""Files as `torch.save` writes them, made by hand, so that every number in them can be wrong."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path


def _opcodes(value) -> bytes:
    return pickle.dumps(value, 2)[2:-1]  # Without the number of the protocol and the end.


def tensor(key: str, count, offset, shape, strides) -> bytes:
    """The opcodes of one tensor: a view of `count` elements of the float32 storage `key`."""
    name, *more = map(_opcodes, ("storage", key, "cpu", count))
    storage = b"(" + name + b"ctorch\nFloatStorage\n" + b"".join(more) + b"tQ"
    arguments = storage + b"".join(map(_opcodes, (offset, tuple(shape), tuple(strides), False, {})))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def state_dict(tensors: Mapping[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(_opcodes(key) + value for key, value in tensors.items()) + b"u."


def write(path: Path, pickle: bytes, storages: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    members = {"data.pkl": pickle, "byteorder": "little", "version": "3\n"}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in (members | {f"data/{key}": data for key, data in storages.items()}).items():
            archive.writestr(f"a/{name}", data)
    return path
