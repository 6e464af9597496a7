"""Files of a data set, on this machine or behind a scheme (gs://): patterns, folders, samples and reads by position;
and files of text, such as tables, questions and names of classes."""

import concurrent.futures
import csv
import glob
import io
import itertools
import math
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import braceexpand
import fsspec

from diva_jax.common import json_files, log
from diva_jax.common.errors import UserError, brief, explained, listing
from diva_jax.common.paths import demo_hint, is_remote

# Encoded images are smaller; a larger file is a sparse one, for example.
MAX_IMAGE_BYTES = 2**28
_MAX_EXPANDED = 1_000_000
T = TypeVar("T")
# A key and its extension, one or several parts that each begin with a letter: `0.input.jpg` is `input.jpg` of `0`, but
# `frame.0001.jpg` is `jpg` of `frame.0001`.
_NAME = re.compile(r"((?:.*/)?[^/.][^/]*?)((?:\.[A-Za-z][\w-]*)+)", re.S)

WHAT = (
    "a .tar shard, a pattern like {00000..00331}.tar, a folder of shards or of images, a .csv, .tsv, .jsonl or "
    ".parquet file, a folder of save_to_disk, tfds:name/split, or mix:WEIGHT=PATH;WEIGHT=PATH of these"
)
# Kind of data -> suffixes of its files, in the order in which a folder's files are looked through: img2dataset writes
# a .parquet file of metadata beside each shard and each folder of images, for example. The last two are not read.
_SUFFIXES = json_files.packaged(__file__, "kinds.json")
*KINDS, UNREAD, _PACKED = _SUFFIXES
IMAGE_SUFFIXES = _SUFFIXES["images"]

_MAX_LINE = 2**24
# Threads that ask for files or read them, which is mostly waiting for a disk or a network.
THREADS = 16
_USTAR_OFFSET, _USTAR = 257, b"ustar"


def hidden(name: str) -> bool:
    """Whether a file or folder of this name holds no data: `.Trash-1000`, macOS's `._x.jpg`, a NAS's `@eaDir`."""
    return name.startswith(".") or name == "@eaDir"


def _visible(paths: Iterable[str], given: str) -> list[str]:
    """The sorted paths that have no more hidden parts than the path or pattern that was given, whose own are wanted."""
    asked = sum(map(hidden, given.split("/")))
    return sorted(p for p in paths if sum(map(hidden, p.split("/"))) <= asked)


def kind_of(name: str) -> str | None:
    """The kind of a file by its suffix, one of `KINDS` or one that is not read; None for others and for hidden files,
    such as macOS's `._x.jpg`."""
    base = posixpath.basename(name).lower()
    if hidden(base):
        return None
    return next((kind for kind, ends in _SUFFIXES.items() if base.endswith(ends)), None)


def no_path(cell: str, allow_urls: bool = True) -> str:
    """Why the text of a table's cell, such as an image in base64, is not taken for a path; empty where it is."""
    if len(cell) > 4096:  # No path is longer on any machine.
        return f"a text of {len(cell)} characters is no path: write images as files, or as bytes in Parquet"
    if not is_remote(cell) or allow_urls:
        return ""
    return f"{brief(cell)} is a URL: fetch the images and give paths (training with data.allow_urls=True fetches them)"


def expand(pattern: str) -> list[str]:
    """Expands braces as a shell does: `{000..012}` with its leading zeros, and `{a,b}`. A UserError for more than a
    million names, or braces that are not balanced."""
    problem = f"the pattern {pattern[:300]!r} cannot be expanded"
    with explained(problem, "correct its braces", ValueError, RecursionError):
        # The ranges are counted first, because the library keeps all numbers of a range in memory.
        ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}", pattern)
        if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) <= _MAX_EXPANDED:
            names = list(itertools.islice(braceexpand.braceexpand(pattern, escape=False), _MAX_EXPANDED + 1))
            if len(names) <= _MAX_EXPANDED:
                return names
    problem = f"{pattern!r} stands for more than {_MAX_EXPANDED} names"
    raise UserError(f"{problem}: correct the range, or use * for the files that exist")


