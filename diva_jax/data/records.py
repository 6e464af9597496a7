"""What a data set is made of: records with an image and, where the data has captions, a text."""

import contextlib
import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from diva_jax.common import json_files

# Columns and features with captions, where the data's path has no `text=NAME`; the first that there is.
TEXT_COLUMNS = ("caption", "text", "title", "captions")
CAPTION_KINDS = ("txt", "json")  # Files with captions beside an image, or in its tar: the first that is not blank.
_PROBED = 64  # Records of which it is asked whether they have captions.
MAX_CAPTION_BYTES = 2**20  # A larger file of text beside an image, or in its tar, is no caption.
_MAX_TEXTS, _MAX_TEXT = 64, 4096  # Of a record's list `texts`, and the characters of each.


class Record(NamedTuple):
    """One record: what to call it in a log (file and member or row), the encoded image, and its caption, None where
    there is none; several captions are separated by newlines. `texts` are statements that differ in one fact, see
    `alternatives`; None where there are none, or the source has a method `texts(i)` that reads them."""

    name: str
    image: bytes
    text: str | None = None
    texts: tuple[str, ...] | None = None


class Source(Protocol):
    """Records 0..len-1 with random access. `name` and `read` may be called from any thread. `has_text` is whether the
    records have captions, as far as can be known without reading each of them."""

    has_text: bool

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """The name of record i."""

    def read(self, i: int, with_text: bool = True) -> Record:
        """Record i, without its text where that is not asked for; errors are the source's own."""


def caption(value) -> str | None:
    """A caption as files hold it: a text, texts (joined by newlines), bytes in UTF-8, or None; else a ValueError."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        return "\n".join(filter(None, map(caption, value)))
    raise ValueError(f"its caption is no text but {value!r}")


def listed(value) -> tuple[str, ...] | None:
    """The `texts` of a record, 2 to 64 different ones, of a list or its JSON, or None; a ValueError for others."""
    if isinstance(value, str | bytes):
        value = json_files.decoded(value) if value.strip() else None
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError("its texts are no list of texts")
    found = tuple(text.strip() for text in value)
    if not 2 <= len(found) <= _MAX_TEXTS or not all(found) or len(set(found)) < len(found):
        raise ValueError(f"its texts are not 2 to {_MAX_TEXTS} different ones, none of them blank")
    if max(map(len, found)) > _MAX_TEXT:
        raise ValueError(f"one of its texts has more than {_MAX_TEXT} characters")
    return found


def locate(ends: np.ndarray, i: int) -> tuple[int, int]:
    """(the part with item i, the item's number in it) of parts in a row, of which the k-th ends before `ends[k]`."""
    part = int(np.searchsorted(ends, i, side="right"))
    return part, i - (int(ends[part - 1]) if part else 0)


class CaptionFiles:
    """What sources have in common whose captions are files beside the images. They have `image(i)`, the encoded image
    of record i, `beside(i, kind)`, the content of its file of one of `CAPTION_KINDS` or None, and `captioned()`, the
    records with such files."""

    def read(self, i: int, with_text: bool = True) -> Record:
        """See `Source.read`; an OSError where a file cannot be read, a ValueError for a broken caption."""
        return Record(self.name(i), self.image(i), self._text(i) if with_text else None)

    def texts(self, i: int) -> tuple[str, ...] | None:
        """The list `texts` in the JSON file of record i; errors as of `read`."""
        data = self.beside(i, "json")
        meta = json_files.decoded(data) if data else None
        return listed(meta.get("texts")) if isinstance(meta, dict) else None

    def _text(self, i: int) -> str | None:
        """The first caption that is not blank: a text, or a JSON object's field "caption"."""
        for kind in CAPTION_KINDS:
            data = self.beside(i, kind)
            try:
                if kind == "json" and data:
                    meta = json_files.decoded(data)
                    text = caption(meta.get("caption")) if isinstance(meta, dict) else None
                else:
                    text = (data or b"").decode("utf-8")
            except ValueError as e:
                raise ValueError(f"the caption in its .{kind} file cannot be read ({e})") from e
            if text and text.strip():
                return text
        return None

    @functools.cached_property
    def has_text(self) -> bool:
        """Whether one of 64 records with files for captions, spread over all, has a caption that can be read."""
        records = self.captioned()
        for i in records[:: -(-len(records) // _PROBED) or 1]:
            with contextlib.suppress(OSError, ValueError):
                if self._text(i):
                    return True
        return False
