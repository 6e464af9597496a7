"""Where records live: paths, patterns, folders, on this machine or behind a scheme such as gs://."""

import concurrent.futures
import functools
import glob
import os
import posixpath
import re

import fsspec

from diva_jax.common.errors import UserError, listing

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
WHAT = "a .tar shard, a pattern like {00000..00331}.tar, a folder of shards or of images, or tfds:name/split"


def is_image(name: str) -> bool:
    """By suffix. Hidden files do not count: macOS leaves `._x.jpg` beside `x.jpg` in folders and tars."""
    base = posixpath.basename(name)
    return base.lower().endswith(IMAGE_SUFFIXES) and not base.startswith(".")


def is_remote(path: str) -> bool:
    return "://" in path


def expand(pattern: str) -> list[str]:
    """Expands braces as a shell does: `{000..012}` keeps its leading zeros, `{a,b}` lists."""
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
        raise UserError(f"{path!r} cannot be reached ({e}): install what this scheme needs") from e


def open_binary(path: str):
    """A seekable binary file, local or remote."""
    if not is_remote(path):
        return open(path, "rb")
    fs, inside = _remote(path)
    return fs.open(inside, "rb")


def stat(path: str) -> tuple[int, str]:
    """Size in bytes, and whatever tells one version of the file from the next.

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


def _spelled(pattern: str) -> list[str]:
    """The files of a brace or glob pattern."""
    spelled = expand(pattern)
    if any(c in pattern for c in "*?["):
        files = [f for one in spelled for f in match(one)]
        if not files:
            raise UserError(f"config.data.path={pattern!r} matches no file: give it {WHAT}")
        return files
    if len(spelled) == 1:
        raise UserError(f"config.data.path={pattern!r} does not exist: give it {WHAT}")
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        missing = [f for f, there in zip(spelled, pool.map(exists, spelled), strict=True) if not there]
    if missing:
        raise UserError(
            f"config.data.path={pattern!r} spells {len(missing)} files that do not exist "
            f"({listing(missing, 5)}): mend the range, or use * to take what is there"
        )
    return spelled


def find(path: str) -> tuple[str, list[str]]:
    """Tells by looking what a data path is.

    Args:
      path: a .tar file, a folder, or a brace or glob pattern; local or with a scheme.

    Returns:
      ("tars", shards) or ("images", image files), sorted (braces: in the order they spell).

    Raises:
      UserError: nothing is there, or nothing that can be read.
    """
    if not path:
        raise UserError(f"config.data.path is not set: give it {WHAT}")
    if is_folder(path):
        files = walk(path)
    elif exists(path):
        return ("images" if is_image(path) else "tars"), [path]
    else:
        files = _spelled(path)
    tars = [f for f in files if f.lower().endswith(".tar")]
    images = [f for f in files if is_image(f)]
    if not tars and not images:
        raise UserError(
            f"config.data.path={path!r} has neither .tar shards nor images ({', '.join(IMAGE_SUFFIXES)}) in it"
        )
    return ("tars", tars) if tars else ("images", images)


class _Descriptor:
    """An open file, closed when its last user lets go of it."""

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close=os.close):  # A default outlives the module at the interpreter's end.
        if hasattr(self, "fd"):
            close(self.fd)


class Reader:
    """Reads ranges of files by position, from any number of threads.

    `pread` moves no shared file position, so threads and forked processes may share a descriptor. Only
    the most recent 256 stay open, since thousands of shards would run into the limit on open files; one
    that falls out is closed when the reads that hold it are done.
    """

    def __init__(self):
        self._open = functools.lru_cache(maxsize=256)(_Descriptor)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; an OSError where the file ends before."""
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
        while len(data) < size:  # Network file systems, and reads past 2 GiB, may return less than asked.
            more = os.pread(file.fd, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


def write_atomically(path: str, data: bytes) -> None:
    """Writes so that no reader ever sees a part; creates the folder."""
    if is_remote(path):
        fs, inside = _remote(path)  # Object stores show a file only once it is whole.
        fs.makedirs(posixpath.dirname(inside), exist_ok=True)
        fs.pipe_file(inside, data)
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(data)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
