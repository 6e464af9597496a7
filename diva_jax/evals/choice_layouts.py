"""Layouts of image-and-text choices: how the files of published sets, and of one's own, are read."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from diva_jax.common import json_files
from diva_jax.common.errors import UserError, brief
from diva_jax.data import files
from diva_jax.data.images import MAX_PIXELS

_CSV_COLUMNS = ("item", "image", "text", "right")
# What'sUp's prepositions, each with the axis of which it is one side.
_AXES = dict.fromkeys(("left", "right"), "sides") | dict.fromkeys(("on", "under"), "heights")
_AXES |= dict.fromkeys(("in-front", "behind"), "depths")


class ImageRegion(NamedTuple):
    """An image file, and the part of it that is shown: (left, top, right, bottom) in pixels, or None for all."""

    path: Path
    box: tuple[int, int, int, int] | None = None


class Item(NamedTuple):
    """One question: `where` it is, for errors and predictions, what is shown, and the (image, text) numbers that belong
    together. Every image has a text; a text without an image is a wrong alternative. `groups`: kind of group ("class",
    "pair", "set", "pattern") -> label; scores are reported by pattern."""

    where: str
    images: tuple[ImageRegion, ...]
    texts: tuple[str, ...]
    right: tuple[tuple[int, int], ...] = ((0, 0),)
    groups: Mapping[str, str] = {}


class _Row(NamedTuple):
    """A row of a file: `where` it is and the `task`, for errors, its `value` as JSON has it, and the `folder` of the
    images."""

    file: Path
    where: str
    value: Any
    folder: Path
    is_file: Callable[[Path], bool]
    task: str

    def field(self, name: str, kind: type | tuple[type, ...] = str) -> Any:
        """Returns a field; a UserError where the row is no object, or it is missing, empty or of another type."""
        value = self.value.get(name) if isinstance(self.value, Mapping) else None
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, str) and not value.strip()):
            raise UserError(f"{self.where}: the field {name!r} is missing, empty or of another type: correct the row")
        return value

    def texts(self, *names: str) -> list[str]:
        return [self.field(name) for name in names]

    def image(self, *names: str, box: tuple[int, int, int, int] | None = None) -> ImageRegion:
        """Returns the first of these paths, relative to the folder, that exists; a UserError where none does."""
        for path in (self.folder / name for name in names):
            if self.is_file(path):
                return ImageRegion(path, box)
        problem = f"{self.where}: its image {brief(str(self.folder / names[0]), 300)} does not exist"
        raise UserError(f"{problem}: fetch it, or set --config.eval.{self.task}.images to the folder of the images")

    def item(self, images: list[ImageRegion], words: Sequence[str], groups: Mapping[str, str] | None = None) -> Item:
        """Returns an item whose image i belongs to text i; further texts are wrong alternatives."""
        if len(words) < 2 or not all(isinstance(t, str) and t.strip() for t in words):
            raise UserError(f"{self.where}: there must be at least two texts, none empty: correct the row")
        return Item(self.where, tuple(images), tuple(words), tuple((i, i) for i in range(len(images))), groups or {})


def _sugarcrepe(row: _Row) -> Item:
    """SugarCrepe (arXiv 2306.14610): an object of {filename, caption, negative_caption}, images of COCO val2017."""
    name = row.field("filename")
    return row.item([row.image(name, f"val2017/{name}", f"images/{name}")], row.texts("caption", "negative_caption"))


def _two_by_two(row: _Row) -> Item:
    """Winoground (arXiv 2204.03162): lines of {image_0, image_1, caption_0, caption_1, tag, collapsed_tag}; and
    NaturalBench's retrieval form (arXiv 2410.14669), a list of the same without tags."""
    images = [row.image(f"images/{n}.png", f"{n}.png", f"images/{n}", n) for n in row.texts("image_0", "image_1")]
    tag = str(row.value.get("tag", ""))
    groups = {"class": tag, "pattern": str(row.value.get("collapsed_tag", tag))}
    return row.item(images, row.texts("caption_0", "caption_1"), groups)


