"""The two views of one crop, computed on the device: the VAE's and the backbone's. `exact` is the preprocessing that
the models were trained with, `faithful` what the code of the authors of arXiv 2407.20171 computes."""

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
    edges where the image gets smaller, then PyTorch's cubic kernel (a = -0.75) between pixels whose corners are
    aligned."""
    rows, columns = (jnp.asarray(_aligned_weights(n, size), images.dtype) for n in images.shape[1:3])
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, images, precision=jax.lax.Precision.HIGHEST)


def vae_view(images: Array, mode: str = "exact") -> Array:
    """The VAE's input of images [B, S, S, 3] in [0, 1]. "exact" is 2x - 1; "faithful" is 2y - 1, where y is x
    normalised with CLIP's statistics and denormalised with ImageNet's: 0.82 to 0.86 of the contrast, and another
    mean."""
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
