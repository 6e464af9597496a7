"""What belongs to one sample: files whose names are the same but for their extensions, in tars and in folders alike."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from diva_jax.common.errors import UserError, listing
from diva_jax.data import files

logger = logging.getLogger(__name__)
T = TypeVar("T")

# A key and its extension, one or several parts that each begin with a letter: `0.input.jpg` is `input.jpg` of `0`, but
# `frame.0001.jpg` is `jpg` of `frame.0001`.
_NAME = re.compile(r"((?:.*/)?[^/.][^/]*?)((?:\.[A-Za-z][\w-]*)+)", re.S)
ORDER = f"the first of {', '.join(files.IMAGE_SUFFIXES)}, or else of NAME.jpg and so on"


def split(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a file's name; ("", "") for hidden files and those without an extension."""
    match = _NAME.fullmatch(name)
    return (match[1], match[2][1:].lower()) if match else ("", "")


def group(named: Iterable[tuple[str, T]], where: str) -> dict[str, dict[str, T]]:
    """{key: {extension: item}} of (name, item), in their order. A UserError, which gives `where`, if two names have the
    same key and extension, so that samples would be merged."""
    grouped: dict[str, dict[str, T]] = {}
    for name, item in named:
        key, extension = split(name)
        if key:
            sample = grouped.setdefault(key, {})
            if extension in sample:
                raise UserError(
                    f"{where} has {listing([key])}.{extension} twice, which would merge two samples: give every sample "
                    "a name of its own"
                )
            sample[extension] = item
    return grouped


def images_of(sample: Mapping[str, T]) -> list[str]:
    """The extensions of a sample's images, that of the image to use first; see `ORDER`."""
    kinds = {e: f".{e.rpartition('.')[2]}" for e in sample}
    images = [e for e, kind in kinds.items() if kind in files.IMAGE_SUFFIXES]
    return sorted(images, key=lambda e: (e.count("."), files.IMAGE_SUFFIXES.index(kinds[e]), e))


def beside(sample: Mapping[str, T], image: str, kind: str) -> T | None:
    """The item of a kind, such as "txt", for the image of an extension: `0.input.txt`, or else `0.txt`."""
    stem = image.rpartition(".")[0]
    return sample.get(f"{stem}.{kind}", sample.get(kind))


LeftOut = tuple[int, list[str]]  # How many images, and the names of some.


def left_out(names: Sequence[str]) -> LeftOut:
    """How many these are, and two of them."""
    return len(names), list(names[:2])


def say_left_out(where: str, others: LeftOut, unread: LeftOut) -> None:
    """Warns of images that are not read: further ones of a sample, and those of other formats."""
    for (count, some), what, rule in (
        (others, "further images of samples", f"a sample has one image, {ORDER}"),
        (unread, "images of other formats", "convert them to JPEG or PNG"),
    ):
        if count:
            logger.warning("%s: %d %s are not read (such as %s): %s", where, count, what, listing(some), rule)


def one_image_each(paths: Sequence[str], where: str, quiet: bool = False) -> list[str]:
    """The image of each sample among files, in the order of the files; what is left out is logged."""
    images = [p for p in paths if files.kind_of(p) == "images"]
    kept = {sample[images_of(sample)[0]] for sample in group(zip(images, images, strict=True), where).values()}
    if not quiet:
        others, unread = [p for p in images if p not in kept], [p for p in paths if files.is_unread(p)]
        say_left_out(where, left_out(others), left_out(unread))
    return [p for p in images if p in kept]
