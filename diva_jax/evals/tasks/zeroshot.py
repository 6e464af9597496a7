"""Zero-shot classification as CLIP_benchmark does it: acc@1, acc@5 and mean per-class recall. A class is the mean of
its prompts' normalised embeddings, normalised again; an image belongs to the class with the highest cosine."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from diva_jax.common import log, paths
from diva_jax.common.errors import UserError, listing
from diva_jax.common.fields import field
from diva_jax.common.json_files import packaged
from diva_jax.data import labelled
from diva_jax.evals import AT, LOGIT_SCALE, ClassificationTask, Classified, Settings, encode, resolved

# Where a template has the class: CLIP_benchmark's form, or OpenAI's.
_PLACE = re.compile(r"\{c?\}")
# A class name that is rather a number or an identifier.
_CODE = re.compile(r"(class|label|[a-z]?)[-_ ]?[0-9]+", re.I)


@dataclasses.dataclass(frozen=True)
class ZeroShotOptions:
    """The section `config.eval.zeroshot`."""

    classes: str = field("", 'A JSON file of class names, or "imagenet"; if empty, the data\'s own are used.')
    templates: str = field("", "A JSON file of prompt templates; if empty, the data's own are used, or ImageNet's.")


@functools.cache
def imagenet(what: str) -> tuple[str, ...]:
    """ImageNet's 1000 "classes" and 80 "templates", as OpenAI published them, or "wnids" of WordNet, by label."""
    return packaged(__file__, "imagenet.json")[what]


def class_names(given: str, images: labelled.Images) -> list[list[str]]:
    """The names of each class by label, one or several synonyms, from `ZeroShotOptions.classes`: "imagenet", a JSON
    list by label, a JSON object from folder (where there are none, from label) to name, or empty: the data's own. A
    UserError where names are missing, or do not fit the labels."""
    folders = images.folders
    if given == "imagenet":
        names = [[name] for name in imagenet("classes")]
        by_wnid = dict(zip(imagenet("wnids"), names, strict=True))
        names = by_wnid if folders and set(folders) <= by_wnid.keys() else names
    elif given:
        names = labelled.read_names(given)
    elif images.classes:
        names = [[name] for name in images.classes]
    else:
        raise UserError("the data names no classes: set config.eval.zeroshot.classes=FILE.json, or add classnames.txt")
    if isinstance(names, dict):
        keys = folders or list(map(str, range(len(names))))
        if missing := [key for key in keys if key not in names]:
            raise UserError(f"{given} has no name for {listing(missing, 5)}: add it")
        names = [names[key] for key in keys]
    first, last = min(images.targets), len(folders) - 1 if folders else max(images.targets)
    if first < 0 or len(names) <= last or (folders and len(names) > len(folders)):
        problem = f"there are {len(names)} class names, but labels from {first} to {last}"
        raise UserError(f"{problem}: set --config.eval.zeroshot.classes=FILE.json with a name for every label")
    if empty := [label for label, synonyms in enumerate(names) if not all(synonyms)]:
        raise UserError(f"the class name of label {empty[0]} is empty: write it into the list of names")
    codes = [name for synonyms in names for name in synonyms if _CODE.fullmatch(name)]
    if 2 * len(codes) > len(names):
        what = f"{len(codes)} class names look like codes ({listing(codes, 3)}), of which prompts say nothing"
        log.warn(f"{what}: give names in classnames.txt or with --config.eval.zeroshot.classes")
    return names


def prompts(given: str, images: labelled.Images, names: Sequence[Sequence[str]]) -> list[list[str]]:
    """The texts of each class, from `ZeroShotOptions.templates`: a JSON list of templates with `{c}` (or `{}`), which
    give a text for each of the class's names, a JSON object class -> texts, or empty: the data's own, or else
    ImageNet's 80. A UserError where a class has no texts, or a template no `{c}`."""
    where = given or "zeroshot_classification_templates.txt"
    own = [[template] for template in images.templates or imagenet("templates")]
    templates = labelled.read_names(given) if given else own
    if isinstance(templates, Mapping):
        keys = [[*synonyms, *(images.folders or [])[i : i + 1]] for i, synonyms in enumerate(names)]
        by_class = [next((templates[key] for key in known if key in templates), None) for known in keys]
        if missing := [known[0] for known, found in zip(keys, by_class, strict=True) if not found]:
            raise UserError(f"{where} has no prompts for {listing(missing, 5)}: add them")
    else:
        if any(len(template) > 1 for template in templates):
            raise UserError(f"{where}: lists in a list say no class: give texts, or an object from class to its texts")
        if bad := [template for (template,) in templates if not _PLACE.search(template)]:
            raise UserError(f"{where}: the template {bad[0]!r} has no {{c}} where the class goes: add it")
        by_class = [[template for (template,) in templates]] * len(names)
    return [
        [_PLACE.sub(lambda _, name=name: name, t) for name in synonyms for t in found]
        for synonyms, found in zip(names, by_class, strict=True)
    ]


def classifier(model, prompts: Sequence[Sequence[str]]) -> np.ndarray:
    """The unit embedding of each class, [C, D], from its prompts, which are among the task's texts."""
    embeddings = encode.unit(model.texts([text for texts in prompts for text in texts]))
    parts = np.split(embeddings, np.cumsum([len(texts) for texts in prompts])[:-1])
    return encode.unit(np.stack([p.mean(axis=0) for p in parts]))


def open_data(path: str, task: str = "zeroshot") -> labelled.Images:
    """tfds, tars in CLIP_benchmark's layout, or class folders; the form is detected from the path and its contents."""
    if path.startswith("tfds:"):
        return labelled.tfds(path)
    root = paths.expanded(path)
    if not root.is_dir():
        raise UserError(f"--data={task}={path} is not a folder: give tar shards, class folders or tfds:name/split")
    return labelled.tars(root, "cls", int) if labelled.has_tars(root) else labelled.class_folders(root)


class PromptedTask(ClassificationTask):
    """A task that classifies the images of each of `classified` by its prompts."""

    def answer(self, model):
        """The predicted class of every image among those of its own set."""

        def logits(data: Classified) -> np.ndarray:
            classes = classifier(model, data.prompts)
            return LOGIT_SCALE * encode.unit(model.images(data.images.read, len(data.images))["pooled"]) @ classes.T

        return *self.classify((prefix, logits(data)) for prefix, data in self.classified.items()), {}


class ZeroShot(PromptedTask):
    """The task on `path`: tfds:name/split, tars in CLIP_benchmark's layout, or a folder of class folders."""

    title, lists_top5 = "Zero-shot classification", True

    def __init__(self, path: str, section: ConfigDict, settings: Settings):
        options = ZeroShotOptions(**section)
        self.settings, self.images, self.data = settings, open_data(path), resolved(path)
        names = class_names(options.classes, self.images)
        self.classes = [synonyms[0] for synonyms in names]
        texts = prompts(options.templates, self.images, names)
        self.set_classified({"": Classified("", self.images, self.classes, len(names) >= AT, texts)})

    def answer(self, model):
        """As `PromptedTask`, and the number of classes."""
        held, rows, _ = super().answer(model)
        return held, rows, {"classes": len(self.classes)}


SECTION, prepare = ZeroShotOptions, ZeroShot
