"""Reads JSON files that may come from elsewhere: regular files, bounded in size and depth, values of declared types."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pydantic
from etils import epath

from diva_jax.common import paths
from diva_jax.common.errors import UserError, brief, explained, printable

# Content of JSON needs up to thirty times the memory of its text.
MAX_BYTES = 2**26
# For files of lines, each of which is parsed alone.
MAX_LINES_BYTES = 2**28
_MAX_DEPTH = 64


class Record(pydantic.BaseModel):
    """An object of a JSON file whose values have exactly the declared types: no text is read as a number. Fields that
    are not declared may have any value and are ignored."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)


def open_regular(path: str, flags: int = 0) -> int:
    """The descriptor of a local file, opened to be read; the `opener` of `open`. An OSError for a pipe, a device, a
    socket or a folder, whose reading may never end."""
    # Without O_NONBLOCK, a pipe would wait for its writer.
    fd = os.open(path, flags | os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{path} is not a regular file")
    return fd


def read(path: str | os.PathLike, form: Any, repair: str, missing: Any = ...) -> Any:
    """The content of a file on this machine or in a bucket: a `Record`, or another type that pydantic can validate. A
    UserError, which ends with `repair`, where it cannot be read, is not JSON, or has not this form. `missing` is the
    result where there is no such file; by default that is an error too."""
    try:
        content = read_bytes(path)
    except UserError as e:
        if missing is ... or not isinstance(e.__cause__, FileNotFoundError | NotADirectoryError):
            raise
        return missing
    return checked(path, parse(path, content), form, repair)


def read_bytes(path: str | os.PathLike, most: int = MAX_BYTES) -> bytes:
    """The content of a file, also in a bucket; a UserError where it cannot be read, or has more than `most` bytes."""
    remote = paths.is_remote(path)
    first = "whether the bucket can be reached, " if remote else ""
    kinds = (Exception,) if remote else (OSError, ValueError)  # Stores have errors of their own.
    with (
        explained(f"{path} cannot be read", f"check {first}the file and its permissions", *kinds),
        epath.Path(path).open("rb") if remote else open(path, "rb", opener=open_regular) as file,
    ):
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path} has more than the {most} bytes that are read: give a smaller file")
    return content


def decoded(text: bytes | str) -> Any:
    """The content of a JSON text; a ValueError where it is not UTF-8, not JSON, or nested too deeply."""
    try:
        content = json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    level, depth = [content], 0
    while level := [part for part in level if isinstance(part, list | dict)]:
        level = [value for part in level for value in (part.values() if isinstance(part, dict) else part)]
        if level and (depth := depth + 1) > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
    return content


def parse(path: str | os.PathLike, text: bytes | str, line: int | None = None) -> Any:
    """The content of a file, or of one line of it; a UserError, which names both, where it is not JSON or too deep."""
    try:
        return decoded(text)
    except ValueError as e:
        where = f"line {line or getattr(e, 'lineno', 1)}"
        raise UserError(f"{path}, {where} is not JSON ({brief(getattr(e, 'msg', e))}): repair or remove it") from e


def checked(path: str | os.PathLike, content: Any, form: Any, repair: str) -> Any:
    """Content of a file as `form`; see `read`."""
    try:
        return pydantic.TypeAdapter(form).validate_python(content)
    except pydantic.ValidationError as e:
        raise UserError(f"{path}: {first_error(e)}: {repair}") from e


def first_error(e: pydantic.ValidationError) -> str:
    """Where a value has not the declared form, and what is wrong with it: `tasks.mmvp.title is 3: ...`."""
    error = e.errors(include_url=False)[0]
    where = ".".join(printable(str(part))[:60] for part in error["loc"][:12]).replace("\n", " ")
    if error["type"] == "missing":
        parent, _, field = where.rpartition(".")
        return f"{parent or 'it'} has no {field!r}"
    value = "" if error["type"] == "value_error" else f" is {brief(error['input'], 40)}"
    return f"{where or 'it'}{value}: {error['msg'].removeprefix('Value error, ')[:300]}".replace("\n", " ")


def packaged(module: str, name: str) -> dict[str, Any]:
    """The content of the JSON file `name` beside the file of a module, an object, with tuples for lists."""

    def tuples(value):
        if isinstance(value, dict):
            return {key: tuples(entry) for key, entry in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return tuples(json.loads(Path(module).with_name(name).read_text("utf-8")))
