"""Complete sets of labelled or captioned images, for evaluation: tars, tfds, class folders and CSV files. A broken
image or row is an error here, since every image counts in a score; the sources of training skip it."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from diva_jax.common import json_files
from diva_jax.common.errors import UserError, brief, explained, listing
from diva_jax.data import files, tars as shards
from diva_jax.data.images import open_image, read_file
from diva_jax.data.sources import MAX_CAPTION_BYTES, TfdsSource

_LAYOUT = "PATH/test/0.tar, 1.tar, ... as clip_benchmark_export_wds writes them"
_TEMPLATES = "zeroshot_classification_templates.txt"
_SPLITS = frozenset("train training test testing val valid validation dev".split())


@dataclasses.dataclass(frozen=True)
class Images:
    """Images 0..N-1 with their targets: labels (int) or captions (lists of texts). `read(i)` gives a decoded image in
    any thread; a UserError names a broken one. By label, where the data has them: `classes` (names) and `folders`;
    `templates` are the data's own prompts, with `{c}` for the class."""

    names: Sequence[str]
    read: Callable[[int], Image.Image]
    targets: Sequence
    classes: list[str] | None = None
    templates: list[str] | None = None
    folders: list[str] | None = None

    def __len__(self) -> int:
        return len(self.names)


def lines(path: Path) -> list[str] | None:
    """The stripped lines of a text file, without empty ones at its end; None where it does not exist."""
    return [line.strip() for line in files.read_text(path).rstrip().split("\n")] if path.exists() else None


def _natural(name: str) -> list:
    """A sort key for which numbers in names count as numbers: 0.tar, 2.tar, 10.tar."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


def _shards(root: Path) -> tuple[Path, list[Path]]:
    """(the folder with classnames.txt, the shards) of a data set's folder, or of one of its splits."""
    split = root / "test" if (root / "test").is_dir() else root
    paths = sorted(split.glob("*.tar"), key=lambda path: _natural(path.name))
    count = split / "nshards.txt"
    if count.exists():
        number = files.read_text(count).strip()
        if not re.fullmatch(r"[0-9]{1,6}", number):
            raise UserError(f"{count} holds {brief(number)}, which is not a number of shards: write it again")
        paths = [split / f"{i}.tar" for i in range(int(number))]
        if missing := [p for p in paths if not p.exists()]:
            raise UserError(f"{count} counts {len(paths)} shards, but {missing[0].name} is missing: fetch it")
    if split == root and not any((root / f).exists() for f in ("classnames.txt", "dataset_type.txt")):
        return root.parent, paths  # One split of a data set.
    return root, paths


def has_tars(root: Path) -> bool:
    """Whether a folder, or its split `test`, has tar shards."""
    return any(root.glob("*.tar")) or any((root / "test").glob("*.tar"))


def tars(root: Path, target: str, parse: Callable[[str], object]) -> Images:
    """CLIP_benchmark's webdataset layout: a folder with `test/*.tar`, or one split of it with its tars. `target` is the
    extension of the members with the targets, "cls" or "txt", and `parse` makes a target of such a text. A UserError
    names a shard that is broken, or a sample without an image or a target."""
    top, paths = _shards(root)
    places, names, targets, others, unread = [], [], [], [], []
    for shard in map(str, paths):
        with explained(f"{shard} cannot be read as a tar archive", "fetch it again"):
            members, complaint = shards.scan(shard)
            if complaint:
                raise OSError(f"it {complaint}")
        unread += [m.name for m in members if files.kind_of(m.name) == files.UNREAD]
        for sample in files.group(((m.name, m) for m in members), shard).values():
            images = files.images_of(sample)
            member = files.beside(sample, images[0], target) if images else None
            if member is None:
                lacks = f"a .{target} member" if images else "an image"
                at = next(iter(sample.values())).offset
                raise UserError(f"{shard}: the sample at byte {at} lacks {lacks}: write the shard again")
            with explained(f"{shard}: {brief(member.name)} cannot be used", "write the shard again", ValueError):
                if max(member.size - MAX_CAPTION_BYTES, sample[images[0]].size - files.MAX_IMAGE_BYTES) > 0:
                    raise ValueError("the sample is larger than any")
                targets.append(parse(files.read_range(shard, member.offset, member.size).decode("utf-8-sig")))
            names.append(f"{Path(shard).name}[{len(names)}]")
            places.append((shard, *sample[images[0]][1:]))
            others += [sample[e].name for e in images[1:]]
    if not places:
        raise UserError(f"{root} has no samples in {len(paths)} tar shards: give a folder with {_LAYOUT}")
    files.say_left_out(str(root), files.left_out(others), files.left_out(unread))

    def read(i: int) -> Image.Image:
        return open_image(files.read_range(*places[i]), f"{places[i][0]}, byte {places[i][1]}", rgb=True)

    return Images(names, read, targets, lines(top / "classnames.txt"), lines(top / _TEMPLATES))