def _aro(row: _Row) -> Item:
    """ARO (arXiv 2210.01936): {image_path, bbox_x, bbox_y, bbox_w, bbox_h, true_caption, false_caption} of Visual
    Genome, the image cropped to the box; the class is `relation_name`, or the two `attributes` joined."""
    name = row.field("image_path")
    x, y, w, h = (row.field(f"bbox_{k}", (int, float)) for k in "xywh")
    if not all(abs(v) <= MAX_PIXELS for v in (x, y, w, h)) or not (w >= 1 and h >= 1 and w * h <= MAX_PIXELS):
        raise UserError(f"{row.where}: the box {brief((x, y, w, h))} is no part of an image: correct its bbox_ fields")
    x, y, w, h = map(round, (x, y, w, h))
    image = row.image(f"images/{name}", name, box=(x, y, x + w, y + h))
    captions = row.texts("true_caption", "false_caption")
    if "relation_name" in row.value:
        return row.item([image], captions, {"class": row.field("relation_name")})
    if len(attributes := row.field("attributes", list)) < 2:
        raise UserError(f"{row.where}: the field 'attributes' must hold two texts: correct the row")
    return row.item([image], captions, {"class": f"{attributes[0]}_{attributes[1]}"})


def _whatsup(row: _Row) -> Item:
    """What'sUp's controlled images (arXiv 2310.19785): {image_path, caption_options}, the first one right. A file is
    called OBJECT_PREPOSITION_[of_]OBJECT. The four images of two objects are a set; left and right are a pair of it,
    and so are on and under, or in front and behind."""
    name = row.field("image_path")
    path = PurePosixPath(name)
    parts = path.stem.split("_")
    if len(parts) < 3 or parts[1] not in _AXES:
        raise UserError(f"{row.where}: {path.name!r} is not named OBJECT_PREPOSITION_OBJECT: correct image_path")
    # The published paths begin with data/, which is the folder of the file itself.
    image = row.image(name, name.removeprefix("data/"), f"{path.parent.name}/{path.name}", path.name)
    objects, axis = f"{parts[0]}_{parts[-1]}", _AXES[parts[1]]
    groups = {"set": objects, "pair": f"{objects}_{axis}", "preposition": parts[1], "pattern": axis}
    return row.item([image], row.field("caption_options", list), groups)


def joined(items: Iterable[Item], kind: str) -> list[Item]:
    """An item for each group of a kind, with the images of its items and the first text of each, which is right."""
    out, groups = [], {}
    for item in items:
        groups.setdefault(item.groups[kind], []).append(item)
    for first, *others in groups.values():
        images, words = ([getattr(item, part)[0] for item in (first, *others)] for part in ("images", "texts"))
        pattern = {"pattern": first.groups["pattern"]} if kind == "pair" else {}
        out.append(Item(first.where, tuple(images), tuple(words), tuple((i, i) for i in range(len(words))), pattern))
    return out


def _check_whatsup(items: Iterable[Item]) -> None:
    """Raises a UserError where a set of controlled images is not two pairs; names file and row."""
    sets: dict[str, dict[str, str]] = {}
    for item in items:
        objects, preposition = item.groups["set"], item.groups["preposition"]
        if first := sets.setdefault(objects, {}).get(preposition):
            raise UserError(f"{item.where}: {objects} has {preposition!r} twice, first in {first}: remove one")
        sets[objects][preposition] = item.where
    for objects, by in sets.items():
        axes = [_AXES[p] for p in by]
        if len(by) != 4 or any(axes.count(axis) != 2 for axis in axes):
            where = next(iter(by.values()))
            raise UserError(f"{where}: {objects} has only {', '.join(sorted(by))}, not two pairs: fetch the file again")


def _whatsup_qa(row: _Row) -> Item:
    """What'sUp's COCO and GQA parts: a list of [image id, right caption, wrong caption]. Images are
    `val2017/000000ID.jpg` of COCO, or `vg_images/ID.jpg` for a file whose name begins with vg."""
    value = row.value
    if not isinstance(value, list) or len(value) != 3 or type(value[0]) not in (int, str):
        raise UserError(f"{row.where}: a row is [image id, right caption, wrong caption]: correct the row")
    number, *captions = value
    name = f"{number}.jpg" if row.file.name.startswith("vg") else f"{str(number).zfill(12)}.jpg"
    folder = "vg_images" if row.file.name.startswith("vg") else "val2017"
    return row.item([row.image(f"{folder}/{name}", name)], captions)


def _valse(row: _Row) -> Item | None:
    """VALSE (arXiv 2112.07566): an object of {image_file, caption, foil, mturk}; None where annotators reject it."""
    votes = row._replace(where=f"{row.where}, mturk", value=row.field("mturk", dict))
    if votes.field("caption", int) < 2:  # Annotators, of three, who chose the caption and not the foil.
        return None
    name = row.field("image_file")
    image = row.image(name, f"images/{name}", f"{row.value.get('dataset', 'images')}/{name}")
    return row.item([image], row.texts("caption", "foil"))


