"""What a batch holds: the arrays that an objective asks for, each made of one record.

The pipeline, the abstract batch of the train step and the checks at the start of a run all follow from these inputs.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple, Protocol

import numpy as np
from PIL.Image import Image as PILImage
from pydantic import Field

from diva_jax.common import json_files
from diva_jax.common.errors import UserError
from diva_jax.data import images, labelled, latent_cache
from diva_jax.data.sources import Record, captions
from diva_jax.data.tokenizers import Tokenizer

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
        blocks = difflib.SequenceMatcher(None, found, text.split()[:_MAX_WORDS], autojunk=False).get_matching_blocks()
        found = [word for block in blocks for word in found[block.a : block.a + block.size]]
    return " ".join(found)


@dataclasses.dataclass(frozen=True)
class Alternatives:
    """(record, generator) -> (at most `count` texts, the neutral text), or None where the record has no texts, which
    does not depend on the generator. With `of_caption`, the neutral text is a caption of the record, else that of a
    subclass's `choose`, which takes and returns the same. `wanted` says what a record needs; `listed` is whether that
    is its list `texts`. `every` has all texts that there can be, neutral ones too, where no record changes them."""

    count: int
    of_caption: bool = False
    wanted = ""
    listed = False
    every: ClassVar[Sequence[str]] = ()

    def __call__(self, record: Record, rng: np.random.Generator) -> tuple[list[str], str] | None:
        if not self.of_caption:
            return self.choose(record, rng)
        found = self.choose(record, rng) if (said := captions(record.text)) else None
        # The caption that was edited, if one was.
        return found and (found[0], found[0][0] if found[0][0] in said else said[rng.integers(len(said))])


@dataclasses.dataclass(frozen=True)
class Edits(Alternatives):
    """A caption and edits of it: a word of the lexicon, chosen at random, is replaced by others of its group. The
    neutral text has in its place what the lexicon gives for the group, by default nothing. The lexicon is a list of
    objects with "words" and, where needed, "neutral"; a UserError where the file has another form."""

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
        found = []
        for text in captions(record.text):
            matches = self._pattern.finditer(text[: 2 * _REACH])
            # Without regard to case, some letters match one that is none of their lower case: the long s matches s.
            if own := [m for m in matches if m.start() < _REACH and m[0].lower() in self._groups]:
                found.append((text, own))
        if not found:
            return None
        text, matches = found[rng.integers(len(found))]
        where = matches[rng.integers(len(matches))]
        groups = self._groups[where[0].lower()]
        group = groups[rng.integers(len(groups))]
        others = [word for word in group.words if word.lower() != where[0].lower()]
        texts = [text, *(replaced(text, *where.span(), others[i]) for i in rng.permutation(len(others)))]
        return texts[: self.count], replaced(text, *where.span(), group.neutral)


@dataclasses.dataclass(frozen=True)
class Listed(Alternatives):
    """The record's own `texts`: the first and others at random, in their order; the neutral text has what all have."""

    wanted, listed = "a list `texts`", True

    def choose(self, record: Record, rng: np.random.Generator) -> tuple[list[str], str] | None:
        if not record.texts:
            return None
        others = np.sort(rng.permutation(len(record.texts) - 1)[: self.count - 1]) + 1
        texts = [record.texts[0], *(record.texts[i] for i in others)]
        return texts, common(texts)


@dataclasses.dataclass(frozen=True)
class Classes(Alternatives):
    """A template with the names of classes, chosen at random; the neutral text has what those of all classes have."""

    names: Sequence[str] = ()
    template: str = "{}"

    @functools.cached_property
    def _texts(self) -> tuple[str, ...]:
        texts = [self.template.replace("{}", name) for name in self.names]
        return *texts, common(texts)

    @property
    def every(self) -> Sequence[str]:
        return () if self.of_caption else self._texts

    @classmethod
    def read(cls, count: int, of_caption: bool, path: str, template: str) -> "Classes":
        """From a file as `labelled.read_names` has it; a UserError where it or the template is wrong."""
        if "{}" not in template:
            raise UserError(f"config.judge.template={template!r} has no {{}}, which stands for the name of a class")
        if not path:
            raise UserError("config.judge.classes is not set: give the JSON file with the names of the classes")
        given = labelled.read_names(path)
        entries = given.values() if isinstance(given, dict) else given
        names = tuple(dict.fromkeys(entry[0].strip() for entry in entries))
        if len(names) < 2:
            raise UserError(f"config.judge.classes={path} has fewer than two names: give more")
        return cls(count, of_caption, names, template)

    def choose(self, record: Record, rng: np.random.Generator) -> tuple[list[str], str] | None:
        return [self._texts[i] for i in rng.permutation(len(self.names))[: self.count]], self._texts[-1]


class Example(NamedTuple):
    """One decoded record (RGB, with its caption where an input needs one) at one position of the run. The position's
    random crop box was drawn first from `rng`, which is of (seed, position); inputs draw from it in the order of their
    mapping. `cached` (name -> bfloat16 array, of frozen models) and the box are those of a cache, if one is read."""

    image: PILImage
    text: str | None
    box: images.Box
    rng: np.random.Generator
    cached: Mapping[str, np.ndarray] | None = None
    texts: tuple[str, ...] | None = None


