"""What a batch holds: the arrays that an objective asks for, each made of one record.

An input is any object with `shape` and `dtype` (of one example), `needs_text` (whether it reads captions) and `open`.
The pipeline, the abstract batch of the train step and the checks at the start of a run all follow from them.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from PIL.Image import Image as PILImage

from diva_jax.common.errors import UserError
from diva_jax.data import crop
from diva_jax.data.tokenizers import Tokenizer


class Example(NamedTuple):
    """One decoded record at one position of the run.

    Attributes:
      image: RGB.
      text: the caption; None where no input of the run needs one.
      box: the random crop box of this position.
      rng: of (seed, position). The box was drawn from it first; inputs draw from it in the order of their mapping.
    """

    image: PILImage
    text: str | None
    box: crop.Box
    rng: np.random.Generator


class Input(Protocol):
    """One array of a batch.

    Attributes:
      shape, dtype: of one example.
      needs_text: whether it reads `Example.text`.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def needs_text(self) -> bool: ...

    def open(self, config) -> Callable[[Example], np.ndarray]:
        """The function that makes the array; called once, when the pipeline is built, and used by many threads.

        Args:
          config: `config.data`.

        Raises:
          UserError: a file that it needs is missing or wrong.
        """


@dataclasses.dataclass(frozen=True)
class Image:
    """A square crop of the image: the position's box, resized with `config.data.crop.interpolation`.

    All inputs of this kind in one batch see the same box, each at its own size.

    Attributes:
      size: side of the crop [pixels].
    """

    size: int
    needs_text = False

    def __post_init__(self):
        if self.size < 1:
            raise UserError(f"an image input of {self.size} pixels cannot be made: use 1 or more")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    def open(self, config) -> Callable[[Example], np.ndarray]:
        size, interpolation = self.size, config.crop.interpolation
        return lambda example: crop.resized_crop(example.image, example.box, size, interpolation)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids of the record's text.

    Attributes:
      length: ids per text.
      tokenizer: gives the tokenizer (texts -> int32 [N, length]); called once, when the pipeline is built.
      choose: the part of the text to tokenize, given the text and the position's generator; None: all of it.
    """

    length: int
    tokenizer: Callable[[], Tokenizer]
    choose: Callable[[str, np.random.Generator], str] | None = None
    needs_text = True

    @property
    def shape(self) -> tuple[int]:
        return (self.length,)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int32)

    def open(self, config) -> Callable[[Example], np.ndarray]:
        """See `Input.open`.

        Raises:
          UserError: the tokenizer's files are wrong, or it gives another number of ids.
        """
        tokenize = self.tokenizer()
        # The first call also sets the padding of transformers' tokenizers, which threads must not do at once.
        given = np.shape(tokenize(["a"]))[-1]
        if given != self.length:
            raise UserError(
                f"the tokenizer gives {given} ids per text, but the input has {self.length}: make them equal"
            )

        def ids(example: Example) -> np.ndarray:
            text = self.choose(example.text, example.rng) if self.choose else example.text
            return np.asarray(tokenize([text])[0], np.int32)

        return ids
