"""Files of a data set: patterns, folders and reads by position, on this machine or behind a scheme such as gs://."""

import concurrent.futures
import functools
import glob
import os
import posixpath
import re

import fsspec

from diva_jax.common.errors import UserError, listing
from diva_jax.common.paths import is_remote

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
WHAT = (
    "a .tar shard, a pattern like {00000..00331}.tar, a folder of shards or of images, a .csv, .tsv or .parquet file, "
    "a folder of save_to_disk, or tfds:name/split"
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


def is_image(name: str) -> bool:
    """Whether a file is an image, by suffix. Hidden ones are not: macOS leaves `._x.jpg` beside `x.jpg`."""
    base = posixpath.basename(name)
    return base.lower().endswith(IMAGE_SUFFIXES) and not base.startswith(".")


def expand(pattern: str) -> list[str]:
    """Expands braces as a shell does: `{000..012}` with its leading zeros, and `{a,b}`."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if not brace:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        step = 1 if last >= first else -1
        choices = [str(i).zfill(len(bounds[1])) for i in range(first, last + step, step)]
    else:
        choices = brace[1].split(",")
    head, tail = pattern[: brace.start()], pattern[brace.end() :]
    return [one for choice in choices for one in expand(head + choice + tail)]


def _remote(path: str):
    """The fsspec file system of a path with a scheme, and the path inside it."""
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as e:
        raise UserError(f"{path!r} cannot be reached ({e}): install the package for this scheme") from e


def open_binary(path: str):
    """A seekable binary file, local or remote."""
    if not is_remote(path):
        return open(path, "rb")
    fs, inside = _remote(path)
    return fs.open(inside, "rb")


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
    if len(names) == 1:
        raise UserError(f"config.data.path={pattern!r} does not exist: give it {WHAT}")
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
        return kind_of(path) or "tars", [path]  # Without a known suffix, the scan says what is wrong.
    else:
        found = _matches(path)
    by_kind: dict[str | None, list[str]] = {}
    for file in found:
        by_kind.setdefault(kind_of(file), []).append(file)
    for kind in KINDS:
        if kind in by_kind:
            return kind, by_kind[kind]
    raise UserError(
        f"config.data.path={path!r} has neither .tar shards nor images ({', '.join(IMAGE_SUFFIXES)}) nor tables "
        "(.arrow, .parquet, .csv, .tsv) in it"
    )


class _Descriptor:
    """A file descriptor that is closed when nothing refers to it any more."""

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

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
