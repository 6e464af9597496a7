"""Folders of a run, on this machine or in a bucket (gs://...), through etils.epath and gcsfs."""

import contextlib
import logging
import tempfile
import time
from pathlib import Path

import fsspec
from etils import epath

from diva_jax.common.errors import UserError

# A bucket's listing goes stale as soon as another process, or tensorstore in this one, writes to it.
fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
# Without a right that nothing here needs, gcsfs warns of it at every call.
logging.getLogger("gcsfs").setLevel(logging.ERROR)


def is_remote(path) -> bool:
    return "://" in str(path)


def folder(path, flag: str) -> epath.Path:
    """A folder that may be in a bucket, of which is found out whether it can be asked for.

    Args:
      path: what the user gave, e.g. "~/runs/a" or "gs://bucket/runs/a".
      flag: where they gave it, named in errors.

    Raises:
      UserError: the bucket cannot be reached, or what reaches it is not installed.
    """
    if not is_remote(path):
        return epath.Path(path).expanduser()
    try:
        found = epath.Path(path)
        found.exists()
    except ImportError as e:
        raise UserError(f"{flag}={path}: buckets need gcsfs: pip install 'diva_jax[gcs]'") from e
    except KeyError as e:
        raise UserError(f"{flag}={path} is of no kind that can be written: use gs://BUCKET/... or a folder") from e
    except Exception as e:  # The store's own, from DNS to a right that is missing.
        raise UserError(
            f"{flag}={path} cannot be reached ({reason(e)}): check the name and this account's rights"
        ) from e
    return found


def absolute(path: epath.Path) -> epath.Path:
    """The same folder, whatever the current one."""
    return path if is_remote(path) else path.resolve()


def reason(e: Exception) -> str:
    """An exception as part of one line; stores answer with pages."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:300]


def local(path: str, flag: str) -> Path:
    """A folder on this machine; a UserError where it is in a bucket."""
    if is_remote(path):
        raise UserError(f"{flag}={path} must be a folder on this machine: copy it from there with gcloud storage cp")
    return Path(path)


@contextlib.contextmanager
def _as_oserror(path):
    """Stores have exceptions of their own, which are to a run what a full disk is."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:
        raise OSError(f"{path}: {reason(e)}") from e


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file so that nobody ever reads a part of it; makes its folder.

    Raises:
      OSError: it cannot be written.
    """
    with _as_oserror(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(path):  # There a file is seen once it is whole, and renaming is copying.
            path.write_text(text)
            return
        tmp = path.with_name(path.name + ".tmp")
        tmp.write_text(text)
        tmp.replace(path)


class Mirror:
    """A folder for libraries that append to files, or know local ones only.

    Where the folder is remote, `local` is a temporary one whose files are copied there, whole, by `push`; else it
    is the folder itself.

    Args:
      folder: to be written to.
      every: seconds that lie between two pushes that are not forced.
    """

    def __init__(self, folder: epath.Path, every: float = 30.0):
        self.folder, self._every, self._pushed = folder, every, time.monotonic()
        self._tmp = tempfile.TemporaryDirectory(prefix="diva_jax_") if is_remote(folder) else None
        self.local = Path(self._tmp.name if self._tmp else folder)
        self._seen: dict[Path, tuple[int, int]] = {}  # What a file was like when it was copied.

    def push(self, force: bool = False) -> None:
        """Copies what has changed, if the last time was long enough ago.

        Raises:
          OSError: it cannot be written there.
        """
        if not self._tmp or (not force and time.monotonic() < self._pushed + self._every):
            return
        for file in sorted(p for p in self.local.rglob("*") if p.is_file()):
            state = (file.stat().st_size, file.stat().st_mtime_ns)
            if self._seen.get(file) == state:
                continue
            with _as_oserror(self.folder):
                (self.folder / str(file.relative_to(self.local))).write_bytes(file.read_bytes())
            self._seen[file] = state
        self._pushed = time.monotonic()

    def close(self) -> None:
        """Copies what is left, and removes the temporary folder."""
        self.push(force=True)
        if self._tmp:
            self._tmp.cleanup()