class Input(Protocol):
    """One array of a batch, of `shape` and `dtype` for one example; `needs_text` is whether it reads `Example.text`. An
    input may have `alternatives`, see `Texts`: records of which these make nothing are skipped."""

    shape: tuple[int, ...]
    dtype: np.dtype
    needs_text: bool

    def open(self, config) -> Callable[[Example], np.ndarray]:
        """The function that makes the array, given `config.data`; called once, when the pipeline is built, and used by
        many threads. A UserError where a file that it needs is missing or wrong."""


@dataclasses.dataclass(frozen=True)
class _Pixels:
    """A square image, uint8 [size, size, 3]."""

    size: int
    dtype = np.dtype(np.uint8)
    needs_text = False

    def __post_init__(self):
        if self.size < 1:
            raise UserError(f"an image input of {self.size} pixels cannot be made: use 1 or more")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3


@dataclasses.dataclass(frozen=True)
class Image(_Pixels):
    """A square crop of the image: the position's box, resized with `config.data.crop.interpolation`. All inputs of this
    kind in one batch see the same box, each at its own size."""

    def open(self, config) -> Callable[[Example], np.ndarray]:
        size, interpolation = self.size, config.crop.interpolation
        return lambda example: images.resized_crop(example.image, example.box, size, interpolation)


@dataclasses.dataclass(frozen=True)
class Cached:
    """What a frozen model made of the crop, or of its caption, from the cache `config.data.latents`: the moments of its
    latents, [h, w, 2 c], or the output `name` of another model."""

    shape: tuple[int, ...]
    name: str = "moments"
    needs_text: bool = False
    dtype = latent_cache.DTYPE

    def open(self, config) -> Callable[[Example], np.ndarray]:
        return lambda example: example.cached[self.name]


@dataclasses.dataclass(frozen=True)
class Prepared(_Pixels):
    """The image as it is prepared for an evaluation, without random choices: `images.prepare`, bit for bit. Where
    `resize` [pixels] is not 0, the image is prepared at this size and the central `size` pixels of each side are kept,
    as transforms do that resize to 256 and crop 224."""

    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    resize: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.resize and self.resize < self.size:
            problem = f"{self.size} pixels cannot be cropped from an image of {self.resize}"
            raise UserError(f"{problem}: resize it to {self.size} or more")

    def open(self, config) -> Callable[[Example], np.ndarray]:
        side = self.resize or self.size
        first = (side - self.size) // 2
        kept = slice(first, first + self.size)
        return lambda example: images.prepare(example.image, side, self.resize_mode, self.interpolation)[kept, kept]


def first_sentences(text: str, rng: np.random.Generator) -> str:
    """The first n sentences of a text, unchanged, n uniform from 1 to all of them: a `choose` for `Tokens`. A sentence
    ends at ".", "!" or "?" before white space."""
    ends = [m.end() for m in re.finditer(r"[.!?](?=\s)", text.rstrip())]
    ends.append(len(text.rstrip()))
    return text[: ends[rng.integers(len(ends))]]


def opened(tokenizer: Callable[[], Tokenizer], length: int) -> Tokenizer:
    """The tokenizer; a UserError where it gives another number of ids than `length`."""
    tokenize = tokenizer()
    # The first call also sets the padding of transformers' tokenizers, which threads must not do at once.
    given = np.shape(tokenize(["a"]))[-1]
    if given != length:
        raise UserError(f"the tokenizer gives {given} ids per text, but the input has {length}: make them equal")
    return tokenize


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids of one of the record's captions, int32 [length], drawn from the position's generator where there are
    several. `tokenizer` gives the tokenizer (texts -> int32 [N, length]), once for a pipeline; `choose` gives the part
    of a caption to tokenize, from the same generator."""

    length: int
    tokenizer: Callable[[], Tokenizer]
    choose: Callable[[str, np.random.Generator], str] | None = None
    dtype = np.dtype(np.int32)
    needs_text = True

    @property
    def shape(self) -> tuple[int]:
        return (self.length,)

    def open(self, config) -> Callable[[Example], np.ndarray]:
        """See `Input.open`; a UserError where the tokenizer gives another number of ids."""
        tokenize = opened(self.tokenizer, self.length)

        def ids(example: Example) -> np.ndarray:
            said = captions(example.text)
            text = said[example.rng.integers(len(said))]  # Of one, numpy draws nothing.
            return np.asarray(tokenize([self.choose(text, example.rng) if self.choose else text])[0], np.int32)

        return ids


@dataclasses.dataclass(frozen=True)
class Texts:
    """Token ids of `count` texts about the image and, last, of their neutral text: int32 [count + 1, length].
    `alternatives` chooses the texts; all inputs of a batch that have the same one see the same texts. Ids are -1 in
    place of texts that there are not, and of those whose ids an earlier one has."""

    count: int
    length: int
    tokenizer: Callable[[], Tokenizer]
    alternatives: Alternatives
    dtype = np.dtype(np.int32)
    needs_text = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.count + 1, self.length

    def open(self, config) -> Callable[[Example], np.ndarray]:
        """See `Input.open`."""
        tokenize = opened(self.tokenizer, self.length)

        def ids(example: Example) -> np.ndarray:
            # Not the example's own generator, from which other inputs draw.
            rng = np.random.default_rng((*example.rng.bit_generator.seed_seq.entropy, 1))
            texts, neutral = self.alternatives(example, rng)
            out = np.full(self.shape, -1, np.int32)
            found = tokenize([*texts, neutral])
            for i, row in enumerate(found[:-1]):
                if not (out[:i] == row).all(axis=-1).any():
                    out[i] = row
            out[-1] = found[-1]
            return out

        return ids
