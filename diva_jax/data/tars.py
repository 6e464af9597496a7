"""Random access to the images and captions of tar shards, through an index of their headers."""

import concurrent.futures
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import posixpath
import struct
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import pydantic
from pydantic import Field
from tqdm import tqdm

from diva_jax.common import json_files, paths
from diva_jax.common.errors import UserError, listing
from diva_jax.data import files
from diva_jax.data.records import MAX_CAPTION_BYTES, Record, caption

logger = logging.getLogger(__name__)

# Part of the cached index's name; increased whenever the content of an index changes.
_INDEX_VERSION = 4
# Threads that read headers, which is mostly waiting for the disk.
_SCANNERS = 16
# Damaged shards that the log names; further ones are only counted.
_MAX_NAMED = 20
# A larger index, of more than thirty million images, is made at every start.
_MAX_INDEX_BYTES = 2**31
# tarfile needs time that grows with the square of an extended header's size.
_MAX_HEADER_BYTES = 2**13
# What tarfile raises for damaged headers; all but the first for the numbers and names in extended ones.
_BROKEN_HEADER = (tarfile.TarError, ValueError, IndexError, KeyError, OverflowError)
# Extensions of members with captions, by their code in the index.
_CAPTIONS = ("", "txt", "json")


class Member(NamedTuple):
    """A regular file in a tar; `offset` and `size` are those of its data, in bytes."""

    name: str
    offset: int
    size: int


class _Headers:
    """A seekable binary file of which tarfile reads headers alone: none of them is large."""

    def __init__(self, file):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def scan(path: str) -> tuple[list[Member], str]:
    """Reads the headers of one shard. Damage ends the scan; the complete members before it are kept.

    Returns:
      (members in archive order, what is wrong with the shard: empty if nothing is).

    Raises:
      OSError: the file cannot be opened or read.
    """
    length, _ = files.stat(path)
    with files.open_binary(path) as file:
        try:
            tar = tarfile.TarFile(fileobj=_Headers(file))
        except _BROKEN_HEADER:
            return [], "is no uncompressed tar archive, or its first header is damaged"
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
        complete = file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
    return members, "" if complete else f"is cut short or damaged at byte {end} of {length}"


def _split(name: str) -> tuple[str, str]:
    """(the sample that a member belongs to, its extension in lower case), split at the first dot of its name."""
    folder, base = posixpath.split(name)
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension.lower()


def samples(members: Iterable[Member]) -> dict[str, dict[str, Member]]:
    """Groups members as webdataset does: those whose names are the same up to the first dot are one sample.

    Returns:
      {name up to the dot: {extension in lower case: member}}, in the order of the archive, without hidden files.
    """
    grouped: dict[str, dict[str, Member]] = {}
    for member in members:
        key, extension = _split(member.name)
        if posixpath.basename(key):
            grouped.setdefault(key, {})[extension] = member
    return grouped


# One image: its shard, the bytes of its file, the code in `_CAPTIONS` and the bytes of the member with its caption (0,
# 0, 0: none), and where its name ends in the names of all images.
_ROW = np.dtype(
    [
        ("shard", np.int32),
        ("offset", np.int64),
        ("size", np.int64),
        ("caption", np.uint8),
        ("text_offset", np.int64),
        ("text_size", np.int32),
        ("name_end", np.int64),
    ]
)


class _Index(NamedTuple):
    """The images of one shard or of all shards: `_ROW` [N], UTF-8 of their names, [[shard, what is wrong]] as JSON."""

    rows: np.ndarray
    names: np.ndarray
    complaints: np.ndarray

    def checked(self, shards: int) -> "_Index":
        """Itself, where it can be that of this many shards; a ValueError otherwise."""
        rows, names = self.rows, self.names
        if (rows.dtype, rows.ndim, names.dtype, names.ndim) != (_ROW, 1, np.uint8, 1):
            raise ValueError("it holds other arrays")
        ends = rows["name_end"]
        possible = [rows[f].min(initial=0) >= 0 for f in ("shard", "offset", "size", "text_offset", "text_size")]
        possible += [rows["shard"].max(initial=0) < shards, rows["caption"].max(initial=0) < len(_CAPTIONS)]
        possible += [rows["text_size"].max(initial=0) <= MAX_CAPTION_BYTES]
        possible += [(np.diff(ends, prepend=0) >= 0).all(), ends.max(initial=0) <= len(names)]
        if not all(possible):
            raise ValueError("its numbers are not those of these shards")
        pydantic.TypeAdapter(list[tuple[Annotated[int, Field(ge=0, lt=shards)], str]]).validate_json(
            str(self.complaints)
        )
        return self


