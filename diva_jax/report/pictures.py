"""Pictures embedded in the page: thumbnails of image files, and the strips of a segmentation."""

import base64
import colorsys
import io
import os
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from diva_jax.data.files import open_regular
from diva_jax.data.images import FORMATS, MAX_PIXELS
from diva_jax.report.sections import paragraph, swatch

SIDE = 320  # Longer side of a thumbnail [pixels].
IGNORED = 255  # Value of pixels without a class.
_MOST = 2**20  # Pixels of a map.
_NAMED = 16  # Classes that the legend of a strip names.


def image(path: str, thumbnails: dict[str, str]) -> str:
    """Returns an `<img>` with embedded data, or a line with the file name if the file cannot be read.

    Args:
      path: the file.
      thumbnails: path -> data: URI of files that were read before; it is extended.
    """
    if path not in thumbnails:
        thumbnails[path] = _thumbnail(path)
    if not thumbnails[path]:
        return f'<p class="missing">{escape(Path(path).name)} cannot be read</p>'
    return f'<img src="{thumbnails[path]}" alt="{escape(Path(path).name)}">'


def _thumbnail(path: str) -> str:
    """Returns a JPEG thumbnail as a data: URI, or "" if the file is missing or is not an image."""
    try:
        with open(path, "rb", opener=open_regular) as file, Image.open(file, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                return ""
            picture.draft("RGB", (2 * SIDE, 2 * SIDE))
            small = ImageOps.exif_transpose(picture).convert("RGB")
    except Exception:  # Pillow's plugins raise many types.
        return ""
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return _uri(small, "jpeg", quality=80)


def _uri(picture: Image.Image, form: str, **options) -> str:
    picture.save(buffer := io.BytesIO(), form.upper(), **options)
    return f"data:image/{form};base64," + base64.b64encode(buffer.getvalue()).decode()


def colour(number: int, name: str) -> tuple[int, int, int]:
    """Returns the colour of a class: hues a golden angle apart, three lightnesses in turn, grey for the background."""
    if name == "background":
        return 110, 110, 110
    red, green, blue = colorsys.hls_to_rgb(number * 0.618034 % 1, (0.45, 0.62, 0.32)[number % 3], 0.65)
    return round(255 * red), round(255 * green), round(255 * blue)


def _decoded(encoded: str) -> np.ndarray:
    """Returns a map of class numbers, uint8 [H, W], from a PNG in base64.

    Raises:
      Exception: it is none; Pillow raises many types.
    """
    with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=("PNG",)) as file:
        if file.width * file.height > _MOST:
            raise ValueError(f"{file.width}x{file.height} pixels are too many")
        return np.asarray(file.convert("L"))


def _map(numbers: np.ndarray, names: list[str], what: str) -> str:
    """Returns a map of classes as an `<img>`."""
    palette = [v for i, name in enumerate(names) for v in colour(i, name)]
    palette = (palette + [0] * 768)[: 3 * IGNORED] + [225, 225, 225]
    picture = Image.fromarray(numbers, "L")
    picture.putpalette(palette)
    return f'<img src="{_uri(picture, "png", optimize=True)}" alt="{escape(what)}">'


def strips(task: dict[str, Any], labels: list[str]) -> list[str]:
    """Returns one row per picture of a segmentation: the image, the truth, and the classes under each set of weights.

    Args:
      task: an entry of results.json; nothing is returned where its weights have no `pictures`.
      labels: the labels of the weights, in order.
    """
    used = [w for w in labels if task["weights"].get(w, {}).get("pictures")]
    used = [w for w in used if isinstance(task["weights"][w].get("classes"), list)]
    if not used:
        return []
    names = [c["name"] for c in task["weights"][used[0]]["classes"]]
    out, thumbnails = ["<h3>Pictures <small>evenly spaced over the set, not chosen by their scores</small></h3>"], {}
    for i, shown in enumerate(zip(*(task["weights"][w]["pictures"] for w in used), strict=False)):
        first = shown[0]
        try:
            truth = _decoded(first["truth"])
            found = {w: _decoded(p["predicted"]) for w, p in zip(used, shown, strict=True)}
        except Exception:  # See `_decoded`.
            out.append(paragraph(f"Picture {i + 1} of results.json cannot be read.", "fine"))
            continue
        figures = [
            _figure(image(first["image"], thumbnails), "image"),
            _figure(_map(truth, names, "truth"), "truth"),
            *(
                _figure(_map(m, names, w), w, swatch(labels.index(w)) if len(used) > 1 else "")
                for w, m in found.items()
            ),
        ]
        out.append(f'<div class="strip" style="--columns:{len(figures)}">{"".join(figures)}</div>')
        out.append(_legend([truth, *found.values()], names))
    return out


def estimates(found: dict[str, Any], folder: os.PathLike) -> list[str]:
    """Returns one row per entry of `rows` in images.json: pictures beside each other with their captions.

    Args:
      found: the content of the file.
      folder: that of the file; names of pictures are relative to it.
    """
    out, thumbnails = [], {}
    for row in found["rows"]:
        shown = [_figure(image(str(Path(folder) / f["image"]), thumbnails), f["caption"]) for f in row]
        out.append(f'<div class="strip" style="--columns:{max(1, len(shown))}">{"".join(shown)}</div>')
    return out


def _figure(picture: str, caption: str, mark: str = "") -> str:
    return f"<figure>{picture}<figcaption>{mark}{escape(caption)}</figcaption></figure>"


def _legend(maps: list[np.ndarray], names: list[str]) -> str:
    """Returns the names of the classes in some maps, the most frequent ones first."""
    counts = np.bincount(np.concatenate([m.ravel() for m in maps]), minlength=IGNORED + 1)[: len(names)]
    order = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
    marks = [
        f'<span><i class="swatch" style="background:rgb{colour(i, names[i])}"></i>{escape(names[i])}</span>'
        for i in order[:_NAMED]
    ]
    more = f" and {len(order) - _NAMED} more" if len(order) > _NAMED else ""
    if (maps[0] == IGNORED).any():
        marks.append('<span><i class="swatch" style="background:rgb(225,225,225)"></i>not labelled</span>')
    return f'<p class="legend">{" ".join(marks)}{more}</p>' if marks else paragraph("No labelled pixel.", "fine")
