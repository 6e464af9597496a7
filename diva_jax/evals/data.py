"""Data sets of evaluation: labelled and captioned images from tars, tfds, class folders and CSV files."""

import csv
import dataclasses
import json
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import parse_qsl

from PIL import Image

from diva_jax.common.errors import UserError, listing
from diva_jax.data import files
from diva_jax.data.images import open_image

_LAYOUT = "PATH/test/0.tar, 1.tar, ... as clip_benchmark_export_wds writes them"
_IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")


@dataclasses.dataclass(frozen=True)
class Images:
    """Images 0..N-1 and what is known of each.

    Attributes:
      names: of each, for results and errors.
      read: image i, decoded to RGB; from any thread; a UserError names a broken one.
      targets: the label (int) or the captions (list of texts) of each.
      classes: names by label; None where there are no labels, or the data does not name them.
      templates: the data's own prompts with `{c}` for the class; None where it has none.
    """

    names: Sequence[str]
    read: Callable[[int], Image.Image]
    targets: Sequence
    classes: list[str] | None = None
    templates: list[str] | None = None

    def __len__(self) -> int:
        return len(self.names)


def lines(path: Path) -> list[str] | None:
    """Stripped lines of a text file; None where it does not exist."""
    return [line.strip() for line in path.read_text("utf-8").splitlines()] if path.exists() else None


def _natural(path: Path) -> list:
    """0.tar, 2.tar, 10.tar."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _shards(root: Path) -> tuple[Path, list[Path]]:
    """(the folder with the names of the classes, shards) of a root, or of one of its splits."""
    split = root / "test" if (root / "test").is_dir() else root
    found = sorted(split.glob("*.tar"), key=_natural)
    count = split / "nshards.txt"
    if count.exists():
        wanted = [split / f"{i}.tar" for i in range(int(count.read_text()))]
        if missing := [p for p in wanted if not p.exists()]:
            raise UserError(f"{count} counts {len(wanted)} shards, but {missing[0].name} is missing: fetch it")
        found = wanted
    here = any((split / f).exists() for f in ("classnames.txt", "dataset_type.txt"))
    return (split if here else split.parent) if split == root else root, found


def has_tars(root: Path) -> bool:
    return any(root.glob("*.tar")) or any((root / "test").glob("*.tar"))


def _members(shards: Sequence[Path]) -> list[dict[str, tuple[str, int, int]]]:
    """Samples in archive order: extension -> (shard, offset, size); a sample's members share what is before the dot."""
    samples: dict[tuple[str, str], dict] = {}
    for shard in map(str, shards):
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    folder, _, base = member.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    if member.isfile() and stem:
                        place = (shard, member.offset_data, member.size)
                        samples.setdefault((shard, f"{folder}/{stem}"), {})[extension.lower()] = place
        except (tarfile.TarError, OSError) as e:
            raise UserError(f"{shard} cannot be read as a tar archive ({e}): fetch it again") from e
    return list(samples.values())


def tars(root: Path, target: str, parse: Callable[[str], object]) -> Images:
    """CLIP_benchmark's webdataset layout.

    Args:
      root: the folder with `test/*.tar`, or one split of it with its tars.
      target: the extension that holds the target, "cls" or "txt".
      parse: its text -> the target.

    Raises:
      UserError: a shard is missing or broken, or a sample has no image or no target; names them.
    """
    top, shards = _shards(root)
    if not shards:
        raise UserError(f"{root} has no tar shards: give a folder with {_LAYOUT}")
    reader = files.Reader()
    places, names, targets = [], [], []
    for sample in _members(shards):
        image = next((sample[s] for s in _IMAGE_SUFFIXES if s in sample), None)
        anything = next(iter(sample.values()))
        if image is None or target not in sample:
            lacks = "an image" if image is None else f"a .{target} member"
            raise UserError(f"{anything[0]}: the sample at byte {anything[1]} lacks {lacks}: write the shard again")
        text = reader.read(*sample[target]).decode("utf-8", "replace")
        try:
            targets.append(parse(text))
        except ValueError as e:
            raise UserError(f"{anything[0]}: .{target} holds {text[:40]!r} ({e}): write the shard again") from e
        places.append(image)
        names.append(f"{Path(image[0]).name}[{len(names)}]")
    if not places:
        raise UserError(f"{shards[0]} and its neighbours hold no samples: give a folder with {_LAYOUT}")

    def read(i: int) -> Image.Image:
        return open_image(reader.read(*places[i]), f"{places[i][0]}, byte {places[i][1]}", rgb=True)

    return Images(
        names,
        read,
        targets,
        lines(top / "classnames.txt"),
        lines(top / "zeroshot_classification_templates.txt"),
    )