def _caption_member(grouped: Mapping[str, Mapping[str, Member]], image: str) -> tuple[int, int, int]:
    """(code, offset, size) of an image's caption: of its name without the suffix, or else of its sample."""
    key, extension = _split(image)
    for stem in (extension.rpartition(".")[0], ""):
        for code, kind in enumerate(_CAPTIONS[1:], start=1):
            member = grouped[key].get(f"{stem}.{kind}".lstrip("."))
            if member and member.size <= MAX_CAPTION_BYTES:
                return code, member.offset, member.size
    return 0, 0, 0


def _index_shard(shard: int, path: str) -> _Index:
    try:
        members, complaint = scan(path)
    except OSError as e:
        # Not skipped as damage is: a temporary failure would change the data, and the cache would keep the change.
        raise UserError(f"tar shard {path} of config.data.path cannot be read ({e}): repair it or leave it out") from e
    grouped = samples(members)
    images = [m for m in members if files.kind_of(m.name) == "images"]
    names = [m.name.encode("utf-8", "surrogateescape") for m in images]
    ends = itertools.accumulate(map(len, names))
    rows = [
        (shard, m.offset, m.size, *_caption_member(grouped, m.name), end) for m, end in zip(images, ends, strict=True)
    ]
    if complaint and members:
        complaint += f": {len(rows)} images kept, the rest skipped"
    complaints = [(shard, complaint)] if complaint else []
    return _Index(np.array(rows, _ROW), np.frombuffer(b"".join(names), np.uint8), np.array(json.dumps(complaints)))


def _join(parts: Sequence[_Index]) -> _Index:
    rows = np.concatenate([part.rows for part in parts])
    rows["name_end"] += np.repeat(
        np.cumsum([0, *(len(part.names) for part in parts[:-1])]), [len(part.rows) for part in parts]
    )
    complaints = [entry for part in parts for entry in json.loads(str(part.complaints))]
    return _Index(rows, np.concatenate([part.names for part in parts]), np.array(json.dumps(complaints)))


def _cache_file(shards: Sequence[str], cache_dir: str) -> str:
    """The index's file, whose name changes whenever a shard is added, removed, replaced or written to."""

    def version(shard: str) -> tuple[str, int, str]:
        try:
            return (shard if paths.is_remote(shard) else os.path.abspath(shard), *files.stat(shard))
        except OSError:
            return shard, -1, ""

    with concurrent.futures.ThreadPoolExecutor(_SCANNERS) as pool:
        facts = list(pool.map(version, shards))
    digest = hashlib.sha256(json.dumps([_INDEX_VERSION, facts]).encode()).hexdigest()
    return os.path.join(cache_dir, f"tar_index_{digest[:20]}.npz")


def _load(path: str, shards: int) -> _Index | None:
    try:
        with files.open_binary(path) as f:
            data = f.read(_MAX_INDEX_BYTES + 1)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # `np.savez` compresses nothing; what is compressed can be of any size.
            if len(data) > _MAX_INDEX_BYTES or sum(member.file_size for member in archive.infolist()) > len(data):
                raise ValueError("it is too large")
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            return _Index(**{field: stored[field] for field in _Index._fields}).checked(shards)
    except FileNotFoundError:
        return None
    # What zipfile raises for damaged archives includes NotImplementedError and errors of struct.
    except (OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, struct.error) as e:
        logger.warning("the cached index %s cannot be read (%s): building it again", path, e)
        return None


