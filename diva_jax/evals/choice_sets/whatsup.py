"""What'sUp's controlled pictures (arXiv 2310.19785): a list of {image_path, caption_options}, the first one right.

A file is called OBJECT_PREPOSITION_[of_]OBJECT. The four pictures of two objects are a set; left and right are a pair
of it, and so are on and under, or in front and behind.
"""

from pathlib import PurePosixPath

from diva_jax.common.errors import UserError
from diva_jax.evals.choice_sets import Item, Picture, alternatives, field

PAIRS = {
    "left": "sides",
    "right": "sides",
    "on": "heights",
    "under": "heights",
    "in-front": "depths",
    "behind": "depths",
}


def read(file, rows, pictures) -> list[Item]:
    """The items, grouped by the parts of the file's name.

    Raises:
      UserError: a file's name has no known preposition, or a pair or a set is not complete; names file and row.
    """
    items, members = [], {}
    for where, row in rows:
        name = field(row, "image_path", where)
        path = PurePosixPath(name)
        parts = path.stem.split("_")
        if len(parts) < 3 or parts[1] not in PAIRS:
            raise UserError(f"{where}: {path.name!r} is not named OBJECT_PREPOSITION_OBJECT: correct image_path")
        # The published paths begin with data/, which is the folder of the file itself.
        found = pictures.find(where, name, name.removeprefix("data/"), f"{path.parent.name}/{path.name}", path.name)
        texts = alternatives(where, field(row, "caption_options", where, list))
        objects = f"{parts[0]}_{parts[-1]}"
        groups = {"set": objects, "pair": f"{objects}_{PAIRS[parts[1]]}"}
        if first := members.setdefault(objects, {}).get(parts[1]):
            raise UserError(f"{where}: {objects} has {parts[1]!r} twice, first in {first}: remove one")
        members[objects][parts[1]] = where
        items.append(Item(where, (Picture(found),), texts, groups=groups))
    for objects, by in members.items():
        kinds = [PAIRS[p] for p in by]
        if len(by) != 4 or any(kinds.count(k) != 2 for k in kinds):
            where = next(iter(by.values()))
            raise UserError(f"{where}: {objects} has only {', '.join(sorted(by))}, not two pairs: fetch the file again")
    return items
