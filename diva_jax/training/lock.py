"""One trainer per workdir: a file that says who trains there, renewed while the run lives."""

import json
import os
import socket
import threading
import time

from etils import epath

from diva_jax.common import log, paths
from diva_jax.common.errors import UserError

RENEWAL_INTERVAL_S = 10.0
STALE_AFTER_S = 25.0  # A run that lives renews its lock within this time.


def _read(path: epath.Path) -> dict | None:
    """The content of a lock; None where there is none, or where it was cut short by a kill."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _ended(owner: dict) -> bool:
    """Whether the owner is a process of this machine that does not exist any more, or this very process."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except PermissionError:  # It exists, and belongs to another user.
        return False
    except (KeyError, TypeError, ValueError, OSError):
        return True
    return int(owner["pid"]) == os.getpid()


def _lives(path: epath.Path, owner: dict) -> bool:
    """Whether the lock is renewed or replaced while it is watched; clocks of other machines are not used."""
    until = time.monotonic() + STALE_AFTER_S
    while time.monotonic() < until:
        time.sleep(min(1.0, STALE_AFTER_S / 5))
        if (now := _read(path)) != owner:
            return now is not None
    return False


class Lock:
    """The lock of a workdir, held until `close`.

    A lock that a killed run has left is taken over: at once if that process was on this machine, else after the lock
    has not been renewed for `STALE_AFTER_S` seconds.

    Args:
      workdir: of the run; a folder or in a bucket.

    Raises:
      UserError: another process trains in this workdir, or it cannot be written.
    """

    def __init__(self, workdir: epath.Path):
        self._path = workdir / "lock.json"
        owner = _read(self._path)
        if owner is not None and not _ended(owner):
            log.say(f"{self._path} exists: waiting up to {STALE_AFTER_S:.0f} s to see whether that run still lives")
            if _lives(self._path, owner):
                raise UserError(
                    f"--workdir={workdir} is in use by process {owner.get('pid')} on {owner.get('host')}: use another "
                    "workdir, or end that run first"
                )
        self._mine = {"host": socket.gethostname(), "pid": os.getpid(), "beat": 0}
        try:
            paths.write_whole(self._path, json.dumps(self._mine))
        except OSError as e:
            raise UserError(f"--workdir={workdir} cannot be written ({e}): use a folder that you may write") from e
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._over.wait(RENEWAL_INTERVAL_S):
            self._mine["beat"] += 1
            try:
                paths.write_whole(self._path, json.dumps(self._mine))
            except OSError:  # A full disk is reported by the checkpoint that meets it.
                continue

    def close(self) -> None:
        """Gives the workdir back."""
        self._over.set()
        self._thread.join()
        try:
            self._path.unlink()
        except Exception as e:  # A store's own errors. The lock then ends because it is not renewed.
            log.say(f"{self._path} could not be removed ({paths.reason(e)}); the next run takes it over")
