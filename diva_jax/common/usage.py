"""What `--help` and `--version` print."""

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence

import jax
from absl import flags

from diva_jax import __version__

HELP = ("--help", "-help", "-h", "--helpfull", "--helpshort")
VERSION = ("--version", "-version")

# What a field is -> its text, see `text`.
Field = tuple[str, str, str]


def version() -> str:
    """`diva_jax 0.1.0, jax 0.10.2, Python 3.11.9`."""
    return f"diva_jax {__version__}, jax {jax.__version__}, Python {sys.version.split()[0]}"


def _program(module) -> str:
    """How the command was started: `python -m diva_jax.main`, or `diva-train`."""
    if module.__name__ != "__main__":
        return os.path.basename(sys.argv[0])
    return f"python -m {module.__spec__.name.removesuffix('.__main__')}"


def _wrapped(head: str, body: str, width: int) -> str:
    """`head` on a line of its own, then `body` below it, indented."""
    return f"  {head}\n{textwrap.fill(body, width, initial_indent=' ' * 6, subsequent_indent=' ' * 6)}"


def text(main: Callable, arguments: Sequence[str], fields: Sequence[Field] = ()) -> str:
    """The help of a command.

    Args:
      main: its function; its module's docstring and flags are shown.
      arguments: names of what it takes besides flags.
      fields: (dotted path, value, comment) of each field of the config that was given.
    """
    module, width = sys.modules[main.__module__], min(shutil.get_terminal_size().columns, 100)
    name = sys.argv[0] if module.__name__ == "__main__" else module.__name__
    own = [f for f in flags.FLAGS.flags_by_module_dict().get(name, ()) if not f.name.startswith("config.")]
    lines = [f"usage: {' '.join([_program(module), *arguments, '[--FLAG=VALUE ...]'])}", "", module.__doc__.strip(), ""]
    lines += ["flags:"]
    for flag in own:
        default = "" if flag.default in (None, "", [], False) or flag.name == "config" else f" Default: {flag.default}."
        lines.append(_wrapped(f"--{flag.name}", f"{flag.help}{default}", width))
    lines += ["  --help\n      Print this; with --config=FILE also every field with its value.", "  --version"]
    if fields:
        lines += ["", "fields of the config, with the values that it has:"]
        lines += [_wrapped(f"--config.{path}={value}", comment, width) for path, value, comment in fields]
    return "\n".join(lines)
