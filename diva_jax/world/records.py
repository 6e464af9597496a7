"""The world as training data: record i is an image and its caption, a function of (seed, i) alone.

    config.data.path = "module:diva_jax.world.records?seed=3&count=100000&captions=rich"

Images are encoded as BMP, which costs nothing and loses nothing.
"""

import dataclasses
import io
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from diva_jax.common.errors import UserError
from diva_jax.data.records import Record
from diva_jax.world import captions, drawing, scenes

MODULE = "module:diva_jax.world.records"
COUNT = 2**20


@dataclasses.dataclass(frozen=True)
class World:
    """A `data.records.Source`.

    Attributes:
      seed: of scenes and captions.
      count: records.
      captions: a key of `captions.KINDS`.
    """

    seed: int = 0
    count: int = COUNT
    captions: str = "biased"
    has_text = True

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"scene {i} of seed {self.seed}"

    def scene(self, i: int) -> tuple[scenes.Scenes, np.random.Generator]:
        """(the scene of record i, the generator that draws the choices of its caption next)."""
        rng = np.random.default_rng((self.seed, i))
        return scenes.sample(rng, 1), rng

    def read(self, i: int, with_text: bool = True) -> Record:
        """See `Source.read`."""
        scene, rng = self.scene(i)
        data = io.BytesIO()
        Image.fromarray(drawing.draw(scene)[0]).save(data, "BMP")
        text = None
        if with_text:
            text = captions.captions(scene, captions.choose(rng, 1, captions.KINDS[self.captions]))[0]
        return Record(self.name(i), data.getvalue(), text)


def path(seed: int, captions: str = "biased", count: int = COUNT) -> str:
    """The value of `config.data.path` for these records."""
    return f"{MODULE}?seed={seed}&captions={captions}&count={count}"


def open_source(options: str) -> World:
    """The records that the options in `config.data.path` describe.

    Args:
      options: "seed=3&count=100000&captions=rich", each with a default.

    Raises:
      UserError: an option is not known, or its value is not possible.
    """
    given, usage = dict(parse_qsl(options, keep_blank_values=True)), "use seed=0&count=100000&captions=biased or rich"
    for name, value in given.items():
        number = value.isascii() and value.isdigit() and len(value) < 13
        if name not in ("seed", "count", "captions") or not (value in captions.KINDS if name == "captions" else number):
            raise UserError(f"config.data.path={MODULE}?{options} has {name}={value!r}: {usage}")
    found = World(int(given.get("seed", 0)), int(given.get("count", COUNT)), given.get("captions", "biased"))
    if not found.count:
        raise UserError(f"config.data.path={MODULE}?{options} has no records: {usage}")
    return found
