"""Probes of the frozen encoder: a linear classifier as CLIP_benchmark's, and nearest neighbours as DINO's, fitted on
the pooled embeddings of a training split, of length one, and scored on a test split."""

import dataclasses
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from diva_jax.common.errors import UserError, listing
from diva_jax.common.fields import Rule, above, at_least, field
from diva_jax.data import labelled
from diva_jax.evals import Settings, encode, linear
from diva_jax.evals.items import AT, ClassificationTask, Classified, resolved
from diva_jax.evals.tasks import zeroshot

_TEST_FOLDERS = ("test", "val")


@dataclasses.dataclass(frozen=True)
class ProbeOptions:
    """The section `config.eval.probe`."""

    neighbours: int = field(20, "This many nearest neighbours vote.", at_least(1))
    temperature: float = field(0.07, "The temperature of the neighbours' votes.", above(0))
    weight_decay: float = field(
        0.0, "The weight decay of the linear probe; 0: it is searched on a part of the training split.", at_least(0)
    )
    held_out: float = field(
        0.2,
        "The weight decay is searched on this share of the training split, chosen by the seed.",
        Rule(lambda share: 0 < share < 1, "must be between 0 and 1"),
    )
    iterations: int = field(1000, "The linear probe is fitted with at most this many steps of L-BFGS.", at_least(1))


SECTION = ProbeOptions


def splits(path: str) -> tuple[str, str]:
    """(the training split, the test split) of a data path: `train=PATH,test=PATH`, or a folder with the folders `train`
    and `test` (or `val`). A UserError where it is neither, or both splits are the same."""
    if path.startswith("train="):
        train, _, test = path.removeprefix("train=").partition(",test=")
        if not train or not test or train == test:
            wrong = "names one split twice" if train == test else "has one split alone"
            raise UserError(f"--data=probe={path} {wrong}: it must read train=PATH,test=PATH")
        return train, test
    root = Path(path).expanduser()
    name = next((name for name in _TEST_FOLDERS if (root / name).is_dir()), None)
    if name is None or not (root / "train").is_dir():
        raise UserError(f"{root} has no folders train and test: give one that has, or train=PATH,test=PATH")
    return str(root / "train"), str(root / name)


def _check_labels(train: labelled.Images, test: labelled.Images) -> None:
    """Raises a UserError where the splits do not have the same classes; names the image."""
    if train.classes and test.classes and train.classes != test.classes:
        strange = sorted(set(train.classes) ^ set(test.classes)) or ["their order"]
        raise UserError(f"the training and the test split differ in the classes {listing(strange, 5)}: give equal ones")
    known = set(train.targets)
    for name, label in zip(test.names, test.targets, strict=True):
        if label not in known:
            raise UserError(f"{name} of the test split has the label {label}, which no training image has: correct it")
    if min(known) < 0 or len(known) < 2:
        raise UserError("a probe needs at least two classes, with labels from 0: correct the training split")


class Probe(ClassificationTask):
    """The task on `path`, see `splits`; each split as for `zeroshot`: class folders, tars or tfds."""

    title = "Probes"

    def __init__(self, path: str, section: ConfigDict, settings: Settings):
        self.options, self.settings = ProbeOptions(**section), settings
        paths = splits(path)
        self.train, self.test = (zeroshot.open_data(p, "probe") for p in paths)
        _check_labels(self.train, self.test)
        self.train_labels = np.asarray(self.train.targets)
        self.count = len(self.test)
        if (k := self.options.neighbours) > len(self.train):
            raise UserError(f"config.eval.probe.neighbours={k} is more than the {len(self.train)} training images")
        self.data = "train={},test={}".format(*map(resolved, paths))
        self._labels = int(self.train_labels.max()) + 1
        names = self.test.classes or []
        names = [*names, *map(str, range(len(names), self._labels))]
        titles = {"linear_": "linear probe", "knn_": f"{k} nearest neighbours"}
        self.set_classified({k: Classified(title, self.test, names, self._labels >= AT) for k, title in titles.items()})

    def _weight_decay(self, x: np.ndarray) -> float:
        """The option, or the decay with the best accuracy on the held-out part of the training split."""
        if self.options.weight_decay:
            return self.options.weight_decay
        order = np.random.default_rng(self.settings.seed).permutation(len(x))
        count = min(max(1, round(self.options.held_out * len(x))), len(x) - 1)
        held, kept = order[:count], order[count:]

        def accuracy(number: int) -> float:
            logits = self._linear(x[kept], self.train_labels[kept], linear.DECAYS[number], x[held])
            return float((logits.argmax(axis=1) == self.train_labels[held]).mean())

        return float(linear.DECAYS[linear.search(accuracy)])

    def _linear(self, x: np.ndarray, y: np.ndarray, decay: float, queries: np.ndarray) -> np.ndarray:
        """Logits of the queries, [Q, C]."""
        weights, biases = linear.fit(x, y, self._labels, decay, self.options.iterations)
        return queries @ weights + biases

    def answer(self, model):
        """Both probes: the predicted class of every test image."""
        train, test = (encode.unit(model.images(s.read, len(s))["pooled"]) for s in (self.train, self.test))
        decay, o = self._weight_decay(train), self.options
        outputs = {
            "linear_": self._linear(train, self.train_labels, decay, test),
            "knn_": linear.neighbours(test, train, self.train_labels, self._labels, o.neighbours, o.temperature),
        }
        return *self.classify(outputs.items()), {"weight_decay": decay, "training_images": len(self.train)}


prepare = Probe
