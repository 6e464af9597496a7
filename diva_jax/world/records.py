"""The world as training data: record i is an image and its text, a function of (seed, i) alone.

    config.data.path = "module:diva_jax.world.records?seed=3&count=32768&captions=rich&wrong=50"

The list `texts` of a record has two statements that differ in the relation, the true one first. With `wrong`, of so
many records in a hundred neither is true: they say "above" and "below" of what is left and right, and the reverse.
Images are encoded as BMP, which costs nothing and loses nothing; blocks of records are made at once and kept.
"""

import dataclasses
import functools
import io
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from diva_jax.common.errors import UserError
from diva_jax.data.sources import Record
from diva_jax.world import captions, drawing, scenes

MODULE = "module:diva_jax.world.records"
COUNT = 2**15
_BLOCK = 256
_KEPT = 512  # Number of blocks that are kept in memory, of 0.3 MB each.


@functools.lru_cache(_KEPT)
def _block(seed: int, number: int, kind: str, wrong: int) -> list[tuple[bytes, str, tuple[str, str]]]:
    """The images, captions and texts of the records of one block."""
    rng = np.random.default_rng((seed, number))
    drawn, encoded = scenes.sample(rng, _BLOCK), []
    for image in drawing.draw(drawn):
        data = io.BytesIO()
        Image.fromarray(image).save(data, "BMP")
        encoded.append(data.getvalue())
    said = captions.captions(drawn, captions.choose(rng, _BLOCK, captions.KINDS[kind]))
    asked = captions.choose(rng, _BLOCK, 1.0)
    told = scenes.turned(drawn, rng.random(_BLOCK) < wrong / 100)
    other = scenes.change(told, "relation", rng)
    texts = zip(captions.captions(told, asked), captions.captions(other, asked), strict=True)
    return list(zip(encoded, said, texts, strict=True))


@dataclasses.dataclass(frozen=True)
class World:
    """A `data.sources.Source`.

    Attributes:
      seed: of scenes and captions.
      count: records.
      captions: a key of `captions.KINDS`.
      wrong: of so many records in a hundred no text is true.
    """

    seed: int = 0
    count: int = COUNT
    captions: str = "biased"
    wrong: int = 0
    has_text = True

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"scene {i} of seed {self.seed}"

    def read(self, i: int, with_text: bool = True) -> Record:
        """See `Source.read`."""
        number, row = divmod(i, _BLOCK)
        image, text, texts = _block(self.seed, number, self.captions, self.wrong)[row]
        return Record(self.name(i), image, text, texts) if with_text else Record(self.name(i), image)


def path(seed: int, captions: str = "biased", count: int = COUNT, wrong: int = 0) -> str:
    """The value of `config.data.path` for these records."""
    return f"{MODULE}?seed={seed}&captions={captions}&count={count}" + f"&wrong={wrong}" * bool(wrong)


def open_source(options: str) -> World:
    """The records that the options in `config.data.path` describe.

    Args:
      options: "seed=3&count=32768&captions=rich", each with a default.

    Raises:
      UserError: an option is not known, or its value is not possible.
    """
    given = dict(parse_qsl(options, keep_blank_values=True))
    usage = f"use seed=0&count={COUNT}&captions={' or '.join(captions.KINDS)}&wrong=0, of at most 100"
    for name, value in given.items():
        number = value.isascii() and value.isdigit() and len(value) < 13
        known = name in ("seed", "count", "wrong") and number and (name != "wrong" or int(value) <= 100)
        if not known and not (name == "captions" and value in captions.KINDS):
            raise UserError(f"config.data.path={MODULE}?{options} has {name}={value!r}: {usage}")
    found = World(**{name: value if name == "captions" else int(value) for name, value in given.items()})
    if not found.count:
        raise UserError(f"config.data.path={MODULE}?{options} has no records: {usage}")
    return found
