"""Segmentation sets in their published layouts: label images have a byte per pixel, a class or an ignored value."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from diva_jax.common.errors import UserError, brief
from diva_jax.common.json_files import open_regular
from diva_jax.data import texts
from diva_jax.data.images import FORMATS, MAX_PIXELS
from diva_jax.evals.items import require_count

# Names of classes, in the order of their values, as texts for an encoder; synonyms are separated by commas. COCO's are
# its 80 objects, COCO-Stuff's its 91 classes of stuff, whose published names are like wall-brick and wall-other.
_NAMES = json.loads(Path(__file__).with_name("tasks").joinpath("segmentation.json").read_text("utf-8"))
# The value of a pixel is the class's number in COCO less one; these numbers of objects are not used.
_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
_STUFF_VALUES = tuple(n - 1 for n in range(1, 183) if n not in _UNUSED)


@dataclasses.dataclass(frozen=True)
class Set:
    """A published set with `count` validation images: the value of each class in label images, the values that are
    ignored, folder -> (image, label image) of each item, and the classes as texts, synonyms separated by commas; None:
    those of the folder's objectInfo150.txt."""

    title: str
    classes: int
    count: int
    values: Sequence[int]
    ignored: Sequence[int]
    pairs: Callable[[Path], list[tuple[Path, Path]]]
    names: Sequence[str] | None


def _pascal(subset: str, labels: str, hint: str) -> Callable[[Path], list[tuple[Path, Path]]]:
    """PASCAL's layout: a list of names, JPEGs and PNGs of labels."""

    def pairs(root: Path) -> list[tuple[Path, Path]]:
        path = root / "ImageSets" / subset / "val.txt"
        if not path.is_file():
            raise UserError(f"{path} does not exist: give the folder {hint}")
        stems = texts.read_text(path).split()
        if wrong := next((n for n in stems if "/" in n), None):
            raise UserError(f"{path} lists {brief(wrong)}, which is not the name of an image: fetch it again")
        return [(root / "JPEGImages" / f"{n}.jpg", root / labels / f"{n}.png") for n in stems]

    return pairs


def _folders(
    images: str, pattern: str, labels: str, suffixes: tuple[str, str], hint: str
) -> Callable[[Path], list[tuple[Path, Path]]]:
    """A folder of images and one of labels with the same paths below, whose names end in one suffix or the other."""

    def pairs(root: Path) -> list[tuple[Path, Path]]:
        paths = sorted((root / images).glob(pattern))
        if not paths:
            raise UserError(f"{root / images} has no {suffixes[0]} images: give {hint}")
        names = [path.relative_to(root / images).as_posix().removesuffix(suffixes[0]) for path in paths]
        return [(path, root / labels / (name + suffixes[1])) for path, name in zip(paths, names, strict=True)]

    return pairs


def _coco(suffix: str) -> Callable[[Path], list[tuple[Path, Path]]]:
    hint = "a folder with COCO's images and annotations"
    return _folders("images/val2017", "*.jpg", "annotations/val2017", (".jpg", suffix), hint)


_VOC = _pascal("Segmentation", "SegmentationClass", "VOC2012 as it was unpacked")
_CONTEXT = _pascal("SegmentationContext", "SegmentationClassContext", "VOC2010 with the files of PASCAL Context in it")
_ADE = _folders(
    "images/validation",
    "*.jpg",
    "annotations/validation",
    (".jpg", ".png"),
    "the folder ADEChallengeData2016 as it was unpacked",
)
_CITYSCAPES = _folders(
    "leftImg8bit/val",
    "*/*_leftImg8bit.png",
    "gtFine/val",
    ("_leftImg8bit.png", "_gtFine_labelTrainIds.png"),
    "Cityscapes' folder as it was unpacked",
)
_IGNORED = (255,)
# A bed is one of COCO's objects.
_OBJECTS = [_NAMES["background"].replace(" bed,", ""), *_NAMES["coco"]]
_THINGS_AND_STUFF = [*_NAMES["coco"], *_NAMES["stuff"]]
SETS: dict[str, Set] = {
    "voc20": Set("PASCAL VOC without background", 20, 1449, range(1, 21), (0, 255), _VOC, _NAMES["voc"]),
    "voc21": Set("PASCAL VOC", 21, 1449, range(21), _IGNORED, _VOC, [_NAMES["background"], *_NAMES["voc"]]),
    "context59": Set(
        "PASCAL Context without background", 59, 5104, range(1, 60), (0, 255), _CONTEXT, _NAMES["context"]
    ),
    "context60": Set("PASCAL Context", 60, 5104, range(60), _IGNORED, _CONTEXT, ["background", *_NAMES["context"]]),
    "ade20k": Set("ADE20K", 150, 2000, range(1, 151), (0, 255), _ADE, None),
    "coco_object": Set("COCO-Object", 81, 5000, range(81), _IGNORED, _coco("_instanceTrainIds.png"), _OBJECTS),
    "coco_stuff": Set("COCO-Stuff", 171, 5000, _STUFF_VALUES, _IGNORED, _coco(".png"), _THINGS_AND_STUFF),
    "cityscapes": Set("Cityscapes", 19, 500, range(19), _IGNORED, _CITYSCAPES, _NAMES["cityscapes"]),
}
_UNKNOWN = -2
# Sets whose class 0 is what no other class is.
HAS_BACKGROUND = ("voc21", "context60", "coco_object")


