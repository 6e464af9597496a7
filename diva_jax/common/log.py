"""Messages for the user: printed, and kept in a file with the time."""

import contextlib
import datetime
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import jax

from diva_jax.common.errors import printable

_MOST = 1000  # Lines kept until there is a file.
_early: list[str] = []
_file: TextIO | None = None
_bar = False  # Whether there is a progress bar on the terminal's last line.


def say(*parts) -> None:
    """Prints on process 0, and writes the same to the log file, with the time before each line."""
    if jax.process_index() > 0:
        return
    text = printable(" ".join(map(str, parts)))
    print(_cleared() + text, flush=True)
    now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    lines = [f"{now}  {line}\n" for line in text.splitlines()]
    if _file is not None:
        _file.writelines(lines)
    elif len(_early) < _MOST:
        _early.extend(lines)


def _cleared() -> str:
    """What removes the progress bar from the terminal; "" where there is none."""
    global _bar
    shown, _bar = _bar, False
    return "\r\x1b[2K" if shown else ""


def bar(share: float | None = None, before: str = "", after: str = "") -> None:
    """Shows or updates a progress bar on the last line, if stdout is a terminal; messages are printed above it.

    Args:
      share: of what is done, 0 to 1; None removes the bar.
      before, after: texts on both sides of it.
    """
    global _bar
    if jax.process_index() > 0 or not sys.stdout.isatty():
        return
    line = _cleared()
    if share is not None:
        room = max(shutil.get_terminal_size().columns - len(before) - len(after) - 6, 10)
        filled = int(share * room)
        line, _bar = f"{line}{before} [{'#' * filled}{'.' * (room - filled)}] {after}", True
    print(line, end="", flush=True)


@contextlib.contextmanager
def waiting(what: str, tell: Callable[[str], None] = say, every: float = 60.0) -> Iterator[None]:
    """Says how long something takes, once per minute, while the block runs.

    Args:
      what: the start of the line.
      tell: takes the line.
      every: time between two lines [s].
    """
    began, over = time.monotonic(), threading.Event()

    def report():
        while not over.wait(every):
            tell(f"{what}: {(time.monotonic() - began) / 60:.0f} min so far")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def keep_in(file: TextIO | None) -> None:
    """From now on messages are also written to `file`, those before it first; None ends that."""
    global _file
    if file is not None:
        file.writelines(_early)
    _early.clear()
    _file = file
