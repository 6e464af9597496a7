"""Tests of the lock of a workdir: one trainer, and no lock that a killed run leaves behind for ever."""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import commands
import pytest
from etils import epath
from helpers import failed, refused

from diva_jax.common.errors import RunError, UserError
from diva_jax.training import lock
from diva_jax.training.lock import Lock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("RENEWAL_INTERVAL_S", 0.05), ("STALE_AFTER_S", 0.6), ("SETTLED_AFTER_S", 0.1)):
        monkeypatch.setattr(lock, name, seconds)


def write(folder, **owner):
    partial = folder.parent / "partial.json"
    partial.write_text(json.dumps({"beat": 0} | owner))
    partial.rename(folder / "lock.json")


def test_a_lock_is_renewed_and_removed(tmp_path, monkeypatch):
    """Also where its file could not be read for a moment."""
    held, read = Lock(epath.Path(tmp_path)), lambda: json.loads((tmp_path / "lock.json").read_text())
    assert read()["pid"] == os.getpid() and read()["host"]
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_owner", mock.Mock(side_effect=RunError("the bucket does not answer")))
        held.check(now=True)
        time.sleep(0.2)
    before = read()["beat"]
    time.sleep(0.3)
    assert read()["beat"] > before
    held.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("owner", [{"host": "elsewhere", "pid": 12}, {"host": socket.gethostname(), "pid": 2**22}])
def test_an_owner_that_renews_is_named_whatever_its_pid(tmp_path, owner):
    """A process in another namespace of this machine has a pid that means nothing here."""
    stop, beats = threading.Event(), itertools.count()

    def renew():
        while not stop.wait(0.05):
            write(tmp_path, **owner, kernel="of another namespace", beat=next(beats))

    write(tmp_path, **owner, kernel="of another namespace")
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        refused(f"in use by process {owner['pid']} on {owner['host']}: use another", lambda: Lock(epath.Path(tmp_path)))
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("left", [None, '{"host": "elsewhere", "pid": 1, "beat": 7}', "{", "[1]", "", '{"pid": "x"}'])
def test_one_of_several_that_begin_together_has_it(tmp_path, left):
    """What nobody renews is taken over."""
    if left is not None:
        (tmp_path / "lock.json").write_text(left)
    barrier = threading.Barrier(3)

    def take(_):
        barrier.wait()
        with contextlib.suppress(UserError):
            return Lock(epath.Path(tmp_path))

    with ThreadPoolExecutor(3) as pool:
        held = [found for found in pool.map(take, range(3)) if found]
    assert len(held) == 1 and json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    held[0].close()


def test_a_run_that_lost_its_lock_ends_and_leaves_that_of_the_other(tmp_path):
    """As after SIGSTOP for longer than `STALE_AFTER_S`: the other's token is there."""
    held = Lock(epath.Path(tmp_path))
    held.check(now=True)
    write(tmp_path, host="elsewhere", pid=12, token="other")
    failed("another run has taken", held.check, now=True)
    held.close()
    assert json.loads((tmp_path / "lock.json").read_text())["token"] == "other"


def test_a_process_of_this_machine_that_lives_is_named(tmp_path):
    code = "import sys, time, diva_jax.training.lock as l; l.RENEWAL_INTERVAL_S = .05; from etils import epath; "
    code += "l.Lock(epath.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    other = commands.launch(sys.executable, "-c", code, tmp_path)
    assert other.stdout.readline() == "held\n"
    refused(f"in use by process {other.pid} on ", lambda: Lock(epath.Path(tmp_path)))
    commands.kill_all()
    began = time.monotonic()
    Lock(epath.Path(tmp_path)).close()  # It has ended, and its lock is taken over at once.
    assert time.monotonic() - began < 0.5
