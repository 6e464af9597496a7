"""Random access to the images and captions of tar shards, through an index of their headers."""

import concurrent.futures
import hashlib
import io
import json
import os
import posixpath
import struct
import tarfile
import zipfile
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
import pydantic

from diva_jax.common import log, paths
from diva_jax.common.errors import UserError, explained, listing
from diva_jax.data import files
from diva_jax.data.sources import CAPTION_KINDS, MAX_CAPTION_BYTES, CaptionFiles

# Part of the cached index's name; increased whenever the content of an index changes.
_INDEX_VERSION = 7
# Damaged shards that the log names; further ones are only counted.
_MAX_NAMED = 20
# A larger index, of more than thirty million images, is made at every start.
_MAX_INDEX_BYTES = 2**31
_MAX_HEADER_BYTES = 2**13  # tarfile needs time that grows with the square of an extended header's size.
# The end of an archive is padded with zeros, of tar's default record at most; what is behind it is looked for in these.
_MAX_PADDING_BYTES = 2**16
# What tarfile raises for damaged headers; all but the first for the numbers and names in extended ones.
_BROKEN_HEADER = (tarfile.TarError, ValueError, IndexError, KeyError, OverflowError)


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
    """(members of a shard in archive order, what is wrong with it: empty if nothing is). A link is the member before it
    that it names. Damage ends the scan, and complete members before it are kept; an OSError for an unreadable file."""
    length, _ = files.stat(path)
    with files.open_binary(path) as file:
        try:
            tar = tarfile.TarFile(fileobj=_Headers(file))
        except _BROKEN_HEADER:
            return [], "is no uncompressed tar archive, or its first header is damaged"
        members, named, loose, end = [], {}, [], 0
        while True:
            file.seek(end)
            try:
                info = tarfile.TarInfo.fromtarfile(tar)
            except _BROKEN_HEADER:
                break
            if info.size < 0 or info.offset_data + info.size > length or tar.offset <= end:
                break
            end, info.name, member = tar.offset, info.name.removeprefix("./"), None
            if info.isreg() and not info.issparse():
                member = Member(info.name, info.offset_data, info.size)
            elif info.islnk() or info.issym():
                folder = posixpath.dirname(info.name) if info.issym() else ""
                if target := named.get(posixpath.normpath(posixpath.join(folder, info.linkname))):
                    member = target._replace(name=info.name)
                else:
                    loose.append(info.name)
            if member:
                members.append(member)
                named[posixpath.normpath(member.name)] = member
        file.seek(end)
        # A complete archive ends with blocks of zeros; one that is cut off between two members has none.
        rest = file.read(_MAX_PADDING_BYTES)
    if rest[: tarfile.BLOCKSIZE] != tarfile.NUL * tarfile.BLOCKSIZE:
        return members, f"is cut short or damaged at byte {end} of {length}"
    if rest.strip(tarfile.NUL):
        return members, f"goes on after its end at byte {end} of {length}, as archives joined by cat do"
    return members, f"has {len(loose)} links to what is not in it ({listing(loose, 2)})" if loose else ""


# One image: its shard, the bytes of its file and of the members with its caption (0, 0: none), and where its name ends
# in the names of all images.
_NUMBERS = ("offset", "size", *(f"{k}_{what}" for k in CAPTION_KINDS for what in ("offset", "size")), "name_end")
_ROW = np.dtype([("shard", np.int32), *((name, np.int64) for name in _NUMBERS)])


class _Index(NamedTuple):
    """The images of one shard or of all: `rows` are `_ROW` [N], `names` the images' names as UTF-8, one after the
    other, and `notes` the JSON of [shard, what is wrong or empty, [further images, some names], [unread images, some
    names]] of those shards that have any."""

    rows: np.ndarray
    names: np.ndarray
    notes: np.ndarray

    def checked(self, shards: int) -> "_Index":
        """This index, if it can be one of so many shards; a ValueError otherwise."""
        rows, names = self.rows, self.names
        if (rows.dtype, rows.ndim, names.dtype, names.ndim) != (_ROW, 1, np.uint8, 1):
            raise ValueError("it holds other arrays")
        ends = rows["name_end"]
        possible = [rows[field].min(initial=0) >= 0 for field in _ROW.names]
        possible += [rows["shard"].max(initial=0) < shards]
        possible += [rows[f"{kind}_size"].max(initial=0) <= MAX_CAPTION_BYTES for kind in CAPTION_KINDS]
        possible += [(np.diff(ends, prepend=0) >= 0).all(), ends.max(initial=0) <= len(names)]
        if not all(possible):
            raise ValueError("its numbers are not those of these shards")
        left = tuple[Annotated[int, pydantic.Field(ge=0)], list[str]]
        note = tuple[Annotated[int, pydantic.Field(ge=0, lt=shards)], str, left, left]
        pydantic.TypeAdapter(list[note]).validate_json(str(self.notes))
        return self


