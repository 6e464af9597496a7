"""The report's sections on flipped items: those that are correct with only one of two sets of weights."""

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from diva_jax.data.files import open_regular
from diva_jax.data.images import FORMATS, MAX_PIXELS
from diva_jax.report.canvas import Canvas
from diva_jax.report.sections import Section, paragraph

_SHOWN = 48  # Largest number of items per comparison, metric and direction; predictions.csv has all of them.
_SIDE = 320  # Longer side of a thumbnail [pixels].


def sections(task: dict[str, Any]) -> list[Section]:
    """Returns one section per comparison and metric that has flipped items."""
    out, thumbnails = [], {}
    compared = task.get("comparisons", [])
    for c in compared:
        for metric, info in task["metrics"].items():
            flipped = [f for f in c.get("flipped", []) if f["metric"] == metric]
            if not flipped:
                continue
            title = f"{task['title']}: {task.get('items', 'items')} that flipped"
            note = f"{info['title']}, {c['before']} → {c['after']}"
            if any(w["scores"].get(metric, {}).get("seeds") for w in task["weights"].values()):
                note += "; shares are means over the draws"
            body = []
            for won, name in ((True, "Correct only after"), (False, "Correct only before")):
                some = [f for f in flipped if f["won"] is won]
                if some:
                    body.append(f'<h3 class="{"won" if won else "lost"}">{name} <small>{len(some)}</small></h3>')
                    cards = "".join(_card(f, task.get("items", "items"), thumbnails) for f in some[:_SHOWN])
                    body.append(f'<div class="cards">{cards}</div>')
                if len(some) > _SHOWN:
                    body.append(paragraph(f"{len(some) - _SHOWN} more are listed in predictions.csv.", "fine"))
            out.append(Section(title, body, note))
    return out


def _card(f: dict[str, Any], items: str, thumbnails: dict[str, str]) -> str:
    head = f"{items.removesuffix('s').capitalize()} {f.get('item', '')}"
    head = f"<header><b>{escape(head)}</b> {escape(f.get('group') or '')}</header>"
    texts, images = f.get("texts", []), f.get("images", [])
    if len(texts) == len(images) == len(f.get("before", [])) == len(f.get("after", [])) == 2:
        parts = [_half(f, i, thumbnails) for i in (0, 1)]
    else:
        parts = [f"<figure>{_picture(i, thumbnails)}</figure>" for i in images] + [paragraph(t) for t in texts]
    return f'<article class="card">{head}<div class="sides">{"".join(parts)}</div></article>'


def _half(f: dict[str, Any], i: int, thumbnails: dict[str, str]) -> str:
    """Returns one image of a pair, its text, and the probability that each encoder gives to that text."""
    shares = [f[when][i] if i == 0 else 1 - f[when][i] for when in ("before", "after")]
    words = [f"{s:.2f} {'✓' if (s > 0.5 if i == 0 else s >= 0.5) else '✗'}" for s in shares]
    return (
        f"<figure>{_picture(f['images'][i], thumbnails)}<figcaption>{escape(f['texts'][i])}"
        f"{_meter(shares)}<small>{words[0]} → {words[1]}</small></figcaption></figure>"
    )


def _meter(shares: list[float]) -> str:
    """Draws the two probabilities as dots on a line from 0 to 1, whose centre is marked."""
    canvas = Canvas(140, 14, f"share of this text: {shares[0]:.2f} before, {shares[1]:.2f} after")
    at = [5 + 130 * s for s in shares]
    canvas.path([(5, 7), (135, 7)], "grid", 2)
    canvas.path([(70, 2), (70, 12)], "axis")
    canvas.path([(at[0], 7), (at[1], 7)], "s1", 2)
    canvas.dot(at[0], 7, 4, "s0")
    canvas.dot(at[1], 7, 4, "s1")
    return canvas.svg()


def _picture(path: str, thumbnails: dict[str, str]) -> str:
    """Returns an `<img>` with embedded data, or a line with the file name if the file cannot be read."""
    if path not in thumbnails:
        thumbnails[path] = _thumbnail(path)
    if not thumbnails[path]:
        return f'<p class="missing">{escape(Path(path).name)} cannot be read</p>'
    return f'<img src="{thumbnails[path]}" alt="{escape(Path(path).name)}">'


def _thumbnail(path: str) -> str:
    """Returns a JPEG thumbnail as a data: URI, or "" if the file is missing or is not an image."""
    try:
        with open(path, "rb", opener=open_regular) as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return ""
            image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
            small = ImageOps.exif_transpose(image).convert("RGB")
    except Exception:  # Pillow's plugins raise many types.
        return ""
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
