"""Cache of what frozen models make of the data: `python -m diva_jax.cache_latents` writes it, `config.data.latents`
names it.

A manifest, `latents.json`, and array_record shards, whose entries have checksums. Shard s has the records s * per_shard
.. (s + 1) * per_shard - 1 of the data set in order, and of each record all crops in order. An entry is a header
(`_HEADER`) and the moments of a VAE for one crop, bfloat16 [h, w, 2 c] in C order; none where the image could not be
decoded. Where other models' outputs are cached, the values of all are in their place, as one row, [1, 1, N].
Crop e of record r has the box that a run with the manifest's seed draws for r in epoch e.
"""

import functools
import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from array_record.python import array_record_module
from pydantic import Field

from diva_jax.common import json_files, paths
from diva_jax.common.errors import RunError, UserError, explained, listing
from diva_jax.common.fields import differences
from diva_jax.data.images import Box
from diva_jax.data.sources import Source

DTYPE = np.dtype(ml_dtypes.bfloat16)
FILE = "latents.json"
_Side = Annotated[int, Field(ge=1, le=2**30)]
# Number of the record, number of the crop, CRC-32 of the encoded image, box.
_HEADER = struct.Struct("<qiI4i")
# About the largest sizes that array_record adds to an entry and to a shard.
_ENTRY_OVERHEAD_BYTES, _SHARD_OVERHEAD_BYTES = 160, 2**17
_MAX_OPEN_SHARDS = 256
_MAX_SHARDS = 10**6
_AGAIN = "make the cache of this config and data with python -m diva_jax.cache_latents"
# Records that are compared with the data when a cache is opened.
PROBED = 16


class Entry(NamedTuple):
    """One crop of a record: the `checksum` of its content, box, moments, bfloat16 [h, w, 2 c], None if it is broken."""

    record: int
    crop: int
    image_crc: int
    box: Box
    moments: np.ndarray | None

    def pack(self) -> bytes:
        """The entry as a shard holds it."""
        head = _HEADER.pack(self.record, self.crop, self.image_crc, *self.box)
        return head if self.moments is None else head + np.ascontiguousarray(self.moments, DTYPE).tobytes()

    @classmethod
    def unpack(cls, data: bytes, shape: tuple[int, ...]) -> "Entry":
        """The entry of packed data; a ValueError where the moments do not have this shape."""
        record, crop, crc, *box = _HEADER.unpack_from(data)
        moments = np.frombuffer(data, DTYPE, offset=_HEADER.size).reshape(shape) if len(data) > _HEADER.size else None
        return cls(record, crop, crc, tuple(box), moments)


def checksum(record, with_text: bool) -> int:
    """CRC-32 of a record's encoded image, and of its caption where what is cached depends on it."""
    found = zlib.crc32(record.image)
    return zlib.crc32(record.text.encode("utf-8", "surrogatepass"), found) if with_text else found


