"""Files of text that come with data sets, such as tables, questions, captions and names of classes."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

from diva_jax.common import json_files
from diva_jax.common.errors import UserError, brief, explained, listing
from diva_jax.data import files

_SEPARATORS = ",\t;|"
_MAX_LINE = 2**24


def is_file(path: str | os.PathLike) -> bool:
    """Whether it is a regular file; False also for what cannot be the name of one."""
    try:
        return os.path.isfile(path)
    except (OSError, ValueError):
        return False


def read_text(path: str | os.PathLike) -> str:
    """The content of a file of UTF-8, with or without a byte order mark; ends of lines are kept. A UserError if it is
    no regular file, has more than 256 MiB, or is not UTF-8."""
    with explained(f"{path} cannot be read as text", "fetch it again", UnicodeDecodeError):
        return json_files.read_bytes(path, json_files.MAX_LINES_BYTES).decode("utf-8-sig")


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; a UserError, which gives `where`, if it is not valid."""
    with explained(f"{where} cannot be read as JSON", "correct it or fetch it again", ValueError):
        return json_files.decoded(text)


def _lines(file, first: str) -> Iterator[str]:
    """The lines of an open file of which the first one was read."""
    line = first
    while line:
        if len(line) > _MAX_LINE:
            raise csv.Error(f"a line has more than {_MAX_LINE} characters")
        yield line
        line = file.readline(_MAX_LINE + 1)


def csv_rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each row of a CSV file that is not blank, the header first; local or remote. The
    separator is the one of comma, tab, semicolon and bar that occurs most often in the first line. A UserError names
    the line that is no CSV in UTF-8, has another number of fields than the header, or whose quote swallows other rows.
    """
    line, separator, header = 0, ",", []
    try:
        with files.open_binary(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as f:
            first = f.readline(_MAX_LINE + 1)
            separator = max(_SEPARATORS, key=first.count)
            for fields in (reader := csv.reader(_lines(f, first), delimiter=separator, strict=True)):
                header = header or fields
                if len(fields) not in (0, len(header)):
                    raise csv.Error(f"it has {len(fields)} fields, the header {len(header)}")
                for inside in (part for field in fields if "\n" in field for part in field.split("\n")):
                    cells = [cell.strip() for cell in inside.split(separator)]
                    if len(cells) == len(header) and any(files.kind_of(cell) == "images" for cell in cells):
                        raise csv.Error(f"a quote swallows the row {brief(inside)}")
                if fields:
                    yield reader.line_num, fields
                line = reader.line_num
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read as a CSV file after line {line} ({e}): write it again") from e
    except csv.Error as e:
        raise UserError(
            f"{path}, line {line + 1}: the row is not CSV ({e}): put quotes around texts with {separator!r}, "
            "quotes or ends of lines in them, double the quotes inside, and give images as paths"
        ) from e


def csv_records(path: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, {column: value}) of each row below the header; a UserError also where a column is missing."""
    rows = csv_rows(path)
    _, header = next(rows, (1, []))
    if wrong := [c for c in columns if header.count(c) != 1]:
        said = "no" if wrong[0] not in header else "more than one"
        raise UserError(f"{path} has {said} column {listing(wrong)}: its first row must be {','.join(columns)}")
    for line, fields in rows:
        yield line, dict(zip(header, fields, strict=True))
