"""Complete sets of labelled or captioned images, for evaluation: tars, tfds, class folders and CSV files.

A broken image or row is an error here, since every image counts in a score; the sources of training skip it.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from diva_jax.common.errors import UserError, brief
from diva_jax.data import files, texts
from diva_jax.data import tars as shards
from diva_jax.data.images import open_image, read_file
from diva_jax.data.tfds_source import TfdsSource

_LAYOUT = "PATH/test/0.tar, 1.tar, ... as clip_benchmark_export_wds writes them"
_TEMPLATES = "zeroshot_classification_templates.txt"
_IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")


@dataclasses.dataclass(frozen=True)
class Images:
    """Images 0..N-1 with their targets.

    Attributes:
      names: of each image, for results and errors.
      read: i -> image i, decoded; may be called from any thread, and raises a UserError that names a broken image.
      targets: the label (int) or the captions (list of texts) of each image.
      classes: class names by label; None where there are no labels, or the data does not name them.
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
    """The stripped lines of a text file; None where it does not exist."""
    return [line.strip() for line in texts.read_text(path).splitlines()] if path.exists() else None


def _natural(path: Path) -> list:
    """A sort key for which numbers in names count as numbers: 0.tar, 2.tar, 10.tar."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _shards(root: Path) -> tuple[Path, list[Path]]:
    """(the folder with classnames.txt, the shards) of a data set's folder, or of one of its splits."""
    split = root / "test" if (root / "test").is_dir() else root
    paths = sorted(split.glob("*.tar"), key=_natural)
    count = split / "nshards.txt"
    if count.exists():
        number = texts.read_text(count).strip()
        if not re.fullmatch(r"[0-9]{1,6}", number):
            raise UserError(f"{count} holds {brief(number)}, which is not a number of shards: write it again")
        paths = [split / f"{i}.tar" for i in range(int(number))]
        if missing := [p for p in paths if not p.exists()]:
            raise UserError(f"{count} counts {len(paths)} shards, but {missing[0].name} is missing: fetch it")
    here = any((split / f).exists() for f in ("classnames.txt", "dataset_type.txt"))
    return (split if here else split.parent) if split == root else root, paths


def has_tars(root: Path) -> bool:
    """Whether a folder, or its split `test`, has tar shards."""
    return any(root.glob("*.tar")) or any((root / "test").glob("*.tar"))


def _samples(shard: str) -> list[dict[str, shards.Member]]:
    """The samples of a shard in archive order: extension -> member."""
    try:
        members, complaint = shards.scan(shard)
    except OSError as e:
        raise UserError(f"{shard} cannot be read as a tar archive ({e}): fetch it again") from e
    if complaint:
        raise UserError(f"{shard} cannot be read as a tar archive (it {complaint}): fetch it again")
    return list(shards.samples(members).values())


def tars(root: Path, target: str, parse: Callable[[str], object]) -> Images:
    """CLIP_benchmark's webdataset layout.

    Args:
      root: the folder with `test/*.tar`, or one split of it with its tars.
      target: the extension of the members with the targets, "cls" or "txt".
      parse: text of such a member -> target; raises ValueError.

    Raises:
      UserError: a shard is missing or broken, or a sample has no image or no target; names them.
    """
    top, paths = _shards(root)
    if not paths:
        raise UserError(f"{root} has no tar shards: give a folder with {_LAYOUT}")
    places, names, targets = [], [], []
    for shard in map(str, paths):
        for sample in _samples(shard):
            image = next((sample[e] for e in _IMAGE_EXTENSIONS if e in sample), None)
            if image is None or target not in sample:
                lacks = "an image" if image is None else f"a .{target} member"
                at = next(iter(sample.values())).offset
                raise UserError(f"{shard}: the sample at byte {at} lacks {lacks}: write the shard again")
            text = files.read_range(shard, *sample[target][1:]).decode("utf-8", "replace")
            try:
                targets.append(parse(text))
            except ValueError as e:
                raise UserError(f"{shard}: .{target} holds {text[:40]!r} ({e}): write the shard again") from e
            names.append(f"{Path(shard).name}[{len(names)}]")
            places.append((shard, image.offset, image.size))
    if not places:
        raise UserError(f"the {len(paths)} shards from {paths[0]} on hold no samples: give a folder with {_LAYOUT}")

    def read(i: int) -> Image.Image:
        return open_image(files.read_range(*places[i]), f"{places[i][0]}, byte {places[i][1]}", rgb=True)

    return Images(names, read, targets, lines(top / "classnames.txt"), lines(top / _TEMPLATES))


