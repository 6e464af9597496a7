"""NaturalBench's retrieval form (arXiv 2410.14669): a list of {index, image_0, image_1, caption_0, caption_1}."""

from diva_jax.evals.choice_sets import Item, Picture, field


def read(file, rows, pictures) -> list[Item]:
    """The items: picture i belongs to caption i; pictures are in `images/`."""
    items = []
    for where, row in rows:
        names = [field(row, f"image_{i}", where) for i in (0, 1)]
        found = (pictures.find(where, f"images/{n}", n) for n in names)
        texts = tuple(field(row, f"caption_{i}", where) for i in (0, 1))
        items.append(Item(where, tuple(map(Picture, found)), texts, ((0, 0), (1, 1))))
    return items