def _file_system(path: str):
    """The fsspec file system of a path, and the path inside it."""
    if not is_remote(path):
        return fsspec.filesystem("file"), path
    with explained(f"{path!r} cannot be reached", "install the package for this scheme", ImportError, ValueError):
        return fsspec.core.url_to_fs(path)


def open_binary(path: str):
    """A seekable binary file, local or remote."""
    fs, inside = _file_system(path)
    if "file" in fs.protocol:  # A local path may be a pipe, for example.
        return open(inside, "rb", opener=json_files.open_regular)
    return fs.open(inside, "rb")


def read_at_most(path: str, size: int) -> bytes | None:
    """The content of a file; None where it has more bytes than `size`."""
    with open_binary(path) as f:
        data = f.read(size + 1)
    return data if len(data) <= size else None


def read_image(path: str) -> bytes:
    """The bytes of an encoded image; a ValueError where the file is larger than any image."""
    data = read_at_most(path, MAX_IMAGE_BYTES)
    if data is None:
        raise ValueError(f"it has more than {MAX_IMAGE_BYTES} bytes, more than any image")
    return data


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`; an OSError where it ends before."""
    if is_remote(path):
        fs, inside = _file_system(path)
        data = fs.cat_file(inside, start=offset, end=offset + size) if size else b""
    else:
        with open_binary(path) as f:
            f.seek(offset)
            data = f.read(size)
    if len(data) != size:
        raise OSError(f"{path} ends {size - len(data)} bytes early")
    return data


def stat(path: str) -> tuple[int, str]:
    """(size in bytes, a text that changes when the file does); a FileNotFoundError where there is none."""
    if not is_remote(path):
        s = os.stat(path)
        return s.st_size, str(s.st_mtime_ns)
    fs, inside = _file_system(path)
    info = fs.info(inside)
    return info["size"], str(next((info[k] for k in ("etag", "ETag", "mtime", "updated", "created") if k in info), ""))


def is_folder(path: str) -> bool:
    fs, inside = _file_system(path)
    return fs.isdir(inside)


def exists(path: str) -> bool:
    fs, inside = _file_system(path)
    return fs.exists(inside)


def names_in(folder: str) -> list[str]:
    """The paths of what a folder holds."""
    if not is_remote(folder):
        return [os.path.join(folder, name) for name in os.listdir(folder or ".")]
    fs, inside = _file_system(folder)
    return [fs.unstrip_protocol(p) for p in fs.ls(inside, detail=False)]


def walk(folder: str) -> list[str]:
    """Every file below a folder and those that it links to, but not in hidden ones, each once, sorted; a UserError
    where one is unreadable."""
    if is_remote(folder):
        fs, inside = _file_system(folder)
        return [fs.unstrip_protocol(p) for p in _visible(fs.find(inside), inside)]
    paths, visited, lost = [], set(), []
    for here, folders, names in os.walk(folder, onerror=lost.append, followlinks=True):
        real = os.path.realpath(here)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not hidden(name)]
        paths.extend(os.path.join(here, name) for name in names)
    if lost:
        raise UserError(f"the folder {lost[0].filename} cannot be read ({lost[0].strerror}): make it readable")
    return sorted(paths)


def _matches(pattern: str) -> list[str]:
    """The files of a brace or glob pattern, which must exist."""
    names = expand(pattern)
    if any(c in pattern for c in "*?["):
        matched = []
        for name in names:
            if is_remote(name):
                fs, inside = _file_system(name)
                matched += map(fs.unstrip_protocol, _visible(fs.glob(inside), inside))
            else:
                matched += _visible(glob.glob(name, recursive=True), name)
        if matched:
            return matched
        raise UserError(f"config.data.path={pattern!r} matches no file: give it {WHAT}")
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        missing = [f for f, there in zip(names, pool.map(exists, names), strict=True) if not there]
    if missing == [pattern]:
        raise UserError(f"config.data.path={pattern!r} does not exist: {demo_hint(pattern) or f'give it {WHAT}'}")
    if missing:
        problem = f"config.data.path={pattern!r} names {len(missing)} files that do not exist ({listing(missing, 5)})"
        raise UserError(f"{problem}: correct the range, or use * for the files that exist")
    return names


def find(path: str) -> tuple[str, list[str]]:
    """(one of `KINDS`, the sorted files of this kind) at a path: a file, a folder, or a brace or glob pattern, whose
    order is then that of the expansion. Those of "images" include the ones whose formats are not read. A UserError
    where nothing is there, or nothing that can be read."""
    if not path:
        raise UserError(f"config.data.path is not set: give it {WHAT}")
    if is_folder(path):
        paths = walk(path)
    elif exists(path):
        if (kind := kind_of(path)) == _PACKED:
            raise UserError(f"config.data.path={path!r} is compressed: unpack it to .tar, which is read in place")
        if kind in KINDS:
            return kind, [path]
        with open_binary(path) as f:
            if f.read(_USTAR_OFFSET + len(_USTAR)).endswith(_USTAR):
                return "tars", [path]
        raise UserError(f"config.data.path={path!r} is no kind of data that is read here: give it {WHAT}")
    else:
        paths = _matches(path)
    by_kind: dict[str | None, list[str]] = {}
    for file in paths:
        by_kind.setdefault(kind_of(file), []).append(file)
    if kind := next((kind for kind in KINDS if kind in by_kind), None):
        # Beside shards and images, img2dataset writes a Parquet file of their metadata, which nobody misses.
        kinds = ("images", "csv", "jsonl", _PACKED) if kind in ("tars", "images") else (_PACKED,)
        missed = {k: by_kind[k] for k in kinds if k in by_kind and k != kind}
        for what, left in missed.items():
            log.warn("%s: %d %s beside the %s are not read (%s)", path, len(left), what, kind, listing(left, 2))
        return kind, by_kind[kind] + (by_kind.get(UNREAD, []) if kind == "images" else [])
    problem = f"config.data.path={path!r} has neither .tar shards nor images ({', '.join(IMAGE_SUFFIXES)}) nor tables"
    advice = "unpack shards that are compressed, and convert images of other formats to JPEG or PNG"
    raise UserError(f"{problem} (.arrow, .parquet, .csv, .tsv, .jsonl) in it: {advice}")


def split(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a file's name; ("", "") for hidden files and those without an extension."""
    match = _NAME.fullmatch(name)
    return (match[1], match[2][1:].lower()) if match else ("", "")


def group(named: Iterable[tuple[str, T]], where: str) -> dict[str, dict[str, T]]:
    """The samples, {key: {extension: item}}, of (name, item), in their order. A UserError, which gives `where`, if two
    names have the same key and extension, so that samples would be merged."""
    grouped: dict[str, dict[str, T]] = {}
    for name, item in named:
        key, extension = split(name)
        if key:
            sample = grouped.setdefault(key, {})
            if extension in sample:
                problem = f"{where} has {listing([key])}.{extension} twice, which would merge two samples"
                raise UserError(f"{problem}: give every sample a name of its own")
            sample[extension] = item
    return grouped


def images_of(sample: Mapping[str, T]) -> list[str]:
    """The extensions of a sample's images, the one to use first: of `IMAGE_SUFFIXES`, or else NAME.jpg and so on."""
    kinds = {e: f".{e.rpartition('.')[2]}" for e in sample}
    images = [e for e, kind in kinds.items() if kind in IMAGE_SUFFIXES]
    return sorted(images, key=lambda e: (e.count("."), IMAGE_SUFFIXES.index(kinds[e]), e))


def beside(sample: Mapping[str, T], image: str, kind: str) -> T | None:
    """The item of a kind, such as "txt", for the image of an extension: `0.input.txt`, or else `0.txt`."""
    return sample.get(f"{image.rpartition('.')[0]}.{kind}", sample.get(kind))


def left_out(names: Sequence[str]) -> tuple[int, list[str]]:
    """How many these are, and two of them."""
    return len(names), list(names[:2])


def say_left_out(where: str, others: tuple[int, list[str]], unread: tuple[int, list[str]]) -> None:
    """Warns of images that are not read, see `left_out`: further ones of a sample, and those of other formats."""
    one = f"a sample has one image, the first of {', '.join(IMAGE_SUFFIXES)}, or else of NAME.jpg and so on"
    for (count, some), what, rule in (
        (others, "further images of samples", one),
        (unread, UNREAD, "convert them to JPEG or PNG"),
    ):
        if count:
            log.warn("%s: %d %s are not read (such as %s): %s", where, count, what, listing(some), rule)


def one_image_each(paths: Sequence[str], where: str) -> list[str]:
    """The image of each sample among files, in the order of the files; what is left out is logged."""
    images = [p for p in paths if kind_of(p) == "images"]
    kept = {sample[images_of(sample)[0]] for sample in group(zip(images, images, strict=True), where).values()}
    others, unread = [p for p in images if p not in kept], [p for p in paths if kind_of(p) == UNREAD]
    say_left_out(where, left_out(others), left_out(unread))
    return [p for p in images if p in kept]


def read_text(path: str | os.PathLike) -> str:
    """The content of a file of UTF-8, with or without a byte order mark; ends of lines are kept. A UserError if it is
    no regular file, has more than 256 MiB, or is not UTF-8."""
    with explained(f"{path} cannot be read as text", "fetch it again", UnicodeDecodeError):
        return json_files.read_bytes(path, json_files.MAX_LINES_BYTES).decode("utf-8-sig")


def csv_rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each row of a CSV file that is not blank, the header first; local or remote. The
    separator is the one of comma, tab, semicolon and bar that occurs most often in the first line. A UserError names
    the line that is no CSV in UTF-8, has another number of fields than the header, or whose quote swallows other rows.
    """
    line, separator, header = 0, ",", []
    try:
        with open_binary(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as f:
            first = f.readline(_MAX_LINE)
            separator = max(",\t;|", key=first.count)
            # A longer line comes in pieces, of which the reader refuses the first: it has other fields, or larger ones.
            lines = itertools.chain([first], iter(lambda: f.readline(_MAX_LINE), ""))
            for fields in (reader := csv.reader(lines, delimiter=separator, strict=True)):
                header = header or fields
                if len(fields) not in (0, len(header)):
                    raise csv.Error(f"it has {len(fields)} fields, the header {len(header)}")
                for inside in (part for field in fields if "\n" in field for part in field.split("\n")):
                    cells = [cell.strip() for cell in inside.split(separator)]
                    if len(cells) == len(header) and any(kind_of(cell) == "images" for cell in cells):
                        raise csv.Error(f"a quote swallows the row {brief(inside)}")
                if fields:
                    yield reader.line_num, fields
                line = reader.line_num
    except (OSError, UnicodeDecodeError) as e:
        advice = "save it as UTF-8" if isinstance(e, UnicodeDecodeError) else "make it readable"
        raise UserError(f"{path} cannot be read as a CSV file after line {line} ({e}): {advice}") from e
    except csv.Error as e:
        rule = f"put quotes around texts with {separator!r}, quotes or ends of lines in them, double the quotes inside"
        raise UserError(f"{path}, line {line + 1}: the row is not CSV ({e}): {rule}, and give images as paths") from e


def csv_records(path: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, {column: value}) of each row below the header; a UserError also where a column is missing."""
    rows = csv_rows(path)
    _, header = next(rows, (1, []))
    if wrong := [c for c in columns if header.count(c) != 1]:
        said = "no" if wrong[0] not in header else "more than one"
        raise UserError(f"{path} has {said} column {listing(wrong)}: its first row must be {','.join(columns)}")
    for line, fields in rows:
        yield line, dict(zip(header, fields, strict=True))
