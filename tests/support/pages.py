"""The examples of a page of the documentation, run in the order in which they stand."""

import os
import re
import sys
from pathlib import Path

import commands
from places import ROOT


def blocks(page: str) -> list[tuple[str, str]]:
    """Returns (language, code) of each block of code of a page of the repository."""
    return re.findall(r"```(\w*)\n(.*?)```", (ROOT / page).read_text(), re.S)


def shell(line: str, folder: Path) -> str:
    """Returns the output of a line of the shell, in which `python` is this one."""
    first = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return commands.output(commands.launch("bash", "-c", line, cwd=folder, PATH=first))
