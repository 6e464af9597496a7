"""Zero-shot classification under shifts of ImageNet's distribution: V2, A, R, Sketch and ObjectNet.

Each set is scored among its own classes alone: a set of 200 of ImageNet's classes has 200 answers. A class is the mean
of its prompts, as in `zeroshot`.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from diva_jax.common.errors import UserError, listing
from diva_jax.data import labelled
from diva_jax.evals import Outcome, Settings, Task, encode, stats
from diva_jax.evals.tasks import zeroshot

_WNIDS = Path(__file__).with_name("imagenet_wnids.json")
_BORDER = 2  # Pixels around ObjectNet's images that are cut off; the outermost are red.
_MAPPING = "folder_to_objectnet_label.json"
_OVERLAP = "objectnet_to_imagenet_1k.json"


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `config.eval.robustness`."""

    templates: str = ""  # A JSON file of prompt templates; empty: ImageNet's 80.
    allow_partial: bool = False  # Whether a set may have fewer classes than the published one.


def default() -> ConfigDict:
    """The options and their defaults."""
    return ConfigDict(dataclasses.asdict(Options()))


def wnids() -> list[str]:
    """WordNet ids of ImageNet's 1000 classes by label."""
    return json.loads(_WNIDS.read_text("utf-8"))


def _folders(root: Path) -> list[Path]:
    return sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))


def _images(root: Path, folders: Mapping[str, int], classes: list[str]) -> labelled.Images:
    """The images of these folders, folder name -> label."""
    paths, labels = [], []
    for folder, label in folders.items():
        found = labelled.folder_images(root / folder)
        if not found:
            raise UserError(f"{root / folder} has no image in it: fetch its images, or remove the folder")
        paths += found
        labels += [label] * len(found)
    return labelled.image_files(paths, labels, root, classes=classes)


def _subset(root: Path, by_folder: Mapping[str, int], what: str) -> labelled.Images:
    """Images in folders that name classes of ImageNet; labels count the classes that are there, in ImageNet's order.

    Args:
      root: the folder of the folders.
      by_folder: name of a folder -> ImageNet's label.
      what: such a name, for the error.
    """
    names = [f.name for f in _folders(root)]
    if strange := [n for n in names if n not in by_folder]:
        raise UserError(f"{root / strange[0]} is not named after {what}: remove it, or give the set's folder")
    order = sorted(names, key=by_folder.__getitem__)
    every = zeroshot.imagenet("classes")
    return _images(root, {name: i for i, name in enumerate(order)}, [every[by_folder[n]] for n in order])


def by_wnid(root: Path) -> labelled.Images:
    """Folders named by WordNet id, as ImageNet-A, -R and -Sketch are."""
    return _subset(root, {wnid: i for i, wnid in enumerate(wnids())}, "a WordNet id of ImageNet")


def by_number(root: Path) -> labelled.Images:
    """Folders named by label, as ImageNet-V2's: the label is the number, whatever the order of the names."""
    return _subset(root, {str(i): i for i in range(1000)}, "a label of ImageNet, 0 to 999")


def _mapping(root: Path, name: str) -> dict[str, str]:
    path = next((p for p in (root / "mappings" / name, root / name) if p.is_file()), None)
    if path is None:
        raise UserError(f"{root} has no mappings/{name}: give ObjectNet's folder as it was unpacked")
    return labelled.read_names(str(path))


def objectnet(root: Path) -> labelled.Images:
    """ObjectNet's images of the 113 classes that it shares with ImageNet, under ObjectNet's names; borders cut off.

    `root` is the unpacked folder, with `images/<folder>/*.png` and `mappings/*.json`.
    """
    title_of, overlap = _mapping(root, _MAPPING), _mapping(root, _OVERLAP)
    if unknown := [title for title in overlap if title not in title_of.values()]:
        raise UserError(f"{root}/mappings/{_OVERLAP} has {unknown[0]!r}, which {_MAPPING} does not: fetch them again")
    folder_of = {title: folder for folder, title in title_of.items()}
    there = sorted(folder_of[t] for t in overlap if (root / "images" / folder_of[t]).is_dir())
    if not there:
        raise UserError(
            f"{root}/images has none of the {len(overlap)} folders that are classes of ImageNet: fetch them"
        )
    found = _images(root / "images", {f: i for i, f in enumerate(there)}, [title_of[f].lower() for f in there])

    def read(i: int) -> Image.Image:
        image = found.read(i)
        return image.crop((_BORDER, _BORDER, image.width - _BORDER, image.height - _BORDER))

    return dataclasses.replace(found, read=read)


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
    """Set -> folder, of a data path `v2=FOLDER,a=FOLDER`.

    Raises:
      UserError: it does not read so, or a set is not known or no folder.
    """
    pairs = [entry.partition("=") for entry in path.split(",")]
    if not all(sep and name in SETS and where for name, sep, where in pairs):
        raise UserError(f"--data=robustness={path} must read SET=FOLDER,SET=FOLDER with sets of {listing(list(SETS))}")
    found = {name: Path(where).expanduser() for name, _, where in pairs}
    if len(found) < len(pairs):
        raise UserError(f"--data=robustness={path} names a set twice: give each once")
    for name, where in found.items():
        if not where.is_dir():
            raise UserError(f"--data=robustness={path}: {name}={where} is not a folder")
    return found


