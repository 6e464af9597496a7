"""Open-vocabulary segmentation from patch tokens: the mIoU of the texts nearest to each pixel, as SCLIP does it (arXiv
2312.01597): windows over the resized image, cosines of patch tokens and texts interpolated to pixels and averaged where
windows overlap, a softmax over all texts, and for each class its most probable synonym."""

import base64
import dataclasses
import functools
import io
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from diva_jax.common.errors import UserError, listing
from diva_jax.common.fields import above, at_least, below, field, one_of
from diva_jax.data.images import read_file
from diva_jax.evals import Outcome, Settings, Task, encode, segmentation_sets, stats
from diva_jax.evals.items import set_and_folder
from diva_jax.evals.segmentation_sets import SETS
from diva_jax.evals.tasks import zeroshot
from diva_jax.models import backbones
from diva_jax.models.backbones import spec_of
from diva_jax.models.backbones.shared.dense import VARIANTS

# How many images, evenly spaced, results.json has the maps of classes of, and the longer side of these [pixels].
_MAPS, _MAP_SIDE = 6, 240


@dataclasses.dataclass(frozen=True)
class SegmentationOptions:
    """The section `config.eval.segmentation`."""

    last: str = field("sclip", "The last block is run in this variant.", one_of(*VARIANTS))
    short_side: int = field(
        0,
        "The image's shorter side is resized to this; 0: to one and a half windows [pixels].",
        at_least(0),
    )
    stride: int = field(
        0,
        "Windows, which are of the backbone's image size, have this distance; 0: half a window [pixels].",
        at_least(0),
    )
    scale: float = field(40.0, "Cosines are multiplied by this before the softmax.", above(0))
    background: float = field(
        0.0,
        "Where no class is as probable as this, a set that has a background has it there.",
        below(0, 1),
    )
    classes: str = field(
        "", "A text file with a line per class, synonyms separated by commas; if empty, the set's own are used."
    )
    allow_partial: bool = field(False, "Whether a set may have fewer images than the published one.")


SECTION = SegmentationOptions


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side of `length` pixels, at least `window`; the last one ends with the side."""
    return [
        min(i, length - window) for i in range(0, max(length - window + stride - 1, 0) // stride * stride + 1, stride)
    ]


def interpolation(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of linear interpolation, edges repeated, as torch has it without `align_corners`."""
    centres = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
    low = np.floor(centres).astype(int)
    high, rows = (low + 1).clip(max=old - 1), np.arange(new)
    weights = np.zeros((new, old), np.float32)
    np.add.at(weights, (rows, low), 1 - (centres - low))
    np.add.at(weights, (rows, high), centres - low)
    return weights


def resized(table: np.ndarray, height: int, width: int) -> np.ndarray:
    """[h, w, T] -> [height, width, T], linearly interpolated."""
    rows, columns = interpolation(table.shape[0], height), interpolation(table.shape[1], width)
    return np.einsum("ih,hwt,jw->ijt", rows, table, columns, optimize=True)


def classify(cosines: np.ndarray, owner: np.ndarray, scale: float, background: float) -> np.ndarray:
    """The class of each pixel, int [H, W], from the cosines [H, W, T] of each text, times `scale` before the softmax.
    `owner`, [T], is the class of each text, increasing. Class 0 where no class's most probable text reaches
    `background`."""
    x = scale * cosines
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    first = np.searchsorted(owner, np.arange(owner.max() + 1))
    by_class = np.maximum.reduceat(p, first, axis=-1)
    return np.where(by_class.max(axis=-1) < background, 0, by_class.argmax(axis=-1))


