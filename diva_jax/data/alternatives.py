"""Texts about an image that differ in one fact: edits of its caption, a list in its record, or names of classes.

Each kind of `Alternatives` makes of a record the texts and, without the fact, the neutral text.
"""

import abc
import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from diva_jax.common import json_files
from diva_jax.common.errors import UserError
from diva_jax.data import labelled
from diva_jax.data.records import Record

LEXICON = Path(__file__).with_name("edits.json")
# Only words that begin before this character are edited: text towers read no more than 77 tokens.
_REACH = 300
_ARTICLE = re.compile(r"\b(a)n?(\s+)$", re.IGNORECASE)
# Words of a text in which others are looked for.
_MAX_WORDS = 128


class _Group(json_files.Record):
    """Words of which one may stand in place of another, and what stands there where the fact is left open."""

    words: Annotated[list[Annotated[str, Field(pattern=r"^\S(.*\S)?$", max_length=100)]], Field(min_length=2)]
    neutral: Annotated[str, Field(max_length=100)] = ""


def replaced(text: str, start: int, end: int, word: str) -> str:
    """`text` with `word` in place of text[start:end]: with its capital, and the right one of "a" and "an" before it."""
    if text[start].isupper():
        word = word[:1].upper() + word[1:]
    before, rest = text[:start], text[end:]
    rest = f"{word}{rest}" if word else rest.lstrip()
    before = before if rest[:1].isalnum() else before.rstrip()
    fitting = "n" if rest[:1].lower() in tuple("aeiou") else ""
    return _ARTICLE.sub(lambda m: m[1] + fitting + m[2], before) + rest


def common(texts: Sequence[str]) -> str:
    """The words that all texts have, in their order."""
    found = texts[0].split()[:_MAX_WORDS]
    for text in texts[1:]:
        words = text.split()[:_MAX_WORDS]
        blocks = difflib.SequenceMatcher(None, found, words, autojunk=False).get_matching_blocks()
        found = [word for block in blocks for word in found[block.a : block.a + block.size]]
    return " ".join(found)


@dataclasses.dataclass(frozen=True)
class Alternatives(abc.ABC):
    """(record, generator) -> (at most `count` texts, the neutral text), or None where the record has no texts, which
    does not depend on the generator. With `of_caption`, the neutral text is the record's caption.

    `wanted` says what a record needs; `listed` is whether that is its list `texts`.
    """

    count: int
    of_caption: bool = False
    wanted = ""
    listed = False

    def __call__(self, record: Record, rng: np.random.Generator) -> tuple[list[str], str] | None:
        if not self.of_caption:
            return self.choose(record, rng)
        found = self.choose(record, rng) if record.text and record.text.strip() else None
        return found and (found[0], record.text)

    @abc.abstractmethod
    def choose(self, record: Record, rng: np.random.Generator) -> tuple[list[str], str] | None:
        """As a call, with a neutral text of its own."""


@dataclasses.dataclass(frozen=True)
class Edits(Alternatives):
    """The caption and edits of it: a word of the lexicon, chosen at random, is replaced by others of its group.

    The neutral text has in its place what the lexicon gives for the group, by default nothing. The lexicon is a list of
    objects with "words" and, where needed, "neutral"; a UserError where the file has another form.
    """

    lexicon: Path = LEXICON
    wanted = "a caption with a word of the lexicon, which config.judge.lexicon replaces"

    def __post_init__(self):
        groups = json_files.read(self.lexicon, list[_Group], "see diva_jax/data/edits.json for the form")
        by_word: dict[str, list[_Group]] = {}
        for group in groups:
            for word in dict.fromkeys(w.lower() for w in group.words):
                by_word.setdefault(word, []).append(group)
        if not by_word:
            raise UserError(f"{self.lexicon} has no words: see diva_jax/data/edits.json for the form")
        longest = sorted(by_word, key=len, reverse=True)
        pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)", re.IGNORECASE)
        object.__setattr__(self, "_groups", by_word)
        object.__setattr__(self, "_pattern", pattern)

    def choose(self, record: Record, rng: np.random.Generator) -> tuple[list[str], str] | None:
        for text in (record.text or "").splitlines():
            if found := [m for m in self._pattern.finditer(text[: 2 * _REACH]) if m.start() < _REACH]:
                break
        else:
            return None
        where = found[rng.integers(len(found))]
        groups = self._groups[where[0].lower()]
        group = groups[rng.integers(len(groups))]
        others = [word for word in group.words if word.lower() != where[0].lower()]
        texts = [text, *(replaced(text, *where.span(), others[i]) for i in rng.permutation(len(others)))]
        return texts[: self.count], replaced(text, *where.span(), group.neutral)


@dataclasses.dataclass(frozen=True)
class Listed(Alternatives):
    """The record's own `texts`: the first one and others at random, in their order; the neutral text has what all
    have."""

    wanted, listed = "a list `texts`", True

    def choose(self, record: Record, rng: np.random.Generator) -> tuple[list[str], str] | None:
        if not record.texts:
            return None
        others = np.sort(rng.permutation(len(record.texts) - 1)[: self.count - 1]) + 1
        texts = [record.texts[0], *(record.texts[i] for i in others)]
        return texts, common(texts)


@dataclasses.dataclass(frozen=True)
class Classes(Alternatives):
    """A template with the names of classes, chosen at random; the neutral text has what all have."""

    names: Sequence[str] = ()
    template: str = "{}"

    @classmethod
    def read(cls, count: int, of_caption: bool, path: str, template: str) -> "Classes":
        """From a file as `labelled.read_names` has it; a UserError where it or the template is wrong."""
        if "{}" not in template:
            raise UserError(f"config.judge.template={template!r} has no {{}}, which stands for the name of a class")
        if not path:
            raise UserError("config.judge.classes is not set: give the JSON file with the names of the classes")
        names = list(dict.fromkeys(entry[0].strip() for entry in labelled.read_names(path)))
        if len(names) < 2:
            raise UserError(f"config.judge.classes={path} has fewer than two names: give more")
        return cls(count, of_caption, names, template)

    def choose(self, record: Record, rng: np.random.Generator) -> tuple[list[str], str] | None:
        chosen = rng.permutation(len(self.names))[: self.count]
        texts = [self.template.replace("{}", self.names[i]) for i in chosen]
        return texts, common(texts)
