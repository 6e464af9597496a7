"""One trainer per workdir: a file that says who trains there, renewed while the run lives."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from etils import epath

from diva_jax.common import errors, json_files, log, paths
from diva_jax.common.errors import RunError, UserError, explained

RENEWAL_INTERVAL_S = 10.0
# A lock that was not renewed for this time belongs to a run that has ended.
STALE_AFTER_S = 25.0
# If two processes take a lock over at the same time, both have written after this time.
SETTLED_AFTER_S = 1.0


def _kernel() -> str | None:
    """What a process id belongs to: this start of this machine's kernel, and the namespace of process ids."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return None


def _owner(path: epath.Path) -> dict | None:
    """The content of a lock; None without one, {} where it was cut short; a UserError where it cannot be read."""
    try:
        return json_files.read(path, dict[str, Any], "remove it", None)
    except UserError as e:
        if not isinstance(e.__cause__, ValueError):
            raise
        return {}


def _ended(owner: dict) -> bool:
    """Whether the owner is known to have ended: a process of this kernel and namespace that does not exist."""
    if owner.get("kernel") is None or owner["kernel"] != _kernel():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except PermissionError:  # It exists, and belongs to another user.
        return False
    except (KeyError, TypeError, ValueError, OSError):
        return True
    return False


class Lock:
    """The lock of a workdir, on this machine or in a bucket, held until `close`. It is created exclusively. One that a
    killed run has left is taken over: at once if that process was one of this machine, else after the lock has not been
    renewed for `STALE_AFTER_S` seconds. A run that was stopped for longer finds the token of another run in it, and
    must end. A UserError where another process trains there, or it cannot be written."""

    def __init__(self, workdir: epath.Path):
        self._workdir, self._path = workdir, workdir / "lock.json"
        self._mine = dict(host=socket.gethostname(), pid=os.getpid(), kernel=_kernel(), token=uuid.uuid4().hex, beat=0)
        self._over, self._lost = threading.Event(), threading.Event()
        with explained(f"--workdir={workdir} cannot be written", "use a folder that you may write"):
            self._take()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        try:
            paths.write_whole(self._path, json.dumps(self._mine), new=True)
            return
        except FileExistsError:
            owner = _owner(self._path) or {}
        if not _ended(owner):
            log.say(f"{self._path} exists: waiting up to {STALE_AFTER_S:.0f} s to see whether that run still lives")
            until = time.monotonic() + STALE_AFTER_S  # Clocks of other machines are not used.
            while time.monotonic() < until:
                time.sleep(min(1.0, STALE_AFTER_S / 5))
                if (now := _owner(self._path)) != owner:
                    if now is not None:  # It was renewed or replaced.
                        self._refuse(owner)
                    break
        elif _owner(self._path) != owner:
            self._refuse(owner)
        paths.write_whole(self._path, json.dumps(self._mine))
        time.sleep(SETTLED_AFTER_S)
        if (now := _owner(self._path)) != self._mine:
            self._refuse(now or {})

    def _refuse(self, owner: dict) -> None:
        who = f"process {owner['pid']} on {owner.get('host')}" if "pid" in owner else "another process"
        raise UserError(f"--workdir={self._workdir} is in use by {who}: use another workdir, or end that run first")

    def _renew(self) -> None:
        while not self._over.wait(RENEWAL_INTERVAL_S):
            if not self._is_mine():
                return
            self._mine["beat"] += 1
            with contextlib.suppress(OSError):  # A full disk is reported by the checkpoint that meets it.
                paths.write_whole(self._path, json.dumps(self._mine))

    def _is_mine(self) -> bool:
        """Whether no other run has put its token there; a file that cannot be read now says nothing."""
        owner = None
        with contextlib.suppress(UserError, RunError):
            owner = _owner(self._path)
        if owner and owner.get("token") != self._mine["token"]:
            self._lost.set()
        return not self._lost.is_set()

    def check(self, now: bool = False) -> None:
        """A RunError where another run has taken the workdir over, by the last renewal or, with `now`, by the file."""
        if self._lost.is_set() or (now and not self._is_mine()):
            why = f"this one did not renew its lock for {STALE_AFTER_S:.0f} s (was it stopped?)"
            problem = f"another run has taken --workdir={self._workdir} over, because {why}"
            raise RunError(f"{problem}: this run ends, and writes nothing more there")

    def close(self) -> None:
        """Gives the workdir back."""
        self._over.set()
        self._thread.join()
        try:
            if self._is_mine():
                self._path.unlink(missing_ok=True)
        except Exception as e:  # A store's own errors. The lock then ends because it is not renewed.
            log.say(f"{self._path} could not be removed ({errors.reason(e)}); the next run takes it over")
