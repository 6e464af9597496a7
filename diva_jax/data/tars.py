"""Random access to the images of tar shards, through an index of their headers."""

import concurrent.futures
import hashlib
import io
import json
import logging
import os
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diva_jax.common.errors import UserError, listing
from diva_jax.data import files
from diva_jax.data.records import Record

logger = logging.getLogger(__name__)

_BLOCK = tarfile.BLOCKSIZE
_VERSION = 1  # Of the cached index; counts up whenever what `scan` takes in changes.
_SCANNERS = 16  # Threads; reading headers is mostly waiting for the disk.
_NAMED = 20  # Damaged shards named in the log before it only counts.


class Members(NamedTuple):
    """The complete image members of one shard.

    Attributes:
      names: as the archive spells them, long names included.
      offsets, sizes: of the data, in bytes.
      complaint: what is wrong with the shard; empty if nothing is.
    """

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    complaint: str


def scan(path: str) -> Members:
    """Reads the headers of one shard. Damage ends the scan; what came whole before it is kept.

    Raises:
      UserError: the file cannot be opened or read.
    """
    names, offsets, sizes = [], [], []
    try:
        length, _ = files.stat(path)
        with files.open_binary(path) as file:
            complaint = _scan(file, length, names, offsets, sizes)
    except OSError as e:
        # Not damage to work around: a passing failure would change the data, and the cache remember it.
        raise UserError(f"tar shard {path} of config.data.path cannot be read ({e}): mend that or leave it out") from e
    return Members(names, offsets, sizes, complaint)


def _scan(file, length: int, names: list[str], offsets: list[int], sizes: list[int]) -> str:
    try:
        tar = tarfile.TarFile(fileobj=file)
    except tarfile.TarError:
        return "is no uncompressed tar archive"
    here = 0
    while True:
        file.seek(here)
        try:
            info = tarfile.TarInfo.fromtarfile(tar)
        except (tarfile.TarError, ValueError, IndexError):  # The latter two: nonsense in a long-name header.
            break
        whole = info.offset_data + info.size <= length
        if not whole or tar.offset <= here:
            break
        here = tar.offset
        if info.isreg() and not info.issparse() and files.is_image(info.name):
            names.append(info.name)
            offsets.append(info.offset_data)
            sizes.append(info.size)
    file.seek(here)
    # A whole archive ends with blocks of zeros; one cut off between two members has none.
    if file.read(_BLOCK) == tarfile.NUL * _BLOCK:
        return ""
    return f"is cut short or damaged at byte {here} of {length}: {len(names)} images kept, the rest skipped"


