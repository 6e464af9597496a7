"""Sets of picture-and-text choices: one row of `TABLE` per published file, one module per layout.

An item has some pictures and some texts, and says which of them belong together. A layout is a module of this package
with `read(file, rows, pictures) -> list[Item]` and, where its files are no JSON, `rows(file)`. What is scored is data:
the `Metric`s of the table's row.
"""

import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diva_jax.common.errors import UserError, listing
from diva_jax.data import texts

LAYOUTS = ("sugarcrepe", "winoground", "naturalbench", "aro", "whatsup", "whatsup_qa", "valse", "own")


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image file, and the part of it that is shown: (left, top, right, bottom) in pixels, or None for all."""

    path: Path
    box: tuple[int, int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      where: file and row, for errors and predictions.
      pictures, texts: what is shown.
      right: (picture, text) numbers that belong together; every picture has a text. A text without a picture is a
        wrong alternative.
      groups: kind of group ("class", "pair", "set") -> label.
    """

    where: str
    pictures: tuple[Picture, ...]
    texts: tuple[str, ...]
    right: tuple[tuple[int, int], ...] = ((0, 0),)
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Metric:
    """A score of a set.

    Attributes:
      name, title: the key and the reader's name.
      answers: "text" (the right texts of each picture), "image" (the right pictures of each text) or "group" (both).
      all_of: a kind of group: a group counts where all of its items are right; empty: items count.
      mean_over: a kind of group: the score is the mean of the groups' means; empty: the mean over what counts.
      at_least: groups of `mean_over` with fewer items are left out.
    """

    name: str
    title: str
    answers: str = "text"
    all_of: str = ""
    mean_over: str = ""
    at_least: int = 1


ACCURACY = (Metric("accuracy", "accuracy"),)
PAIRED = (
    Metric("text", "text score", "text"),
    Metric("image", "image score", "image"),
    Metric("group", "group score", "group"),
)
BY_CLASS = (Metric("accuracy", "mean accuracy of the classes", mean_over="class"), Metric("items", "accuracy of items"))
BY_ATTRIBUTES = (dataclasses.replace(BY_CLASS[0], at_least=25), BY_CLASS[1])
CONTROLLED = (
    Metric("single", "single accuracy"),
    Metric("pair", "pair accuracy", all_of="pair"),
    Metric("set", "set-of-four accuracy", all_of="set"),
)


@dataclasses.dataclass(frozen=True)
class Published:
    """A file of a published set.

    Attributes:
      file: its published name.
      name: of the set in metric names.
      layout: one of `LAYOUTS`.
      count: the number of items; None where no single number is published.
      metrics: what is scored.
    """

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


class Pictures:
    """Finds the files of pictures.

    Args:
      folder: `config.eval.choice.images`, or else the folder of the set's file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._seen: dict[Path, bool] = {}

    def find(self, where: str, *names: str) -> Path:
        """The first of these names, relative to the folder, that exists.

        Raises:
          UserError: none does; names file and row.
        """
        for name in names:
            path = self.folder / name
            if path not in self._seen:
                self._seen[path] = texts.is_file(path)
            if self._seen[path]:
                return path
        raise UserError(
            f"{where}: its image {str(self.folder / names[0])[:300]} does not exist: fetch it, or set "
            "--config.eval.choice.images to the folder of the images"
        )


def field(row: Any, name: str, where: str, kind: type | tuple[type, ...] = str) -> Any:
    """A field of a row.

    Raises:
      UserError: the row is no object, or the field is missing, empty or of another type; names file and row.
    """
    value = row.get(name) if isinstance(row, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{where}: the field {name!r} is missing, empty or of another type: correct the row")
    return value


def json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of each element of a JSON list, or of each value of a JSON object.

    Raises:
      UserError: the file cannot be read, or is neither.
    """
    value = texts.parse_json(texts.read_text(file), str(file))
    if not isinstance(value, list | dict):
        raise UserError(f"{file} holds neither a list nor an object: fetch it again")
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return ((f"{file}, row {str(key)[:60]}", row) for key, row in pairs)


def json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of each line of a JSON-lines file that is not blank.

    Raises:
      UserError: the file or a line cannot be read; names the line.
    """
    for number, line in enumerate(texts.read_text(file).splitlines(), 1):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, texts.parse_json(line, where)


def published(path: Path, layout: str) -> list[tuple[Path, Published]]:
    """The files to evaluate, each with its row of the table.

    Args:
      path: a file, or a folder with files of published names.
      layout: `config.eval.choice.layout`, for files of other names; empty: by the published name.

    Raises:
      UserError: nothing is there, or a file's layout is not known.
    """
    known = {row.file: row for row in TABLE}
    if path.is_dir():
        found = [(path / row.file, row) for row in TABLE if (path / row.file).is_file()]
        if not found:
            raise UserError(
                f"{path} has no file of a published set: give one of {listing(list(known), 4)}, or your own"
            )
        return found
    if not path.is_file():
        raise UserError(f"--data=choice={path} does not exist: give the file of a set, or a folder of published files")
    if path.name in known and layout in ("", known[path.name].layout):
        return [(path, known[path.name])]
    own = path.suffix.lower() in (".csv", ".tsv", ".jsonl")
    layout = layout or ("own" if own else "")
    if not layout:
        raise UserError(f"{path} has no published name: set --config.eval.choice.layout to {listing(LAYOUTS)}")
    return [(path, Published(path.name, path.stem, layout, None, _METRICS.get(layout, PAIRED)))]


def read_set(file: Path, row: Published, images: str, allow_partial: bool) -> list[Item]:
    """The items of a file, checked.

    Args:
      file: the file.
      row: its row of the table.
      images: the folder with the pictures; empty: that of the file.
      allow_partial: whether another number of items than the published one is allowed.

    Raises:
      UserError: a row or its picture is wrong, or the number of items is; names file and row.
    """
    module = importlib.import_module(f"{__name__}.{row.layout}")
    rows = getattr(module, "rows", json_rows)(file)
    items = module.read(file, rows, Pictures(Path(images).expanduser() if images else file.parent))
    if not items:
        raise UserError(f"{file} has no items: fetch it again")
    if row.count not in (None, len(items)) and not allow_partial:
        raise UserError(
            f"{file} has {len(items)} items, the published set has {row.count}: fetch it again, or set "
            "--config.eval.choice.allow_partial to score a part"
        )
    return items


def alternatives(where: str, choices: Sequence[str]) -> tuple[str, ...]:
    """The texts of an item, the first one right.

    Raises:
      UserError: there are fewer than two, or one is no text or empty.
    """
    if len(choices) < 2 or not all(isinstance(t, str) and t.strip() for t in choices):
        raise UserError(f"{where}: there must be at least two texts, none empty: correct the row")
    return tuple(choices)
