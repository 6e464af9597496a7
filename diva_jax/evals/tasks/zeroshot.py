"""Zero-shot classification as CLIP_benchmark does it: acc@1, acc@5 and mean per-class recall.

A class is the mean of its prompts' normalised embeddings, normalised again; an image belongs to the class with the
highest cosine.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from diva_jax.common.errors import UserError, listing
from diva_jax.common.fields import field
from diva_jax.data import labelled
from diva_jax.evals import Settings, encode
from diva_jax.evals.classification import MIN_CLASSES_AT_5, ClassificationTask, Classified
from diva_jax.evals.items import resolved

_IMAGENET = Path(__file__).with_name("imagenet.json")
# Factor of the cosines, as in every published evaluation; no answer depends on it.
LOGIT_SCALE = 100


@dataclasses.dataclass(frozen=True)
class ZeroShotOptions:
    """The section `config.eval.zeroshot`."""

    classes: str = field("", 'A JSON file of class names, or "imagenet"; if empty, the data\'s own are used.')
    templates: str = field(
        "", "A JSON file of prompt templates; if empty, the data's own are used, or else ImageNet's."
    )


SECTION = ZeroShotOptions


def imagenet(what: str) -> list[str]:
    """ImageNet's 1000 "classes" or its 80 "templates", as OpenAI published them for CLIP."""
    return json.loads(_IMAGENET.read_text("utf-8"))[what]


def class_names(given: str, images: labelled.Images) -> list[str]:
    """The class names by label.

    Args:
      given: `ZeroShotOptions.classes`; "imagenet", a JSON list by label, a JSON object folder name -> class name, or
        empty: the data's own.
      images: the data.

    Raises:
      UserError: names are missing, or do not fit the labels.
    """
    if given == "imagenet":
        names = imagenet("classes")
    else:
        names = labelled.read_names(given) if given else images.classes
    if names is None:
        raise UserError(
            "the data names no classes (no classnames.txt): set --config.eval.zeroshot.classes=FILE.json with a list"
        )
    if isinstance(names, dict):
        if missing := [c for c in images.classes or () if c not in names]:
            raise UserError(f"{given} has no name for {listing(missing, 5)}: add it")
        names = [names[c] for c in images.classes or ()]
    labels = np.asarray(images.targets)
    if not len(names) > labels.max() or labels.min() < 0:
        raise UserError(
            f"there are {len(names)} class names, but labels from {labels.min()} to {labels.max()}: "
            "set --config.eval.zeroshot.classes=FILE.json with a name for every label"
        )
    return list(names)


def prompts(given: str, images: labelled.Images, classes: list[str]) -> list[list[str]]:
    """The texts of each class.

    Args:
      given: `ZeroShotOptions.templates`: a JSON list of templates with `{c}`, a JSON object class -> texts, or empty:
        the data's own, or else ImageNet's 80.

    Raises:
      UserError: a class has no texts, or a template no `{c}`.
    """
    templates = labelled.read_names(given) if given else images.templates or imagenet("templates")
    where = given or "zeroshot_classification_templates.txt"
    if isinstance(templates, Mapping):
        if missing := [c for c in classes if not templates.get(c)]:
            raise UserError(f"{where} has no prompts for {listing(missing, 5)}: add them")
        return [[t.replace("{c}", c) for t in templates[c]] for c in classes]
    if bad := [t for t in templates if "{c}" not in t]:
        raise UserError(f"{where}: the template {bad[0]!r} has no {{c}} where the class goes: add it")
    return [[t.replace("{c}", c) for t in templates] for c in classes]


def classifier(embeddings: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Prompt embeddings [sum(sizes), D], ordered by class -> unit class embeddings [C, D]; `sizes` is per class."""
    ends = np.cumsum(sizes)
    parts = np.split(encode.unit(embeddings), ends[:-1])
    return encode.unit(np.stack([p.mean(axis=0) for p in parts]))


def open_data(path: str, task: str = "zeroshot") -> labelled.Images:
    """tfds, tars in CLIP_benchmark's layout, or class folders; the form is detected from the path and its contents."""
    if path.startswith("tfds:"):
        return labelled.tfds(path)
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"--data={task}={path} is not a folder: give tar shards, class folders or tfds:name/split")
    return labelled.tars(root, "cls", int) if labelled.has_tars(root) else labelled.class_folders(root)


class ZeroShot(ClassificationTask):
    """The task; see `evals.Task`."""

    title, lists_top5 = "Zero-shot classification", True

    def __init__(self, path: str, options: ZeroShotOptions, settings: Settings):
        self.settings, self.images, self.data = settings, open_data(path), resolved(path)
        self.count = len(self.images)
        self.classes = class_names(options.classes, self.images)
        texts = prompts(options.templates, self.images, self.classes)
        self._sizes = [len(t) for t in texts]
        self.texts = [t for per_class in texts for t in per_class]
        self.set_classified({"": Classified("", self.images, self.classes, len(self.classes) >= MIN_CLASSES_AT_5)})

    def answer(self, model):
        """The predicted classes of every image."""
        classes = classifier(model.texts(self.texts), self._sizes)
        images = encode.unit(model.images(self.images.read, self.count)["pooled"])
        held, rows = self.classify([("", LOGIT_SCALE * images @ classes.T)])
        return held, rows, {"classes": len(self.classes)}


def prepare(path: str, section: ConfigDict, settings: Settings) -> ZeroShot:
    """The task on `path`: tfds:name/split, tars in CLIP_benchmark's layout, or a folder of class folders."""
    return ZeroShot(path, ZeroShotOptions(**section), settings)
