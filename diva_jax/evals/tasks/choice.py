"""Choices between texts for an image, and between images for a text: SugarCrepe, Winoground, ARO and others. What is
right is in `diva_jax.evals.stats`, how files are read in `diva_jax.evals.choice_layouts`."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from diva_jax.common import paths
from diva_jax.common.errors import UserError, listing
from diva_jax.common.fields import choice, field
from diva_jax.common.json_files import packaged
from diva_jax.data.images import read_file
from diva_jax.evals import ItemTask, Settings, Values, encode, require_count, stats
from diva_jax.evals.choice_layouts import LAYOUTS, Item, joined, read_items

# Sets with more patterns than this have no score for each.
_MAX_PATTERNS = 30


@dataclasses.dataclass(frozen=True)
class ChoiceOptions:
    """The section `config.eval.choice`."""

    layout: str = choice(("", *LAYOUTS), "A file without a published name has this layout; if empty, the name says it.")
    images: str = field("", "The images are in this folder; if empty, in that of the file.")
    allow_partial: bool = field(False, "Whether a published file may have another number of items.")


class Metric(NamedTuple):
    """A score of a set, by key and with the reader's name for it. `answers` is a key of `stats.ANSWERS`. `all_of`:
    groups of this kind count, where all of their items are right. `mean_over`: the mean of the means of groups of this
    kind, but for those that are called as in `without` and those with fewer than `at_least` items."""

    name: str
    title: str
    answers: str = "text"
    all_of: str = ""
    mean_over: str = ""
    at_least: int = 1
    without: Sequence[str] = ()


_TABLES = packaged(__file__, "choice.json")
_KINDS = {kind: tuple(Metric(**row) for row in rows) for kind, rows in _TABLES["metrics"].items()}
PAIRED = _KINDS["paired"]


class Published(NamedTuple):
    """A published file; `name` is the set's in metric names, `count` the number of items, None if not published."""

    file: str
    name: str
    layout: str
    count: int | None
    metrics: tuple[Metric, ...]


TABLE = {row["file"]: Published(**row | {"metrics": _KINDS[row["metrics"]]}) for row in _TABLES["files"]}


def published(path: Path, layout: str, task: str = "choice") -> list[tuple[Path, Published]]:
    """The files to evaluate, each with its row of the table: a file, or those of published names in a folder. `layout`
    is for other names. A UserError, in terms of `task`, where nothing is there, or a file's layout is not known."""
    if path.is_dir():
        here = [(path / file, row) for file, row in TABLE.items() if (path / file).is_file()]
        if not here:
            raise UserError(f"{path} has no file of a published set: give {listing(list(TABLE), 4)}, or your own")
        return here
    if not path.is_file():
        raise UserError(f"--data={task}={path} does not exist: give the file of a set, or a folder of published files")
    row = TABLE.get(path.name)
    if row is None or layout not in ("", row.layout):
        layout = layout or ("own" if path.suffix.lower() in (".csv", ".tsv", ".jsonl") else "")
        if not layout:
            raise UserError(f"{path} has no published name: set --config.eval.{task}.layout to {listing(LAYOUTS)}")
        alike = {row.layout: row.metrics for row in TABLE.values()}
        row = Published(path.name, path.stem, layout, None, alike.get(layout, PAIRED))
    return [(path, row)]


def scored(row: Published, items: list[Item]) -> Iterator[tuple[str, list[Item], tuple[Metric, ...]]]:
    """Yields (name, items, what is scored) of a set and, for controlled images, of its pairs and sets of four, which
    have the images and right captions of two or four items. Matches are not scored in a set where no item has them."""
    if row.metrics != PAIRED or any(stats.one_to_one(item.right) for item in items):
        yield row.name, items, row.metrics
    else:
        yield row.name, items, PAIRED[:-1]
    if row.layout == "whatsup":
        yield f"{row.name}_pair", joined(items, "pair"), PAIRED
        yield f"{row.name}_set", joined(items, "set"), PAIRED[-1:]


