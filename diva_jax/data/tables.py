"""Records from tables: CSV and TSV files, Parquet files, and the Arrow files of Hugging Face datasets."""

import csv
import functools
import io
import itertools
import logging
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diva_jax.common.errors import UserError, brief, listing
from diva_jax.common.paths import is_remote
from diva_jax.data import files, texts
from diva_jax.data.records import TEXT_COLUMNS, Record, caption

logger = logging.getLogger(__name__)

# Names of columns that are used where `?image=` gives none; the first that a table has.
IMAGE_COLUMNS = ("image", "file", "filepath", "path", "file_name", "filename", "image_path", "jpg", "png", "webp")
_SEPARATORS = ",\t;|"
_CHUNK = 2**16  # Rows of a CSV file that are converted to Arrow at once.
_GROUPS = 4  # Decoded row groups that are kept.
_LARGE_GROUP = 2**26  # Bytes of images in a row group above which random access is slow.
_SPLIT = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|val|dev)(?=[/_.-])")


class Part(Protocol):
    """The rows of one file."""

    path: str

    def __len__(self) -> int: ...

    def place(self, row: int) -> str:
        """Where a row is: "line 7" or "row 6"."""

    def cells(self, row: int, with_text: bool) -> tuple:
        """(image, text) of a row, as Python objects; None where a cell is empty."""


def _column(path: str, what: str, columns: Sequence[str], wanted: str | None, known: Sequence[str]) -> str | None:
    if wanted and wanted not in columns:
        raise UserError(f"config.data.path: {path} has no column {wanted!r} for ?{what}=, only {listing(columns, 10)}")
    return wanted or next((name for name in known if name in columns), None)


def choose_columns(path: str, columns: Sequence[str], options: Mapping[str, str]) -> tuple[str, str | None]:
    """(the column with the images, the column with the captions or None).

    Args:
      path: the table, for errors.
      columns: its column names.
      options: "image" and "text", where they are given.

    Raises:
      UserError: there is no such column, or none that is known to hold images.
    """
    image = _column(path, "image", columns, options.get("image"), IMAGE_COLUMNS)
    if image is None:
        raise UserError(
            f"config.data.path: {path} has no column {', '.join(IMAGE_COLUMNS[:-1])} or {IMAGE_COLUMNS[-1]}, only "
            f"{listing(columns, 10)}: name the one with the images, as {path}?image=COLUMN"
        )
    return image, _column(path, "text", columns, options.get("text"), TEXT_COLUMNS)


def csv_rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each row of a CSV file that is not blank, the header first.

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


class _Columns:
    """A part whose columns are in memory, or mapped into it."""

    def __init__(self, path: str, image, text=None, lines: np.ndarray | None = None):
        self.path, self._image, self._text, self._lines = path, image, text, lines

    def __len__(self) -> int:
        return len(self._image)

    def place(self, row: int) -> str:
        return f"row {row + 1}" if self._lines is None else f"line {self._lines[row]}"

    def cells(self, row: int, with_text: bool) -> tuple:
        return self._image[row].as_py(), self._text[row].as_py() if with_text and self._text is not None else None


class _RowGroups:
    """A Parquet file that holds the images themselves: a row is read with its row group.

    Args:
      path: the file.
      columns: (image, text or None).
      read_group: (path, row group) -> table with these columns.
    """

    def __init__(self, path: str, metadata: pq.FileMetaData, columns, read_group):
        self.path, self._columns, self._read_group = path, columns, read_group
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self._ends = np.cumsum(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def place(self, row: int) -> str:
        return f"row {row + 1}"

    def cells(self, row: int, with_text: bool) -> tuple:
        group = int(np.searchsorted(self._ends, row, side="right"))
        table = self._read_group(self.path, group)
        local = row - int(self._ends[group - 1] if group else 0)
        image, text = self._columns
        return table[image][local].as_py(), table[text][local].as_py() if with_text and text else None


class TableSource:
    """Records that are rows of tables.

    The image is a file (a path relative to the table's folder), the encoded bytes, or a struct of `bytes` and `path` as
    Hugging Face datasets have it; the caption is a text or a list of texts.

    Args:
      parts: the tables, in order.
      has_text: whether they have a column with captions.

    Raises:
      UserError: there are no rows.
    """

    def __init__(self, parts: Sequence[Part], has_text: bool):
        self.parts, self.has_text = parts, has_text
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        if not len(self):
            raise UserError(f"config.data.path: {parts[0].path} has no rows")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, i: int) -> tuple[Part, int]:
        number = int(np.searchsorted(self._ends, i, side="right"))
        return self.parts[number], i - int(self._ends[number - 1] if number else 0)

    def name(self, i: int) -> str:
        """`table.csv, line 7` or `table.parquet, row 6`."""
        part, row = self._locate(i)
        return f"{posixpath.basename(part.path)}, {part.place(row)}"

    def read(self, i: int, with_text: bool = True) -> Record:
        """See `Source.read`.

        Raises:
          OSError: the table or the image's file cannot be read.
          ValueError: the cell has no image, or a caption that is no text.
        """
        part, row = self._locate(i)
        image, text = part.cells(row, with_text)
        return Record(self.name(i), _image_bytes(image, part.path), caption(text))


def _image_bytes(cell, table: str) -> bytes:
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes) and cell:
        return cell
    if not isinstance(cell, str) or not cell:
        raise ValueError("it has no image")
    path = cell if is_remote(cell) else posixpath.join(posixpath.dirname(table), cell)
    with files.open_binary(path) as f:
        return f.read()


