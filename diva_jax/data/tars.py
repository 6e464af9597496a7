"""Random access to the images and captions of tar shards, through an index of their headers."""

import concurrent.futures
import functools
import hashlib
import io
import json
import logging
import os
import posixpath
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diva_jax.common import paths
from diva_jax.common.errors import UserError, listing
from diva_jax.data import files
from diva_jax.data.records import Record, caption

logger = logging.getLogger(__name__)

_BLOCK = tarfile.BLOCKSIZE
_VERSION = 3  # Of the cached index; increased whenever the content of an index changes.
_SCANNERS = 16  # Threads; reading headers is mostly waiting for the disk.
_NAMED = 20  # Damaged shards that the log names; further ones are only counted.
_CAPTIONS = ("", ".txt", ".json")  # Suffixes of caption members by their code in the index.
_LONGEST_HEADER = 2**13  # Bytes of an extended header; tarfile needs time that grows with their square.
# What tarfile raises for damaged headers; all but the first for the numbers and names in extended ones.
_BROKEN_HEADER = (tarfile.TarError, ValueError, IndexError, KeyError, OverflowError)
_LONGEST_CAPTION = 2**20  # Bytes; a larger .txt or .json member is no caption.


class Member(NamedTuple):
    """A regular file in a tar; `offset` and `size` are those of its data, in bytes."""

    name: str
    offset: int
    size: int


class Scan(NamedTuple):
    """The complete members of one shard, in archive order, and what is wrong with it (empty if nothing is)."""

    members: list[Member]
    complaint: str


class _Headers:
    """A file of which tarfile reads headers alone: none of them is large.

    Args:
      file: a seekable binary file.
    """

    def __init__(self, file):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def scan(path: str) -> Scan:
    """Reads the headers of one shard. Damage ends the scan; the complete members before it are kept.

    Raises:
      OSError: the file cannot be opened or read.
    """
    length, _ = files.stat(path)
    with files.open_binary(path) as file:
        try:
            tar = tarfile.TarFile(fileobj=_Headers(file))
        except _BROKEN_HEADER:
            return Scan([], "is no uncompressed tar archive, or its first header is damaged")
        members, end = [], 0
        while True:
            file.seek(end)
            try:
                info = tarfile.TarInfo.fromtarfile(tar)
            except _BROKEN_HEADER:
                break
            if info.size < 0 or info.offset_data + info.size > length or tar.offset <= end:
                break
            end = tar.offset
            if info.isreg() and not info.issparse():
                members.append(Member(info.name, info.offset_data, info.size))
        file.seek(end)
        # A complete archive ends with blocks of zeros; one that is cut off between two members has none.
        complete = file.read(_BLOCK) == tarfile.NUL * _BLOCK
    return Scan(members, "" if complete else f"is cut short or damaged at byte {end} of {length}")


def sample_key(name: str) -> tuple[str, str]:
    """(the sample that a member belongs to, its extension), split at the first dot as webdataset does."""
    folder, base = posixpath.split(name)
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension.lower()


class Images(NamedTuple):
    """The images of one shard.

    Attributes:
      members: of each image.
      captions: (code in `_CAPTIONS`, offset, size) of each image's caption.
      complaint: what is wrong with the shard; empty if nothing is.
    """

    members: list[Member]
    captions: list[tuple[int, int, int]]
    complaint: str


def _caption_of(name: str, texts: dict[str, Member]) -> tuple[int, int, int]:
    """The caption member of an image: of its name without the suffix, or else of its webdataset sample."""
    for stem in (posixpath.splitext(name)[0], sample_key(name)[0]):
        for code, suffix in enumerate(_CAPTIONS[1:], start=1):
            if found := texts.get(stem + suffix):
                return code, found.offset, found.size
    return 0, 0, 0


def _images(path: str) -> Images:
    """The images of a shard, with their captions.

    Raises:
      UserError: the shard cannot be opened or read.
    """
    try:
        members, complaint = scan(path)
    except OSError as e:
        # Not skipped as damage is: a temporary failure would change the data, and the cache would keep the change.
        raise UserError(f"tar shard {path} of config.data.path cannot be read ({e}): repair it or leave it out") from e
    found = [m for m in members if files.is_image(m.name)]
    texts = {m.name: m for m in members if m.name.endswith(_CAPTIONS[1:]) and m.size <= _LONGEST_CAPTION}
    if complaint and members:
        complaint += f": {len(found)} images kept, the rest skipped"
    return Images(found, [_caption_of(m.name, texts) for m in found], complaint)


