"""Zero-shot classification under shifts of ImageNet's distribution: V2, A, R, Sketch and ObjectNet. Each set is scored
among its own classes alone: a set of 200 of ImageNet's classes has 200 answers."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict
from PIL import Image

from diva_jax.common.errors import UserError
from diva_jax.common.fields import field
from diva_jax.common.json_files import packaged
from diva_jax.data import files, labelled
from diva_jax.evals import Classified, Settings, require_count, set_and_folder
from diva_jax.evals.tasks import zeroshot

# Set -> (title, number of classes).
SETS = packaged(__file__, "robustness.json")["sets"]
# Pixels that are cut off around ObjectNet's images, of which the outermost are red.
_BORDER = 2
_MAPPING = "folder_to_objectnet_label.json"
_OVERLAP = "objectnet_to_imagenet_1k.json"


@dataclasses.dataclass(frozen=True)
class RobustnessOptions:
    """The section `config.eval.robustness`."""

    templates: str = field("", "A JSON file of prompt templates; if empty, ImageNet's 80 are used.")
    allow_partial: bool = field(False, "Whether a set may have fewer classes than the published one.")


def _subset(root: Path, known: Sequence[str], what: str) -> labelled.Images:
    """Images in folders that name (`what`) classes of ImageNet; `known` are the names of all by label. Labels count the
    classes that are there, in ImageNet's order."""
    names = {f.name for f in root.iterdir() if f.is_dir() and not files.hidden(f.name)}
    if strange := sorted(names.difference(known)):
        raise UserError(f"{root / strange[0]} is not named after {what}: remove it, or give the set's folder")
    there = [(name, title) for name, title in zip(known, zeroshot.imagenet("classes"), strict=True) if name in names]
    labels = {name: i for i, (name, _) in enumerate(there)}
    return labelled.in_folders(root, labels, classes=[title for _, title in there])


def _mapping(root: Path, name: str) -> dict[str, str]:
    path = next((p for p in (root / "mappings" / name, root / name) if p.is_file()), None)
    if path is None:
        raise UserError(f"{root} has no mappings/{name}: give ObjectNet's folder as it was unpacked")
    names = labelled.read_names(str(path))
    if not isinstance(names, dict):
        raise UserError(f"{path} is no object from one name to another: fetch it again")
    return {name: given[0] for name, given in names.items()}


def _objectnet(root: Path) -> labelled.Images:
    """ObjectNet's images, `images/<folder>/*.png` with `mappings/*.json`, of the 113 classes that it shares with
    ImageNet, under ObjectNet's names; borders cut off."""
    title_of, overlap = _mapping(root, _MAPPING), _mapping(root, _OVERLAP)
    if unknown := [title for title in overlap if title not in title_of.values()]:
        raise UserError(f"{root}/mappings/{_OVERLAP} has {unknown[0]!r}, which {_MAPPING} does not: fetch them again")
    folder_of = {title: folder for folder, title in title_of.items()}
    there = sorted(folder_of[t] for t in overlap if (root / "images" / folder_of[t]).is_dir())
    labels = {folder: i for i, folder in enumerate(there)}
    images = labelled.in_folders(root / "images", labels, classes=[title_of[f].lower() for f in there])

    def read(i: int) -> Image.Image:
        image = images.read(i)
        return image.crop((_BORDER, _BORDER, image.width - _BORDER, image.height - _BORDER))

    return dataclasses.replace(images, read=read)


def read_set(name: str, root: Path, allow_partial: bool) -> labelled.Images:
    """The images of a set, the number of its classes checked; a UserError names what is wrong or missing. Folders are
    named by WordNet id, those of ImageNet-V2 by label, whatever the order of the names."""
    title, classes = SETS[name]
    if name == "objectnet":
        images = _objectnet(root)
    elif name == "v2":
        images = _subset(root, list(map(str, range(1000))), "a label of ImageNet, 0 to 999")
    else:
        images = _subset(root, zeroshot.imagenet("wnids"), "a WordNet id of ImageNet")
    if not (allow_partial and images.classes):
        require_count(root, len(images.classes), classes, title, "classes", "robustness.allow_partial")
    return images


class Robustness(zeroshot.PromptedTask):
    """The task on `path`, `SET=FOLDER,SET=FOLDER` with sets of `SETS`."""

    title = "Robustness"

    def __init__(self, path: str, section: ConfigDict, settings: Settings):
        options, entries = RobustnessOptions(**section), path.split(",")
        self.settings, roots = settings, dict(set_and_folder("robustness", entry, SETS) for entry in entries)
        if len(roots) < len(entries):
            raise UserError(f"--data=robustness={path} names a set twice: give each once")
        self.data = ",".join(f"{name}={root.resolve()}" for name, root in roots.items())
        classified = {}
        for name, root in roots.items():
            images = read_set(name, root, options.allow_partial)
            prompts = zeroshot.prompts(options.templates, images, [[name] for name in images.classes])
            classified[f"{name}_"] = Classified(SETS[name][0], images, images.classes, prompts=prompts)
        self.set_classified(classified)


SECTION, prepare = RobustnessOptions, Robustness
