"""Files of a folder, declared as the JSON tables of tests have them."""

import csv
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from records import encoded, write_tar


def _patched(value, change):
    """JSON content with other values at keys of objects and numbers of rows, or without them where they are null."""
    if not isinstance(change, dict) or not isinstance(value, dict | list):
        return change
    value = value.copy()
    for key, new in change.items():
        at = int(key) if isinstance(value, list) else key
        if new is None:
            del value[at]
        elif isinstance(value, list) and at == len(value):
            value.append(new)
        else:
            value[at] = _patched(value[at] if isinstance(value, list) else value.get(at), new)
    return value


def _data(content) -> bytes:
    """Text as UTF-8; "PNG" is an image, and [text, more, count] a text with another one many times after it."""
    text = content[0] + content[1] * content[2] if isinstance(content, list) else content
    return text if isinstance(text, bytes) else encoded(7) if text == "PNG" else text.encode(errors="surrogateescape")


def _write_table(path: Path, columns: dict) -> None:
    """Writes columns, in several parts where the form has parts."""
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", encoding="utf-8", newline="") as f:
            rows = csv.writer(f, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
            rows.writerows([columns, *zip(*columns.values(), strict=True)])
    elif path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path, row_group_size=3)
    else:
        table = pa.table(columns)
        with pa.OSFile(str(path), "wb") as f, pa.ipc.new_stream(f, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)


def change(root: Path, tree: dict) -> None:
    """Writes files by path: text as in `_data`, the members of a tar, the columns of a table, changes of JSON that is
    there, [first, last, new lines or numbers of old ones] of a text that is there, or its length in bytes. A path that
    ends with "/" is a folder; null: the file or folder is removed."""
    for name, content in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        old = path.read_bytes() if path.is_file() else b""
        if old or content is None:  # A new file in place of one to which there may be other links.
            path.unlink() if path.is_file() else shutil.rmtree(path)
        if content is None:
            continue
        if name.endswith("/"):
            path.mkdir()
        elif isinstance(content, int):
            path.write_bytes(old[:content])
        elif isinstance(content, list) and isinstance(content[0], int):
            (first, last, new), lines = content, old.decode().splitlines()
            new = [lines[n] if isinstance(n, int) else n for n in new]
            path.write_text("\n".join([*lines[:first], *new, *lines[last:]]) + "\n")
        elif not isinstance(content, dict):
            path.write_bytes(_data(content))
        elif path.suffix == ".tar":
            write_tar(path, {member: _data(data) for member, data in content.items()})
        elif path.suffix in (".csv", ".tsv", ".parquet", ".arrow"):
            _write_table(path, content)
        else:
            path.write_text(json.dumps(_patched(json.loads(old or "{}"), content)))
