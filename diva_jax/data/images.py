"""A test image as open_clip prepares it for a backbone, on the host with Pillow, bit for bit."""

import io

import numpy as np
from PIL import Image

from diva_jax.common.errors import UserError

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow would also hand PostScript to Ghostscript.


def open_image(data: bytes, name: str, rgb: bool = False) -> Image.Image:
    """Decodes an image.

    Args:
      data: the encoded image.
      name: for the error.
      rgb: convert at once, as webdataset and torchvision's folders do; else `prepare` converts after resizing, as
        open_clip does, which is not the same for a palette or an alpha channel.

    Raises:
      UserError: it cannot be decoded; names it.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        image.load()
        return image.convert("RGB") if rgb else image
    except Exception as e:  # Pillow's plugins raise many kinds on broken data.
        raise UserError(f"the image {name} cannot be read ({e}): fetch it again") from e


def _shortest(image: Image.Image, size: int, filter: Image.Resampling) -> Image.Image:
    """The shorter side to `size`, the longer one in proportion (rounded down), then the centre."""
    w, h = image.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    if (w, h) != image.size:
        image = image.resize((w, h), filter)
    # Python rounds halves to even, and so does torchvision's crop.
    left, top = round((w - size) / 2), round((h - size) / 2)
    return image.crop((left, top, left + size, top + size))


def prepare(image: Image.Image, size: int, resize_mode: str, interpolation: str) -> np.ndarray:
    """uint8 [size, size, 3].

    Args:
      image: of any mode and size.
      size: the backbone's resolution [pixels].
      resize_mode: "shortest" (and the centre) or "squash" (both sides, whatever the proportions).
      interpolation: "bicubic" or "bilinear".
    """
    filter = _FILTERS[interpolation]
    if resize_mode == "shortest":
        image = _shortest(image, size, filter)
    elif resize_mode != "squash":
        raise UserError(f"backbone.resize_mode={resize_mode!r} is not known: use shortest or squash")
    elif image.size != (size, size):
        image = image.resize((size, size), filter)
    return np.asarray(image.convert("RGB"))
