"""Tasks that classify labelled images: accuracy @1 and @5, mean per-class recall, and a row per image."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from diva_jax.data import labelled
from diva_jax.evals.items import ItemTask, Values

_AT = 5
# The smallest number of classes of which the accuracy @5 says anything.
MIN_CLASSES_AT_5 = 5
_RECALL = "mean_per_class_recall"


@dataclasses.dataclass(frozen=True)
class Classified:
    """Labelled images, with targets from 0, and how they are classified. `title` is empty where there is only one such
    set or classifier; `at5` is whether the accuracy @5 is scored."""

    title: str
    images: labelled.Images
    classes: Sequence[str]
    at5: bool

    @property
    def labels(self) -> np.ndarray:
        """The label of each image, int [N]."""
        return np.asarray(self.images.targets)


class ClassificationTask(ItemTask):
    """A task that classifies labelled images: `classified` is by prefix of metric names, and `lists_top5` is whether
    predictions.csv has the five most probable classes of each image."""

    items = "images"
    classified: dict[str, Classified]
    lists_top5 = False

    def set_classified(self, classified: dict[str, Classified]) -> None:
        """Sets `classified`, and the metrics that follow from it."""
        self.classified, self.metrics = classified, {}
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
            order = np.argsort(-scores, axis=1, kind="stable")[:, :_AT]
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
        if metric.endswith(_RECALL):
            prefix = metric.removesuffix(_RECALL)
            return Values(held[prefix][:, 0], strata=self.classified[prefix].labels, tested=False)
        if metric.endswith("acc5"):
            return Values(held[metric.removesuffix("acc5")].any(axis=1))
        return Values(held[metric.removesuffix("acc1")][:, 0])
