"""Files of a data set: patterns, folders and reads by position, on this machine or behind a scheme such as gs://."""

import concurrent.futures
import functools
import glob
import logging
import math
import os
import posixpath
import re
import stat as statlib

import fsspec

from diva_jax.common.errors import UserError, listing
from diva_jax.common.paths import demo_hint, is_remote

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_IMAGE_BYTES = 2**28  # Of one encoded image; a larger file is not an image, but a sparse file, for example.
_MOST_NAMES = 1_000_000  # That the braces of a pattern may stand for.
logger = logging.getLogger(__name__)

WHAT = (
    "a .tar shard, a pattern like {00000..00331}.tar, a folder of shards or of images, a .csv, .tsv or .parquet file, "
    "a folder of save_to_disk, tfds:name/split, or mix:WEIGHT=PATH;WEIGHT=PATH of these"
)
# Kind of data -> suffixes of its files, in the order in which a folder's files are looked through: img2dataset writes
# a .parquet file of metadata beside each shard and each folder of images, for example.
KINDS = {
    "tars": (".tar",),
    "images": IMAGE_SUFFIXES,
    "arrow": (".arrow",),
    "parquet": (".parquet",),
    "csv": (".csv", ".tsv"),
}

_TAR_MAGIC = (257, b"ustar")  # The offset of the text in a tar archive's first header.
_PACKED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")


def is_image(name: str) -> bool:
    """Whether a file is an image, by suffix. Hidden ones are not: macOS leaves `._x.jpg` beside `x.jpg`."""
    base = posixpath.basename(name)
    return base.lower().endswith(IMAGE_SUFFIXES) and not base.startswith(".")


_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


def _choices(brace: str) -> list[str] | range:
    """What the inside of a brace stands for; numbers without their leading zeros."""
    if not (bounds := _RANGE.fullmatch(brace)):
        return brace.split(",")
    first, last = int(bounds[1]), int(bounds[2])
    return range(first, last + 1) if last >= first else range(first, last - 1, -1)


def expand(pattern: str) -> list[str]:
    """Expands braces as a shell does: `{000..012}` with its leading zeros, and `{a,b}`.

    Raises:
      UserError: it stands for more than a million names.
    """
    if (count := math.prod(len(_choices(b)) for b in re.findall(r"\{([^{}]*)\}", pattern))) > _MOST_NAMES:
        raise UserError(f"{pattern!r} stands for {count} names: correct the range, or use * for the files that exist")
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if not brace:
        return [pattern]
    width = len(brace[1].partition("..")[0]) if _RANGE.fullmatch(brace[1]) else 0
    head, tail = pattern[: brace.start()], pattern[brace.end() :]
    return [one for choice in _choices(brace[1]) for one in expand(f"{head}{str(choice).zfill(width)}{tail}")]


def _remote(path: str):
    """The fsspec file system of a path with a scheme, and the path inside it."""
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as e:
        raise UserError(f"{path!r} cannot be reached ({e}): install the package for this scheme") from e


def open_binary(path: str):
    """A seekable binary file, local or remote."""
    if not is_remote(path):
        return open(path, "rb", opener=open_regular)
    fs, inside = _remote(path)
    return fs.open(inside, "rb")


