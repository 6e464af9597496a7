"""A set of one's own, as JSON lines or CSV.

A line of JSON is {"images": [...], "texts": [...], "pairs": [[image, text], ...], "class": "..."}; `pairs` are the
numbers of those that belong together, by default [[0, 0], [1, 1], ...] over the images; `class` is optional.
A CSV file has the columns item, image, text and right (1: they belong together, 0: they do not); the rows of one item
have the same text in `item`.
"""

from pathlib import Path

from diva_jax.common.errors import UserError, brief, listing
from diva_jax.data import tables
from diva_jax.evals.choice_sets import Item, Picture, field, json_lines

_COLUMNS = ("item", "image", "text", "right")


def _table(file: Path):
    """The rows of a CSV file as objects of the JSON form."""
    lines = tables.csv_rows(str(file))
    header = next(lines, (1, []))[1]
    if missing := [c for c in _COLUMNS if c not in header]:
        raise UserError(f"{file} has no column {listing(missing)}: its first row must be {','.join(_COLUMNS)}")
    items: dict[str, tuple[str, dict]] = {}
    for line, cells in lines:
        where, row = f"{file}, line {line}", dict(zip(header, cells, strict=False))
        if row.get("right") not in ("0", "1") or not all(row.get(c, "").strip() for c in _COLUMNS[:3]):
            raise UserError(
                f"{where}: item, image and text must not be empty, and right must be 0 or 1: correct the row"
            )
        _, item = items.setdefault(row["item"], (where, {"images": [], "texts": [], "pairs": []}))
        for kind in ("image", "text"):
            if row[kind] not in item[f"{kind}s"]:
                item[f"{kind}s"].append(row[kind])
        if row["right"] == "1":
            item["pairs"].append([item["images"].index(row["image"]), item["texts"].index(row["text"])])
    return items.values()


def rows(file: Path):
    """(where, row) of each item."""
    return json_lines(file) if file.suffix.lower() in (".jsonl", ".json") else _table(file)


def _check_pairs(where: str, pairs, images: int, texts: int) -> tuple[tuple[int, int], ...]:
    good = isinstance(pairs, list) and all(
        isinstance(p, list) and len(p) == 2 and p[0] in range(images) and p[1] in range(texts) for p in pairs
    )
    if not good:
        raise UserError(
            f"{where}: 'pairs' must be [image, text] numbers below {images} and {texts}, not {brief(pairs)}: correct "
            "the row"
        )
    found = {(int(i), int(t)) for i, t in pairs}
    if len({i for i, _ in found}) < images or (images > 1 and len({t for _, t in found}) < min(texts, 2)):
        raise UserError(f"{where}: an image has no text that belongs to it: complete 'pairs'")
    if len(found) == images * texts:
        raise UserError(
            f"{where}: everything belongs together, so there is nothing to choose: add a wrong text or image"
        )
    return tuple(sorted(found))


def read(file: Path, rows, pictures) -> list[Item]:
    """The items."""
    items = []
    for where, row in rows:
        names, texts = field(row, "images", where, list), field(row, "texts", where, list)
        if not names or not all(isinstance(n, str) and n.strip() for n in (*names, *texts)):
            raise UserError(f"{where}: 'images' and 'texts' must hold texts, none empty: correct the row")
        pairs = _check_pairs(where, row.get("pairs", [[i, i] for i in range(len(names))]), len(names), len(texts))
        found = tuple(Picture(pictures.find(where, n)) for n in names)
        groups = {"class": str(row["class"])[:100]} if "class" in row else {}
        items.append(Item(where, found, tuple(texts), pairs, groups))
    return items
