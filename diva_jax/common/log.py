"""Messages for the user: printed, and kept in a file with the time; and progress."""

import contextlib
import datetime
import functools
import importlib.metadata
import logging
import platform
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import jax
from tqdm import tqdm

from diva_jax import __version__
from diva_jax.common.errors import printable

tqdm.monitor_interval = 0  # Without its thread.
_MAX_EARLY_LINES = 1000
_early: list[str] = []  # What was said before there was a file.
_file: TextIO | None = None


class Bar(tqdm):
    """A bar around which `say` writes. The list of plain tqdm has bars of other libraries as well, and fails its reader
    where one of them is collected as garbage at that moment."""

    _instances = weakref.WeakSet()


def say(*parts) -> None:
    """Prints on process 0, above a progress bar, and writes the same to the log file, each line with the time."""
    if jax.process_index() > 0:
        return
    text = printable(" ".join(map(str, parts)))
    Bar.write(text, sys.stdout)
    sys.stdout.flush()
    now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    lines = [f"{now}  {line}\n" for line in text.splitlines()]
    if _file is not None:
        _file.writelines(lines)
    elif len(_early) < _MAX_EARLY_LINES:
        _early.extend(lines)


def warn(message: str, *values) -> None:
    """Logs a warning, as `logging` does, on process 0."""
    if jax.process_index() == 0:
        logging.getLogger(__name__).warning(message, *values)


say_once = functools.cache(say)  # Says a text the first time only.


def progress(what: str, total: int, unit: str = "steps", every: float = 20.0, initial: int = 0) -> Bar:
    """A tqdm of `total` items with the time that is left: a bar on a terminal, otherwise a line every so many seconds;
    nothing except on process 0. `update(n)` counts items and `close()` removes the bar."""
    shown = dict(desc=what, total=total, initial=initial, unit=unit, leave=False, disable=jax.process_index() > 0)
    if sys.stdout.isatty():
        return Bar(file=sys.stdout, **shown)
    # Each state of the bar is a line; without a position, a bar in another one would move the cursor up.
    lines = types.SimpleNamespace(write=lambda text: text.strip() and say(text.strip()), flush=lambda: None)
    line = "{desc}: {n_fmt}/{total_fmt} {unit}, {remaining} left"
    return Bar(file=lines, bar_format=line, mininterval=every, miniters=1, delay=every, position=0, **shown)


@contextlib.contextmanager
def waiting(what: str, tell: Callable[[str], None] = say, every: float = 60.0) -> Iterator[None]:
    """Says how long something takes, every so many seconds, while the block runs; the line begins with `what`."""
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


def now() -> str:
    """Returns the time in UTC: `2026-01-31T12:00:00+00:00`."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def describe() -> dict[str, Any]:
    """Returns {"versions": package -> version, "devices": such as "8 x TPU v5e"}; the devices of all processes."""
    devices = jax.devices()
    versions = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax", "numpy", "pillow", "transformers")}
    return {
        "versions": {"diva_jax": __version__, "python": platform.python_version()} | versions,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }
