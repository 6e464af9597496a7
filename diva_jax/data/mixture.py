"""Several sources as one, in given proportions."""

import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from diva_jax.common.errors import UserError
from diva_jax.data.records import Record, Source, locate

PREFIX = "mix:"
_ENTRY = re.compile(r"(\d+(?:\.\d*)?|\.\d+)=(.+)", re.S)
# The shuffle of an epoch numbers its images with 32 bits.
_MAX_EPOCH_IMAGES = 2**31


def split(path: str) -> list[tuple[Fraction, str]]:
    """`"mix:2=a.csv;1=b/*.tar"` -> [(2/3, "a.csv"), (1/3, "b/*.tar")]; a UserError for others."""
    entries = [entry.strip() for entry in path.removeprefix(PREFIX).split(";") if entry.strip()]
    matches = [_ENTRY.fullmatch(entry) for entry in entries]
    if not matches or not all(matches) or not all(Fraction(m[1]) > 0 for m in matches):
        raise UserError(
            f"config.data.path={path!r} must read mix:WEIGHT=PATH;WEIGHT=PATH with weights above 0, e.g. "
            "'mix:0.7=cc3m/{00000..00331}.tar;0.3=mine.csv'"
        )
    weights = [Fraction(m[1]) for m in matches]
    return [(w / sum(weights), m[2].strip()) for w, m in zip(weights, matches, strict=True)]


class MixtureSource:
    """A source whose epoch has as many records of each part as its weight (the sum is 1) says.

    One part, the largest for its weight, has each of its records once per epoch. Records of the others are repeated, or
    rather: slot k of a part of n records is its record k modulo n, so that all of them come before one is repeated.
    Order, resumption and the split over processes are those of any source, which its epoch's shuffle mixes.
    """

    def __init__(self, parts: Sequence[Source], weights: Sequence[Fraction], path: str):
        self.parts = list(parts)
        length = max(Fraction(len(part)) / w for part, w in zip(parts, weights, strict=True))
        counts = [max(1, round(w * length)) for w in weights]
        if sum(counts) > _MAX_EPOCH_IMAGES:
            raise UserError(
                f"config.data.path={path!r}: an epoch would have {sum(counts)} images, more than {_MAX_EPOCH_IMAGES}: "
                "give the large sources more weight, or fewer files"
            )
        self.counts = counts
        self._ends = np.cumsum(counts, dtype=np.int64)

    @property
    def has_text(self) -> bool:
        return all(part.has_text for part in self.parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, i: int) -> tuple[int, int]:
        """(the number of the part, the record of the part) in slot i."""
        number, slot = locate(self._ends, i)
        return number, slot % len(self.parts[number])

    def name(self, i: int) -> str:
        """The record's name in its part."""
        number, record = self.locate(i)
        return self.parts[number].name(record)

    def read(self, i: int, with_text: bool = True) -> Record:
        number, record = self.locate(i)
        return self.parts[number].read(record, with_text)

    def texts(self, i: int) -> tuple[str, ...] | None:
        """The list `texts` of the record in slot i."""
        number, record = self.locate(i)
        part = self.parts[number]
        return part.texts(record) if hasattr(part, "texts") else part.read(record).texts

    def describe(self) -> list[str]:
        """Returns one line per part: its share of an epoch, its size, and how often its records come in an epoch."""
        return [
            f"{count / len(self):.1%} of the images: {len(part):,}, each {count / len(part):.3g} times per epoch"
            for part, count in zip(self.parts, self.counts, strict=True)
        ]
