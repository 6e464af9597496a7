"""Files of text that come with data sets, such as questions, captions and names of classes."""

import json
import os
from typing import Any

from diva_jax.common.errors import UserError
from diva_jax.data.files import open_regular

_MOST_BYTES = 2**28


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
        with open(path, "rb", opener=open_regular) as f:
            data = f.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise OSError("it has more than 256 MiB")
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as text ({str(e)[:200]}): fetch it again") from e


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
      UserError: it is not valid; gives `where`.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} cannot be read as JSON ({str(e)[:200]}): correct it or fetch it again") from e