def _ade_names(root: Path) -> list[str]:
    """The column `Name` of objectInfo150.txt, whose synonyms are separated by commas."""
    path = root / "objectInfo150.txt"
    if not path.is_file():
        raise UserError(f"{path} does not exist: fetch it, or set --config.eval.segmentation.classes=FILE.txt")
    return [line.split("\t")[-1].strip() for line in texts.read_text(path).splitlines()[1:] if line.strip()]


def read_names(given: str, subject: Set, root: Path) -> list[list[str]]:
    """The synonyms of each class, from a text file with a line per class, synonyms separated by commas; empty: the
    set's own. A UserError where it cannot be read, or has another number of classes."""
    if given:
        try:
            lines = texts.read_text(Path(given).expanduser()).splitlines()
        except UserError as e:
            raise UserError(f"config.eval.segmentation.classes={given}: {e}") from e
    else:
        lines = _ade_names(root) if subject.names is None else subject.names
    synonyms = [[n.strip() for n in line.split(",") if n.strip()] for line in lines if line.strip()]
    if len(synonyms) != subject.classes or not all(synonyms):
        raise UserError(
            f"{given or root}: {subject.title} has {subject.classes} classes, not {len(synonyms)}: correct the names"
        )
    return synonyms


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file whose pixels have not been read yet; a UserError where it cannot be decoded."""
    try:
        with open(path, "rb", opener=open_regular) as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are too many")
            yield image
    except UserError:
        raise
    except Exception as e:  # Pillow's plugins raise many types.
        raise UserError(f"{path} cannot be read ({str(e)[:200]}): fetch it again") from e


def read_pairs(subject: Set, root: Path, allow_partial: bool) -> list[tuple[Path, Path]]:
    """(image, label image) of each item. A UserError names a file that is missing or broken, of another size than its
    image, or with an unknown label; or the number of items is wrong."""
    pairs = subject.pairs(root)
    if not allow_partial:
        require_count(root, len(pairs), subject.count, subject.title, "images", "segmentation.allow_partial")

    def check(pair: tuple[Path, Path]) -> None:
        with _opened(pair[0]) as image, _opened(pair[1]) as label_image:
            if image.size != label_image.size:
                raise UserError(f"{pair[1]} has the size {label_image.size}, its image {image.size}: fetch both again")
        read_labels(pair[1], subject)

    with ThreadPoolExecutor() as pool:
        list(pool.map(check, pairs))
    return pairs


def read_labels(path: Path, subject: Set) -> np.ndarray:
    """The class of each pixel, int [H, W], -1 where it is ignored; a UserError for other values, or no label image."""
    with _opened(path) as image:
        # Palettes are kept: the values are the labels.
        if image.mode not in ("P", "L"):
            raise UserError(
                f"{path} has the mode {image.mode}, not one byte per pixel: give the published label images"
            )
        values = np.asarray(image).astype(int)
    table = np.full(256, _UNKNOWN)
    table[list(subject.ignored)] = -1
    table[list(subject.values)] = np.arange(subject.classes)
    labels = table[values]
    if (strange := labels == _UNKNOWN).any():
        raise UserError(
            f"{path} has the unknown label {values[strange][0]}: it is none of {subject.title}'s {subject.classes} "
            "classes"
        )
    return labels
