"""What a batch holds: the arrays that an objective asks for, each made of one record.

The pipeline, the abstract batch of the train step and the checks at the start of a run all follow from these inputs.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from PIL.Image import Image as PILImage

from diva_jax.common.errors import UserError
from diva_jax.data import crop, images, latent_cache
from diva_jax.data.alternatives import Alternatives
from diva_jax.data.tokenizers import Tokenizer


class Example(NamedTuple):
    """One decoded record (RGB, with its caption where an input needs one) at one position of the run.

    The position's random crop box was drawn first from `rng`, which is of (seed, position); inputs draw from it in the
    order of their mapping. `cached` (name -> bfloat16 array, of frozen models) and the box are those of a cache, where
    the run reads one.
    """

    image: PILImage
    text: str | None
    box: crop.Box
    rng: np.random.Generator
    cached: Mapping[str, np.ndarray] | None = None
    texts: tuple[str, ...] | None = None


class Input(Protocol):
    """One array of a batch, of `shape` and `dtype` for one example; `needs_text` is whether it reads `Example.text`.

    An input may have `alternatives`, see `Texts`: records of which these make nothing are skipped.
    """

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
        return lambda example: crop.resized_crop(example.image, example.box, size, interpolation)


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
            raise UserError(
                f"{self.size} pixels cannot be cropped from an image of {self.resize}: resize it to {self.size} or more"
            )

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
    """Token ids of the record's text, int32 [length]. `tokenizer` gives the tokenizer (texts -> int32 [N, length]),
    once for a pipeline; `choose` gives the part of a text to tokenize, from the position's generator."""

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
            text = self.choose(example.text, example.rng) if self.choose else example.text
            return np.asarray(tokenize([text])[0], np.int32)

        return ids


@dataclasses.dataclass(frozen=True)
class Texts:
    """Token ids of `count` texts about the image and, last, of their neutral text: int32 [count + 1, length].

    `alternatives` chooses the texts; all inputs of a batch that have the same one see the same texts. Ids are -1 in
    place of texts that there are not, and of those whose ids an earlier one has.
    """

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