class Index(NamedTuple):
    """All members of all shards, N in number.

    Attributes:
      shard: int32 [N], which file.
      offset, size: int64 [N], bytes.
      names: uint8, every name in UTF-8, one after the other.
      name_end: int64 [N], where each name ends in `names`.
      complaints: JSON, a list of [file number, what is wrong].
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    names: np.ndarray
    name_end: np.ndarray
    complaints: np.ndarray


def _pack(parts: Sequence[Members]) -> Index:
    names = [name.encode("utf-8", "surrogateescape") for part in parts for name in part.names]
    complaints = [(i, part.complaint) for i, part in enumerate(parts) if part.complaint]
    return Index(
        shard=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.names) for part in parts]),
        offset=np.array([o for part in parts for o in part.offsets], np.int64),
        size=np.array([s for part in parts for s in part.sizes], np.int64),
        names=np.frombuffer(b"".join(names), np.uint8),
        name_end=np.cumsum([len(name) for name in names], dtype=np.int64),
        complaints=np.array(json.dumps(complaints)),
    )


def _scan_all(shards: Sequence[str], quiet: bool) -> list[Members]:
    """Scans in threads; a line with the time left every ten seconds."""
    start = last = time.monotonic()
    parts: list[Members] = []
    with concurrent.futures.ThreadPoolExecutor(_SCANNERS) as pool:
        for part in pool.map(scan, shards):
            parts.append(part)
            now = time.monotonic()
            if now - last > 10 and not quiet:
                left = (now - start) / len(parts) * (len(shards) - len(parts))
                line = f"indexing tar shards: {len(parts)} of {len(shards)}, about {left:.0f} s left"
                print(line, file=sys.stderr, flush=True)
                last = now
    return parts


def _cache_file(shards: Sequence[str], cache_dir: str) -> str:
    """A name that changes whenever a shard is added, removed, replaced or written to."""
    with concurrent.futures.ThreadPoolExecutor(_SCANNERS) as pool:
        facts = list(pool.map(_fact, shards))
    digest = hashlib.sha256(json.dumps([_VERSION, facts]).encode()).hexdigest()
    return os.path.join(cache_dir, f"tar_index_{digest[:20]}.npz")


def _fact(shard: str) -> tuple[str, int, str]:
    try:
        return (shard if files.is_remote(shard) else os.path.abspath(shard), *files.stat(shard))
    except OSError:
        return shard, -1, ""


def _load(path: str) -> Index | None:
    try:
        with files.open_binary(path) as f, np.load(io.BytesIO(f.read()), allow_pickle=False) as stored:
            return Index(**{field: stored[field] for field in Index._fields})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        logger.warning("the cached index %s cannot be read (%s): building it again", path, e)
        return None


def _store(path: str, index: Index) -> None:
    data = io.BytesIO()
    np.savez(data, **index._asdict())
    try:
        files.write_atomically(path, data.getvalue())
    except OSError as e:
        logger.warning("the index of the tar shards could not be kept in %s (%s): going on without", path, e)


def build_index(shards: Sequence[str], cache_dir: str | None = None, quiet: bool = False) -> Index:
    """Indexes shards, from the cache where it knows them as they are now.

    Args:
      shards: tar files.
      cache_dir: folder for the index, created when needed; None keeps none. Nothing is ever written
        beside the shards.
      quiet: print no progress.
    """
    cached = cache_dir and _cache_file(shards, cache_dir)
    index = _load(cached) if cached else None
    if index is None:
        index = _pack(_scan_all(shards, quiet))
        if cached:
            _store(cached, index)
    return index


class TarSource:
    """The images of tar shards as webdataset and img2dataset write them, in archive order.

    Args:
      shards: tar files, local or remote.
      cache_dir: folder for the index, or None.
      quiet: neither progress nor complaints about damaged shards are reported.

    Raises:
      UserError: not one image in all the shards.
    """

    def __init__(self, shards: Sequence[str], cache_dir: str | None = None, quiet: bool = False):
        self.shards = list(shards)
        self._index = build_index(self.shards, cache_dir, quiet)
        self._reader = files.Reader()
        self.damaged = {self.shards[i]: why for i, why in json.loads(str(self._index.complaints))}
        if not quiet:
            self._report()
        if not len(self):
            found = f" ({listing([f'{s} {why}' for s, why in self.damaged.items()], 3)})" if self.damaged else ""
            raise UserError(f"config.data.path: not one image in {len(self.shards)} tar files{found}")

    def _report(self):
        for shard, why in list(self.damaged.items())[:_NAMED]:
            logger.warning("tar shard %s %s", shard, why)
        if self.damaged:
            logger.warning("%d of %d tar shards are damaged", len(self.damaged), len(self.shards))

    def __len__(self) -> int:
        return len(self._index.shard)

    def name(self, i: int) -> str:
        """`shard.tar/member.jpg`."""
        start = self._index.name_end[i - 1] if i else 0
        member = self._index.names[start : self._index.name_end[i]].tobytes()
        shard = self.shards[self._index.shard[i]]
        return f"{os.path.basename(shard)}/{member.decode('utf-8', 'surrogateescape')}"

    has_text = False

    def read(self, i: int, with_text: bool = True) -> Record:
        """Name and encoded image; an OSError if the shard has shrunk or gone since it was indexed."""
        index = self._index
        shard = self.shards[index.shard[i]]
        return Record(self.name(i), self._reader.read(shard, int(index.offset[i]), int(index.size[i])))
