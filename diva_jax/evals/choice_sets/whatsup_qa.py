"""What'sUp's COCO and GQA parts (arXiv 2310.19785): a list of [image id, right caption, wrong caption]."""

from diva_jax.common.errors import UserError
from diva_jax.evals.choice_sets import Item, Picture, alternatives


def read(file, rows, pictures) -> list[Item]:
    """The items; pictures are `val2017/000000ID.jpg` of COCO or `vg_images/ID.jpg`."""
    items = []
    for where, row in rows:
        if not isinstance(row, list) or len(row) != 3 or isinstance(row[0], bool) or not isinstance(row[0], int | str):
            raise UserError(f"{where}: a row is [image id, right caption, wrong caption]: correct the row")
        coco = f"{str(row[0]).zfill(12)}.jpg"
        names = (f"vg_images/{row[0]}.jpg", f"{row[0]}.jpg")
        if not file.name.startswith("vg"):
            names = (f"val2017/{coco}", coco)
        items.append(Item(where, (Picture(pictures.find(where, *names)),), alternatives(where, row[1:])))
    return items