class Index(NamedTuple):
    """The images of all shards, N in number.

    Attributes:
      shard: int32 [N], which file.
      offset, size: int64 [N], bytes.
      caption: uint8 [N], code in `_CAPTIONS` of the member with the caption; 0: there is none.
      text_offset: int64 [N], bytes; of that member.
      text_size: int32 [N], bytes; of that member.
      names: uint8, the concatenated names in UTF-8.
      name_end: int64 [N], where each name ends in `names`.
      complaints: JSON, a list of [file number, what is wrong].
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    caption: np.ndarray
    text_offset: np.ndarray
    text_size: np.ndarray
    names: np.ndarray
    name_end: np.ndarray
    complaints: np.ndarray


def _pack(parts: Sequence[Images]) -> Index:
    members = [m for part in parts for m in part.members]
    captions = [c for part in parts for c in part.captions]
    names = [m.name.encode("utf-8", "surrogateescape") for m in members]
    complaints = [(i, part.complaint) for i, part in enumerate(parts) if part.complaint]
    return Index(
        shard=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.members) for part in parts]),
        offset=np.array([m.offset for m in members], np.int64),
        size=np.array([m.size for m in members], np.int64),
        caption=np.array([code for code, _, _ in captions], np.uint8),
        text_offset=np.array([offset for _, offset, _ in captions], np.int64),
        text_size=np.array([size for _, _, size in captions], np.int32),
        names=np.frombuffer(b"".join(names), np.uint8),
        name_end=np.cumsum([len(name) for name in names], dtype=np.int64),
        complaints=np.array(json.dumps(complaints)),
    )


def _scan_all(shards: Sequence[str], quiet: bool) -> list[Images]:
    """Scans in threads, and prints a line with the remaining time every ten seconds."""
    start = last = time.monotonic()
    parts: list[Images] = []
    with concurrent.futures.ThreadPoolExecutor(_SCANNERS) as pool:
        for part in pool.map(_images, shards):
            parts.append(part)
            now = time.monotonic()
            if now - last > 10 and not quiet:
                left = (now - start) / len(parts) * (len(shards) - len(parts))
                line = f"indexing tar shards: {len(parts)} of {len(shards)}, about {left:.0f} s left"
                print(line, file=sys.stderr, flush=True)
                last = now
    return parts


def _cache_file(shards: Sequence[str], cache_dir: str) -> str:
    """The index's file, whose name changes whenever a shard is added, removed, replaced or written to."""
    with concurrent.futures.ThreadPoolExecutor(_SCANNERS) as pool:
        facts = list(pool.map(_version_of, shards))
    digest = hashlib.sha256(json.dumps([_VERSION, facts]).encode()).hexdigest()
    return os.path.join(cache_dir, f"tar_index_{digest[:20]}.npz")


def _version_of(shard: str) -> tuple[str, int, str]:
    try:
        return (shard if paths.is_remote(shard) else os.path.abspath(shard), *files.stat(shard))
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
        paths.write_whole(path, data.getvalue())
    except OSError as e:
        logger.warning(
            "the index of the tar shards could not be written to %s (%s): the next start will scan them again", path, e
        )


def build_index(shards: Sequence[str], cache_dir: str | None = None, quiet: bool = False) -> Index:
    """Indexes shards, or reads the index from the cache if no shard has changed since it was written.

    Args:
      shards: tar files.
      cache_dir: folder for the index, created when needed; None: no cache. Nothing is ever written beside the shards.
      quiet: print no progress.

    Raises:
      UserError: a shard cannot be opened or read.
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

    An image's caption is the `.txt` member of the same stem, or else the "caption" of its `.json` member. It is read
    from the tar when it is asked for.

    Args:
      shards: tar files, local or remote.
      cache_dir: folder for the index, or None.
      quiet: report neither progress nor damaged shards.

    Raises:
      UserError: a shard cannot be read, or there is not one image in all the shards.
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

    @functools.cached_property
    def has_text(self) -> bool:
        """Whether there are captions: a .txt member, or a "caption" in the first .json member."""
        if (self._index.caption == _CAPTIONS.index(".txt")).any():
            return True
        found = np.flatnonzero(self._index.caption)
        try:
            return bool(len(found)) and self._text(int(found[0])) is not None
        except (OSError, ValueError):
            return False

    def _text(self, i: int) -> str | None:
        index = self._index
        suffix = _CAPTIONS[index.caption[i]]
        if not suffix:
            return None
        data = self._reader.read(self.shards[index.shard[i]], int(index.text_offset[i]), int(index.text_size[i]))
        try:
            text = data.decode("utf-8")
            if suffix == ".txt":
                return text
            meta = json.loads(text)
        except ValueError as e:
            raise ValueError(f"the caption in its {suffix} member cannot be read ({e})") from e
        return caption(meta.get("caption")) if isinstance(meta, dict) else None

    def read(self, i: int, with_text: bool = True) -> Record:
        """See `Source.read`.

        Raises:
          OSError: the shard is shorter than when it was indexed, or no longer there.
          ValueError: the caption is not UTF-8, or its .json member is broken.
        """
        index = self._index
        if index.size[i] > files.MAX_IMAGE_BYTES:
            raise ValueError(f"it has {index.size[i]} bytes, more than any image")
        image = self._reader.read(self.shards[index.shard[i]], int(index.offset[i]), int(index.size[i]))
        return Record(self.name(i), image, self._text(i) if with_text else None)
