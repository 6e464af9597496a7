"""Open-vocabulary segmentation from patch tokens: the mIoU of the texts nearest to each pixel, as SCLIP does it (arXiv
2312.01597): windows over the resized image, cosines of patch tokens and texts interpolated to pixels and averaged where
windows overlap, a softmax over all texts, and for each class its most probable synonym."""

import base64
import dataclasses
import functools
import io
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from diva_jax.common import paths
from diva_jax.common.errors import UserError, brief, explained
from diva_jax.common.fields import above, at_least, below, field, one_of
from diva_jax.common.json_files import packaged
from diva_jax.data import files
from diva_jax.data.images import opened, read_file
from diva_jax.evals import Outcome, Settings, Task, encode, require_count, set_and_folder, stats
from diva_jax.evals.tasks import zeroshot
from diva_jax.models import backbones
from diva_jax.models.backbones.shared.transformer import VARIANTS

_UNKNOWN = -2
# Number of images, evenly spaced, whose maps of classes are in results.json, and the longer side of a map [pixels].
_MAPS, _MAP_SIDE = 6, 240


@dataclasses.dataclass(frozen=True)
class SegmentationOptions:
    """The section `config.eval.segmentation`."""

    last: str = field("sclip", "The last block is run in this variant.", one_of(*VARIANTS))
    short_side: int = field(0, "The shorter side is resized to this; 0: one and a half windows [pixels].", at_least(0))
    stride: int = field(0, "The distance of windows of the backbone's image size; 0: half of it [pixels].", at_least(0))
    scale: float = field(40.0, "Cosines are multiplied by this before the softmax.", above(0))
    background: float = field(0.0, "A set with a background has it where no class is as probable as this.", below(0, 1))
    classes: str = field("", "A file with a line per class, synonyms separated by commas; if empty, the set's own.")
    allow_partial: bool = field(False, "Whether a set may have fewer images than the published one.")


@dataclasses.dataclass(frozen=True)
class Set:
    """A published set of `classes` classes with `count` validation images.

    Its files, with {} for the name of an item: an image, and a label image with a byte per pixel. The file `listed` has
    the names; where it is empty, all images are items. `values` are those of the classes in label images, `background`
    is whether class 0 is what no other class is, and `names` are the classes as texts, synonyms separated by commas;
    empty: those of the folder's objectInfo150.txt."""

    title: str
    classes: int
    count: int
    background: bool
    images: str
    labels: str
    listed: str
    hint: str
    values: Sequence[int]
    ignored: Sequence[int]
    names: Sequence[str]


SETS = {name: Set(**row) for name, row in packaged(__file__, "segmentation.json")["sets"].items()}


def class_names(given: str, subject: Set, root: Path) -> list[list[str]]:
    """The synonyms of each class, from a text file with a line per class, synonyms separated by commas; empty: the
    set's own. A UserError where it cannot be read, or has another number of classes."""
    lines, objects = subject.names, root / "objectInfo150.txt"
    with explained(f"config.eval.segmentation.classes={given}", "set it to FILE.txt", UserError):
        if given:
            lines = files.read_text(paths.expanded(given)).splitlines()
        elif not lines:
            lines = [line.split("\t")[-1] for line in files.read_text(objects).splitlines()[1:]]
    synonyms = [[n.strip() for n in line.split(",") if n.strip()] for line in lines if line.strip()]
    if len(synonyms) != subject.classes or not all(synonyms):
        problem = f"{subject.title} has {subject.classes} classes, not {len(synonyms)}"
        raise UserError(f"{given or root}: {problem}: correct the names")
    return synonyms


def _pairs(subject: Set, root: Path) -> list[tuple[Path, Path]]:
    """(image, label image) of each item, which may not exist."""
    if subject.listed:
        path = root / subject.listed
        if not path.is_file():
            raise UserError(f"{path} does not exist: give the folder {subject.hint}")
        names = files.read_text(path).split()
        if wrong := next((n for n in names if "/" in n), None):
            raise UserError(f"{path} lists {brief(wrong)}, which is not the name of an image: fetch it again")
    else:
        folder, suffix = subject.images.split("/{}")
        at = root / folder
        there = sorted(map(Path, files.walk(str(at)))) if at.is_dir() else []
        names = [p.relative_to(at).as_posix().removesuffix(suffix) for p in there if p.name.endswith(suffix)]
        if not names:
            raise UserError(f"{at} has no {suffix} images: give {subject.hint}")
    return [(root / subject.images.format(n), root / subject.labels.format(n)) for n in names]