def _csv_part(path: str, options: Mapping[str, str]) -> tuple[Part, bool]:
    rows = csv_rows(path)
    header = next(rows, (1, []))[1]
    image, text = (None if column is None else header.index(column) for column in choose_columns(path, header, options))
    wanted = [image] if text is None else [image, text]
    lines, chunks = [], [[] for _ in wanted]
    while batch := list(itertools.islice(rows, _CHUNK)):
        lines.append(np.array([line for line, _ in batch], np.int64))
        for chunk, k in zip(chunks, wanted, strict=True):
            cells = [fields[k] if k < len(fields) else None for _, fields in batch]
            chunk.append(pa.array(cells, pa.large_string()))
    columns = [pa.chunked_array(chunk, pa.large_string()) for chunk in chunks]
    return _Columns(path, *columns, lines=np.concatenate(lines) if lines else np.zeros(0, np.int64)), text is not None


def _check_type(path: str, column: str, kind: pa.DataType) -> None:
    names = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    plain = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    if not (names & {"bytes", "path"} or any(test(kind) for test in plain)):
        raise UserError(
            f"config.data.path: the column {column!r} of {path} holds {kind}, neither encoded images nor paths: name "
            "another one with ?image=COLUMN"
        )


def _parquet_part(path: str, options: Mapping[str, str], read_group) -> tuple[Part, bool]:
    with files.open_binary(path) as f:
        parquet = pq.ParquetFile(f)
        schema = parquet.schema_arrow
        columns = image, text = choose_columns(path, schema.names, options)
        _check_type(path, image, schema.field(image).type)
        if pa.types.is_string(schema.field(image).type) or pa.types.is_large_string(schema.field(image).type):
            table = parquet.read(list(filter(None, columns)))
            return _Columns(path, table[image], table[text] if text else None), text is not None
        return _RowGroups(path, parquet.metadata, columns, read_group(columns)), text is not None


def _arrow_part(path: str, options: Mapping[str, str]) -> tuple[Part, bool]:
    table = pa.ipc.open_stream(pa.memory_map(path)).read_all()  # No copy: the columns stay in the file.
    image, text = choose_columns(path, table.column_names, options)
    _check_type(path, image, table.schema.field(image).type)
    return _Columns(path, table[image], table[text] if text else None), text is not None


def _group_reader():
    """Columns -> (path, row group) -> table; the most recent row groups are kept, whatever their file."""

    @functools.lru_cache(maxsize=_GROUPS)
    def read(path: str, group: int, columns: tuple) -> pa.Table:
        with files.open_binary(path) as f:
            return pq.ParquetFile(f).read_row_group(group, columns=list(filter(None, columns)), use_threads=False)

    return lambda columns: lambda path, group: read(path, group, columns)


def _warn_of_large_groups(path: str) -> None:
    with files.open_binary(path) as f:
        metadata = pq.read_metadata(f)
    size = max((metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups)), default=0)
    if size > _LARGE_GROUP:
        logger.warning(
            "%s has row groups of up to %d MB, one of which is read for every image: write it with fewer rows per row "
            "group, or as a folder of save_to_disk",
            path,
            size // 2**20,
        )


def _data_files(path: str, found: Sequence[str]) -> Sequence[str]:
    """The Arrow files of one dataset: those that its state.json lists, without the caches beside them."""
    folders = sorted({posixpath.dirname(f) for f in found})
    if len(folders) > 1:
        names = listing([posixpath.basename(f) for f in folders], 5)
        raise UserError(f"config.data.path={path!r} holds several datasets ({names}): choose one, e.g. {folders[0]}")
    if is_remote(path):
        raise UserError(
            f"config.data.path={path!r}: Arrow files must be on this machine: copy the folder, or use Parquet"
        )
    state = posixpath.join(folders[0], "state.json")
    if not files.is_folder(path) or not files.exists(state):
        return found
    try:
        listed = [entry["filename"] for entry in texts.parse_json(texts.read_text(state), state)["_data_files"]]
        if not all(isinstance(name, str) and name == posixpath.basename(name) and name.strip(".") for name in listed):
            raise ValueError("it lists what is no file of its own folder")
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{state} is no state.json of save_to_disk ({brief(e)}): write the dataset again") from e
    return [posixpath.join(folders[0], name) for name in listed]


def open_tables(kind: str, found: Sequence[str], path: str, options: Mapping[str, str], quiet: bool) -> TableSource:
    """Opens tables of one kind.

    Args:
      kind: "csv", "parquet" or "arrow".
      found: the files, as `files.find` gives them.
      path: what the user gave, for errors.
      options: "image" and "text": names of columns.
      quiet: do not warn of files that are slow to read.

    Raises:
      UserError: a file is broken, has no such columns, or the files are of several splits.
    """
    if kind == "arrow":
        found = _data_files(path, found)
    splits = {match[1] for f in found if (match := _SPLIT.search(f.removeprefix(path)))}
    if len(splits) > 1 and files.is_folder(path):
        raise UserError(
            f"config.data.path={path!r} holds several splits ({listing(sorted(splits))}): choose the files of one "
            "with a pattern, e.g. 'data/train-*.parquet'"
        )
    opens = {"csv": _csv_part, "arrow": _arrow_part}
    opens["parquet"] = functools.partial(_parquet_part, read_group=_group_reader())
    parts, with_text = [], []
    for file in found:
        try:
            part, has_text = opens[kind](file, options)
        except (OSError, pa.ArrowException) as e:
            why = " ".join(str(e).split())[:300]
            raise UserError(f"config.data.path: {file} cannot be read as {kind} ({why}): write it again") from e
        parts.append(part)
        with_text.append(has_text)
    if any(with_text) and not all(with_text):
        file = parts[with_text.index(False)].path
        raise UserError(f"config.data.path: {file} has no column with captions, but {len(with_text)} files must agree")
    if not quiet and any(isinstance(part, _RowGroups) for part in parts):
        _warn_of_large_groups(found[0])
    return TableSource(parts, all(with_text))
