"""What a data set is made of: records with an image and, where the data has captions, a text."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

# Columns and features with captions, where the data's path has no `text=NAME`; the first that there is.
TEXT_COLUMNS = ("caption", "text", "title", "captions")
# A larger file of text beside an image, or in its tar, is no caption.
MAX_CAPTION_BYTES = 2**20


class Record(NamedTuple):
    """One record of a source.

    Attributes:
      name: what to call it in a log: file and member, file and row.
      image: the encoded image.
      text: its caption; several captions are separated by newlines. None where there is none.
    """

    name: str
    image: bytes
    text: str | None = None


class Source(Protocol):
    """Records 0..len-1 with random access. `name` and `read` may be called from any thread."""

    @property
    def has_text(self) -> bool:
        """Whether the records have captions, as far as can be known without reading each of them."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """The name of record i."""

    def read(self, i: int, with_text: bool = True) -> Record:
        """Record i; without its text where that is not asked for.

        Raises:
          Exception: the record cannot be read. The type depends on the source.
        """


def caption(value) -> str | None:
    """A caption as files hold it: a text, several texts (joined by newlines), bytes in UTF-8, or None.

    Raises:
      ValueError: it is anything else.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        return "\n".join(filter(None, map(caption, value)))
    raise ValueError(f"its caption is no text but {value!r}")


def locate(ends: np.ndarray, i: int) -> tuple[int, int]:
    """(the part with item i, the item's number in it) of parts in a row, of which the k-th ends before `ends[k]`."""
    part = int(np.searchsorted(ends, i, side="right"))
    return part, i - (int(ends[part - 1]) if part else 0)
