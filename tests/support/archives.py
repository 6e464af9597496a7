"""Files as `torch.save` writes them, made by hand, so that every number in them can be wrong."""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value) -> bytes:
    if isinstance(value, int) and not isinstance(value, bool):
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    return b"G" + struct.pack(">d", value) if isinstance(value, float) else text(str(value))


def _numbers(values) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


def tensor(key: str, count, offset, shape, strides) -> bytes:
    """The opcodes of one tensor: a view of `count` elements of the float32 storage `key`."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + _number(count) + b"tQ"
    arguments = storage + _number(offset) + _numbers(shape) + _numbers(strides) + b"\x89}"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def state_dict(tensors: Mapping[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in tensors.items()) + b"u."


def write(path: Path, pickle: bytes, storages: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", pickle)
        archive.writestr("a/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"a/data/{key}", data)
        archive.writestr("a/version", "3\n")
    return path