def open_regular(path: str, flags: int = 0) -> int:
    """The descriptor of a local file, opened to be read.

    Raises:
      OSError: it is a pipe, a device, a socket or a folder, whose reading may never end.
    """
    fd = os.open(path, flags | os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # A pipe would wait for its writer.
    if not statlib.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{path} is not a regular file")
    return fd


def stat(path: str) -> tuple[int, str]:
    """(size in bytes, a text that changes when the file does).

    Raises:
      FileNotFoundError: there is no such file.
    """
    if not is_remote(path):
        s = os.stat(path)
        return s.st_size, str(s.st_mtime_ns)
    fs, inside = _remote(path)
    info = fs.info(inside)
    version = next((info[k] for k in ("etag", "ETag", "mtime", "updated", "created") if k in info), "")
    return info["size"], str(version)


def is_folder(path: str) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    fs, inside = _remote(path)
    return fs.isdir(inside)


def exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    fs, inside = _remote(path)
    return fs.exists(inside)


def match(pattern: str) -> list[str]:
    """Files that match a glob pattern, sorted."""
    if not is_remote(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    fs, inside = _remote(pattern)
    return sorted(fs.unstrip_protocol(p) for p in fs.glob(inside))


def walk(folder: str) -> list[str]:
    """Every file below a folder, sorted. Links to folders are followed, each real folder once."""
    if is_remote(folder):
        fs, inside = _remote(folder)
        return sorted(fs.unstrip_protocol(p) for p in fs.find(inside))
    found, visited = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        found.extend(os.path.join(here, name) for name in names)
    return sorted(found)


def _matches(pattern: str) -> list[str]:
    """The files of a brace or glob pattern, which must exist."""
    names = expand(pattern)
    if any(c in pattern for c in "*?["):
        found = [f for one in names for f in match(one)]
        if not found:
            raise UserError(f"config.data.path={pattern!r} matches no file: give it {WHAT}")
        return found
    if names == [pattern]:
        raise UserError(f"config.data.path={pattern!r} does not exist: {demo_hint(pattern) or f'give it {WHAT}'}")
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        missing = [f for f, there in zip(names, pool.map(exists, names), strict=True) if not there]
    if missing:
        raise UserError(
            f"config.data.path={pattern!r} names {len(missing)} files that do not exist "
            f"({listing(missing, 5)}): correct the range, or use * for the files that exist"
        )
    return names


def kind_of(name: str) -> str | None:
    """The kind of data in a file, a key of `KINDS`, by suffix; None for others and hidden files."""
    base = posixpath.basename(name).lower()
    return None if base.startswith(".") else next((k for k, suffixes in KINDS.items() if base.endswith(suffixes)), None)


def _kind_of_content(path: str) -> str:
    """ "tars" for a file without a known suffix that is a tar archive.

    Raises:
      UserError: it is something else.
    """
    if path.lower().endswith(_PACKED):
        raise UserError(f"config.data.path={path!r} is compressed: unpack it to .tar, which is read in place")
    with open_binary(path) as f:
        if f.read(_TAR_MAGIC[0] + len(_TAR_MAGIC[1])).endswith(_TAR_MAGIC[1]):
            return "tars"
    raise UserError(f"config.data.path={path!r} is no kind of data that is read here: give it {WHAT}")


def _report_unread(path: str, kind: str, by_kind: dict[str | None, list[str]]) -> None:
    """Logs images and compressed shards that are left out, because shards are in the same folder."""
    packed = [f for f in by_kind.get(None, ()) if f.lower().endswith(_PACKED)]
    for what, left in (("images", by_kind.get("images", [])), ("compressed shards", packed)):
        if kind == "tars" and left:
            logger.warning(
                "%s: %d %s beside the .tar shards are not read (%s)", path, len(left), what, listing(left, 2)
            )


def find(path: str) -> tuple[str, list[str]]:
    """The kind of data at a path, by the suffixes of its files.

    Args:
      path: a file, a folder, or a brace or glob pattern; local or with a scheme.

    Returns:
      (a key of `KINDS`, the files of this kind, sorted; with braces, in the order of the expansion).

    Raises:
      UserError: nothing is there, or nothing that can be read.
    """
    if not path:
        raise UserError(f"config.data.path is not set: give it {WHAT}")
    if is_folder(path):
        found = walk(path)
    elif exists(path):
        return kind_of(path) or _kind_of_content(path), [path]
    else:
        found = _matches(path)
    by_kind: dict[str | None, list[str]] = {}
    for file in found:
        by_kind.setdefault(kind_of(file), []).append(file)
    for kind in KINDS:
        if kind in by_kind:
            _report_unread(path, kind, by_kind)
            return kind, by_kind[kind]
    if packed := [f for f in found if f.lower().endswith(_PACKED)]:
        raise UserError(
            f"{packed[0]} of config.data.path is compressed: unpack the shards to .tar, which are read in place"
        )
    raise UserError(
        f"config.data.path={path!r} has neither .tar shards nor images ({', '.join(IMAGE_SUFFIXES)}) nor tables "
        "(.arrow, .parquet, .csv, .tsv) in it"
    )


class _Descriptor:
    """A file descriptor that is closed when nothing refers to it any more."""

    def __init__(self, path: str):
        self.fd = open_regular(path)

    def __del__(self, close=os.close):  # Bound here, since at exit the module may be gone before the object.
        if hasattr(self, "fd"):
            close(self.fd)


class Reader:
    """Reads ranges of files by position, from any number of threads.

    `pread` does not move the file position, so threads and forked processes may share a descriptor. At most 256
    stay open, because thousands of shards would exceed the limit on open files; the least recently used one is closed
    when the reads that hold it are done.
    """

    def __init__(self):
        self._open = functools.lru_cache(maxsize=256)(_Descriptor)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`.

        Raises:
          OSError: the file cannot be read, or ends before.
        """
        if is_remote(path):
            fs, inside = _remote(path)
            data = fs.cat_file(inside, start=offset, end=offset + size) if size else b""
        else:
            data = self._pread(path, offset, size)
        if len(data) != size:
            raise OSError(f"{path} ends {size - len(data)} bytes early")
        return data

    def _pread(self, path: str, offset: int, size: int) -> bytes:
        file = self._open(path)
        data = os.pread(file.fd, size, offset)
        while len(data) < size:  # Reads from network file systems or of more than 2 GiB may be partial.
            more = os.pread(file.fd, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data
