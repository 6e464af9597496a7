"""Records from tables: CSV, TSV and JSON Lines, Parquet files, and the Arrow files of Hugging Face datasets."""

import array
import contextlib
import functools
import itertools
import posixpath
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from diva_jax.common import json_files, log
from diva_jax.common.errors import UserError, explained, listing
from diva_jax.common.paths import is_remote
from diva_jax.data import files
from diva_jax.data.sources import TEXT_COLUMNS, Record, caption, listed, locate

# Names of columns that are used where `?image=` gives none; the first that a table has.
IMAGE_COLUMNS = ("image", "file", "filepath", "path", "file_name", "filename", "image_path", "jpg", "png", "webp")
# Rows of a CSV file that are converted to Arrow at once.
_CHUNK_ROWS = 2**16
# Number of decoded row groups that a source keeps in memory.
_KEPT_ROW_GROUPS = 2
_MAX_ROW_GROUP_BYTES = 2**30
_ROWS_AT_ONCE = 16
# Random access is slow in row groups with more bytes than these.
_LARGE_ROW_GROUP_BYTES = 2**26
_SMALLER = "write it with fewer rows per row group, such as df.to_parquet(..., row_group_size=1000)"
# Largest number of bytes in a line of JSON Lines, and of entries in a list.
_MAX_LINE, _MAX_LIST = 2**24, 2**12
# Number of rows that are checked for paths.
_PROBED = 16
_TEXTS = (pa.string(), pa.large_string())
_CACHE = re.compile(r"(cache-|tmp).*\.arrow")
_SPLIT = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|val|dev)(?=[/_.-])")


class _Part(NamedTuple):
    """The rows of one file. `columns` are those with the image, the caption and `texts`, or None. `cell`: (row, column)
    -> a Python object, None where it is empty. `place`: row -> "line 7" or "row 6". `row_group_bytes`: of the largest
    row group, where rows are read with theirs."""

    path: str
    rows: int
    columns: tuple[str | None, ...]
    cell: Callable[[int, str], Any]
    place: Callable[[int], str] = lambda row: f"row {row + 1}"
    row_group_bytes: int = 0


def choose_columns(path: str, columns: Sequence[str], options: Mapping[str, str]) -> tuple[str | None, ...]:
    """(the column with the images, with the captions or None, with lists of texts or None) of a table's columns;
    `options` may name them as "image", "text" and "texts". A UserError where one is missing, or none is known."""
    found = []
    for what, known in (("image", IMAGE_COLUMNS), ("text", TEXT_COLUMNS), ("texts", ("texts",))):
        if (wanted := options.get(what)) and wanted not in columns:
            there = listing(columns, 10)
            raise UserError(f"config.data.path: {path} has no column {wanted!r} for ?{what}=, only {there}")
        found.append(wanted or next((name for name in known if name in columns), None))
    if found[0] is None:
        known = f"{', '.join(IMAGE_COLUMNS[:-1])} or {IMAGE_COLUMNS[-1]}"
        problem = f"config.data.path: {path} has no column {known}, only {listing(columns, 10)}"
        raise UserError(f"{problem}: name the one with the images, as {path}?image=COLUMN")
    if twice := [c for c in found if list(columns).count(c) > 1]:
        raise UserError(f"config.data.path: {path} has the column {listing(twice)} twice: rename one")
    return tuple(found)


def _typed_columns(path: str, schema: pa.Schema, options: Mapping[str, str]) -> tuple[str | None, ...]:
    """As `choose_columns`; a UserError also where the images' column can hold neither images nor paths."""
    columns = choose_columns(path, schema.names, options)
    kind = schema.field(columns[0]).type
    struct = pa.types.is_struct(kind) and {field.name for field in kind} & {"bytes", "path"}
    if not (struct or kind in (*_TEXTS, pa.binary(), pa.large_binary())):
        problem = f"the column {columns[0]!r} of {path} holds {kind}, neither encoded images nor paths"
        raise UserError(f"config.data.path: {problem}: name another one with ?image=COLUMN")
    return columns