def _encoded(labels: np.ndarray) -> str:
    """A map of classes as a small PNG in base64; 255 where it is ignored."""
    image = Image.fromarray(np.where(labels < 0, 255, labels).astype(np.uint8))
    ratio = min(1.0, _MAP_SIDE / max(image.size))
    size = [max(1, round(ratio * x)) for x in image.size]
    image.resize(size, Image.Resampling.NEAREST).save(buffer := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def overlaps(predicted: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(pixels of the intersection, of the union) of each class, [C] each; labels of -1 are ignored."""
    counted = labels >= 0
    p, t = predicted[counted], labels[counted]
    both = np.bincount(t[p == t], minlength=classes)
    return both, np.bincount(p, minlength=classes) + np.bincount(t, minlength=classes) - both


class Segmentation(Task):
    """The task on `path`, `SET=FOLDER` with a set of `segmentation_sets.SETS`."""

    title, items = "Open-vocabulary segmentation", "images"

    def __init__(self, path: str, section: ConfigDict, settings: Settings):
        options = SegmentationOptions(**section)
        self.options, self.settings = options, settings
        if (given := set_and_folder(path, SETS)) is None:
            raise UserError(f"--data=segmentation={path} must read SET=FOLDER with a set of {listing(list(SETS))}")
        name, root = given
        self.set = SETS[name]
        if options.background and name not in segmentation_sets.HAS_BACKGROUND:
            raise UserError(f"config.eval.segmentation.background={options.background}: {name} has none, set it to 0")
        self.pairs = segmentation_sets.read_pairs(self.set, root, options.allow_partial)
        self.names = segmentation_sets.read_names(options.classes, self.set, root)
        self.owner = np.repeat(np.arange(len(self.names)), [len(n) for n in self.names])
        self._prompts = [[t.replace("{c}", n) for t in zeroshot.imagenet("templates")] for s in self.names for n in s]
        self.texts = list(dict.fromkeys(t for texts in self._prompts for t in texts))
        self.root, self.data, self.count = root, str(root.resolve()), len(self.pairs)
        self.metrics = {"miou": {"title": f"{self.set.title}, mIoU", "unit": "%"}}
        self._shown = set(np.linspace(0, self.count - 1, min(_MAPS, self.count)).round().astype(int).tolist())

    def bind(self, config: ConfigDict, mesh) -> None:
        """Lays out the windows for the backbone's image size."""
        spec = spec_of(config)
        if not hasattr(backbones.architecture(spec.arch).Vision, "encode_dense") or not spec.has_text:
            raise UserError(f"segmentation needs patch tokens in the text's space, which {spec.arch} does not have")
        self.window, self.interpolation = spec.image_size, spec.interpolation
        self.grid = spec.grid
        self.stride = self.options.stride or self.window // 2
        side = self.options.short_side or self.window * 3 // 2
        if side < self.window or self.stride > self.window:
            raise UserError(
                f"config.eval.segmentation: short_side={side} must be at least the window, {self.window}, and "
                f"stride={self.stride} at most that: set backbone.image_size for another window"
            )
        self.sizes, self.windows = [], []
        for i, (path, _) in enumerate(self.pairs):
            with Image.open(path) as image:
                ratio = side / min(image.size)
                w, h = (int(x * ratio + 0.5) for x in image.size)
            self.sizes.append((h, w))
            corners = [(y, x) for y in starts(h, self.window, self.stride) for x in starts(w, self.window, self.stride)]
            self.windows += [(i, y, x) for y, x in corners]
        self._image = functools.lru_cache(maxsize=32)(self._read)  # Windows of one image are read one after another.

    def _read(self, i: int) -> np.ndarray:
        """Image i, resized, uint8 [h, w, 3]."""
        path = self.pairs[i][0]
        h, w = self.sizes[i]
        filter = Image.Resampling[self.interpolation.upper()]
        return np.asarray(read_file(path, rgb=True).resize((w, h), filter))

    def _cut(self, n: int) -> np.ndarray:
        """Window n, uint8 [S, S, 3]."""
        i, y, x = self.windows[n]
        return self._image(i)[y : y + self.window, x : x + self.window]

    def _cosines(self, model, texts: np.ndarray) -> Iterator[np.ndarray]:
        """Of each resized image, [h, w, T]: the mean over the windows that show a pixel."""
        tokens = model.dense(self._cut, len(self.windows), self.options.last)
        total, seen, current = None, None, -1
        for (i, y, x), window in zip(self.windows, tokens, strict=True):
            if i != current:
                if total is not None:
                    yield total / seen
                total = np.zeros((*self.sizes[i], len(texts)), np.float32)
                seen, current = np.zeros((*self.sizes[i], 1), np.float32), i
            table = (encode.unit(window) @ texts.T).astype(np.float32).reshape(self.grid, self.grid, -1)
            shown = np.s_[y : y + self.window, x : x + self.window]
            total[shown] += resized(table, self.window, self.window)
            seen[shown] += 1
        yield total / seen

    def evaluate(self, model) -> Outcome:
        """The mIoU over the whole set, each class's IoU, the maps of a few images, and the overlaps of every image."""
        embeddings = model.texts([t for texts in self._prompts for t in texts])
        texts = zeroshot.classifier(embeddings, [len(t) for t in self._prompts])
        o, maps, rows = self.options, [], []
        both, union = np.zeros((2, self.count, len(self.names)))
        for i, ((path, label_path), cosines) in enumerate(zip(self.pairs, self._cosines(model, texts), strict=True)):
            labels = segmentation_sets.read_labels(label_path, self.set)
            predicted = classify(resized(cosines, *labels.shape), self.owner, o.scale, o.background)
            both[i], union[i] = overlaps(predicted, labels, len(self.names))
            if i in self._shown:
                shown = {"truth": _encoded(labels), "predicted": _encoded(predicted)}
                maps.append({"image": str(path.resolve()), **shown})
            own = float(stats.mean_ratio(both[i], union[i]))
            row = {"weights": model.label, "metric": "miou", "item": i, "file": str(path.relative_to(self.root))}
            rows.append(row | {"score": "" if np.isnan(own) else own})
        totals = both.sum(axis=0), union.sum(axis=0)
        per_class = [
            {"name": n[0], "iou": 100 * b / u if u else None} for n, b, u in zip(self.names, *totals, strict=True)
        ]
        score = {"score": 100 * float(stats.mean_ratio(*totals)), "interval": self._interval((both, union))}
        results = {"scores": {"miou": score}, "classes": per_class, "pictures": maps}
        return Outcome(results, rows, {"overlaps": (both, union)})

    def _interval(self, *overlaps: tuple[np.ndarray, np.ndarray]) -> list[float]:
        """The interval of the mIoU, or of the difference of two, in percent."""
        ends = stats.bootstrap_ratios(*overlaps, resamples=self.settings.bootstrap, seed=self.settings.seed)
        return [100 * end for end in ends]

    def compare(self, before: Outcome, after: Outcome) -> dict:
        """The difference of the mIoU and its paired bootstrap interval over images."""
        b, a = (outcome.results["scores"]["miou"]["score"] for outcome in (before, after))
        interval = self._interval(before.held["overlaps"], after.held["overlaps"])
        return {"scores": {"miou": {"difference": a - b, "interval": interval, "mcnemar": None}}}


prepare = Segmentation
