"""Choices between texts for an image, and between images for a text: SugarCrepe, Winoground, ARO and others. What is
right is in `diva_jax.evals.matching`, the sets are in `diva_jax.evals.choice_sets`."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from diva_jax.common.errors import UserError
from diva_jax.common.fields import field, one_of
from diva_jax.data.images import read_file
from diva_jax.evals import Settings, choice_sets, encode, matching, stats
from diva_jax.evals.choice_layouts import Item
from diva_jax.evals.choice_sets import Metric
from diva_jax.evals.items import ItemTask, Values

# Sets with more patterns than this have no score for each.
_MAX_PATTERNS = 30


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


def answers(scores: Sequence[np.ndarray], items: Sequence[Item]) -> dict[str, np.ndarray]:
    """`matching.answers` of items with scores [images, texts] each: bool [N]; "match" is False where it is not
    defined."""
    alike: dict[tuple, list[int]] = {}
    for number, (table, item) in enumerate(zip(scores, items, strict=True)):
        alike.setdefault((table.shape, item.right), []).append(number)
    out = {kind: np.zeros(len(items), bool) for kind in matching.ANSWERS}
    for (_, right), numbers in alike.items():
        for kind, found in matching.answers(np.stack([scores[n] for n in numbers]), right).items():
            out[kind][numbers] = found
    return out


def counted(metric: Metric, right: np.ndarray, items: Sequence[Item]) -> Values:
    """What a metric counts: whether each item, or each group of items, is right; matches where every image has one text
    of its own. A UserError where every class has fewer items than the metric asks for."""
    if metric.all_of:
        _, index = np.unique([item.groups[metric.all_of] for item in items], return_inverse=True)
        return Values(np.bincount(index, ~right) == 0)
    if metric.answers == "match":
        return Values(right[[matching.one_to_one(item.right) for item in items]])
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
    """The task on `path`: the file of a set, or a folder with files of published names."""

    title, items, section_type = "Choices", "items", ChoiceOptions

    def __init__(self, path: str, section: ConfigDict, settings: Settings):
        self.options = options = self.section_type(**section)
        self.settings = settings
        where = Path(path).expanduser()
        self.sets: dict[str, list[Item]] = {}
        self._metrics: dict[str, tuple[str, Metric]] = {}
        self.metrics = {}
        self.count = 0
        for row, items in self.read(where, options):
            self.count += len(items)
            for name, part, metrics in choice_sets.scored(row, items):
                self.sets[name] = part
                for metric in metrics:
                    counted(metric, np.ones(len(part), bool), part)
                    key = f"{name}_{metric.name}"
                    self._metrics[key] = (name, metric)
                    self.metrics[key] = {"title": f"{name}, {metric.title}", "unit": "%"}
                    if metrics == choice_sets.PAIRED:
                        self.metrics[key] |= {"answers": metric.answers, "dataset": name}
        everything = [item for items in self.sets.values() for item in items]
        self.data = str(where.resolve())
        self.texts = list(dict.fromkeys(text for item in everything for text in item.texts))
        self.images = list(dict.fromkeys(image for item in everything for image in item.images))
        self._rows_of = {entry: i for each in (self.texts, self.images) for i, entry in enumerate(each)}

    def read(self, path: Path, options: ChoiceOptions) -> Iterator[tuple[choice_sets.Published, list[Item]]]:
        """Yields the sets at a path, each with its items, checked."""
        for file, row in choice_sets.published(path, options.layout):
            yield row, choice_sets.read_set(file, row, options.images, options.allow_partial)

    def rows_of(self, item: Item) -> tuple[list[int], list[int]]:
        """The numbers of an item's images in `images`, and of its texts in `texts`."""
        return [self._rows_of[image] for image in item.images], [self._rows_of[text] for text in item.texts]

    def _read(self, i: int) -> Image.Image:
        region = self.images[i]
        image = read_file(region.path, rgb=True)
        return image.crop(region.box) if region.box else image

    def answer(self, model):
        """Which items of each set are right, and a row per image of each item."""
        images = encode.unit(model.images(self._read, len(self.images))["pooled"])
        texts = encode.unit(model.texts(self.texts))
        return self.graded(lambda of_images, of_texts: images[of_images] @ texts[of_texts].T)

    def graded(self, scores: Callable[[list[int], list[int]], np.ndarray]):
        """As `answer`, from `scores`: numbers of images and of texts -> [images, texts]."""
        held, rows = {}, []
        for name, items in self.sets.items():
            tables = [scores(*self.rows_of(item)) for item in items]
            held[name] = answers(tables, items)
            for number, (item, table) in enumerate(zip(items, tables, strict=True)):
                right = {f"{kind}_right": int(values[number]) for kind, values in held[name].items()}
                rows += self._rows(name, number, item, table, right)
        return held, rows, {"patterns": self._patterns(held)}

    def _patterns(self, held: dict) -> list[dict]:
        """The scores of the parts of each set, by the items' "pattern"."""
        out = []
        for name, items in self.sets.items():
            labels = np.array([item.groups.get("pattern", "") for item in items])
            if not 1 < len(parts := np.unique(labels)) <= _MAX_PATTERNS:
                continue
            for part in parts:
                here = np.flatnonzero(labels == part)
                scores = {}
                for key, (of, metric) in self._metrics.items():
                    if of == name and metric in choice_sets.PAIRED:
                        found = counted(metric, held[name][metric.answers][here], [items[i] for i in here])
                        if len(found.values):
                            scores[key] = stats.estimate(found.values, **found.resampling(self.settings))
                if scores:
                    out.append({"name": f"{name}, {part or 'others'}", "count": len(here), "scores": scores})
        return out

    def values(self, metric: str, held: dict) -> Values:
        """Which of the items or groups that the metric counts are right."""
        name, scored = self._metrics[metric]
        return counted(scored, held[name][scored.answers], self.sets[name])

    def _rows(self, name: str, number: int, item: Item, table: np.ndarray, right: dict[str, int]) -> list[dict]:
        """A row for each image: the text that belongs to it and the one that scores highest."""
        rows, shared = [], {"metric": name, "item": number, "text": " | ".join(item.texts)}
        shared |= {"correct": right["group_right"], "where": item.where, "class": item.groups.get("class", "")}
        for n, (image, cosines) in enumerate(zip(item.images, table, strict=True)):
            truth = " | ".join(item.texts[t] for i, t in item.right if i == n)
            chosen = {"predicted": item.texts[int(np.argmax(cosines))], "score": float(cosines.max())}
            file = os.path.relpath(image.path, Path(self.data).parent)
            chosen |= {"file": file, "truth": truth, "cosines": " ".join(f"{x:.6f}" for x in cosines)}
            rows.append(shared | chosen | right)
        return rows


prepare = Choice
