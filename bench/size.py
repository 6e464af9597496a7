"""Prints the size of the project beside its marks: python bench/size.py. Exits with 1 where a mark is exceeded.

Lines are those of Python files, blank lines, docstrings and comments included. A thing that shall exist once is counted
as the files that have its signature, a regular expression which a second one could hardly avoid.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARKS = {"package without world/": 22_000, "tests": 15_000}
ONCE = {
    "validator of config fields": r"^def check\(values|^_?[A-Z_]*RULES\b.* = \($",
    "train loop": r"\.step\(index\)",
    "resolver of a source of weights": r"snapshot_download\(|def is_run\(",
    "CLIP tokenizer": r"\bBPE\(|CLIPTokenizer\.from_pretrained",
    "look-up of a config by name": r'(?<!_SOURCES)\.glob\("\*\.py"\)',
    "comparison of configs": r"^def differing\(",
}


def python_files(folder: str, without: str | None = None) -> list[Path]:
    """The Python files of a folder, except those in its subfolder `without`; links are not followed."""
    files = sorted((ROOT / folder).rglob("*.py"))
    own = [f for f in files if not any(p.is_symlink() for p in f.parents if ROOT in p.parents)]
    return [f for f in own if without not in f.relative_to(ROOT / folder).parts]


def lines(files: list[Path]) -> int:
    return sum(len(f.read_text().splitlines()) for f in files)


def main() -> int:
    package = python_files("diva_jax", "world")
    tests = python_files("tests")
    rows = [
        ("lines of the package without world/", lines(package), MARKS["package without world/"]),
        ("lines of the tests", lines(tests), MARKS["tests"]),
    ]
    for title, signature in ONCE.items():
        rows.append((title, sum(bool(re.search(signature, f.read_text(), re.M)) for f in package), 1))
    for title, count, mark in rows:
        print(f"{title:<40} {count:>7,}  at most {mark:>7,}{'' if count <= mark else '  EXCEEDED'}")
    by_folder = {}
    for file in package:
        place = file.relative_to(ROOT / "diva_jax").parts[0]
        by_folder[place] = by_folder.get(place, 0) + lines([file])
    print("  ".join(f"{place} {count:,}" for place, count in sorted(by_folder.items(), key=lambda item: -item[1])))
    return int(any(count > mark for _, count, mark in rows))


if __name__ == "__main__":
    sys.exit(main())