def tfds(spec: str) -> Images:
    """A prepared tfds data set in array_record format, read through `data_source`, without TensorFlow.

    Args:
      spec: `tfds:name/split[?data_dir=...&image=image&label=label]`.

    Raises:
      UserError: it is not there, not in this format, or has no such features.
    """
    name, _, query = spec.partition("?")
    options = {"image": "image", "label": "label"} | dict(parse_qsl(query))
    name, _, split = name.removeprefix("tfds:").rpartition("/")
    if not name or set(options) - {"data_dir", "image", "label"}:
        raise UserError(f"{spec!r} must read tfds:name/split[?data_dir=...&image=...&label=...]")
    import tensorflow_datasets as tfds_  # Slow to import, and only this source needs it.

    image, label = options["image"], options["label"]
    try:
        builder = tfds_.builder(name, data_dir=options.get("data_dir"))
        features = builder.info.features
        classes = list(features[label].names)
        records = builder.as_data_source(split=split, decoders={image: tfds_.decode.SkipDecoding()})
        targets = [int(record[label]) for record in records]
    except Exception as e:  # tfds raises a different kind for each of missing name, split, feature, format.
        why = str(e).strip().splitlines()
        raise UserError(
            f"{spec!r} cannot be read ({why[0] if why else type(e).__name__}): prepare it first with "
            "tfds.builder(name, file_format='array_record').download_and_prepare(), and name its features"
        ) from e
    names = [f"{name}/{split}[{i}]" for i in range(len(targets))]
    return Images(names, lambda i: open_image(records[i][image], names[i], rgb=True), targets, classes)


def folder_images(root: Path) -> list[Path]:
    """Every image file below a folder, sorted."""
    return [Path(f) for f in files.walk(str(root)) if files.is_image(f)]


def image_files(paths: Sequence[Path], targets: Sequence, root: Path, rgb: bool = True, **kw) -> Images:
    """Images that are files, named relative to `root`."""

    def read(i: int) -> Image.Image:
        try:
            return open_image(paths[i].read_bytes(), str(paths[i]), rgb=rgb)
        except OSError as e:
            raise UserError(f"the image {paths[i]} cannot be read ({e.strerror}): fetch it again") from e

    return Images([os.path.relpath(p, root) for p in paths], read, targets, **kw)


def class_folders(root: Path) -> Images:
    """`root/<class>/.../<image>`: labels by the sorted order of the folders, as torchvision's ImageFolder.

    `classes` are the folders' names; a `classnames.txt` or the prompts beside them are read as in the tar layout.

    Raises:
      UserError: no folders, or a folder without an image.
    """
    folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not folders:
        raise UserError(f"{root} has neither tar shards nor a folder of images for each class: give one that has")
    paths, labels = [], []
    for label, folder in enumerate(folders):
        found = folder_images(folder)
        if not found:
            raise UserError(f"{folder} has no image in it: remove the folder or fetch its images")
        paths.extend(found)
        labels.extend([label] * len(found))
    classes = lines(root / "classnames.txt") or [f.name for f in folders]
    return image_files(
        paths, labels, root, classes=classes, templates=lines(root / "zeroshot_classification_templates.txt")
    )


def caption_csv(path: Path) -> Images:
    """A CSV file with the columns `image` (a file, relative to the CSV's folder) and `caption`, a row a caption.

    Raises:
      UserError: a column or a file is missing, or a caption is empty; names the row.
    """
    captions: dict[str, list[str]] = {}
    with open(path, encoding="utf-8-sig", newline="") as f:
        reader = csv.DictReader(f)
        if missing := {"image", "caption"} - set(reader.fieldnames or ()):
            raise UserError(f"{path} has no column {listing(sorted(missing))}: its first row must be image,caption")
        for row in reader:
            if not row["image"] or not (row["caption"] or "").strip():
                raise UserError(f"{path}, line {reader.line_num}: image or caption is empty: mend the row")
            captions.setdefault(row["image"], []).append(row["caption"])
    paths = [path.parent / name for name in captions]
    if gone := next((p for p in paths if not p.is_file()), None):
        raise UserError(f"{path} names {gone}, which does not exist: fetch the image or remove its rows")
    if not paths:
        raise UserError(f"{path} has no rows: it needs image,caption in each")
    return image_files(paths, list(captions.values()), path.parent)


def read_names(path: str) -> list[str] | dict:
    """A JSON file with class names or prompt templates.

    Raises:
      UserError: it is missing, broken, or neither a list of texts nor an object.
    """
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as JSON ({e}): give a file with a list of texts, or an object") from e
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return value
    if isinstance(value, dict) and value:
        return value
    raise UserError(f"{path} must hold a list of texts, or an object with one entry a class")