def _store(path: str, index: _Index) -> None:
    data = io.BytesIO()
    np.savez(data, **index._asdict())
    try:
        paths.write_whole(path, data.getvalue())
    except OSError as e:
        logger.warning(
            "the index of the tar shards could not be written to %s (%s): the next start will scan them again", path, e
        )


def _index(shards: Sequence[str], cache_dir: str | None, quiet: bool) -> _Index:
    """The index of all shards, from the cache if no shard has changed since it was written."""
    cached = cache_dir and _cache_file(shards, cache_dir)
    if cached and (index := _load(cached, len(shards))):
        return index
    with concurrent.futures.ThreadPoolExecutor(_SCANNERS) as pool:
        scanned = pool.map(_index_shard, range(len(shards)), shards)
        # The bar appears where indexing takes more than ten seconds.
        bar = tqdm(scanned, "indexing tar shards", len(shards), disable=quiet, delay=10, mininterval=10)
        index = _join(list(bar))
    if cached:
        _store(cached, index)
    return index


class TarSource:
    """The images of tar shards as webdataset and img2dataset write them, in archive order.

    An image's caption is the `.txt` member of the same stem, or else the "caption" of its `.json` member. It is read
    from the tar when it is asked for. Nothing is ever written beside the shards.

    Args:
      shards: tar files, local or remote.
      cache_dir: folder for the index, created when needed, or None.
      quiet: report neither progress nor damaged shards.

    Raises:
      UserError: a shard cannot be read, or there is not one image in all the shards.
    """

    def __init__(self, shards: Sequence[str], cache_dir: str | None = None, quiet: bool = False):
        self._shards = list(shards)
        self._rows, self._names, complaints = _index(self._shards, cache_dir, quiet)
        damaged = [f"{self._shards[i]} {why}" for i, why in json.loads(str(complaints))]
        if damaged and not quiet:
            for shard in damaged[:_MAX_NAMED]:
                logger.warning("tar shard %s", shard)
            logger.warning("%d of %d tar shards are damaged", len(damaged), len(self._shards))
        if not len(self):
            which = f" ({listing(damaged, 3)})" if damaged else ""
            raise UserError(f"config.data.path: not one image in {len(self._shards)} tar files{which}")

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, i: int) -> str:
        """`shard.tar/member.jpg`."""
        start = self._rows["name_end"][i - 1] if i else 0
        member = self._names[start : self._rows["name_end"][i]].tobytes()
        shard = self._shards[self._rows["shard"][i]]
        return f"{os.path.basename(shard)}/{member.decode('utf-8', 'surrogateescape')}"

    @functools.cached_property
    def has_text(self) -> bool:
        """Whether there are captions: a .txt member, or a "caption" in the first .json member."""
        if (self._rows["caption"] == _CAPTIONS.index("txt")).any():
            return True
        captioned = np.flatnonzero(self._rows["caption"])
        try:
            return bool(len(captioned)) and self._text(captioned[0]) is not None
        except (OSError, ValueError):
            return False

    def _text(self, i: int) -> str | None:
        row = self._rows[i]
        if not (kind := _CAPTIONS[row["caption"]]):
            return None
        data = files.read_range(self._shards[row["shard"]], int(row["text_offset"]), int(row["text_size"]))
        try:
            if kind == "txt":
                return data.decode("utf-8")
            meta = json_files.decoded(data)
        except ValueError as e:
            raise ValueError(f"the caption in its .{kind} member cannot be read ({e})") from e
        return caption(meta.get("caption")) if isinstance(meta, dict) else None

    def read(self, i: int, with_text: bool = True) -> Record:
        """See `Source.read`.

        Raises:
          OSError: the shard is shorter than when it was indexed, or no longer there.
          ValueError: the caption is not UTF-8, or its .json member is broken.
        """
        row = self._rows[i]
        if row["size"] > files.MAX_IMAGE_BYTES:
            raise ValueError(f"it has {row['size']} bytes, more than any image")
        image = files.read_range(self._shards[row["shard"]], int(row["offset"]), int(row["size"]))
        return Record(self.name(i), image, self._text(i) if with_text else None)
