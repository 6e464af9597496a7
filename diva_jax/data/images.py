"""Images on the host, with Pillow: decoding, random resized crops bit for bit as torchvision makes them, and the
preparation of test images for a backbone."""

import contextlib
import io
import math
import os
import threading
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from diva_jax.common.errors import explained
from diva_jax.common.json_files import open_regular
from diva_jax.data import files

INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")
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
    """Crops the box out, then resizes, uint8 [size, size, 3]; `resize(box=...)` would read pixels outside of it."""
    return np.asarray(image.crop(box).resize((size, size), Image.Resampling[interpolation.upper()]))


# Pillow would also pass PostScript to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_PNG = b"\x89PNG\r\n\x1a\n"
# 400 MB decoded; a larger image is taken for a decompression bomb, and so is a thin one, which would have as many
# pixels once its shorter side is that of a tower's input.
MAX_PIXELS, _MAX_RATIO = 2**27, 500
_REPAIR = "fetch it again, convert it to an RGB image of JPEG or PNG, or leave it out of the data"
# While an image is decoded and converted, Pillow keeps four bytes per pixel, twice.
_BYTES_PER_PIXEL = 8


class Memory:
    """Memory [bytes] for images that several threads decode at the same time; a larger image is decoded alone."""

    def __init__(self, size: int):
        self._size = self._free = size
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def reserve(self, data: bytes) -> Iterator[None]:
        """Waits until there is room for an encoded image, and keeps it; one that cannot be opened needs no room."""
        try:
            with Image.open(io.BytesIO(_without_texts(data)), formats=FORMATS) as image:
                wanted = min(_BYTES_PER_PIXEL * image.width * image.height, self._size)
        except Exception:  # See `decode`, which reports it.
            wanted = 0
        with self._changed:
            self._changed.wait_for(lambda: self._free >= wanted)
            self._free -= wanted
        try:
            yield
        finally:
            with self._changed:
                self._free += wanted
                self._changed.notify_all()


# Of evaluations and encoders, as much as config.data.decode_gib by default; and by thread, what it holds, see `kept`.
_MEMORY, _THREAD = Memory(2**32), threading.local()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Context manager, or decorator, for a thread that reads images, one after the other: the room for the last one is
    kept until the next one or the end, and not only until it is decoded."""
    with contextlib.ExitStack() as _THREAD.stack:
        try:
            yield
        finally:
            del _THREAD.stack


def _without_texts(data: bytes) -> bytes:
    """A PNG without colour profiles and texts, which change no pixel and of which Pillow refuses large ones."""
    if not data.startswith(_PNG):
        return data
    kept, at = [_PNG], len(_PNG)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])  # Length, kind, content and checksum.
        if data[at + 4 : at + 8] not in (b"iCCP", b"iTXt", b"tEXt", b"zTXt"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _check_size(image: Image.Image) -> None:
    """A ValueError for an image that is taken for a decompression bomb."""
    if image.width * image.height > MAX_PIXELS or max(image.size) > _MAX_RATIO * min(image.size):
        raise ValueError(f"{image.width}x{image.height} pixels are too many, or too far from a square")


def eight_bits(image: Image.Image) -> Image.Image:
    """The image, which is read if it was only opened, with 8 bits per pixel instead of 16; a ValueError for pixels of
    32, and for an image that is taken for a decompression bomb."""
    _check_size(image)
    image.load()
    if image.mode.startswith("I;16"):  # Pillow's conversion would cut values off at 255.
        return Image.fromarray(((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} (32 bits) have no range that says what is white")
    return image


def decode(data: bytes, rgb: bool = True) -> Image.Image:
    """Decodes an image at its full size; Pillow's `draft` mode, which decodes JPEGs at a lower resolution, would change
    pixels. `rgb` converts at once, as webdataset and torchvision's folders do; otherwise the image keeps its mode, and
    `prepare` converts it after resizing, as open_clip does, which differs for palettes and alpha channels. 16 bits per
    pixel become 8. Pillow's plugins raise many types for a broken image."""
    try:
        image = Image.open(io.BytesIO(_without_texts(data)), formats=FORMATS)
    except UnidentifiedImageError as e:
        raise ValueError(f"it is no image of {', '.join(FORMATS)}") from e
    image = eight_bits(image)
    return image.convert("RGB") if rgb and image.mode != "RGB" else image  # Without a copy where it is RGB.


def open_image(data: bytes, name: str, rgb: bool = False) -> Image.Image:
    """`decode` for data in which every image counts, as in an evaluation: a UserError with the name of a broken one.
    It waits until there is room, see `kept`."""
    with explained(f"the image {name} cannot be read", _REPAIR, Exception), contextlib.ExitStack() as here:
        stack = getattr(_THREAD, "stack", here)
        stack.close()  # A thread that waits holds nothing.
        stack.enter_context(_MEMORY.reserve(data))
        return decode(data, rgb)


def read_file(path: str | os.PathLike, rgb: bool = False) -> Image.Image:
    """`open_image` of a file on this machine or behind a scheme, which is regular and not larger than any image."""
    with explained(f"the image {path} cannot be read", "check the path, or fetch it again", OSError, ValueError):
        data = files.read_image(os.fspath(path))
    return open_image(data, os.fspath(path), rgb)


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """An image file on this machine whose pixels are not read yet; a UserError where it cannot be decoded."""
    with (
        explained(f"{path} cannot be read", "fetch it again", Exception),  # Pillow's plugins raise many types.
        open(path, "rb", opener=open_regular) as file,
        Image.open(file, formats=FORMATS) as image,
    ):
        _check_size(image)
        yield image


def prepare(image: Image.Image, size: int, resize_mode: str, interpolation: str) -> np.ndarray:
    """A test image as open_clip prepares it, uint8 [size, size, 3]; `interpolation` is the name of a filter of Pillow.
    `resize_mode` "shortest" resizes the shorter side, the longer in proportion, rounded down, then crops the centre;
    "squash" resizes both sides. With ":K" the side is K instead of `size` pixels before the crop, whose place is
    transformers'."""
    mode, _, side = resize_mode.partition(":")
    (w, h), short = image.size, int(side or size)
    if mode == "squash":
        w, h = short, short
    else:
        w, h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    if (w, h) != image.size:
        image = image.resize((w, h), Image.Resampling[interpolation.upper()])
    # transformers rounds down; torchvision rounds, as Python does, halves to even.
    left, top = ((w - size) // 2, (h - size) // 2) if side else (round((w - size) / 2), round((h - size) / 2))
    if (w, h) != (size, size):
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image.convert("RGB"))
