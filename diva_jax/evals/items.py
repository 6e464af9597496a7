"""Tasks whose scores are means over items, such as images, pairs or queries: from the values of every item follow the
scores, their intervals and the comparison of two sets of weights on the same items. Those that classify images share
the accuracy @1 and @5, the mean per-class recall, and a row per image."""

import abc
import dataclasses
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diva_jax.common.errors import UserError, listing
from diva_jax.data import labelled
from diva_jax.evals import Outcome, Settings, Task, stats

# How many classes are named for an image; with fewer in all, the accuracy @5 says nothing.
AT = 5
_RECALL = "mean_per_class_recall"


@dataclasses.dataclass(frozen=True)
class Values:
    """What a metric is the mean of: values [N], one per item, 0 to 1, with the `strata` or `clusters` of
    `stats.bootstrap`. `tested` is whether two sets of weights are compared by McNemar's test, which takes items for
    independent; an item whose value is above one half counts as right."""

    values: np.ndarray
    strata: np.ndarray | None = None
    clusters: np.ndarray | None = None
    tested: bool = True

    def resampling(self, settings: Settings) -> dict[str, Any]:
        """Returns the arguments of `stats.bootstrap`."""
        groups = {"strata": self.strata, "clusters": self.clusters}
        return {"resamples": settings.bootstrap, "seed": settings.seed} | groups


def resolved(path: str) -> str:
    """Returns where data is, for results.json: a `tfds:` spec as it is, else an absolute path."""
    return path if path.startswith("tfds:") else str(Path(path).expanduser().resolve())


def set_and_folder(task: str, entry: str, sets: Collection[str]) -> tuple[str, Path]:
    """Parses `SET=FOLDER`; a UserError where the set is none of `sets`, or there is no such folder."""
    name, _, folder = entry.partition("=")
    if name not in sets or not folder:
        raise UserError(f"--data={task}={entry} must read SET=FOLDER with a set of {listing(list(sets))}")
    if not (root := Path(folder).expanduser()).is_dir():
        raise UserError(f"--data={task}: {entry} is not a folder: give that of the set")
    return name, root


def require_count(where: Path, count: int, published: int, title: str, what: str, option: str) -> None:
    """A UserError where `where` has not as many of `what` ("images") as the published set; `option` allows that."""
    if count != published:
        problem = f"{where} has {count} {what}, {title} has {published}"
        raise UserError(f"{problem}: fetch the rest, or set --config.eval.{option} to score a part")


class ItemTask(Task):
    """A task whose metrics are means over items."""

    settings: Settings

    @abc.abstractmethod
    def answer(self, model) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
        """Applies one set of weights, an `encode.Model`: (what `values` needs, rows of predictions.csv without the
        label of the weights, further results)."""

    @abc.abstractmethod
    def values(self, metric: str, held: dict[str, Any]) -> Values:
        """Returns what a metric is the mean of; `held` is the first result of `answer`."""

    def score(self, metric: str, held: dict[str, Any]) -> dict[str, Any]:
        """Returns a metric's entry in `scores` of results.json."""
        counted = self.values(metric, held)
        return stats.estimate(counted.values, **counted.resampling(self.settings))

    def evaluate(self, model) -> Outcome:
        """Returns every metric's score with its interval, and the rows of every item."""
        held, rows, further = self.answer(model)
        scores = {metric: self.score(metric, held) for metric in self.metrics}
        return Outcome({"scores": scores} | further, [{"weights": model.label, **row} for row in rows], held)

    def compare(self, before: Outcome, after: Outcome) -> dict[str, Any]:
        """Returns every metric's paired difference, interval and McNemar test."""
        scores = {}
        for metric in self.metrics:
            b, a = (self.values(metric, outcome.held) for outcome in (before, after))
            test = stats.mcnemar(b.values > 0.5, a.values > 0.5) if a.tested else None
            scores[metric] = stats.paired(b.values, a.values, **a.resampling(self.settings)) | {"mcnemar": test}
        return {"scores": scores}


@dataclasses.dataclass(frozen=True)
class Classified:
    """Labelled images, with targets from 0, and how they are classified. `title` is empty where there is only one such
    set or classifier; `at5` is whether the accuracy @5 is scored; `prompts` are the texts of each class, if any."""

    title: str
    images: labelled.Images
    classes: Sequence[str]
    at5: bool = False
    prompts: Sequence[Sequence[str]] = ()

    @property
    def labels(self) -> np.ndarray:
        return np.asarray(self.images.targets)


class ClassificationTask(ItemTask):
    """A task that classifies labelled images: `classified` is by prefix of metric names, and `lists_top5` is whether
    predictions.csv has the five most probable classes of each image."""

    items = "images"
    classified: dict[str, Classified]
    lists_top5 = False

    def set_classified(self, classified: dict[str, Classified]) -> None:
        """Sets `classified`, and the metrics, the number of images and the texts that follow from it."""
        self.classified, self.metrics = classified, {}
        self.count = sum(len(data.images) for data in classified.values())
        self.texts = list(dict.fromkeys(t for data in classified.values() for texts in data.prompts for t in texts))
        for prefix, data in classified.items():
            titles = {"acc1": "accuracy @1"} | ({"acc5": "accuracy @5"} if data.at5 else {})
            for name, title in (titles | {_RECALL: "mean per-class recall"}).items():
                self.metrics[prefix + name] = {"title": f"{data.title}, {title}".removeprefix(", "), "unit": "%"}

    def classify(self, logits: Iterable[tuple[str, np.ndarray]]) -> tuple[dict[str, np.ndarray], list[dict]]:
        """Ranks the classes of each image, from (prefix, scores [N, C]): (prefix -> whether each of the first five is
        the right one, bool [N, 5]; rows of predictions.csv). Scores that are not finite count as wrong."""
        held, rows = {}, []
        for prefix, scores in logits:
            data = self.classified[prefix]
            order = np.argsort(-scores, axis=1, kind="stable")[:, :AT]
            held[prefix] = (order == data.labels[:, None]) & np.isfinite(scores).all(axis=1, keepdims=True)
            for i, (label, first) in enumerate(zip(data.labels, order, strict=True)):
                names = [data.classes[c] for c in first]
                item = {"metric": f"{prefix}acc1", "item": i, "file": data.images.names[i]}
                item |= {"truth": data.classes[label], "predicted": names[0], "correct": int(held[prefix][i, 0])}
                top5 = {"top5": "; ".join(names)} if self.lists_top5 else {}
                rows.append(item | {"score": float(scores[i, first[0]])} | top5)
        return held, rows

    def values(self, metric: str, held: dict[str, np.ndarray]) -> Values:
        """Whether each image is classified correctly; the recall, a mean over classes, has no McNemar test."""
        prefix = metric.removesuffix(_RECALL).removesuffix("acc5").removesuffix("acc1")
        if metric.endswith(_RECALL):
            return Values(held[prefix][:, 0], strata=self.classified[prefix].labels, tested=False)
        return Values(held[prefix].any(axis=1) if metric.endswith("acc5") else held[prefix][:, 0])
