"""Lists the commands: python -m diva_jax."""

import ast
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from diva_jax.common import errors


def commands() -> Iterator[tuple[str, str]]:
    """Yields (module, the first sentence of its documentation) of every command of the package."""
    package = Path(__file__).parent
    for file in sorted(package.rglob("*.py"), key=lambda f: (len(f.parts), f.name)):
        text = file.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":' in text and file.parent != package / "configs" and file != Path(__file__):
            parts = file.relative_to(package.parent).with_suffix("").parts
            line = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
            yield ".".join(parts).removesuffix(".__main__"), re.split("[:?] python -m", line)[0].rstrip(".:")


def main(arguments: list[str]) -> int:
    """Prints the commands, or what a name that is none may mean; returns the exit code."""
    found = dict(commands())
    if wrong := [a for a in arguments if a not in ("-h", "--help")]:
        said = errors.unknown("no command python -m diva_jax", wrong[:1], found, "python -m diva_jax lists all")
        print(f"error: {said}", file=sys.stderr)
        return 2
    width = max(map(len, found)) + 13
    print("Commands; each prints its own flags with --help:\n")
    print("\n".join(f"{f'python -m {name}':{width}}{line}" for name, line in found.items()))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # A reader such as head may end before.
    sys.exit(main(sys.argv[1:]))
