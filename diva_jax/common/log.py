"""Messages for the user: printed, and kept in a file with the time."""

import datetime
from typing import TextIO

import jax

from diva_jax.common.errors import printable

_MOST = 1000  # Lines kept until there is a file.
_early: list[str] = []
_file: TextIO | None = None


def say(*parts) -> None:
    """Prints on process 0, and writes the same to the log file, with the time before each line."""
    if jax.process_index() > 0:
        return
    text = printable(" ".join(map(str, parts)))
    print(text, flush=True)
    now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    lines = [f"{now}  {line}\n" for line in text.splitlines()]
    if _file is not None:
        _file.writelines(lines)
    elif len(_early) < _MOST:
        _early.extend(lines)


def keep_in(file: TextIO | None) -> None:
    """From now on messages are also written to `file`, those before it first; None ends that."""
    global _file
    if file is not None:
        file.writelines(_early)
    _early.clear()
    _file = file
