"""Small data sets for the tests of evaluation, made from scikit-image's photographs."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from diva_jax import config
from diva_jax.evals.tasks.mmvp import FOLDERS, HEADER, PATTERNS, PER_PATTERN
from diva_jax.models.backbones import Spec

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "camera", "logo")

TEXTS = [
    "a photo of a dog looking to the left.",
    "A Photo, of  the\tDOG's   two\nears -- isn't it? we'll see: they've 12345 hairs (3.14 %)",
    "a photo of a butterfly's wings, the_under_side; snake_case & CamelCase",
    "",
    "   \n ",
    "!!! ... ???",
    "😀 a 👩‍👩‍👧 family of 🐈‍⬛ cats ❤️",
    "une tasse de café, naïve façade, Straße, İstanbul, ﬁancé, Ⅷ ½ ²",
    "写真 の 猫 и кошка على العشب",
    "&lt;b&gt;bold&lt;/b&gt; &amp;amp; schÃ¶n â€œquotedâ€\x9d",
    "<start_of_text> in the text <end_of_text> <|endoftext|>",
    "word " * 200,
    "supercalifragilisticexpialidocious" * 20,
    "x" * 74,
    "1 " * 75,
]


def statement(row: int) -> str:
    """Of the MMVP data below."""
    return f"thing number {row * 7}, seen from {'left' if row % 2 else 'above'}"


def eval_config(spec: Spec, source: Path):
    return config.default(dataclasses.replace(spec, source=str(source)))


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)())


def patch(index: int) -> Image.Image:
    """A piece of a photograph, another for each index; no two of one size in a row."""
    rng = np.random.default_rng(index)
    whole = photograph(PHOTOGRAPHS[index % 4])
    w, h = 50 + index % 17, 45 + index % 13
    left, top = rng.integers(0, whole.width - 2 * w), rng.integers(0, whole.height - 2 * h)
    return whole.crop((left, top, left + 2 * w, top + 2 * h)).resize((w, h))


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    data = io.BytesIO()
    image.save(data, form)
    return data.getvalue()


def write_mmvp(root: Path, folder: str = FOLDERS[0]) -> Path:
    """135 pairs of pieces of photographs with statements of their own."""
    lines = [",".join(HEADER)]
    for row in range(2 * PER_PATTERN * len(PATTERNS)):
        type_ = PATTERNS[row // (2 * PER_PATTERN)].split()[0]
        path = root / folder / type_ / f"{row + 1}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(patch(row), "JPEG"))
        lines.append(f'{row + 1},{type_},"{statement(row)}"')
    (root / "Questions.csv").write_text("\n".join(lines) + "\n")
    return root
