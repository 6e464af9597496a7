"""Segmentation sets in their published layouts: one row of `SETS` each.

A label image has one byte per pixel; `first` is the value of class 0, and values outside the classes are ignored.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from diva_jax.common.errors import UserError, brief
from diva_jax.data import texts
from diva_jax.data.files import open_regular
from diva_jax.data.images import FORMATS, MAX_PIXELS

_VOC = (
    "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,potted plant,"
    "sheep,sofa,train,tv monitor"
).split(",")
_BACKGROUND = (
    "background, sky, wall, tree, wood, grass, road, sea, river, mountain, sand, desk, bed, building, cloud, lamp, "
    "door, window, wardrobe, ceiling, shelf, curtain, stair, floor, hill, rail, fence"
)
_CITYSCAPES = (
    "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider,car,truck,"
    "bus,train,motorcycle,bicycle"
).split(",")


@dataclasses.dataclass(frozen=True)
class Set:
    """A published set.

    Attributes:
      title: for the reader.
      classes: how many.
      count: of images in the validation split.
      first: the value of class 0 in label images; smaller values are ignored.
      pairs: folder -> (image, label image) of each item.
      names: folder -> the classes, one text each, synonyms separated by commas.
    """

    title: str
    classes: int
    count: int
    first: int
    pairs: Callable[[Path], list[tuple[Path, Path]]]
    names: Callable[[Path], list[str]]


def _voc(root: Path) -> list[tuple[Path, Path]]:
    listed = root / "ImageSets" / "Segmentation" / "val.txt"
    if not listed.is_file():
        raise UserError(f"{listed} does not exist: give the folder VOC2012 as it was unpacked")
    names = texts.read_text(listed).split()
    if wrong := next((n for n in names if "/" in n), None):
        raise UserError(f"{listed} lists {brief(wrong)}, which is not the name of an image: fetch it again")
    return [(root / "JPEGImages" / f"{n}.jpg", root / "SegmentationClass" / f"{n}.png") for n in names]


def _ade(root: Path) -> list[tuple[Path, Path]]:
    images = sorted((root / "images" / "validation").glob("*.jpg"))
    if not images:
        raise UserError(
            f"{root}/images/validation has no .jpg: give the folder ADEChallengeData2016 as it was unpacked"
        )
    return [(p, root / "annotations" / "validation" / f"{p.stem}.png") for p in images]


def _ade_names(root: Path) -> list[str]:
    """The column `Name` of objectInfo150.txt, whose synonyms are separated by commas."""
    path = root / "objectInfo150.txt"
    if not path.is_file():
        raise UserError(f"{path} does not exist: fetch it, or set --config.eval.segmentation.classes=FILE.txt")
    return [line.split("\t")[-1].strip() for line in texts.read_text(path).splitlines()[1:] if line.strip()]


def _cityscapes(root: Path) -> list[tuple[Path, Path]]:
    images = sorted((root / "leftImg8bit" / "val").glob("*/*_leftImg8bit.png"))
    if not images:
        raise UserError(f"{root}/leftImg8bit/val has no images: give Cityscapes' folder as it was unpacked")
    labels = root / "gtFine" / "val"
    suffix = "_gtFine_labelTrainIds.png"
    return [(p, labels / p.parent.name / p.name.replace("_leftImg8bit.png", suffix)) for p in images]


SETS: dict[str, Set] = {
    "voc20": Set("PASCAL VOC without background", 20, 1449, 1, _voc, lambda root: _VOC),
    "voc21": Set("PASCAL VOC", 21, 1449, 0, _voc, lambda root: [_BACKGROUND, *_VOC]),
    "ade20k": Set("ADE20K", 150, 2000, 1, _ade, _ade_names),
    "cityscapes": Set("Cityscapes", 19, 500, 0, _cityscapes, lambda root: _CITYSCAPES),
}
HAS_BACKGROUND = ("voc21",)  # Sets whose class 0 is what no other class is.


def read_names(given: str, found: Set, root: Path) -> list[list[str]]:
    """The synonyms of each class.

    Args:
      given: a text file with a line per class, synonyms separated by commas; empty: the set's own.
      found: the set.
      root: its folder.

    Raises:
      UserError: the file cannot be read, or has another number of classes than the set.
    """
    try:
        lines = texts.read_text(Path(given).expanduser()).splitlines() if given else found.names(root)
    except UserError as e:
        raise UserError(f"config.eval.segmentation.classes={given}: {e}" if given else str(e)) from e
    names = [[n.strip() for n in line.split(",") if n.strip()] for line in lines if line.strip()]
    if len(names) != found.classes or not all(names):
        raise UserError(
            f"{given or root}: {found.title} has {found.classes} classes, not {len(names)}: correct the names"
        )
    return names


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file whose pixels have not been read yet.

    Raises:
      UserError: it is no image, or one that cannot be decoded.
    """
    try:
        with open(path, "rb", opener=open_regular) as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are too many")
            yield image
    except UserError:
        raise
    except Exception as e:  # Pillow's plugins raise many types.
        raise UserError(f"{path} cannot be read ({str(e)[:200]}): fetch it again") from e


def read_pairs(found: Set, root: Path, allow_partial: bool) -> list[tuple[Path, Path]]:
    """(image, label image) of each item, which exist and have one size and known labels.

    Raises:
      UserError: a file is missing or broken, sizes differ, a label is unknown, or the number of items is wrong; names
        the file.
    """
    pairs = found.pairs(root)
    if len(pairs) != found.count and not allow_partial:
        raise UserError(
            f"{root} has {len(pairs)} images, {found.title} has {found.count}: fetch the rest, or set "
            "--config.eval.segmentation.allow_partial to score a part"
        )
    for pair in pairs:
        sizes = []
        for path in pair:
            with _opened(path) as image:
                sizes.append(image.size)
        if sizes[0] != sizes[1]:
            raise UserError(f"{pair[1]} has the size {sizes[1]}, its image {sizes[0]}: fetch both again")
    with ThreadPoolExecutor() as pool:  # An unknown label is found before anything is loaded or scored.
        list(pool.map(lambda pair: read_labels(pair[1], found).shape, pairs))
    return pairs


def read_labels(path: Path, found: Set) -> np.ndarray:
    """The class of each pixel, int [H, W]; -1 where it is ignored.

    Raises:
      UserError: the file is no label image, or a value is neither a class nor 0 nor 255.
    """
    with _opened(path) as image:
        # Palettes are kept: the values are the labels.
        if image.mode not in ("P", "L"):
            raise UserError(
                f"{path} has the mode {image.mode}, not one byte per pixel: give the published label images"
            )
        values = np.asarray(image).astype(int)
    labels = values - found.first
    strange = (labels >= found.classes) & (values != 255)
    if strange.any():
        raise UserError(f"{path} has the unknown label {values[strange][0]}: {found.title} has {found.classes} classes")
    return np.where((labels < 0) | (values == 255), -1, labels)