class TableSource:
    """Records that are rows of tables. The image is a file (a path relative to the table's folder), the encoded bytes,
    or a struct of `bytes` and `path` as Hugging Face datasets have it; the caption is a text or a list of texts. A
    UserError where there are no rows, or the first ones have texts that cannot be used as paths."""

    def __init__(self, parts: Sequence[_Part], allow_urls: bool = False):
        self._parts, self.has_text, self._allow_urls = parts, parts[0].columns[1] is not None, allow_urls
        self._ends = np.cumsum([part.rows for part in parts], dtype=np.int64)
        if not len(self):
            raise UserError(f"config.data.path: {parts[0].path} has no rows")
        if not parts[0].row_group_bytes:
            first = []
            for i in range(min(parts[0].rows, _PROBED)):
                with contextlib.suppress(ValueError):  # Lines that are no JSON.
                    first.append(parts[0].cell(i, parts[0].columns[0]))
            reasons = [files.no_path(cell, allow_urls) for cell in first if isinstance(cell, str) and cell]
            if reasons and all(reasons):
                raise UserError(f"config.data.path: {self.name(0)}: {reasons[0]}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, i: int) -> str:
        """`table.csv, line 7` or `table.parquet, row 6`."""
        part, row = self._at(i)
        return f"{posixpath.basename(part.path)}, {part.place(row)}"

    def _at(self, i: int) -> tuple[_Part, int]:
        number, row = locate(self._ends, i)
        return self._parts[number], row

    def read(self, i: int, with_text: bool = True) -> Record:
        """See `Source.read`; an OSError where a file cannot be read, a ValueError where a cell has no image or text."""
        part, row = self._at(i)
        image_column, text_column, _ = part.columns
        image = part.cell(row, image_column)
        text = part.cell(row, text_column) if with_text and text_column else None
        if isinstance(image, dict):  # Of JSON, which holds no bytes.
            image = image.get("path")
        if isinstance(image, str) and image:
            if reason := files.no_path(image, self._allow_urls):
                raise ValueError(reason)
            image = files.read_image(image if is_remote(image) else posixpath.join(posixpath.dirname(part.path), image))
        if not isinstance(image, bytes) or not image:
            raise ValueError("it has no image")
        return Record(self.name(i), image, caption(text))

    def texts(self, i: int) -> tuple[str, ...] | None:
        """The list `texts` of record i; errors as of `read`."""
        part, row = self._at(i)
        return listed(part.cell(row, part.columns[2])) if part.columns[2] else None


def _value(scalar: pa.Scalar):
    """A cell as a Python object; of a struct, its `bytes` or `path`. A ValueError for more bytes than any image has."""
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.StructScalar):
        return next(filter(None, (_value(scalar[name]) for name in ("bytes", "path") if name in scalar)), None)
    if hasattr(scalar, "as_buffer") and scalar.as_buffer().size > files.MAX_IMAGE_BYTES:
        raise ValueError(f"it has more than {files.MAX_IMAGE_BYTES} bytes, more than any image")
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar) and len(scalar.values) > _MAX_LIST:
        raise ValueError(f"it has a list of more than {_MAX_LIST} texts")
    return scalar.as_py()


def _of_columns(path: str, table: Mapping[str, Sequence], columns: Sequence[str | None], **kw) -> _Part:
    """A part whose columns are in memory, or mapped into it."""
    return _Part(path, len(table[columns[0]]), columns, lambda row, name: _value(table[name][row]), **kw)


def _csv_part(path: str, options: Mapping[str, str]) -> _Part:
    rows = files.csv_rows(path)
    header = next(rows, (1, []))[1]
    columns = choose_columns(path, header, options)
    wanted = {column: header.index(column) for column in columns if column}
    schema = pa.schema([(column, pa.large_string()) for column in wanted])
    lines, tables = array.array("q"), [schema.empty_table()]
    while batch := list(itertools.islice(rows, _CHUNK_ROWS)):
        lines.extend(line for line, _ in batch)
        tables.append(pa.table({c: [fields[k] for _, fields in batch] for c, k in wanted.items()}, schema=schema))
    return _of_columns(path, pa.concat_tables(tables), columns, place=lambda row: f"line {lines[row]}")


def _jsonl_part(path: str, options: Mapping[str, str]) -> _Part:
    """A file of JSON objects, one a line; a line is read when it is asked for."""
    spans, start, number, columns = array.array("q"), 0, 0, (None,) * 3
    with files.open_binary(path) as f:
        while line := f.readline(_MAX_LINE + 1):
            number += 1
            if len(line) > _MAX_LINE:
                raise UserError(f"{path}, line {number} has more than {_MAX_LINE} bytes: write one record a line")
            if line.strip():
                spans.extend((start, len(line), number))
                if not columns[0]:
                    if not isinstance(record := json_files.parse(path, line, number), dict):
                        raise UserError(f"{path}, line {number} is no JSON object: write one record a line")
                    columns = choose_columns(path, list(record), options)
            start += len(line)
    rows = np.array(spans, np.int64).reshape(-1, 3)

    @functools.lru_cache(_ROWS_AT_ONCE)
    def record(row: int) -> dict:
        found = json_files.decoded(files.read_range(path, *map(int, rows[row, :2])))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        return found

    return _Part(path, len(rows), columns, lambda row, name: record(row).get(name), lambda row: f"line {rows[row, 2]}")