def tfds(spec: str) -> Images:
    """A prepared tfds dataset with labels: `tfds:name/split[?data_dir=...&image=...&label=...]`, see `TfdsSource`."""
    source = TfdsSource(spec, "--data", {"image": "image", "label": "label"})
    names = [source.name(i).removeprefix("tfds:") for i in range(len(source))]
    read = functools.partial(source.read, with_text=False)
    return Images(names, lambda i: open_image(read(i).image, names[i], rgb=True), *source.labels())


def image_files(paths: Sequence[str | Path], targets: Sequence, root: Path, rgb: bool = True, **kw) -> Images:
    return Images([os.path.relpath(p, root) for p in paths], lambda i: read_file(paths[i], rgb), targets, **kw)


def in_folders(root: Path, labels: Mapping[str, int], **kw) -> Images:
    """All images below the folders of a root, given as name -> label, also where training would take several for one
    sample; a UserError names a folder without an image."""
    paths, targets, unread = [], [], []
    for name, label in labels.items():
        there = files.walk(str(root / name))
        unread += [f for f in there if files.kind_of(f) == files.UNREAD]
        if not (images := [f for f in there if files.kind_of(f) == "images"]):
            raise UserError(f"{root / name} has no image in it: fetch its images, or remove the folder")
        paths += images
        targets += [label] * len(images)
    files.say_left_out(str(root), (0, []), files.left_out(unread))
    return image_files(paths, targets, root, folders=list(labels), **kw)


def class_folders(root: Path) -> Images:
    """`root/<class>/.../<image>`: labels by the sorted order of the folders, as in torchvision's ImageFolder, or by
    number where all are numbers. `classes` are the lines of `root/classnames.txt`, or else the folders' names; prompts
    are those of the tar layout. A UserError where there are no folders, those of splits, or another number of names."""
    names = sorted(f.name for f in root.iterdir() if f.is_dir() and not files.hidden(f.name))
    if all(re.fullmatch("[0-9]{1,18}", name) for name in names):
        names.sort(key=_natural)
    splits = [name for name in names if name.lower() in _SPLITS]
    if splits and len(splits) in (len(names), 2, 3):
        problem = f"{root} has the folders {listing(splits)}, which are splits of a data set and no classes"
        raise UserError(f"{problem}: give one of them")
    if not names:
        raise UserError(f"{root} has neither tar shards nor a folder of images for each class: give one that has")
    labels = {name: label for label, name in enumerate(names)}
    classes = lines(root / "classnames.txt") or names
    if len(classes) != len(names):
        problem = f"{root}/classnames.txt has {len(classes)} names, but there are {len(names)} folders of classes"
        raise UserError(f"{problem}: give each folder a name, in the order of the folders")
    return in_folders(root, labels, classes=classes, templates=lines(root / _TEMPLATES))


def caption_csv(path: Path) -> Images:
    """A CSV file with the columns `image` (a file, relative to the CSV's folder) and `caption`, one caption per row. A
    UserError names the line of a missing file or an empty cell."""
    captions: dict[str, list[str]] = {}
    for line, row in files.csv_records(str(path), ("image", "caption")):
        if not row.get("image") or not row.get("caption", "").strip():
            raise UserError(f"{path}, line {line}: image or caption is empty: complete the row")
        if reason := files.no_path(row["image"]):
            raise UserError(f"{path}, line {line}: {reason}")
        captions.setdefault(os.path.normpath(row["image"]), []).append(row["caption"])
    paths = [path.parent / name for name in captions]
    if gone := next((p for p in paths if not os.path.isfile(p)), None):
        raise UserError(f"{path} names {brief(str(gone), 300)}, which does not exist: fetch it or remove its rows")
    if not paths:
        raise UserError(f"{path} has no rows: it needs image,caption in each")
    return image_files(paths, list(captions.values()), path.parent)


def read_names(path: str) -> list[list[str]] | dict[str, list[str]]:
    """A JSON file with class names or prompt templates, as lists by label or by class; a text stands for a list of one.
    A UserError where it has anything else in it, such as a number or an empty text."""
    value = json_files.parse(path, files.read_text(os.path.expanduser(path)))
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list | dict) or not value:
        raise UserError(f"{path} must hold a list of texts, or an object with one entry per class")
    items = value.items() if isinstance(value, dict) else enumerate(value)
    by_key = {k: [v] if isinstance(v, str) else v for k, v in items}
    for key, entry in by_key.items():
        if not isinstance(entry, list) or not entry or not all(isinstance(t, str) and t.strip() for t in entry):
            where = f"{path} has {brief(entry)} at {brief(key)}"
            raise UserError(f"{where}, where it must hold a text or a list of texts, none empty")
    return by_key if isinstance(value, dict) else list(by_key.values())
