"""Colour jitter, flips and a random crop of images on the device, drawn for each image: the positive view of DCR, by
torchvision's `ColorJitter`, `RandomHorizontalFlip`, `RandomVerticalFlip` and `RandomResizedCrop` on float tensors."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

_GRAY = (0.2989, 0.587, 0.114)
_TRIES = 10


class Draw(NamedTuple):
    """What was drawn for B images: `order` of the operations 0 brightness, 1 contrast, 2 saturation and 3 hue, int32
    [B, 4]; `factors` of each operation, by its number, float32 [B, 4]; `crop` (top, left, height, width) [pixels],
    int32 [B, 4]; `hflip` and `vflip`, bool [B]."""

    order: Array
    factors: Array
    crop: Array
    hflip: Array
    vflip: Array


@dataclasses.dataclass(frozen=True)
class Ranges:
    """What is drawn from, uniform, the crop's ratio on a logarithmic scale; the defaults are DCR's. Brightness,
    contrast and saturation are multiplied by 1 - color to 1 + color, the hue is moved by -hue to hue [turns]; `scale`
    is the crop's area over the image's, `ratio` its width over its height."""

    color: float = 0.1
    hue: float = 0.05
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (0.9, 1.1)


def _crop(key: Array, size: int, ranges: Ranges) -> Array:
    """The first of ten boxes that lies within the image, else the whole image, [4] int32."""
    shape_key, place_key = jax.random.split(key)
    area, ratio = jax.random.uniform(shape_key, (2, _TRIES))
    low, high = ranges.scale
    area = size**2 * (low + (high - low) * area)
    low, high = jnp.log(jnp.asarray(ranges.ratio))
    ratio = jnp.exp(low + (high - low) * ratio)
    width, height = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (width <= size) & (height <= size)
    first = jnp.argmax(fits)
    height, width = (jnp.where(fits[first], x[first], size).astype(jnp.int32) for x in (height, width))
    place = jax.random.randint(place_key, (2,), 0, jnp.stack([size - height, size - width]) + 1)
    return jnp.stack([place[0], place[1], height, width])


def draw(keys: Array, size: int, ranges: Ranges = Ranges()) -> Draw:
    """Draws for images of `size` x `size` pixels, from one key per image, [B]."""

    def one(key):
        order, factors, hflip, vflip, crop = jax.random.split(key, 5)
        width = jnp.asarray([ranges.color] * 3 + [ranges.hue])
        centre = jnp.asarray([1.0, 1.0, 1.0, 0.0])
        return Draw(
            jax.random.permutation(order, 4).astype(jnp.int32),
            centre + width * jax.random.uniform(factors, (4,), minval=-1.0),
            _crop(crop, size, ranges),
            jax.random.bernoulli(hflip),
            jax.random.bernoulli(vflip),
        )

    return jax.vmap(one)(keys)


def _blend(a: Array, b: Array | float, ratio: Array) -> Array:
    return jnp.clip(ratio * a + (1 - ratio) * b, 0, 1)


def _gray(x: Array) -> Array:
    """[H, W, 3] -> [H, W, 1]."""
    r, g, b = _GRAY
    return r * x[..., :1] + g * x[..., 1:2] + b * x[..., 2:]


def _hue(x: Array, shift: Array) -> Array:
    """Moves the hue of [H, W, 3] by `shift` turns: to HSV and back."""
    r, g, b = x[..., 0], x[..., 1], x[..., 2]
    top, bottom = jnp.max(x, axis=-1), jnp.min(x, axis=-1)
    grey = top == bottom
    saturation = (top - bottom) / jnp.where(grey, 1, top)
    span = jnp.where(grey, 1, top - bottom)
    rc, gc, bc = (top - r) / span, (top - g) / span, (top - b) / span
    hue = jnp.where(top == r, bc - gc, jnp.where(top == g, 2 + rc - bc, 4 + gc - rc))
    hue = jnp.mod(jnp.fmod(hue / 6 + 1, 1) + shift, 1)
    sector = jnp.floor(6 * hue)
    f = 6 * hue - sector
    p, q, t = (jnp.clip(top * (1 - s), 0, 1) for s in (saturation, saturation * f, saturation * (1 - f)))
    sector = (sector.astype(jnp.int32) % 6)[..., None]
    out = jnp.stack([top, t, p], axis=-1)
    for k, channels in enumerate(((q, top, p), (p, top, t), (p, q, top), (t, p, top), (top, p, q)), start=1):
        out = jnp.where(sector == k, jnp.stack(channels, axis=-1), out)
    return out


_OPERATIONS = (
    lambda x, factor: _blend(x, 0.0, factor),  # Brightness.
    lambda x, factor: _blend(x, jnp.mean(_gray(x)), factor),  # Contrast.
    lambda x, factor: _blend(x, _gray(x), factor),  # Saturation.
    _hue,
)


def _weights(start: Array, length: Array, size: int, dtype) -> Array:
    """[size, size]: the row of each output pixel holds its two input pixels' shares, half-pixel centres."""
    twice = (2 * jnp.arange(size) + 1) * length - size  # 2 * size times the position in the crop, without rounding.
    twice = jnp.clip(twice, 0, 2 * size * (length - 1))
    left, share = twice // (2 * size), (twice % (2 * size) / (2 * size))[:, None]
    right = jnp.minimum(left + 1, length - 1)
    pixels = jnp.arange(size)[None]
    weights = (1 - share) * (pixels == (start + left)[:, None]) + share * (pixels == (start + right)[:, None])
    return weights.astype(dtype)


def apply(images: Array, drawn: Draw) -> Array:
    """The jittered images [B, S, S, 3]: colour in the drawn order, each operation clipped to [0, 1], flips, then the
    crop, resized (bilinear) to the whole size."""

    def one(x, drawn):
        for k in range(len(_OPERATIONS)):
            operation = drawn.order[k]
            x = jax.lax.switch(operation, _OPERATIONS, x, drawn.factors[operation].astype(x.dtype))
        x = jnp.where(drawn.hflip, x[:, ::-1], x)
        x = jnp.where(drawn.vflip, x[::-1], x)
        top, left, height, width = drawn.crop
        size = x.shape[0]
        rows, columns = _weights(top, height, size, x.dtype), _weights(left, width, size, x.dtype)
        return jnp.einsum("yh,hwc,xw->yxc", rows, x, columns, precision=jax.lax.Precision.HIGHEST)

    return jax.vmap(one)(images, drawn)
