"""The two views of one crop, made on the device: the VAE's and the backbone's.

Each has an `exact` form, what the models were trained on, and a `faithful` one, what the authors' code of
arXiv 2407.20171 computes.
"""

import jax
import jax.numpy as jnp

from diva_jax.models.backbones import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD

Array = jax.Array


def to_float(images: Array, dtype=jnp.float32) -> Array:
    """uint8 -> [0, 1]."""
    return images.astype(dtype) / 255


def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """(x - mean) / std by channel, [..., C]."""
    return (images - jnp.asarray(mean, images.dtype)) / jnp.asarray(std, images.dtype)


def resize(images: Array, size: int, method: str, antialias: bool) -> Array:
    """[B, H, W, C] -> [B, size, size, C], as PyTorch's `interpolate(align_corners=False)`.

    Args:
      method: "linear" or "cubic". With antialias, cubic is Keys's kernel with a = -0.5, as in PyTorch and
        Pillow; without, PyTorch takes a = -0.75 and would differ.
      antialias: widen the kernel when downscaling.
    """
    shape = (images.shape[0], size, size, images.shape[3])
    return jax.image.resize(images, shape, method, antialias=antialias, precision=jax.lax.Precision.HIGHEST)


def vae_view(images: Array, mode: str = "exact") -> Array:
    """What the VAE encodes.

    Args:
      images: [B, S, S, 3] in [0, 1].
      mode: "exact": 2x - 1. "faithful": normalised with CLIP's statistics and back with ImageNet's to y,
        then 2y - 1, which scales contrast by 0.82 to 0.86 and shifts it.
    """
    if mode == "faithful":
        images = normalise(images, OPENAI_MEAN, OPENAI_STD)
        images = images * jnp.asarray(IMAGENET_STD, images.dtype) + jnp.asarray(IMAGENET_MEAN, images.dtype)
    return 2 * images - 1


def backbone_view(
    images: Array, size: int, mean: tuple[float, ...], std: tuple[float, ...], mode: str = "exact"
) -> Array:
    """What the vision encoder sees.

    Args:
      images: [B, S, S, 3] in [0, 1].
      size: the backbone's resolution.
      mean, std: to normalise with, by channel.
      mode: of the resize. "exact": bicubic with antialias, then normalised. "faithful": normalised, then
        bilinear without antialias.

    Returns:
      [B, size, size, 3].
    """
    if mode == "faithful":
        return resize(normalise(images, mean, std), size, "linear", antialias=False)
    return normalise(resize(images, size, "cubic", antialias=True), mean, std)