def _read_row_group(path: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    """The rows of a group; a UserError for more bytes than `_MAX_ROW_GROUP_BYTES`, whatever the file states."""
    batches, size = [], 0
    with files.open_binary(path) as f:
        parquet = pq.ParquetFile(f)
        for batch in parquet.iter_batches(_ROWS_AT_ONCE, [group], list(columns), use_threads=False):
            size += batch.nbytes
            if size > _MAX_ROW_GROUP_BYTES:
                problem = f"{path} has a row group of more than {_MAX_ROW_GROUP_BYTES // 2**20} MB"
                raise UserError(f"config.data.path: {problem}, which must be in memory at once: {_SMALLER}")
            batches.append(batch)
        return pa.Table.from_batches(batches, parquet.schema_arrow.empty_table().select(list(columns)).schema)


def _parquet_part(path: str, options: Mapping[str, str], read_row_group, one_at_a_time) -> _Part:
    with files.open_binary(path) as f:
        parquet = pq.ParquetFile(f)
        chosen, metadata = _typed_columns(path, parquet.schema_arrow, options), parquet.metadata
        columns = tuple(dict.fromkeys(filter(None, chosen)))
        if parquet.schema_arrow.field(chosen[0]).type in _TEXTS:
            return _of_columns(path, parquet.read(list(columns)), chosen)
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)

    def cell(row: int, name: str):
        group, local = locate(ends, row)
        with one_at_a_time if largest > _LARGE_ROW_GROUP_BYTES else contextlib.nullcontext():
            return _value(read_row_group(path, group, columns)[name][local])

    largest = max((group.total_byte_size for group in groups), default=0)
    return _Part(path, metadata.num_rows, chosen, cell, row_group_bytes=largest)


def _arrow_part(path: str, options: Mapping[str, str]) -> _Part:
    # No copy: the columns stay in the file.
    table = pa.ipc.open_stream(pa.memory_map(path)).read_all()
    columns = _typed_columns(path, table.schema, options)
    # Offsets that damage has changed would be read outside of the file.
    table.select(list(dict.fromkeys(filter(None, columns)))).validate(full=True)
    return _of_columns(path, table, columns)


class _File(json_files.Record):
    """A file of a dataset, in the same folder as its state.json."""

    filename: Annotated[str, Field(pattern=r"^[^/\x00]*[^/.\x00][^/\x00]*$")]


class _State(json_files.Record):
    """The state.json that `save_to_disk` writes."""

    files: Annotated[list[_File], Field(min_length=1, alias="_data_files")]


def _data_files(path: str, arrow_files: Sequence[str]) -> Sequence[str]:
    """The Arrow files of one dataset: those that its state.json lists, or all but the caches of `datasets.map`."""
    kept = [f for f in arrow_files if f == path or not _CACHE.fullmatch(posixpath.basename(f))]
    if not kept:
        raise UserError(f"config.data.path={path!r} has caches of datasets.map alone: name one file to read it")
    folders = sorted({posixpath.dirname(f) for f in kept})
    if len(folders) > 1:
        names = listing([posixpath.basename(f) for f in folders], 5)
        raise UserError(f"config.data.path={path!r} holds several datasets ({names}): choose one, e.g. {folders[0]}")
    if is_remote(path):
        problem = f"config.data.path={path!r}: Arrow files must be on this machine"
        raise UserError(f"{problem}: copy the folder, or use Parquet")
    state = posixpath.join(folders[0], "state.json")
    if not files.is_folder(path) or not files.exists(state):
        return kept
    listed = json_files.read(state, _State, "it is no state.json of save_to_disk, write the dataset again")
    return [posixpath.join(folders[0], entry.filename) for entry in listed.files]


def open_tables(
    kind: str, paths: Sequence[str], path: str, options: Mapping[str, str], allow_urls: bool = False
) -> TableSource:
    """Opens the files of one kind, "csv", "parquet" or "arrow", which `path` of the user stands for; `options` as in
    `choose_columns`. A UserError where a file is broken, has no such columns, or the files are of several splits."""
    if kind == "arrow":
        paths = _data_files(path, paths)
    splits = {match[1] for f in paths if (match := _SPLIT.search(f.removeprefix(path)))}
    if len(splits) > 1 and files.is_folder(path):
        problem = f"config.data.path={path!r} holds several splits ({listing(sorted(splits))})"
        raise UserError(f"{problem}: choose the files of one with a pattern, e.g. 'data/train-*.parquet'")
    read_row_group = functools.lru_cache(maxsize=_KEPT_ROW_GROUPS)(_read_row_group)
    opens = {
        "csv": _csv_part,
        "jsonl": _jsonl_part,
        "arrow": _arrow_part,
        "parquet": functools.partial(_parquet_part, read_row_group=read_row_group, one_at_a_time=threading.Lock()),
    }
    parts = []
    for file in paths:
        problem = f"config.data.path: {file} cannot be read as {kind}"
        with explained(problem, "write it again", OSError, UnicodeError, pa.ArrowException):
            parts.append(opens[kind](file, options))
    without = [part.path for part in parts if not part.columns[1]]
    if 0 < len(without) < len(parts):
        raise UserError(f"config.data.path: {without[0]} has no column of captions, but {len(parts)} files must agree")
    if (largest := parts[0].row_group_bytes) > _LARGE_ROW_GROUP_BYTES:
        many = f"{parts[0].path} has row groups of up to {largest // 2**20} MB, one of which is read for every image"
        log.warn("%s: %s, or as a folder of save_to_disk", many, _SMALLER)
    return TableSource(parts, allow_urls)
