"""ARO (arXiv 2210.01936): relations and attributes of Visual Genome, the picture cropped to the box of the relation."""

from diva_jax.common.errors import UserError
from diva_jax.evals.choice_sets import Item, Picture, field


def _class(row, where: str) -> str:
    """The relation's name, or the two attributes joined."""
    if "relation_name" in row:
        return field(row, "relation_name", where)
    attributes = field(row, "attributes", where, list)
    if len(attributes) < 2:
        raise UserError(f"{where}: the field 'attributes' must hold two texts: correct the row")
    return f"{attributes[0]}_{attributes[1]}"


def read(file, rows, pictures) -> list[Item]:
    """The items of {image_path, bbox_x, bbox_y, bbox_w, bbox_h, true_caption, false_caption} and the class."""
    items = []
    for where, row in rows:
        name = field(row, "image_path", where)
        x, y, w, h = (field(row, f"bbox_{k}", where, (int, float)) for k in "xywh")
        if w <= 0 or h <= 0:
            raise UserError(f"{where}: the box has no area ({w} x {h}): correct bbox_w and bbox_h")
        picture = Picture(pictures.find(where, f"images/{name}", name), (x, y, x + w, y + h))
        texts = tuple(field(row, k, where) for k in ("true_caption", "false_caption"))
        items.append(Item(where, (picture,), texts, groups={"class": _class(row, where)}))
    return items