def read_set(name: str, root: Path, allow_partial: bool) -> labelled.Images:
    """The images of a set, the number of its classes checked.

    Raises:
      UserError: a folder or an image is wrong, or classes are missing; names it.
    """
    shift = SETS[name]
    found = shift.read(root)
    if len(found.classes) != shift.classes and not allow_partial:
        raise UserError(
            f"{root} has {len(found.classes)} classes, {shift.title} has {shift.classes}: fetch the rest, or set "
            "--config.eval.robustness.allow_partial to score a part"
        )
    return found


class Robustness(Task):
    """The task; see `evals.Task`."""

    title, items = "Robustness", "images"

    def __init__(self, path: str, options: Options, settings: Settings):
        self.settings, roots = settings, paths_of(path)
        self.data = ",".join(f"{name}={root.resolve()}" for name, root in roots.items())
        self.sets = {name: read_set(name, root, options.allow_partial) for name, root in roots.items()}
        self._prompts, self.metrics = {}, {}
        for name, images in self.sets.items():
            self._prompts[name] = zeroshot.prompts(options.templates, images, images.classes)
            self.metrics[f"{name}_acc1"] = {"title": f"{SETS[name].title}, accuracy @1", "unit": "%"}
            self.metrics[f"{name}_mean_per_class_recall"] = {
                "title": f"{SETS[name].title}, mean per-class recall",
                "unit": "%",
            }
        prompts = (t for by_class in self._prompts.values() for texts in by_class for t in texts)
        self.texts = list(dict.fromkeys(prompts))
        self.count = sum(map(len, self.sets.values()))

    def _of(self, metric: str, held: dict) -> tuple[np.ndarray, dict]:
        """The values whose mean the metric is, and how to resample them."""
        name, _, what = metric.partition("_")
        strata = None if what == "acc1" else np.asarray(self.sets[name].targets)
        return held[name], dict(strata=strata, resamples=self.settings.bootstrap, seed=self.settings.seed)

    def evaluate(self, model) -> Outcome:
        """The scores of each set, and the predicted class of every image."""
        held, rows = {}, []
        for name, images in self.sets.items():
            prompts = self._prompts[name]
            texts = model.texts([t for by_class in prompts for t in by_class])
            classes = zeroshot.classifier(texts, [len(by_class) for by_class in prompts])
            logits = 100 * encode.unit(model.images(images.read, len(images))["pooled"]) @ classes.T
            best = logits.argmax(axis=1)
            held[name] = (best == np.asarray(images.targets)) & np.isfinite(logits).all(axis=1)
            rows += [
                {
                    "weights": model.label,
                    "metric": f"{name}_acc1",
                    "item": i,
                    "file": images.names[i],
                    "truth": images.classes[label],
                    "predicted": images.classes[best[i]],
                    "score": float(logits[i, best[i]]),
                    "correct": int(held[name][i]),
                }
                for i, label in enumerate(images.targets)
            ]
        scores = {}
        for metric in self.metrics:
            values, how = self._of(metric, held)
            interval = stats.percent(stats.bootstrap(values, **how))
            scores[metric] = {"score": 100 * stats.mean(values, how["strata"]), "interval": interval}
        return Outcome({"scores": scores}, rows, held)

    def compare(self, before: Outcome, after: Outcome) -> dict:
        """Paired differences; McNemar for the metrics that count each image once."""
        scores = {}
        for metric in self.metrics:
            (b, how), (a, _) = self._of(metric, before.held), self._of(metric, after.held)
            test = None if how["strata"] is not None else stats.mcnemar(b, a)
            scores[metric] = stats.paired(b, a, **how) | {"mcnemar": test}
        return {"scores": scores}


def prepare(path: str, section: ConfigDict, settings: Settings) -> Robustness:
    """The task on `path`, `SET=FOLDER,SET=FOLDER` with sets of `SETS`."""
    return Robustness(path, Options(**section), settings)
