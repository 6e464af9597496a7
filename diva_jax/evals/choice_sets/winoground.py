"""Winoground (arXiv 2204.03162): lines of {image_0, image_1, caption_0, caption_1, tag}, pictures images/NAME.png."""

from diva_jax.evals.choice_sets import Item, Picture, field, json_lines

rows = json_lines


def read(file, rows, pictures) -> list[Item]:
    """The items: picture i belongs to caption i."""
    items = []
    for where, row in rows:
        names = [field(row, f"image_{i}", where) for i in (0, 1)]
        found = (pictures.find(where, f"images/{n}.png", f"{n}.png", f"images/{n}", n) for n in names)
        texts = tuple(field(row, f"caption_{i}", where) for i in (0, 1))
        groups = {"class": str(row.get("tag", ""))}
        items.append(Item(where, tuple(map(Picture, found)), texts, ((0, 0), (1, 1)), groups))
    return items
