"""What is computed of a crop on the device: the VAE's view, the backbone's, and the jittered view of DCR. `exact` is
the preprocessing that the models were trained with, `faithful` what the code of the authors of arXiv 2407.20171
computes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diva_jax.models.backbones import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD

Array = jax.Array


def to_float(images: Array, dtype=jnp.float32) -> Array:
    """uint8 images of any shape -> `dtype`, in [0, 1]."""
    return images.astype(dtype) / 255


def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """(x - mean) / std per channel of images [..., C]."""
    return (images - jnp.asarray(mean, images.dtype)) / jnp.asarray(std, images.dtype)


def resize(images: Array, size: int, method: str, antialias: bool) -> Array:
    """Resizes images [B, H, W, C] to [B, size, size, C] as PyTorch's `interpolate(align_corners=False)` does, `method`
    "linear" or "cubic". With antialias, which widens the kernel when downscaling, cubic is Keys's kernel with a = -0.5,
    as in PyTorch and Pillow; without it PyTorch uses a = -0.75 and would differ."""
    shape = (images.shape[0], size, size, images.shape[3])
    return jax.image.resize(images, shape, method, antialias=antialias, precision=jax.lax.Precision.HIGHEST)


def cubic_weights(at: np.ndarray, n: int) -> np.ndarray:
    """The matrix, float64 [N, n], that samples a row of n pixels as PyTorch's bicubic interpolation does without
    antialias: Keys's cubic kernel with a = -0.75, and pixels at the edges repeated. `at` is where to sample [pixels],
    [N]; the centre of the first pixel is at 0."""
    a, weights = -0.75, np.zeros((len(at), n))
    for tap in range(-1, 3):
        pixel = np.floor(at).astype(int) + tap
        x = np.abs(at - pixel)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * a * x - 4 * a
        np.add.at(weights, (np.arange(len(at)), pixel.clip(0, n - 1)), np.where(x <= 1, near, far))
    return weights


def _aligned_weights(n: int, size: int) -> np.ndarray:
    """The matrix [size, n] of `aligned_resize` along one axis."""
    blur = np.eye(n)
    if (factor := n / size) > 1:
        sigma = max((factor - 1) / 2, 0.001)
        taps = int(max(4 * sigma, 3)) | 1
        offsets = np.arange(taps) - taps // 2
        kernel = np.exp(-(offsets**2) / (2 * sigma**2))
        padded = np.pad(np.arange(n), taps // 2, mode="reflect")
        blur = sum(k * blur[padded[i : i + n]] for i, k in enumerate(kernel / kernel.sum()))
    return cubic_weights(np.arange(size) * ((n - 1) / max(size - 1, 1)), n) @ blur


def aligned_resize(images: Array, size: int) -> Array:
    """Resizes images [B, H, W, C] to [B, size, size, C] as kornia's `resize(interpolation="bicubic",
    align_corners=True, antialias=True)`, which Stability's code for Stable unCLIP uses: a Gaussian blur with reflected
    edges where the image gets smaller, then PyTorch's cubic kernel (a = -0.75) with aligned corners."""
    rows, columns = (jnp.asarray(_aligned_weights(n, size), images.dtype) for n in images.shape[1:3])
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, images, precision=jax.lax.Precision.HIGHEST)


def vae_view(images: Array, mode: str = "exact") -> Array:
    """The VAE's input of images [B, S, S, 3] in [0, 1]. "exact" is 2x - 1; "faithful" is 2y - 1, where y is x
    normalised with CLIP's statistics and denormalised with ImageNet's: another mean, 0.82 to 0.86 of the contrast."""
    if mode == "faithful":
        images = normalise(images, OPENAI_MEAN, OPENAI_STD)
        images = images * jnp.asarray(IMAGENET_STD, images.dtype) + jnp.asarray(IMAGENET_MEAN, images.dtype)
    return 2 * images - 1


def backbone_view(
    images: Array, size: int, mean: tuple[float, ...], std: tuple[float, ...], mode: str = "exact"
) -> Array:
    """The vision encoder's input [B, size, size, 3] of images [B, S, S, 3] in [0, 1]; mean and std are per channel.
    "exact" resizes (bicubic, with antialias), then normalises; "faithful" normalises, then resizes (bilinear, without
    antialias); "aligned" resizes by `aligned_resize`, then normalises."""
    if mode == "faithful":
        return resize(normalise(images, mean, std), size, "linear", antialias=False)
    if mode == "aligned":
        return normalise(aligned_resize(images, size), mean, std)
    return normalise(resize(images, size, "cubic", antialias=True), mean, std)


class Jitter(NamedTuple):
    """What was drawn for B images: `order` of the operations 0 brightness, 1 contrast, 2 saturation and 3 hue, int32
    [B, 4]; `factors` of each operation, by its number, float32 [B, 4]; `crop` (top, left, height, width) [pixels],
    int32 [B, 4]; `hflip` and `vflip`, bool [B]."""

    order: Array
    factors: Array
    crop: Array
    hflip: Array
    vflip: Array


_ATTEMPTS = 10
# What DCR draws from, uniform: brightness, contrast and saturation are multiplied by 1 - x to 1 + x, the hue is moved
# by -x to x [turns]; the crop's area over the image's; its width over its height, on a logarithmic scale.
_COLORS, _SCALE, _RATIO = (0.1, 0.1, 0.1, 0.05), (0.9, 1.0), (0.9, 1.1)


def _crop(key: Array, size: int) -> Array:
    """The first of ten boxes that lies within the image, else the whole image, [4] int32."""
    shape_key, place_key = jax.random.split(key)
    area, ratio = jax.random.uniform(shape_key, (2, _ATTEMPTS))
    low, high = _SCALE
    area = size**2 * (low + (high - low) * area)
    low, high = jnp.log(jnp.asarray(_RATIO))
    ratio = jnp.exp(low + (high - low) * ratio)
    width, height = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (width <= size) & (height <= size)
    first = jnp.argmax(fits)
    height, width = (jnp.where(fits[first], x[first], size).astype(jnp.int32) for x in (height, width))
    place = jax.random.randint(place_key, (2,), 0, jnp.stack([size - height, size - width]) + 1)
    return jnp.stack([place[0], place[1], height, width])


def draw_jitter(keys: Array, size: int) -> Jitter:
    """Draws for images of `size` x `size` pixels, from one key per image, [B]."""

    def one(key):
        order, factors, hflip, vflip, crop = jax.random.split(key, 5)
        width, centre = jnp.asarray(_COLORS), jnp.asarray([1.0, 1.0, 1.0, 0.0])
        return Jitter(
            jax.random.permutation(order, 4).astype(jnp.int32),
            centre + width * jax.random.uniform(factors, (4,), minval=-1.0),
            _crop(crop, size),
            jax.random.bernoulli(hflip),
            jax.random.bernoulli(vflip),
        )

    return jax.vmap(one)(keys)


def _blend(a: Array, b: Array | float, ratio: Array) -> Array:
    return jnp.clip(ratio * a + (1 - ratio) * b, 0, 1)


def _gray(x: Array) -> Array:
    """[H, W, 3] -> [H, W, 1]."""
    return 0.2989 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]


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


def jittered(images: Array, drawn: Jitter) -> Array:
    """Images [B, S, S, 3] as torchvision's `ColorJitter`, flips and `RandomResizedCrop` change float tensors: colour in
    the drawn order, each operation clipped to [0, 1], flips, then the crop, resized (bilinear) to the whole size."""

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
