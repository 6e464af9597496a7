"""The package's imports go in one direction, files stay short, and names of modules are documented."""

import ast
import functools
import re
from pathlib import Path

from places import ROOT, TESTS
from without_torch import PACKAGES

PACKAGE = ROOT / "diva_jax"
# Lowest first: a folder or top-level file imports only from those before it, and from itself. The train loop uses
# evaluation, which uses all else of training.
ORDER = (
    "common", "costs", "models", "data", "weights", "objectives", "training", "evals", "config", "report",
    "training.loop", "api", "world",
)  # fmt: skip
# The exception: a source of weights may be a run; what opens it is imported then, inside a function.
LATE = {"weights/origins.py": {"training"}}
COMMANDS = ("main", "evaluate", "export_torch", "cache_latents", "aot", "selfcheck", "demo")
FILES = sorted(PACKAGE.rglob("*.py"))


def place(module: str) -> str:
    """`diva_jax.data.tars` -> "data"; the package itself -> ""; the train loop is a place of its own."""
    inside = module.split(".")[1:]
    return ".".join(inside[: 1 + (inside[:2] == ["training", "loop"])])


@functools.cache
def imported(file: Path) -> set[str]:
    """The places that a file imports from, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {place(a.name) for a in node.names if a.name.split(".")[0] == "diva_jax"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "diva_jax":
            found |= {place(f"{node.module}.{a.name}") for a in node.names}
    return found


def test_imports_go_down():
    wrong = []
    for file in FILES:
        here = place(".".join(file.relative_to(ROOT).with_suffix("").parts))
        if here in (*COMMANDS, "__init__", "__main__"):
            continue
        allowed = {*ORDER[: ORDER.index(here) + 1], "__version__", *LATE.get(str(file.relative_to(PACKAGE)), ())}
        wrong += [f"{file.relative_to(ROOT)} imports {other}" for other in imported(file) if other not in allowed]
    wrong += [f"{file} imports a command" for file in FILES if imported(file) & set(COMMANDS)]
    assert not wrong


def test_files_are_short():
    files = [f for folder in ("diva_jax", "tests", "configs", "bench") for f in (ROOT / folder).rglob("*.py")]
    assert not [f for f in files if len(f.read_text().splitlines()) > 400]


def test_the_architecture_page_names_every_place():
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    for name in (*ORDER, *COMMANDS):
        assert name.split(".")[-1] in page, name
    modules = [f.stem for f in FILES if f.parent != PACKAGE and f.parent.parent == PACKAGE and f.stem[0] != "_"]
    shown = page.split("```")[1]
    internal = {f.stem for f in (PACKAGE / "report").glob("*.py")}
    assert not sorted(m for m in modules if m not in shown and m not in internal)


def test_only_parity_needs_pytorch():
    """`make check` also runs the unit tests where these packages cannot be imported."""
    imports = re.compile(rf"^\s*(?:import|from) (?:{'|'.join(PACKAGES)})\b", re.MULTILINE)
    files = [f for folder in ("unit", "runs", "tools") for f in (TESTS / folder).rglob("*.py")]
    assert len(files) > 30 and not [f for f in files if imports.search(f.read_text())]
