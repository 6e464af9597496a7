"""TorchScript archives written by hand, so that every number in them can be wrong."""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

TYPES = {"float32": "FloatStorage", "float16": "HalfStorage", "float64": "DoubleStorage"}


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value) -> bytes:
    if isinstance(value, int) and not isinstance(value, bool):
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    return b"G" + struct.pack(">d", value) if isinstance(value, float) else _text(str(value))


def _numbers(values) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tensor(key: str, kind: str, count, offset, shape, strides) -> bytes:
    """The opcodes of one tensor: a view of `count` elements of the storage `key`."""
    storage = b"(" + _text("storage") + _global("torch", kind) + _text(key) + _text("cpu") + _number(count) + b"tQ"
    arguments = storage + _number(offset) + _numbers(shape) + _numbers(strides) + b"\x89}"
    return _global("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def module(attributes: Mapping[str, bytes], name: str = "Model") -> bytes:
    """The opcodes of one module."""
    items = b"".join(_text(key) + value for key, value in attributes.items())
    return _global("__torch__", name) + b")\x81}(" + items + b"ub"


def pickled(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def dense(arrays: Mapping[str, np.ndarray]) -> tuple[bytes, dict[str, bytes]]:
    """(the pickle of one module with these arrays, its storages)."""
    attributes, storages = {}, {}
    for i, (name, a) in enumerate(arrays.items()):
        strides = [s // a.itemsize for s in np.ascontiguousarray(a).strides]
        attributes[name] = tensor(str(i), TYPES[str(a.dtype)], a.size, 0, a.shape, strides)
        storages[str(i)] = np.ascontiguousarray(a).tobytes()
    return pickled(module(attributes)), storages


def write(path: Path, pickle: bytes, storages: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Writes the archive."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", pickle)
        archive.writestr("a/code/__torch__.py", "")
        for key, data in storages.items():
            archive.writestr(f"a/data/{key}", data)
    return path
