"""Zero-shot classification under shifts of ImageNet's distribution: V2, A, R, Sketch and ObjectNet. Each set is scored
among its own classes alone: a set of 200 of ImageNet's classes has 200 answers."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from diva_jax.common.errors import UserError, listing
from diva_jax.common.fields import field
from diva_jax.data import labelled
from diva_jax.evals import Settings, encode
from diva_jax.evals.classification import ClassificationTask, Classified
from diva_jax.evals.items import require_count, set_and_folder
from diva_jax.evals.tasks import zeroshot

# Pixels that are cut off around ObjectNet's images, of which the outermost are red.
_BORDER = 2
_MAPPING = "folder_to_objectnet_label.json"
_OVERLAP = "objectnet_to_imagenet_1k.json"


@dataclasses.dataclass(frozen=True)
class RobustnessOptions:
    """The section `config.eval.robustness`."""

    templates: str = field("", "A JSON file of prompt templates; if empty, ImageNet's 80 are used.")
    allow_partial: bool = field(False, "Whether a set may have fewer classes than the published one.")


SECTION = RobustnessOptions


def _subset(root: Path, by_folder: Mapping[str, int], what: str) -> labelled.Images:
    """Images in folders that name (`what`) classes of ImageNet, folder name -> ImageNet's label. Labels count the
    classes that are there, in ImageNet's order."""
    names = sorted(f.name for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    if strange := [n for n in names if n not in by_folder]:
        raise UserError(f"{root / strange[0]} is not named after {what}: remove it, or give the set's folder")
    order = sorted(names, key=by_folder.__getitem__)
    every = zeroshot.imagenet("classes")
    labels = {name: i for i, name in enumerate(order)}
    return labelled.in_folders(root, labels, classes=[every[by_folder[n]] for n in order])


def by_wnid(root: Path) -> labelled.Images:
    """Folders named by WordNet id, as ImageNet-A, -R and -Sketch are."""
    return _subset(root, {wnid: i for i, wnid in enumerate(zeroshot.wnids())}, "a WordNet id of ImageNet")


def by_number(root: Path) -> labelled.Images:
    """Folders named by label, as ImageNet-V2's: the label is the number, whatever the order of the names."""
    return _subset(root, {str(i): i for i in range(1000)}, "a label of ImageNet, 0 to 999")


def _mapping(root: Path, name: str) -> dict[str, str]:
    path = next((p for p in (root / "mappings" / name, root / name) if p.is_file()), None)
    if path is None:
        raise UserError(f"{root} has no mappings/{name}: give ObjectNet's folder as it was unpacked")
    names = labelled.read_names(str(path))
    if not isinstance(names, dict):
        raise UserError(f"{path} is no object from one name to another: fetch it again")
    return {name: given[0] for name, given in names.items()}


def objectnet(root: Path) -> labelled.Images:
    """ObjectNet's images, `images/<folder>/*.png` with `mappings/*.json`, of the 113 classes that it shares with
    ImageNet, under ObjectNet's names; borders cut off."""
    title_of, overlap = _mapping(root, _MAPPING), _mapping(root, _OVERLAP)
    if unknown := [title for title in overlap if title not in title_of.values()]:
        raise UserError(f"{root}/mappings/{_OVERLAP} has {unknown[0]!r}, which {_MAPPING} does not: fetch them again")
    folder_of = {title: folder for folder, title in title_of.items()}
    there = sorted(folder_of[t] for t in overlap if (root / "images" / folder_of[t]).is_dir())
    if not there:
        raise UserError(
            f"{root}/images has none of the {len(overlap)} folders that are classes of ImageNet: fetch them"
        )
    labels = {folder: i for i, folder in enumerate(there)}
    images = labelled.in_folders(root / "images", labels, classes=[title_of[f].lower() for f in there])

    def read(i: int) -> Image.Image:
        image = images.read(i)
        return image.crop((_BORDER, _BORDER, image.width - _BORDER, image.height - _BORDER))

    return dataclasses.replace(images, read=read)


@dataclasses.dataclass(frozen=True)
class Shift:
    """A published set: its title, how it is read, and its number of classes."""

    title: str
    read: Callable[[Path], labelled.Images]
    classes: int


SETS: dict[str, Shift] = {
    "v2": Shift("ImageNet-V2", by_number, 1000),
    "a": Shift("ImageNet-A", by_wnid, 200),
    "r": Shift("ImageNet-R", by_wnid, 200),
    "sketch": Shift("ImageNet-Sketch", by_wnid, 1000),
    "objectnet": Shift("ObjectNet", objectnet, 113),
}


def paths_of(path: str) -> dict[str, Path]:
    """Set -> folder, of a data path `v2=FOLDER,a=FOLDER`; a UserError where a set is not known or no folder."""
    entries = [set_and_folder(entry, SETS) for entry in path.split(",")]
    if not all(entries):
        raise UserError(f"--data=robustness={path} must read SET=FOLDER,SET=FOLDER with sets of {listing(list(SETS))}")
    folders = dict(entries)
    if len(folders) < len(entries):
        raise UserError(f"--data=robustness={path} names a set twice: give each once")
    for name, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"--data=robustness={path}: {name}={folder} is not a folder")
    return folders


def read_set(name: str, root: Path, allow_partial: bool) -> labelled.Images:
    """The images of a set, the number of its classes checked; a UserError names what is wrong or missing."""
    shift = SETS[name]
    images = shift.read(root)
    if not allow_partial:
        require_count(root, len(images.classes), shift.classes, shift.title, "classes", "robustness.allow_partial")
    return images


class Robustness(ClassificationTask):
    """The task on `path`, `SET=FOLDER,SET=FOLDER` with sets of `SETS`."""

    title = "Robustness"

    def __init__(self, path: str, section: ConfigDict, settings: Settings):
        options = RobustnessOptions(**section)
        self.settings, roots = settings, paths_of(path)
        self.data = ",".join(f"{name}={root.resolve()}" for name, root in roots.items())
        sets = {name: read_set(name, root, options.allow_partial) for name, root in roots.items()}
        self.set_classified({f"{n}_": Classified(SETS[n].title, s, s.classes, at5=False) for n, s in sets.items()})
        self._prompts = {
            prefix: zeroshot.prompts(options.templates, data.images, [[name] for name in data.classes])
            for prefix, data in self.classified.items()
        }
        prompts = (t for by_class in self._prompts.values() for texts in by_class for t in texts)
        self.texts = list(dict.fromkeys(prompts))
        self.count = sum(map(len, sets.values()))

    def _logits(self, model) -> Iterator[tuple[str, np.ndarray]]:
        for prefix, prompts in self._prompts.items():
            images = self.classified[prefix].images
            texts = model.texts([t for by_class in prompts for t in by_class])
            classes = zeroshot.classifier(texts, [len(by_class) for by_class in prompts])
            embeddings = encode.unit(model.images(images.read, len(images))["pooled"])
            yield prefix, zeroshot.LOGIT_SCALE * embeddings @ classes.T

    def answer(self, model):
        """The predicted class of every image among those of its own set."""
        return *self.classify(self._logits(model)), {}


prepare = Robustness
