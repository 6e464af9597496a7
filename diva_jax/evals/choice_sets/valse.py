"""VALSE (arXiv 2112.07566): an object of {image_file, caption, foil, mturk}; what two of three annotators accept."""

from diva_jax.evals.choice_sets import Item, Picture, alternatives, field

ACCEPTED = 2  # Annotators who chose the caption and not the foil.


def read(file, rows, pictures) -> list[Item]:
    """The items with `mturk.caption` of at least `ACCEPTED`."""
    items = []
    for where, row in rows:
        votes = field(row, "mturk", where, dict)
        if field(votes, "caption", f"{where}, mturk", int) < ACCEPTED:
            continue
        name = field(row, "image_file", where)
        names = (name, f"images/{name}", f"{row.get('dataset', 'images')}/{name}")
        texts = alternatives(where, [field(row, k, where) for k in ("caption", "foil")])
        items.append(Item(where, (Picture(pictures.find(where, *names)),), texts))
    return items
