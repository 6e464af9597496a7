"""Images embedded in the page: thumbnails of image files, the classes of a segmentation, and flipped items."""

import base64
import colorsys
import functools
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diva_jax.common.errors import UserError
from diva_jax.common.results_schema import Task
from diva_jax.data.images import eight_bits, opened
from diva_jax.report.figures import Label, Part, Section, colour_role
from diva_jax.report.inputs import ImageRows

_THUMBNAIL_SIDE = 320
_UNLABELLED = 255
_UNLABELLED_COLOUR = (225, 225, 225)
_MAX_MAP_PIXELS = 2**20
_MAX_NAMED_CLASSES = 16


class EmbeddedImage(NamedTuple):
    """An image as a data: URI, which is empty where the file cannot be read."""

    uri: str
    name: str


def _thumbnail(path: str) -> EmbeddedImage:
    """A JPEG thumbnail, as encoders see the image; its URI is empty where the file is missing or is not an image."""
    name = Path(path).name
    try:
        with opened(path) as image:
            image.draft("RGB", (2 * _THUMBNAIL_SIDE, 2 * _THUMBNAIL_SIDE))
            small = eight_bits(image).convert("RGB")
    except UserError:
        return EmbeddedImage("", name)
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    return EmbeddedImage(_uri(small, "jpeg", quality=80), name)


def _uri(image: Image.Image, form: str, **options) -> str:
    image.save(buffer := io.BytesIO(), form.upper(), **options)
    return f"data:image/{form};base64," + base64.b64encode(buffer.getvalue()).decode()


def rows(content: ImageRows, folder: Path) -> list[Part]:
    """Returns the rows of images.json; names of files are relative to its folder."""
    thumbnail = functools.cache(_thumbnail)
    return [
        Part("strip", images=[(thumbnail(str(folder / entry.image)), Label(entry.caption)) for entry in row])
        for row in content.rows
    ]


def class_colour(number: int, name: str) -> tuple[int, int, int]:
    """Returns the colour of a class: hues a golden angle apart, three lightnesses in turn, grey for the background."""
    if name == "background":
        return 110, 110, 110
    red, green, blue = colorsys.hls_to_rgb(number * 0.618034 % 1, (0.45, 0.62, 0.32)[number % 3], 0.65)
    return round(255 * red), round(255 * green), round(255 * blue)


def _decoded(encoded: str) -> np.ndarray:
    """Returns a map of class numbers, uint8 [H, W], from a PNG in base64; Pillow raises many types."""
    with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=("PNG",)) as file:
        if file.width * file.height > _MAX_MAP_PIXELS:
            raise ValueError(f"{file.width}x{file.height} pixels are too many")
        return np.asarray(file.convert("L"))


def segmented(task: Task, labels: list[str]) -> list[Part]:
    """One row per image of a segmentation: the image, the truth, the classes under each set of weights; maybe none."""
    used = [w for w in labels if w in task.weights and task.weights[w].pictures]
    used = [w for w in used if isinstance(task.weights[w].classes, list)]
    if not used:
        return []
    names = [c.name for c in task.weights[used[0]].classes]
    palette = [v for i, name in enumerate(names) for v in class_colour(i, name)]
    parts = [Part("heading", line="Images", note="evenly spaced over the set, not chosen by their scores")]
    for i, shown in enumerate(zip(*(task.weights[w].pictures for w in used), strict=False)):
        try:
            encoded = {"truth": shown[0].truth} | {w: p.predicted for w, p in zip(used, shown, strict=True)}
            maps = {what: _decoded(text) for what, text in encoded.items()}
        except Exception:
            parts.append(Part("paragraph", line=f"Image {i + 1} of results.json cannot be read.", kind="fine"))
            continue
        colours = {w: f"var(--{colour_role(labels.index(w))})" for w in used} if len(used) > 1 else {}
        images = [(_thumbnail(shown[0].image), Label("image"))]
        for what, numbers in maps.items():
            image = Image.fromarray(numbers, "L")
            image.putpalette((palette + [0] * 768)[: 3 * _UNLABELLED] + list(_UNLABELLED_COLOUR))
            images.append((EmbeddedImage(_uri(image, "png", optimize=True), what), Label(what, colours.get(what, ""))))
        parts.append(Part("strip", images=images, **_legend(list(maps.values()), names)))
    return parts


def _legend(maps: list[np.ndarray], names: list[str]) -> dict[str, Any]:
    """Returns the names of the classes in some maps, the most frequent ones first, and how many more there are."""
    counts = np.bincount(np.concatenate([m.ravel() for m in maps]), minlength=_UNLABELLED + 1)[: len(names)]
    order = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
    labels = [Label(names[i], f"rgb{class_colour(i, names[i])}") for i in order[:_MAX_NAMED_CLASSES]]
    if (maps[0] == _UNLABELLED).any():
        labels.append(Label("not labelled", f"rgb{_UNLABELLED_COLOUR}"))
    return {"legend": labels or [Label("No labelled pixel.")], "more": max(0, len(order) - _MAX_NAMED_CLASSES)}


def flipped(task: Task) -> list[Section]:
    """One section per comparison and metric with items that are right with only one of two sets of weights. Those of
    the control come last, since a link to sections of the same title opens the first of them."""
    out, thumbnail, controls = [], functools.cache(_thumbnail), task.controls
    for c in sorted(task.comparisons, key=lambda c: (c.after in controls, c.before in controls)):
        control = c.before in controls
        for metric, info in task.metrics.items():
            if not (flips := [f for f in c.flipped if f.metric == metric]):
                continue
            note = f"{info.title}, {c.after} against {'the control ' * control}{c.before}"
            if any(w.scores[metric].seeds for w in task.weights.values() if metric in w.scores):
                note += "; shares are means over the draws"
            won, lost = ("with the weights", "with the control") if control else ("after", "before")
            shown = Part("flips", flips=flips, sides={True: won, False: lost}, items=task.items, thumbnail=thumbnail)
            out.append(Section(f"{task.title}: {task.items} that flipped", [shown], note))
    return out
