"""Choices between texts for an image, and between images for a text: SugarCrepe, Winoground, ARO and others.

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

from diva_jax.common.errors import UserError
from diva_jax.common.fields import field, one_of
from diva_jax.data.images import read_file
from diva_jax.evals import Settings, choice_sets, encode
from diva_jax.evals.choice_layouts import Item
from diva_jax.evals.choice_sets import Metric
from diva_jax.evals.items import ItemTask, Values

# Decimals to which cosines are rounded, so that the rounding of embeddings and sums does not turn a tie into an answer.
_COSINE_DECIMALS = 7


@dataclasses.dataclass(frozen=True)
class ChoiceOptions:
    """The section `config.eval.choice`."""

    layout: str = field(
        "",
        "A file that has no published name has this layout; if empty, the name tells it.",
        one_of("", *choice_sets.LAYOUTS),
    )
    images: str = field("", "The images are in this folder; if empty, in that of the file.")
    allow_partial: bool = field(False, "Whether a published file may have another number of items.")


SECTION = ChoiceOptions


def texts_right(scores: np.ndarray, right: np.ndarray) -> bool:
    """Whether every image's right texts score strictly higher than its wrong ones, and all scores are finite.

    Args:
      scores: [images, texts].
      right: bool, of the same shape.
    """
    if not np.isfinite(scores).all():
        return False
    lowest = np.where(right, scores, np.inf).min(axis=1)
    return bool((lowest > np.where(right, -np.inf, scores).max(axis=1)).all())


def answers(scores: Sequence[np.ndarray], items: Sequence[Item]) -> dict[str, np.ndarray]:
    """Which items are right: bool [N] for "text", "image" and "group" (both).

    Args:
      scores: of each item, [images, texts].
      items: the items.
    """
    out = {"text": np.zeros(len(items), bool), "image": np.zeros(len(items), bool)}
    for i, (table, item) in enumerate(zip(scores, items, strict=True)):
        right = np.zeros(table.shape, bool)
        right[tuple(zip(*item.right, strict=True))] = True
        out["text"][i] = texts_right(table, right)
        # A text without an image is a wrong alternative; it asks for no image.
        asked = right.any(axis=0)
        out["image"][i] = texts_right(table.T[asked], right.T[asked])
    return out | {"group": out["text"] & out["image"]}


def counted(metric: Metric, right: np.ndarray, items: Sequence[Item]) -> Values:
    """What a metric counts: whether each item, or each group of items, is right.

    Raises:
      UserError: every class has fewer items than the metric asks for.
    """
    if metric.all_of:
        _, index = np.unique([item.groups[metric.all_of] for item in items], return_inverse=True)
        return Values(np.bincount(index, ~right) == 0)
    if not metric.mean_over:
        return Values(right)
    labels, index, counts = np.unique(
        [item.groups[metric.mean_over] for item in items], return_inverse=True, return_counts=True
    )
    kept = counts[index] >= metric.at_least
    if not kept.any():
        raise UserError(
            f"{items[0].where.rpartition(',')[0]}: no class has {metric.at_least} items, so nothing can be averaged: "
            "give the whole file"
        )
    return Values(right[kept], strata=labels[index][kept], tested=False)


class Choice(ItemTask):
    """The task; see `evals.Task`."""

    title, items = "Choices", "items"

    def __init__(self, path: str, options: ChoiceOptions, settings: Settings):
        self.settings = settings
        where = Path(path).expanduser()
        self.sets: dict[str, list[Item]] = {}
        self._metrics: dict[str, tuple[str, Metric]] = {}
        self.metrics = {}
        for file, row in choice_sets.published(where, options.layout):
            items = choice_sets.read_set(file, row, options.images, options.allow_partial)
            self.sets[row.name] = items
            for metric in row.metrics:
                counted(metric, np.ones(len(items), bool), items)
                key = f"{row.name}_{metric.name}"
                self._metrics[key] = (row.name, metric)
                self.metrics[key] = {"title": f"{row.name}, {metric.title}", "unit": "%"}
        everything = [item for items in self.sets.values() for item in items]
        self.data, self.count = str(where.resolve()), len(everything)
        self.texts = list(dict.fromkeys(text for item in everything for text in item.texts))
        self.images = list(dict.fromkeys(image for item in everything for image in item.images))

    def _read(self, i: int) -> Image.Image:
        region = self.images[i]
        image = read_file(region.path, rgb=True)
        return image.crop(region.box) if region.box else image

    def answer(self, model):
        """Which items of each set are right, and a row per image of each item."""
        images = encode.unit(model.images(self._read, len(self.images))["pooled"])
        texts = encode.unit(model.texts(self.texts))
        image_row = {image: i for i, image in enumerate(self.images)}
        text_row = {text: i for i, text in enumerate(self.texts)}
        held, rows = {}, []
        for name, items in self.sets.items():
            cosines = [
                images[[image_row[image] for image in item.images]] @ texts[[text_row[t] for t in item.texts]].T
                for item in items
            ]
            tables = [np.round(table, _COSINE_DECIMALS) for table in cosines]
            held[name] = answers(tables, items)
            for number, (item, table) in enumerate(zip(items, tables, strict=True)):
                right = {kind: int(values[number]) for kind, values in held[name].items()}
                rows += self._rows(name, number, item, table, right)
        return held, rows, {}

    def values(self, metric: str, held: dict) -> Values:
        """Which of the items or groups that the metric counts are right."""
        name, scored = self._metrics[metric]
        return counted(scored, held[name][scored.answers], self.sets[name])

    def _rows(self, name: str, number: int, item: Item, table: np.ndarray, right: dict[str, int]) -> list[dict]:
        """A row for each image: the text that belongs to it and the one that scores highest."""
        return [
            {
                "metric": name,
                "item": number,
                "file": os.path.relpath(image.path, Path(self.data).parent),
                "text": " | ".join(item.texts),
                "truth": " | ".join(item.texts[t] for i, t in item.right if i == row),
                "predicted": item.texts[int(np.argmax(table[row]))],
                "score": float(table[row].max()),
                "correct": right["group"],
                "where": item.where,
                "class": item.groups.get("class", ""),
                "text_right": right["text"],
                "image_right": right["image"],
                "cosines": " ".join(f"{x:.6f}" for x in table[row]),
            }
            for row, image in enumerate(item.images)
        ]


def prepare(path: str, section: ConfigDict, settings: Settings) -> Choice:
    """The task on `path`: the file of a set, or a folder with files of published names."""
    return Choice(path, ChoiceOptions(**section), settings)