def read_set(file: Path, row: Published, images: str, allow_partial: bool, task: str = "choice") -> list[Item]:
    """The checked items of a file; `images` is their folder, by default the file's. A UserError names the file and row
    that is wrong; another number of items than the published one is only allowed with `allow_partial`."""
    items = read_items(file, row.layout, paths.expanded(images) if images else file.parent, task)
    if row.count is not None and not allow_partial:
        require_count(file, len(items), row.count, "the published set", "items", f"{task}.allow_partial")
    return items


def counted(metric: Metric, right: np.ndarray, items: Sequence[Item]) -> Values:
    """What a metric counts: whether each item, or each group of items, is right; matches where every image has one text
    of its own. A UserError where every class has fewer items than the metric asks for."""
    if metric.all_of:
        _, index = np.unique([item.groups[metric.all_of] for item in items], return_inverse=True)
        return Values(np.bincount(index, ~right) == 0)
    if metric.answers == "match":
        return Values(right[[stats.one_to_one(item.right) for item in items]])
    if not metric.mean_over:
        return Values(right)
    labels, index, counts = np.unique(
        [item.groups[metric.mean_over] for item in items], return_inverse=True, return_counts=True
    )
    kept = ((counts >= metric.at_least) & ~np.isin(labels, metric.without))[index]
    if not kept.any():
        where, few = items[0].where.rpartition(",")[0], f"no class that counts has {metric.at_least} items"
        raise UserError(f"{where}: {few}, so nothing can be averaged: give the whole file")
    return Values(right[kept], strata=labels[index][kept], tested=False)


class Choice(ItemTask):
    """The task on `path`: the file of a set, or a folder with files of published names."""

    title, items, section_type, task = "Choices", "items", ChoiceOptions, "choice"

    def __init__(self, path: str, section: ConfigDict, settings: Settings):
        self.options, self.settings, where = self.section_type(**section), settings, paths.expanded(path)
        self.sets: dict[str, list[Item]] = {}
        self._metrics: dict[str, tuple[str, Metric]] = {}
        self.metrics, self.count = {}, 0
        for row, items in self.read(where, self.options):
            self.count += len(items)
            for name, part, metrics in scored(row, items):
                self.sets[name] = part
                for metric in metrics:
                    counted(metric, np.ones(len(part), bool), part)
                    key = f"{name}_{metric.name}"
                    self._metrics[key] = (name, metric)
                    self.metrics[key] = {"title": f"{name}, {metric.title}", "unit": "%"}
                    if metrics == PAIRED:
                        self.metrics[key] |= {"answers": metric.answers, "dataset": name}
        everything = [item for items in self.sets.values() for item in items]
        self.data = str(where.resolve())
        self.texts = list(dict.fromkeys(text for item in everything for text in item.texts))
        self.images = list(dict.fromkeys(image for item in everything for image in item.images))
        self._rows_of = {entry: i for each in (self.texts, self.images) for i, entry in enumerate(each)}

    def read(self, path: Path, options: ChoiceOptions) -> Iterator[tuple[Published, list[Item]]]:
        """Yields the sets at a path, each with its items, checked."""
        for file, row in published(path, options.layout, self.task):
            yield row, read_set(file, row, options.images, options.allow_partial, self.task)

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
            answers = []
            for number, item in enumerate(items):
                table = scores(*self.rows_of(item))
                answers.append(dict.fromkeys(stats.ANSWERS, False) | stats.answers(table, item.right))
                rows += self._rows(name, number, item, table, {f"{k}_right": int(v) for k, v in answers[-1].items()})
            held[name] = {kind: np.array([right[kind] for right in answers]) for kind in stats.ANSWERS}
        return held, rows, {"patterns": self._patterns(held)}

    def _patterns(self, held: dict) -> list[dict]:
        """The scores of the parts of each set, by the items' "pattern"."""
        out = []
        for name, items in self.sets.items():
            labels = np.array([item.groups.get("pattern", "") for item in items])
            parts = np.unique(labels)
            if not 1 < len(parts) <= _MAX_PATTERNS:
                continue
            for part in parts:
                here = np.flatnonzero(labels == part)
                scores = {}
                for key, (of, metric) in self._metrics.items():
                    if of == name and metric in PAIRED:
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


SECTION, prepare = ChoiceOptions, Choice
