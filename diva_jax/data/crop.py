"""Random resized crops, bit for bit as torchvision makes them of Pillow images."""

import math

import numpy as np
from PIL import Image

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_ATTEMPTS = 10

Box = tuple[int, int, int, int]  # left, top, right, bottom [pixels]


def sample_box(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Draws torchvision's RandomResizedCrop: the share of the area is uniform in `scale`, width over height log-uniform
    in `ratio`; after ten boxes that do not fit, it is the largest central one whose ratio is in range."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    # At least one pixel: a thin image with a ratio far from 1 would give an empty box.
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resized_crop(image: Image.Image, box: Box, size: int, interpolation: str = "bicubic") -> np.ndarray:
    """Crops the box out, then resizes: uint8 [size, size, 3]. `resize(box=...)` would read pixels outside of the
    box."""
    return np.asarray(image.crop(box).resize((size, size), INTERPOLATIONS[interpolation]))
