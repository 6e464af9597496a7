"""Decoding of images, and the preparation of test images for a backbone: both bit for bit, on the host with Pillow."""

import io

import numpy as np
from PIL import Image

from diva_jax.common.errors import UserError

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
RESIZE_MODES = ("shortest", "squash")
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow would also pass PostScript to Ghostscript.
_MAX_PIXELS = 2**27  # 400 MB decoded; a larger image is taken for a decompression bomb.


def decode(data: bytes, rgb: bool = True) -> Image.Image:
    """Decodes an image at its full size.

    Pillow's `draft` mode, which decodes JPEGs at a lower resolution, would change pixels and stays off.

    Args:
      data: the encoded image.
      rgb: convert to RGB at once, as webdataset and torchvision's folders do. Otherwise the image keeps its mode, and
        `prepare` converts it after resizing, as open_clip does; the two differ for palettes and alpha channels.

    Raises:
      Exception: the image is broken. Pillow's plugins raise many types.
    """
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are too many")
    image.load()
    return image.convert("RGB") if rgb else image


def open_image(data: bytes, name: str, rgb: bool = False) -> Image.Image:
    """`decode` for data in which every image counts, as in an evaluation.

    Raises:
      UserError: the image cannot be decoded; gives `name`.
    """
    try:
        return decode(data, rgb)
    except Exception as e:  # See `decode`.
        raise UserError(f"the image {name} cannot be read ({e}): fetch it again") from e


def _shortest(image: Image.Image, size: int, filter: Image.Resampling) -> Image.Image:
    """Resizes the shorter side to `size` and the longer in proportion (rounded down), then crops the centre."""
    w, h = image.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    if (w, h) != image.size:
        image = image.resize((w, h), filter)
    # Python rounds halves to even, as torchvision's crop does.
    left, top = round((w - size) / 2), round((h - size) / 2)
    return image.crop((left, top, left + size, top + size))


def prepare(image: Image.Image, size: int, resize_mode: str, interpolation: str) -> np.ndarray:
    """A test image as open_clip prepares it, uint8 [size, size, 3].

    Args:
      image: of any mode and size.
      size: the backbone's resolution [pixels].
      resize_mode: "shortest" (resizes the shorter side, then crops the centre) or "squash" (resizes both sides,
        which does not keep the proportions).
      interpolation: "bicubic" or "bilinear".

    Raises:
      UserError: the resize mode is not known.
    """
    filter = _FILTERS[interpolation]
    if resize_mode == "shortest":
        image = _shortest(image, size, filter)
    elif resize_mode != "squash":
        raise UserError(f"backbone.resize_mode={resize_mode!r} is not known: use shortest or squash")
    elif image.size != (size, size):
        image = image.resize((size, size), filter)
    return np.asarray(image.convert("RGB"))
