"""Choices between texts for a picture, and between pictures for a text: SugarCrepe, Winoground, ARO and others.

An answer is right only where its cosine is strictly higher than that of every wrong one: ties and scores that are not
finite are wrong, and cosines that agree to seven decimals are a tie. The sets are in `diva_jax.evals.choice_sets`.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from diva_jax.common import fields
from diva_jax.common.errors import UserError
from diva_jax.data.images import open_image
from diva_jax.evals import Outcome, Settings, Task, choice_sets, encode, stats
from diva_jax.evals.choice_sets import Item, Metric, Picture

DECIMALS = 7  # Of a cosine, so that the rounding of embeddings and sums does not turn a tie into an answer.
RULES = (fields.one_of("layout", "", *choice_sets.LAYOUTS),)


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `config.eval.choice`."""

    layout: str = ""  # Of a file that has no published name; empty: by the name.
    images: str = ""  # The folder with the pictures; empty: that of the file.
    allow_partial: bool = False  # Whether a published file may have another number of items.


def default() -> ConfigDict:
    """The options and their defaults."""
    return ConfigDict(dataclasses.asdict(Options()))


def texts_right(scores: np.ndarray, right: np.ndarray) -> bool:
    """Whether every picture's right texts score strictly higher than its wrong ones, and all scores are finite.

    Args:
      scores: [pictures, texts].
      right: bool, of the same shape.
    """
    if not np.isfinite(scores).all():
        return False
    lowest = np.where(right, scores, np.inf).min(axis=1)
    return bool((lowest > np.where(right, -np.inf, scores).max(axis=1)).all())


def answers(scores: Sequence[np.ndarray], items: Sequence[Item]) -> dict[str, np.ndarray]:
    """Which items are right: bool [N] for "text", "image" and "group" (both).

    Args:
      scores: of each item, [pictures, texts].
      items: the items.
    """
    found = {"text": [], "image": []}
    for table, item in zip(scores, items, strict=True):
        right = np.zeros(table.shape, bool)
        right[tuple(zip(*item.right, strict=True))] = True
        found["text"].append(texts_right(table, right))
        # A text without a picture is a wrong alternative; it asks for no picture.
        asked = right.any(axis=0)
        found["image"].append(texts_right(table.T[asked], right.T[asked]))
    out = {kind: np.array(values, bool) for kind, values in found.items()}
    return out | {"group": out["text"] & out["image"]}


def units(metric: Metric, right: np.ndarray, items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray | None]:
    """What a metric counts: (right or not, bool [U]; the stratum of each, [U], or None).

    Raises:
      UserError: every class has fewer items than the metric asks for.
    """
    if metric.all_of:
        _, index = np.unique([item.groups[metric.all_of] for item in items], return_inverse=True)
        return np.bincount(index, ~right) == 0, None
    if not metric.mean_over:
        return right, None
    labels, index, counts = np.unique(
        [item.groups[metric.mean_over] for item in items], return_inverse=True, return_counts=True
    )
    kept = counts[index] >= metric.at_least
    if not kept.any():
        raise UserError(
            f"{items[0].where.rpartition(',')[0]}: no class has {metric.at_least} items, so nothing can be averaged: "
            "give the whole file"
        )
    return right[kept], labels[index][kept]


class Choice(Task):
    """The task; see `evals.Task`."""

    title, items = "Choices", "items"

    def __init__(self, path: str, options: Options, settings: Settings):
        self.settings = settings
        where = Path(path).expanduser()
        self.sets: dict[str, list[Item]] = {}
        self._metrics: dict[str, tuple[str, Metric]] = {}
        self.metrics = {}
        for file, row in choice_sets.published(where, options.layout):
            found = choice_sets.read_set(file, row, options.images, options.allow_partial)
            self.sets[row.name] = found
            for metric in row.metrics:
                units(metric, np.ones(len(found), bool), found)
                key = f"{row.name}_{metric.name}"
                self._metrics[key] = (row.name, metric)
                self.metrics[key] = {"title": f"{row.name}, {metric.title}", "unit": "%"}
        everything = [item for found in self.sets.values() for item in found]
        self.data, self.count = str(where.resolve()), len(everything)
        self.texts = list(dict.fromkeys(text for item in everything for text in item.texts))
        self.pictures = list(dict.fromkeys(p for item in everything for p in item.pictures))

    def _read(self, i: int) -> Image.Image:
        picture: Picture = self.pictures[i]
        image = open_image(picture.path.read_bytes(), str(picture.path), rgb=True)
        return image.crop(picture.box) if picture.box else image

    def evaluate(self, model) -> Outcome:
        """Every metric of every set, and every single answer."""
        images = encode.unit(model.images(self._read, len(self.pictures))["pooled"])
        texts = encode.unit(model.texts(self.texts))
        row_of = {picture: i for i, picture in enumerate(self.pictures)}
        text_of = {text: i for i, text in enumerate(self.texts)}
        held, rows = {}, []
        for name, items in self.sets.items():
            tables = [
                np.round(images[[row_of[p] for p in i.pictures]] @ texts[[text_of[t] for t in i.texts]].T, DECIMALS)
                for i in items
            ]
            held[name] = answers(tables, items)
            for number, (item, table) in enumerate(zip(items, tables, strict=True)):
                right = {kind: bool(values[number]) for kind, values in held[name].items()}
                rows += self._rows(model.label, name, number, item, table, right)
        scores = {}
        for key in self.metrics:
            values, how = self._of(key, held)
            interval = stats.percent(stats.bootstrap(values, **how))
            scores[key] = {"score": 100 * stats.mean(values, how["strata"]), "interval": interval}
        return Outcome({"scores": scores}, rows, held)

    def _of(self, key: str, held: dict) -> tuple[np.ndarray, dict]:
        """The values whose mean a metric is, and how to resample them."""
        name, metric = self._metrics[key]
        values, strata = units(metric, held[name][metric.answers], self.sets[name])
        return values, dict(strata=strata, resamples=self.settings.bootstrap, seed=self.settings.seed)

    def _rows(self, label: str, name: str, number: int, item: Item, table: np.ndarray, right: dict) -> list[dict]:
        """A row for each picture: the text that belongs to it and the one that scores highest."""
        out = []
        for i, picture in enumerate(item.pictures):
            truth = [item.texts[t] for p, t in item.right if p == i]
            out.append(
                {
                    "weights": label,
                    "metric": name,
                    "item": number,
                    "file": os.path.relpath(picture.path, Path(self.data).parent),
                    "text": " | ".join(item.texts),
                    "truth": " | ".join(truth),
                    "predicted": item.texts[int(np.argmax(table[i]))],
                    "score": float(table[i].max()),
                    "correct": int(right["group"]),
                    "where": item.where,
                    "class": item.groups.get("class", ""),
                    "text_right": int(right["text"]),
                    "image_right": int(right["image"]),
                    "cosines": " ".join(f"{x:.6f}" for x in table[i]),
                }
            )
        return out

    def compare(self, before: Outcome, after: Outcome) -> dict:
        """Paired differences; McNemar for the metrics that count each item or group once."""
        scores = {}
        for key in self.metrics:
            (b, how), (a, _) = self._of(key, before.held), self._of(key, after.held)
            test = None if how["strata"] is not None else stats.mcnemar(b, a)
            scores[key] = stats.paired(b, a, **how) | {"mcnemar": test}
        return {"scores": scores}


def prepare(path: str, section: ConfigDict, settings: Settings) -> Choice:
    """The task on `path`: the file of a set, or a folder with files of published names."""
    return Choice(path, Options(**section), settings)