def _index_shard(shard: int, path: str) -> _Index:
    # Not skipped as damage is: a temporary failure would change the data, and the cache would keep the change.
    with explained(f"tar shard {path} of config.data.path cannot be read", "repair it or leave it out"):
        members, complaint = scan(path)
    rows, names, others, end = [], [], [], 0
    for sample in files.group(((m.name, m) for m in members), f"tar shard {path}").values():
        if not (images := files.images_of(sample)):
            continue
        image, texts = sample[images[0]], []
        for kind in CAPTION_KINDS:
            member = files.beside(sample, images[0], kind)
            texts += member[1:] if member and member.size <= MAX_CAPTION_BYTES else (0, 0)
        names.append(image.name.encode("utf-8", "surrogateescape"))
        end += len(names[-1])
        rows.append((shard, image.offset, image.size, *texts, end))
        others += [sample[e].name for e in images[1:]]
    if not rows and not complaint:
        complaint = "has no image"
    elif complaint and members:
        complaint += f": {len(rows)} images kept, the rest skipped"
    unread = [m.name for m in members if files.kind_of(m.name) == files.UNREAD]
    note = (shard, complaint, files.left_out(others), files.left_out(unread))
    notes = json.dumps([note] if complaint or others or unread else [])
    return _Index(np.array(rows, _ROW), np.frombuffer(b"".join(names), np.uint8), np.array(notes))


def _load(path: str, shards: int) -> _Index | None:
    try:
        data = files.read_at_most(path, _MAX_INDEX_BYTES) or b""
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # `np.savez` compresses nothing; what is compressed can be of any size.
            if sum(member.file_size for member in archive.infolist()) > len(data):
                raise ValueError("it is too large")
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            return _Index(**{field: stored[field] for field in _Index._fields}).checked(shards)
    except FileNotFoundError:
        return None
    # What zipfile raises for damaged archives includes NotImplementedError and errors of struct.
    except (OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, struct.error) as e:
        log.warn("the cached index %s cannot be read (%s): building it again", path, e)
        return None


def _index(shards: Sequence[str], cache_dir: str | None) -> _Index:
    """The index of all shards, from the cache if no shard has changed since it was written."""

    def version(shard: str) -> tuple[str, int, str]:
        try:
            return (shard if paths.is_remote(shard) else os.path.abspath(shard), *files.stat(shard))
        except OSError:
            return shard, -1, ""

    with concurrent.futures.ThreadPoolExecutor(files.THREADS) as pool:
        if cache_dir:  # The file's name changes whenever a shard is added, removed, replaced or written to.
            facts = json.dumps([_INDEX_VERSION, list(pool.map(version, shards))]).encode()
            cached = os.path.join(cache_dir, f"tar_index_{hashlib.sha256(facts).hexdigest()[:20]}.npz")
            if index := _load(cached, len(shards)):
                return index
        parts = []
        with log.progress("indexing tar shards", len(shards), "shards", every=10) as progress:
            for part in pool.map(_index_shard, range(len(shards)), shards):
                parts.append(part)
                progress.update()
    rows, before = np.concatenate([part.rows for part in parts]), np.cumsum([0, *(len(p.names) for p in parts[:-1])])
    rows["name_end"] += np.repeat(before, [len(part.rows) for part in parts])
    notes = [entry for part in parts for entry in json.loads(str(part.notes))]
    index = _Index(rows, np.concatenate([part.names for part in parts]), np.array(json.dumps(notes)))
    if cache_dir:
        np.savez(data := io.BytesIO(), **index._asdict())
        try:
            paths.write_whole(cached, data.getvalue())
        except OSError as e:
            log.warn("the index of the tar shards could not be written, the next start scans them again (%s)", e)
    return index


class TarSource(CaptionFiles):
    """The images of local or remote tar shards as webdataset and img2dataset write them, in archive order. A sample,
    the members of one key, has one image (see `files.images_of`). Its caption is its `.txt` member, or else the
    "caption" of its `.json` member, read when it is asked for. The index is kept in `cache_dir`, if any; nothing is
    ever written beside the shards. A UserError where a shard cannot be read or has a key twice, or no image."""

    def __init__(self, shards: Sequence[str], cache_dir: str | None = None):
        self._shards = list(shards)
        self._rows, self._names, notes = _index(self._shards, cache_dir)
        notes = json.loads(str(notes))
        damaged = [f"{self._shards[i]} {why}" for i, why, *_ in notes if why]
        for shard in damaged[:_MAX_NAMED]:
            log.warn("tar shard %s", shard)
        if damaged:
            log.warn("%d of %d tar shards are damaged or empty", len(damaged), len(self._shards))
        left = [(sum(n[k][0] for n in notes), sum((n[k][1] for n in notes), [])[:2]) for k in (2, 3)]
        files.say_left_out("config.data.path", *left)
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

    def captioned(self) -> np.ndarray:
        return np.flatnonzero(self._rows["txt_size"] + self._rows["json_size"])

    def beside(self, i: int, kind: str) -> bytes | None:
        row = self._rows[i]
        size = int(row[f"{kind}_size"])
        return files.read_range(self._shards[row["shard"]], int(row[f"{kind}_offset"]), size) if size else None

    def image(self, i: int) -> bytes:
        row = self._rows[i]
        if row["size"] > files.MAX_IMAGE_BYTES:
            raise ValueError(f"it has {row['size']} bytes, more than any image")
        return files.read_range(self._shards[row["shard"]], int(row["offset"]), int(row["size"]))