class Manifest(json_files.Record):
    """latents.json: what a cache holds. `facts` are what the moments depend on beside images and boxes (the VAE, its
    weights, the crop setting), `crops` the number of each record's, `seed` the boxes', `shape` the moments'."""

    format: Literal[1] = 1
    facts: dict[str, Any]
    records: Annotated[int, Field(ge=1, le=2**40)]
    crops: Annotated[int, Field(ge=1, le=2**20)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    per_shard: Annotated[int, Field(ge=1, le=2**40)]
    shape: Annotated[tuple[_Side, _Side, _Side], Field(strict=False)]

    @property
    def shards(self) -> int:
        return math.ceil(self.records / self.per_shard)

    def shard_bytes(self, shard: int) -> int:
        """The size of a shard's file, rounded up."""
        entry = math.prod(self.shape) * DTYPE.itemsize + _ENTRY_OVERHEAD_BYTES
        return _SHARD_OVERHEAD_BYTES + len(self.range(shard)) * self.crops * entry

    @property
    def fingerprint(self) -> str:
        """16 hex digits that differ where any value does."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]

    def text(self) -> str:
        """The content of its file."""
        return json.dumps(self.model_dump(), indent=1, sort_keys=True)

    def range(self, shard: int) -> range:
        """The records of a shard."""
        return range(shard * self.per_shard, min(self.records, (shard + 1) * self.per_shard))

    def file(self, shard: int) -> str:
        """The name of a shard."""
        return f"{shard:05d}-of-{self.shards:05d}.array_record"

    @classmethod
    def read(cls, folder: Path, field: str) -> "Manifest | None":
        """The manifest in a folder, None where there is none; a UserError where it is broken or of another version."""
        with explained(f"{field}={folder} holds no cache of this version", _AGAIN, UserError):
            found = json_files.read(folder / FILE, cls, "it cannot be used", None)
        if found and found.shards > _MAX_SHARDS:
            raise UserError(f"{field}={folder} has more than {_MAX_SHARDS} shards: {_AGAIN}")
        return found


def write_shard(folder: Path, name: str, entries: Iterable[Entry]) -> None:
    """Writes a shard, which appears in the folder when it is complete."""
    with paths.whole_file(folder / name) as temporary:
        temporary.touch()  # Raises an OSError of one line where the folder cannot be written.
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        failed = f"{name} is not written", "make room", RuntimeError  # Whatever the reason.
        try:
            for entry in entries:
                with explained(*failed, kind=OSError):
                    writer.write(entry.pack())
        finally:
            if writer.is_open():
                with explained(*failed, kind=OSError):
                    writer.close()
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())


def _open(path: Path):
    return array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0", file_reader_buffer_size=32768)


def is_complete(path: Path, entries: int) -> bool:
    """Whether a shard has this many entries."""
    if not path.is_file():
        return False
    reader = _open(path)
    return reader.ok() and reader.num_records() == entries


class Cache:
    """A cache on this machine, read from any number of threads; `facts` are what this run's moments depend on,
    `shapes` those of its arrays, if there are others. `with_text`: whether captions are among them. A UserError, which
    names `config.data.latents`, where it is missing or of other facts."""

    def __init__(self, folder: str, facts: Mapping[str, Any], shapes: Mapping | None = None, with_text: bool = False):
        self._folder = paths.local(folder, "config.data.latents")
        self._named = f"config.data.latents={folder}"
        manifest = Manifest.read(self._folder, "config.data.latents")
        if manifest is None:
            raise UserError(f"{self._named} holds no cache of latents ({FILE} is not there): {_AGAIN}")
        self.manifest, self._with_text = manifest, with_text
        self._shapes = shapes or {"moments": manifest.shape}
        if wrong := differences(manifest.facts, facts):
            raise UserError(f"{self._named} was made with other settings: {listing(wrong, 3)}; {_AGAIN}")
        self._reader = functools.lru_cache(maxsize=_MAX_OPEN_SHARDS)(_open)

    def check(self, source: Source, records: Iterable[int] | None = None) -> None:
        """Compares some records, by default spread over all, with those that the cache was made of. A UserError if they
        differ, or the cache, where no records are given, is not complete."""
        m, there = self.manifest, len(source)
        if there != m.records:
            raise UserError(f"{self._named} was made of {m.records} images, and config.data.path has {there}: {_AGAIN}")
        if records is None:
            there, records = set(os.listdir(self._folder)), np.unique(np.linspace(0, m.records - 1, PROBED, dtype=int))
            if missing := [name for name in map(m.file, range(m.shards)) if name not in there]:
                lacking = f"{len(missing)} of its {m.shards} shards ({listing(missing, 2)})"
                raise UserError(f"{self._named} lacks {lacking}: {_AGAIN}")
        for record in records:
            entry = self._entry(int(record), 0)
            try:
                found = checksum(source.read(int(record), with_text=self._with_text), self._with_text)
            except Exception:  # Reported where the record is used.
                continue
            if entry.moments is not None and entry.image_crc != found:
                raise UserError(self._other_image(source.name(int(record))))

    def read(self, record: int, epoch: int) -> Entry | None:
        """A record's crop in an epoch, modulo their number; None where its image was broken; a RunError for damage."""
        entry = self._entry(record, epoch % self.manifest.crops)
        return None if entry.moments is None else entry

    def arrays(self, entry: Entry, record, name: str) -> dict[str, np.ndarray]:
        """The arrays of an entry whose image could be decoded, by name; a RunError where it was made of another encoded
        image, or caption, than that of a record."""
        if entry.image_crc != checksum(record, self._with_text):
            raise RunError(self._other_image(name))
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        rows = np.split(entry.moments.reshape(-1), np.cumsum(sizes)[:-1])
        return {name: row.reshape(shape) for (name, shape), row in zip(self._shapes.items(), rows, strict=True)}

    def _other_image(self, name: str) -> str:
        what = f"{name} is another image{' or caption' * self._with_text} there"
        return f"{self._named} was made of other data: {what}; {_AGAIN}"

    def _entry(self, record: int, crop: int) -> Entry:
        m = self.manifest
        shard = record // m.per_shard
        problem = f"{self._named}: the entry of record {record}, crop {crop} in {m.file(shard)} cannot be read"
        damage = (RuntimeError, ValueError, IndexError, OSError, struct.error)
        with explained(problem, f"delete that file, and {_AGAIN}", *damage, kind=RunError):
            (data,) = self._reader(self._folder / m.file(shard)).read([(record % m.per_shard) * m.crops + crop])
            entry = Entry.unpack(data, m.shape)
            if (entry.record, entry.crop) != (record, crop):
                raise ValueError(f"it is that of record {entry.record}, crop {entry.crop}")
        return entry