def _own(row: _Row) -> Item:
    """A set of one's own: {"images": [...], "texts": [...], "pairs": [[image, text], ...], "class": "..."}. `pairs` are
    the numbers of those that belong together, by default [[0, 0], [1, 1], ...]; `class` is optional."""
    names, words = row.field("images", list), row.field("texts", list)
    whole = all(isinstance(n, str) and n.strip() for n in (*names, *words))
    if not names or not whole or len({*names}) < len(names) or len({*words}) < len(words):
        raise UserError(f"{row.where}: 'images' and 'texts' must hold texts, none empty or twice: correct the row")
    pairs, counts = row.value.get("pairs", [[i, i] for i in range(len(names))]), (len(names), len(words))
    if not isinstance(pairs, list) or not all(
        isinstance(p, list) and len(p) == 2 and all(n in range(count) for n, count in zip(p, counts, strict=True))
        for p in pairs
    ):
        wanted = f"'pairs' must be [image, text] numbers below {counts[0]} and {counts[1]}"
        raise UserError(f"{row.where}: {wanted}, not {brief(pairs)}: correct the row")
    right = sorted({(int(i), int(t)) for i, t in pairs})
    shown, said = (len({pair[side] for pair in right}) for side in (0, 1))
    if shown < counts[0] or (counts[0] > 1 and said < min(counts[1], 2)):
        raise UserError(f"{row.where}: an image has no text that belongs to it: complete 'pairs' or 'right'")
    if len(right) == counts[0] * counts[1]:
        raise UserError(f"{row.where}: everything belongs together: add a wrong text or image")
    groups = dict.fromkeys(("class", "pattern"), str(row.value["class"])[:100]) if "class" in row.value else {}
    return Item(row.where, tuple(map(row.image, names)), tuple(words), tuple(right), groups)


LAYOUTS: dict[str, Callable[[_Row], Item | None]] = {
    "sugarcrepe": _sugarcrepe,
    "winoground": _two_by_two,
    "naturalbench": _two_by_two,
    "aro": _aro,
    "whatsup": _whatsup,
    "whatsup_qa": _whatsup_qa,
    "valse": _valse,
    "own": _own,
}


def _json_rows(file: Path, lines: bool) -> Iterator[tuple[str, Any]]:
    """(where, row) of each line that is not blank, or of each element of a list or value of an object."""
    text = files.read_text(file)
    if lines:
        numbered = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        yield from ((f"{file}, line {n}", json_files.parse(file, line, n)) for n, line in numbered)
        return
    value = json_files.parse(file, text)
    if not isinstance(value, list | dict):
        raise UserError(f"{file} holds neither a list nor an object: fetch it again")
    for key, row in value.items() if isinstance(value, dict) else enumerate(value):
        yield f"{file}, row {str(key)[:60]}", row


def _csv_items(file: Path) -> Iterable[tuple[str, Any]]:
    """(where, row) of each item of a CSV file, as objects of the JSON form. It has the columns item, image, text and
    right (1: they belong together, 0: they do not); the rows of one item have the same text in `item`."""
    items: dict[str, tuple[str, dict]] = {}
    said: dict[tuple[str, ...], str] = {}
    for line, row in files.csv_records(str(file), _CSV_COLUMNS):
        where = f"{file}, line {line}"
        if row.get("right") not in ("0", "1") or not all(row.get(c, "").strip() for c in _CSV_COLUMNS[:3]):
            raise UserError(f"{where}: item, image and text must hold something, right must be 0 or 1: correct the row")
        if said.setdefault(tuple(row[c] for c in _CSV_COLUMNS[:3]), row["right"]) != row["right"]:
            raise UserError(f"{where}: this item has the image and text before, with another 'right': correct the rows")
        _, item = items.setdefault(row["item"], (where, {"images": [], "texts": [], "pairs": []}))
        for kind in ("image", "text"):
            if row[kind] not in item[f"{kind}s"]:
                item[f"{kind}s"].append(row[kind])
        if row["right"] == "1":
            item["pairs"].append([item["images"].index(row["image"]), item["texts"].index(row["text"])])
    return items.values()


def read_items(file: Path, layout: str, images: Path, task: str = "choice") -> list[Item]:
    """The items of a file in one of `LAYOUTS`; a UserError, in terms of `task`, names the file and row that is wrong or
    whose image is."""
    own_table = layout == "own" and file.suffix.lower() not in (".jsonl", ".json")
    rows = _csv_items(file) if own_table else _json_rows(file, layout in ("own", "winoground"))
    is_file = functools.cache(os.path.isfile)
    made = (LAYOUTS[layout](_Row(file, where, value, images, is_file, task)) for where, value in rows)
    items = list(filter(None, made))
    if layout == "whatsup":
        _check_whatsup(items)
    if not items:
        raise UserError(f"{file} has no items: fetch it again")
    return items
