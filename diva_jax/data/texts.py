"""Files of text that come with data sets, such as tables, questions, captions and names of classes."""

import csv
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from diva_jax.common import json_files
from diva_jax.common.errors import UserError, listing
from diva_jax.data import files

_SEPARATORS = ",\t;|"


def is_file(path: str | os.PathLike) -> bool:
    """Whether it is a regular file; False also for what cannot be the name of one."""
    try:
        return os.path.isfile(path)
    except (OSError, ValueError):
        return False


def read_text(path: str | os.PathLike) -> str:
    """The content of a file of UTF-8, with or without a byte order mark; ends of lines are kept as they are.

    Raises:
      UserError: it is no regular file, has more than 256 MiB, or is not UTF-8.
    """
    try:
        return json_files.read_bytes(path, json_files.MAX_LINES_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} cannot be read as text ({str(e)[:200]}): fetch it again") from e


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
      UserError: it is not valid; gives `where`.
    """
    try:
        return json_files.decoded(text)
    except ValueError as e:
        raise UserError(f"{where} cannot be read as JSON ({str(e)[:200]}): correct it or fetch it again") from e


def csv_rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each row of a CSV file that is not blank, the header first; local or remote.

    The separator is the one of comma, tab, semicolon and bar that occurs most often in the first line.

    Raises:
      UserError: the file cannot be read as CSV in UTF-8; names the line.
    """
    line = 0
    try:
        with files.open_binary(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as f:
            first = f.readline()
            reader = csv.reader(itertools.chain([first], f), delimiter=max(_SEPARATORS, key=first.count))
            for fields in reader:
                line = reader.line_num
                if fields:
                    yield line, fields
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} cannot be read as a CSV file after line {line} ({e}): write it again") from e


def csv_records(path: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, {column: value}) of each row of a CSV file below its header; cells may be missing at the end.

    Raises:
      UserError: the file cannot be read, or lacks one of `columns`.
    """
    rows = csv_rows(path)
    _, header = next(rows, (1, []))
    if missing := [c for c in columns if c not in header]:
        raise UserError(f"{path} has no column {listing(missing)}: its first row must be {','.join(columns)}")
    for line, fields in rows:
        yield line, dict(zip(header, fields, strict=False))
