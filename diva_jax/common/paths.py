"""Folders of a run, on this machine or in a bucket (gs://...), through etils.epath and gcsfs."""

import contextlib
import logging
import os
import posixpath
import re
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from diva_jax.common.errors import UserError, explained, reason

# A cached listing of a bucket is wrong as soon as another process, or tensorstore in this one, writes to it.
fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
# gcsfs warns at every call where the account lacks a right that nothing here needs, and logs errors that it raises.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
# A value that is a URL, whose query may hold anything; or the URLs within a text.
_A_URL = re.compile(r"(?s)[A-Za-z][\w+.-]*://.*")
_URLS = re.compile(r"[A-Za-z][\w+.-]*://\S+")


def is_remote(path) -> bool:
    """Whether a path has a scheme, such as gs://."""
    return "://" in str(path)


def folder(path, flag: str) -> epath.Path:
    """A folder on this machine or in a bucket, as the user gives it with `flag`: "~/runs/a" or "gs://bucket/runs/a". A
    UserError where the bucket may not be read, or what reads it is not installed; else as `explained`."""
    if not is_remote(path):
        return epath.Path(path).expanduser()
    # The store has errors of its own, from DNS to a right that is missing.
    with explained(f"{flag}={path} cannot be reached", "check it and this account's rights", Exception):
        try:
            remote = epath.Path(path)
            remote.exists()
        except (ImportError, KeyError) as e:
            install, other = "needs gcsfs: pip install -e '.[gcs]'", "has a scheme that is not supported: use gs://..."
            why = install if str(path).startswith("gs://") else other
            raise UserError(f"{flag}={path} {why}, or a folder on this machine") from e
    return remote


def check_writable(folder: epath.Path | Path, flag: str) -> None:
    """A UserError where a local folder, or the nearest one above it, may not be written; nothing is written."""
    if is_remote(folder):
        return
    there = next((p for p in (folder.resolve(), *folder.resolve().parents) if p.exists()), folder)
    if not there.is_dir():
        raise UserError(f"{flag}={folder} cannot be a folder, as {there} is a file: give another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{flag}={folder} cannot be written, since {there} cannot: use a folder that you may write")


def without_secrets(text: str) -> str:
    """A text without the passwords, queries and fragments (signatures, tokens) of the URLs in it."""
    return (_A_URL if _A_URL.match(text) else _URLS).sub(lambda found: _without_secret(found[0]), text)


def _without_secret(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        host, path = parts.netloc.rpartition("@")[2], parts.path
    except ValueError:
        return f"{url.partition('://')[0]}://..."
    port = host.rpartition("]")[2].partition(":")[2]
    if port and not port.isdecimal() and "@" in path:  # What stands for the host is a name and a password with a slash.
        host, _, path = path.rpartition("@")[2].partition("/")
        path = f"/{path}"
    if (host, path) == (parts.netloc, parts.path) and not parts.query and not parts.fragment:
        return url
    return f"{parts.scheme}://{host}{path}" + ("?..." if parts.query else "") + ("#..." if parts.fragment else "")


def values_without_secrets(tree: Any) -> Any:
    """JSON content in which every text is `without_secrets`."""
    if isinstance(tree, dict):
        return {key: values_without_secrets(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [values_without_secrets(value) for value in tree]
    return without_secrets(tree) if isinstance(tree, str) else tree


def absolute(path: epath.Path) -> epath.Path:
    """The folder as an absolute path."""
    return path if is_remote(path) else path.resolve()


def demo_hint(path: str) -> str:
    """For a path in data/tiny, where configs/tiny.py has its files: the command that writes them; otherwise empty."""
    return "python -m diva_jax.demo --out=data/tiny writes it" if Path(path).parts[:2] == ("data", "tiny") else ""


def expanded(path: str | os.PathLike) -> Path:
    """The path with the user's home in place of a ~ at its beginning; one with an unknown user's stays as it is."""
    return Path(os.path.expanduser(path))


def local(path: str, flag: str) -> Path:
    """A folder on this machine; a UserError where it is in a bucket."""
    if is_remote(path):
        raise UserError(f"{flag}={path} must be a folder on this machine: copy it from there with gcloud storage cp")
    return expanded(path)


@contextlib.contextmanager
def _as_oserror(path):
    """Turns the exceptions of object stores into OSErrors, which a run handles as it handles a full disk."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:
        raise OSError(f"{path}: {reason(e)}") from e


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Writes a local file atomically, in a folder that is created: readers see the old file or the complete new one.
    Yields the path of a temporary file in the same folder, to be written. It becomes `path` where the block ends
    without an exception, and is removed otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unique, since several processes may write the same file.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, data: str | bytes, new: bool = False) -> None:
    """Writes bytes, or a text as UTF-8, atomically, on this machine or in a bucket, and creates the folder. With `new`,
    a FileExistsError where the file is there, as for all but one of several processes that write it together."""
    data = data.encode() if isinstance(data, str) else data
    with _as_oserror(path):
        if is_remote(path):
            fs, inside = fsspec.core.url_to_fs(str(path))
            fs.makedirs(posixpath.dirname(inside), exist_ok=True)
            # Object stores show a file only when it is complete.
            fs.pipe_file(inside, data, mode="create" if new else "overwrite")
        elif new:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                file.write(data)
        else:
            with whole_file(path) as temporary:
                temporary.write_bytes(data)


class Mirror:
    """A folder for libraries that append to files, or that write local files only. Where `folder` is remote, `local` is
    a temporary folder whose files `push` copies to it; otherwise `local` is the folder itself."""

    def __init__(self, folder: epath.Path, every: float = 30.0):
        self.folder, self._every, self._pushed = folder, every, time.monotonic()
        self._tmp = tempfile.TemporaryDirectory(prefix="diva_jax_") if is_remote(folder) else None
        self.local = Path(self._tmp.name if self._tmp else folder)
        self._copied: dict[Path, tuple[int, int]] = {}  # Size and time of each file when it was copied.

    def push(self, force: bool = False) -> None:
        """Copies the files that have changed, unless the last push was less than `every` seconds ago."""
        if not self._tmp or (not force and time.monotonic() < self._pushed + self._every):
            return
        for file in sorted(p for p in self.local.rglob("*") if p.is_file()):
            state = (file.stat().st_size, file.stat().st_mtime_ns)
            if self._copied.get(file) == state:
                continue
            with _as_oserror(self.folder):
                (self.folder / str(file.relative_to(self.local))).write_bytes(file.read_bytes())
            self._copied[file] = state
        self._pushed = time.monotonic()

    def close(self) -> None:
        """Copies the files that have changed, and removes the temporary folder."""
        with self._tmp or contextlib.nullcontext():
            self.push(force=True)