def read_pairs(subject: Set, root: Path, allow_partial: bool) -> list[tuple[Path, Path, tuple[int, int]]]:
    """(image, label image, their size) of each item. A UserError names a file that is missing or broken, of another
    size than its image, or with an unknown label; or the number of items is wrong."""
    pairs = _pairs(subject, root)
    if not allow_partial:
        require_count(root, len(pairs), subject.count, subject.title, "images", "segmentation.allow_partial")

    def check(pair: tuple[Path, Path]) -> tuple[Path, Path, tuple[int, int]]:
        with opened(pair[0]) as image, opened(pair[1]) as label_image:
            if image.size != label_image.size:
                raise UserError(f"{pair[1]} has the size {label_image.size}, its image {image.size}: fetch both again")
        read_labels(pair[1], subject)
        return *pair, image.size

    with ThreadPoolExecutor() as pool:
        return list(pool.map(check, pairs))


def read_labels(path: Path, subject: Set) -> np.ndarray:
    """The class of each pixel, int [H, W], -1 where it is ignored; a UserError for other values, or no label image."""
    with opened(path) as image:
        # Palettes are kept: the values are the labels.
        if image.mode not in ("P", "L"):
            raise UserError(f"{path} has the mode {image.mode}, not a byte per pixel: give the published label images")
        values = np.asarray(image)
    table = np.full(256, _UNKNOWN)
    table[list(subject.ignored)] = -1
    table[list(subject.values)] = np.arange(subject.classes)
    labels = table[values]
    if (strange := labels == _UNKNOWN).any():
        problem = f"{path} has the unknown label {values[strange][0]}"
        raise UserError(f"{problem}: it is none of {subject.title}'s {subject.classes} classes")
    return labels


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side of `length` pixels, at least `window`; the last one ends with the side."""
    last = length - window
    return [min(i, last) for i in range(0, max(last + stride - 1, 0) // stride * stride + 1, stride)]


def interpolation(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of linear interpolation, edges repeated, as torch has it without `align_corners`."""
    centres, points = (np.arange(new) + 0.5) * old / new - 0.5, np.arange(old)
    return np.stack([np.interp(centres, points, row) for row in np.eye(old)], axis=1).astype(np.float32)


def resized(table: np.ndarray, height: int, width: int) -> np.ndarray:
    """[h, w, T] -> [height, width, T], linearly interpolated."""
    rows, columns = interpolation(table.shape[0], height), interpolation(table.shape[1], width)
    return np.einsum("ih,hwt,jw->ijt", rows, table, columns, optimize=True)