def tfds(spec: str) -> Images:
    """A prepared tfds dataset with labels, see `TfdsSource`.

    Args:
      spec: `tfds:name/split[?data_dir=...&image=image&label=label]`.

    Raises:
      UserError: it is not there, not in array_record format, or has no such features.
    """
    source = TfdsSource(spec, "--data", {"image": "image", "label": "label"})
    targets, classes = source.labels(source.options["label"])
    names = [source.name(i).removeprefix("tfds:") for i in range(len(source))]
    return Images(
        names, lambda i: open_image(source.read(i, with_text=False).image, names[i], rgb=True), targets, classes
    )


def folder_images(root: Path) -> list[Path]:
    """Every image file below a folder, sorted."""
    return [Path(f) for f in files.walk(str(root)) if files.kind_of(f) == "images"]


def image_files(paths: Sequence[Path], targets: Sequence, root: Path, rgb: bool = True, **kw) -> Images:
    """Images in files of their own.

    Args:
      paths: the files.
      targets: of each.
      root: what names are relative to.
      rgb: see `images.decode`.
      **kw: further fields of `Images`.
    """

    names = [os.path.relpath(p, root) for p in paths]
    return Images(names, lambda i: read_file(paths[i], rgb), targets, **kw)


def in_folders(root: Path, labels: Mapping[str, int], **kw) -> Images:
    """All images below some folders of a root.

    Args:
      root: the folder of the folders.
      labels: name of a folder -> label of its images.
      **kw: further fields of `Images`.

    Raises:
      UserError: a folder has no image.
    """
    paths, targets = [], []
    for name, label in labels.items():
        images = folder_images(root / name)
        if not images:
            raise UserError(f"{root / name} has no image in it: fetch its images, or remove the folder")
        paths += images
        targets += [label] * len(images)
    return image_files(paths, targets, root, **kw)


def class_folders(root: Path) -> Images:
    """`root/<class>/.../<image>`: labels by the sorted order of the folders, as in torchvision's ImageFolder.

    `classes` are the lines of `root/classnames.txt`, or else the folders' names; prompts are read as in the tar layout.

    Raises:
      UserError: no folders, or a folder without an image.
    """
    names = sorted(f.name for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not names:
        raise UserError(f"{root} has neither tar shards nor a folder of images for each class: give one that has")
    labels = {name: label for label, name in enumerate(names)}
    return in_folders(root, labels, classes=lines(root / "classnames.txt") or names, templates=lines(root / _TEMPLATES))


def caption_csv(path: Path) -> Images:
    """A CSV file with the columns `image` (a file, relative to the CSV's folder) and `caption`, one caption per row.

    Raises:
      UserError: a column or a file is missing, or a caption is empty; names the line.
    """
    captions: dict[str, list[str]] = {}
    for line, row in texts.csv_records(str(path), ("image", "caption")):
        if not row.get("image") or not row.get("caption", "").strip():
            raise UserError(f"{path}, line {line}: image or caption is empty: complete the row")
        captions.setdefault(row["image"], []).append(row["caption"])
    paths = [path.parent / name for name in captions]
    if gone := next((p for p in paths if not texts.is_file(p)), None):
        raise UserError(f"{path} names {str(gone)[:300]}, which does not exist: fetch the image or remove its rows")
    if not paths:
        raise UserError(f"{path} has no rows: it needs image,caption in each")
    return image_files(paths, list(captions.values()), path.parent)


def read_names(path: str) -> list[str] | dict:
    """A JSON file with class names or prompt templates.

    Raises:
      UserError: it is missing, broken, or neither a list of texts nor an object.
    """
    value = texts.parse_json(texts.read_text(path), path)
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return value
    if isinstance(value, dict) and value:
        return value
    raise UserError(f"{path} must hold a list of texts, or an object with one entry per class")
