"""The examples of a page of the documentation, run in the order in which they stand."""

import re
import shlex
import sys
from pathlib import Path

import commands
from places import ROOT


def blocks(page: str) -> list[tuple[str, str]]:
    """Returns (language, code) of each block of code of a page of the repository."""
    return re.findall(r"```(\w*)\n(.*?)```", (ROOT / page).read_text(), re.S)


def shell(line: str, folder: Path) -> str:
    """Returns the output of a line of the shell, in which `python` is this one."""
    first, python, *rest = shlex.split(line, comments=True)
    if (first, python) == ("python", "-m") and rest[0].startswith("diva_jax."):
        return commands.succeed(rest[0].removeprefix("diva_jax."), *rest[1:], cwd=folder)
    return commands.output(commands.launch(sys.executable, python, *rest, cwd=folder))