def classify(cosines: np.ndarray, owner: np.ndarray, scale: float, background: float) -> np.ndarray:
    """The class of each pixel, int [H, W], from the cosines [H, W, T] of each text, times `scale` before the softmax; 0
    where no class's most probable text reaches `background`. `owner`, [T], are the texts' classes, increasing."""
    x = scale * cosines
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    by_class = np.maximum.reduceat(p, np.searchsorted(owner, np.arange(owner.max() + 1)), axis=-1)
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
    """The task on `path`, `SET=FOLDER` with a set of `SETS`."""

    title, items = "Open-vocabulary segmentation", "images"

    def __init__(self, path: str, section: ConfigDict, settings: Settings):
        options = SegmentationOptions(**section)
        self.options, self.settings = options, settings
        name, self.root = set_and_folder("segmentation", path, SETS)
        self.set = SETS[name]
        if options.background and not self.set.background:
            raise UserError(f"config.eval.segmentation.background={options.background}: {name} has none, set it to 0")
        self.pairs = read_pairs(self.set, self.root, options.allow_partial)
        self.names = class_names(options.classes, self.set, self.root)
        self.owner = np.repeat(np.arange(len(self.names)), [len(n) for n in self.names])
        self._prompts = [[t.replace("{c}", n) for t in zeroshot.imagenet("templates")] for s in self.names for n in s]
        self.texts = list(dict.fromkeys(t for texts in self._prompts for t in texts))
        self.data, self.count = str(self.root.resolve()), len(self.pairs)
        self.metrics = {"miou": {"title": f"{self.set.title}, mIoU", "unit": "%"}}
        self._shown = set(np.linspace(0, self.count - 1, min(_MAPS, self.count)).round().astype(int).tolist())

    def bind(self, config: ConfigDict, mesh) -> None:
        """Lays out the windows for the backbone's image size."""
        spec = backbones.spec_of(config)
        if not hasattr(backbones.architecture(spec.arch).Vision, "encode_dense") or not spec.has_text:
            raise UserError(f"segmentation needs patch tokens in the text's space, which {spec.arch} does not have")
        self.window, self.interpolation, self.grid = spec.image_size, spec.interpolation, spec.grid
        self.seen = spec.grid * spec.patch_size  # Pixels of a window's side in whole patches; further ones have none.
        self.stride = self.options.stride or self.window // 2
        side = self.options.short_side or self.window * 3 // 2
        if side < self.window or self.stride > self.window:
            problem = f"short_side={side} must be at least the window, {self.window}, and stride={self.stride} at most"
            raise UserError(f"config.eval.segmentation: {problem}: set backbone.image_size for another window")
        self.sizes, self.windows = [], []
        for i, (_, _, size) in enumerate(self.pairs):
            w, h = (int(x * side / min(size) + 0.5) for x in size)
            self.sizes.append((h, w))
            corners = [(y, x) for y in starts(h, self.window, self.stride) for x in starts(w, self.window, self.stride)]
            self.windows += [(i, y, x) for y, x in corners]
        self._image = functools.lru_cache(maxsize=32)(self._read)  # Windows of one image are read one after another.

    def _read(self, i: int) -> np.ndarray:
        """Image i, resized, uint8 [h, w, 3]."""
        filter = Image.Resampling[self.interpolation.upper()]
        return np.asarray(read_file(self.pairs[i][0], rgb=True).resize(self.sizes[i][::-1], filter))

    def _cut(self, n: int) -> np.ndarray:
        """Window n, uint8 [S, S, 3]."""
        i, y, x = self.windows[n]
        return self._image(i)[y : y + self.window, x : x + self.window]

    def _cosines(self, model, texts: np.ndarray) -> Iterator[np.ndarray]:
        """Of each resized image, [h, w, T]: the mean over the windows that show a pixel."""
        windows = zip(self.windows, model.dense(self._cut, len(self.windows), self.options.last), strict=True)
        for i, of_image in itertools.groupby(windows, key=lambda window: window[0][0]):
            total = np.zeros((*self.sizes[i], len(texts)), np.float32)
            seen = np.zeros((*self.sizes[i], 1), np.float32)
            for (_, y, x), window in of_image:
                table = (encode.unit(window) @ texts.T).astype(np.float32).reshape(self.grid, self.grid, -1)
                shown = np.s_[y : y + self.window, x : x + self.window]
                beyond = (0, self.window - self.seen)
                total[shown] += np.pad(resized(table, self.seen, self.seen), (beyond, beyond, (0, 0)), "edge")
                seen[shown] += 1
            yield total / seen

    def evaluate(self, model) -> Outcome:
        """The mIoU over the whole set, each class's IoU, the maps of a few images, and the overlaps of every image."""
        o, maps, rows, texts = self.options, [], [], zeroshot.classifier(model, self._prompts)
        both, union = np.zeros((2, self.count, len(self.names)))
        for i, ((path, label_path, _), cosines) in enumerate(zip(self.pairs, self._cosines(model, texts), strict=True)):
            labels = read_labels(label_path, self.set)
            predicted = classify(resized(cosines, *labels.shape), self.owner, o.scale, o.background)
            both[i], union[i] = overlaps(predicted, labels, len(self.names))
            if i in self._shown:
                shown = {"truth": _encoded(labels), "predicted": _encoded(predicted)}
                maps.append({"image": str(path.resolve()), **shown})
            own = float(stats.mean_ratio(both[i], union[i]))
            row = {"weights": model.label, "metric": "miou", "item": i, "file": str(path.relative_to(self.root))}
            rows.append(row | {"score": "" if np.isnan(own) else own})
        totals = both.sum(axis=0), union.sum(axis=0)
        shares = [100 * b / u if u else None for b, u in zip(*totals, strict=True)]
        per_class = [{"name": n[0], "iou": share} for n, share in zip(self.names, shares, strict=True)]
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


SECTION, prepare = SegmentationOptions, Segmentation
