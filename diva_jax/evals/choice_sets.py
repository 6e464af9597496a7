"""Published sets of image-and-text choices: one row of `TABLE` per file, with the `Metric`s that are scored."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from diva_jax.common.errors import UserError, listing
from diva_jax.evals import matching
from diva_jax.evals.choice_layouts import LAYOUTS, Item, joined, read_items
from diva_jax.evals.items import require_count


@dataclasses.dataclass(frozen=True)
class Metric:
    """A score of a set, by key and with the reader's name for it. `answers` is a key of `matching.ANSWERS`. `all_of`:
    groups of this kind count, where all of their items are right. `mean_over`: the mean of the means of groups of this
    kind, without those with fewer than `at_least` items."""

    name: str
    title: str
    answers: str = "text"
    all_of: str = ""
    mean_over: str = ""
    at_least: int = 1


ACCURACY = (Metric("accuracy", "accuracy"),)
MATCH = Metric("match", "matches", "match")
PAIRED = (*(Metric(kind, f"{kind} score", kind) for kind in ("text", "image", "group")), MATCH)
BY_CLASS = (Metric("accuracy", "mean accuracy of the classes", mean_over="class"), Metric("items", "accuracy of items"))
BY_ATTRIBUTES = (dataclasses.replace(BY_CLASS[0], at_least=25), BY_CLASS[1])
CONTROLLED = (
    Metric("single", "single accuracy"),
    Metric("pair", "pair accuracy", all_of="pair"),
    Metric("set", "set-of-four accuracy", all_of="set"),
)


@dataclasses.dataclass(frozen=True)
class Published:
    """A published file; `name` is that of the set in metric names, `count` the items, None where it is not
    published."""

    file: str
    name: str
    layout: str
    count: int | None
    metrics: tuple[Metric, ...] = ACCURACY


_SUGARCREPE = dict(
    add_att=692, add_obj=2062, replace_att=788, replace_obj=1652, replace_rel=1406, swap_att=666, swap_obj=245
)
_QA = {"coco_qa_one_obj": 2247, "coco_qa_two_obj": 440, "vg_qa_one_obj": 1160, "vg_qa_two_obj": 291}
_VALSE = (
    "existence plurals counting-hard counting-adversarial counting-small-quant relations action-replacement "
    "actant-swap coreference-standard coreference-hard foil-it"
).split()
TABLE: tuple[Published, ...] = (
    *(Published(f"{name}.json", name, "sugarcrepe", count) for name, count in _SUGARCREPE.items()),
    Published("examples.jsonl", "winoground", "winoground", 400, PAIRED),
    Published("metadata.json", "naturalbench", "naturalbench", None, PAIRED),
    Published("visual_genome_relation.json", "vg_relation", "aro", 23937, BY_CLASS),
    Published("visual_genome_attribution.json", "vg_attribution", "aro", 28748, BY_ATTRIBUTES),
    Published("controlled_images_dataset.json", "controlled_images", "whatsup", 412, CONTROLLED),
    Published("controlled_clevr_dataset.json", "controlled_clevr", "whatsup", 408, CONTROLLED),
    *(Published(f"{name}.json", name, "whatsup_qa", count) for name, count in _QA.items()),
    *(Published(f"{name}.json", name.replace("-", "_"), "valse", None) for name in _VALSE),
)
# What is scored in a file of another name than the published one.
_METRICS = {row.layout: row.metrics for row in TABLE}


def published(path: Path, layout: str) -> list[tuple[Path, Published]]:
    """The files to evaluate, each with its row of the table: a file, or those of published names in a folder. `layout`
    is for other names. A UserError where nothing is there, or a file's layout is not known."""
    known = {row.file: row for row in TABLE}
    if path.is_dir():
        here = [(path / row.file, row) for row in TABLE if (path / row.file).is_file()]
        if not here:
            raise UserError(
                f"{path} has no file of a published set: give one of {listing(list(known), 4)}, or your own"
            )
        return here
    if not path.is_file():
        raise UserError(f"--data=choice={path} does not exist: give the file of a set, or a folder of published files")
    if path.name in known and layout in ("", known[path.name].layout):
        return [(path, known[path.name])]
    own = path.suffix.lower() in (".csv", ".tsv", ".jsonl")
    layout = layout or ("own" if own else "")
    if not layout:
        raise UserError(f"{path} has no published name: set --config.eval.choice.layout to {listing(LAYOUTS)}")
    return [(path, Published(path.name, path.stem, layout, None, _METRICS.get(layout, PAIRED)))]


def scored(row: Published, items: list[Item]) -> Iterator[tuple[str, list[Item], tuple[Metric, ...]]]:
    """Yields (name, items, what is scored) of a set and, for controlled images, of its pairs and sets of four, which
    have the images and right captions of two or four items. Matches are not scored in a set where no item has them."""
    if row.metrics != PAIRED or any(matching.one_to_one(item.right) for item in items):
        yield row.name, items, row.metrics
    else:
        yield row.name, items, PAIRED[:-1]
    if row.layout == "whatsup":
        yield f"{row.name}_pair", joined(items, "pair"), PAIRED
        yield f"{row.name}_set", joined(items, "set"), (MATCH,)


def read_set(file: Path, row: Published, images: str, allow_partial: bool) -> list[Item]:
    """The checked items of a file; `images` is their folder, by default the file's. A UserError names the file and row
    that is wrong; another number of items than the published one is only allowed with `allow_partial`."""
    items = read_items(file, row.layout, Path(images).expanduser() if images else file.parent)
    if row.count is not None and not allow_partial:
        require_count(file, len(items), row.count, "the published set", "items", "choice.allow_partial")
    return items
