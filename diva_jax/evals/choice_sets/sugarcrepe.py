"""SugarCrepe (arXiv 2306.14610): an object of {filename, caption, negative_caption}, pictures of COCO val2017."""

from diva_jax.evals.choice_sets import Item, Picture, alternatives, field


def read(file, rows, pictures) -> list[Item]:
    """The items; the keys of the object need not be contiguous."""
    items = []
    for where, row in rows:
        name = field(row, "filename", where)
        path = pictures.find(where, name, f"val2017/{name}", f"images/{name}")
        texts = alternatives(where, [field(row, k, where) for k in ("caption", "negative_caption")])
        items.append(Item(where, (Picture(path),), texts))
    return items
