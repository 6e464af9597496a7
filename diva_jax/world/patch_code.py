"""A fixed orthonormal code of image patches, in place of a VAE where images are small."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.common.fields import between
from diva_jax.models.layers import Array
from diva_jax.models.library_config import LibraryConfig

PATH = f"{__name__}.PatchCodeConfig"  # For `config.diffusion.vae._class_name` and `config.genhancer.vae.code`.


@dataclasses.dataclass(frozen=True)
class PatchCodeConfig:
    """Shape of a patch code, a `presets.LatentCode`.

    Attributes:
      patch_size: side of a patch [pixels].
      latent_channels: numbers kept per patch.
      in_channels: channels of the images.
      scaling_factor: factor by which the code is multiplied.
    """

    patch_size: int = 8
    latent_channels: int = 64
    in_channels: int = 3
    scaling_factor: float = 1.0

    @property
    def downscale(self) -> int:
        """Ratio of the image size to the size of the latents."""
        return self.patch_size

    @property
    def moment_channels(self) -> int:
        """Channels of what `PatchCode.moments` returns."""
        return self.latent_channels

    def build(self, **kw) -> "PatchCode":
        """The code of this shape; arguments as those of `PatchCode`."""
        return PatchCode(self, **kw)

    def latents(self, moments: Array, noise: Array | None = None) -> Array:
        """Returns scaling_factor * moments; the code has no variance, and `noise` is not used."""
        return self.scaling_factor * moments

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "PatchCodeConfig":
        """Reads `vae/config.json`.

        Raises:
          UserError: an option is unknown or impossible.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        file = LibraryConfig(options, "the patch code's config")
        file.check(names, {})
        config = cls(
            **{name: file.get(name, getattr(cls, name)) for name in names[:3]},
            scaling_factor=file.get("scaling_factor", 1.0, between(1e-6, 1e6)),
        )
        if config.latent_channels > config.patch_size**2 * config.in_channels:
            raise UserError(
                f"the patch code keeps {config.latent_channels} numbers of a patch that has only "
                f"{config.patch_size**2 * config.in_channels}: lower latent_channels"
            )
        return config


def patches(images, side: int):
    """Patches of images, numpy's or jax's, as vectors: [N, H, W, C] -> [N, H / side, W / side, side**2 * C]."""
    n, h, w, c = images.shape
    tiles = images.reshape(n, h // side, side, w // side, side, c).swapaxes(2, 3)
    return tiles.reshape(n, h // side, w // side, side * side * c)


class PatchCode(nnx.Module):
    """Latents are the projections of image patches on orthonormal patterns, `basis`; there is nothing random.

    It has the methods of `vae.VAE` that objectives use.

    Args:
      config: the shape.
      rngs: not used; the patterns of a new one are those of `principal` on white noise, the first axes.
      dtype, param_dtype: see `Layers`.
    """

    def __init__(self, config: PatchCodeConfig, *, rngs=None, dtype=jnp.float32, param_dtype=jnp.float32):
        self.config, self.dtype = config, dtype
        n = config.patch_size**2 * config.in_channels
        self.basis = nnx.Param(jnp.eye(n, config.latent_channels, dtype=param_dtype))

    def moments(self, images: Array) -> Array:
        """Returns the code: [B, H, W, in_channels] in [-1, 1] -> [B, H/p, W/p, latent_channels]."""
        return patches(images.astype(self.dtype), self.config.patch_size) @ self.basis[...].astype(self.dtype)

    def encode(self, images: Array) -> Array:
        """Returns the latents for the U-Net, `config.latents` of the code."""
        return self.config.latents(self.moments(images))


def principal(images: np.ndarray, patch: int, channels: int) -> np.ndarray:
    """The patterns that keep most of the variance of images' patches, not centred: [patch**2 * C, channels].

    Args:
      images: [N, H, W, C], floats.
      patch: side of a patch [pixels].
      channels: patterns.
    """
    flat = patches(images, patch).reshape(-1, patch * patch * images.shape[-1])
    _, vectors = np.linalg.eigh(flat.T.astype(np.float64) @ flat)
    vectors = vectors[:, ::-1][:, :channels]
    largest = np.abs(vectors).argmax(axis=0)
    return vectors * np.sign(vectors[largest, np.arange(channels)])  # An eigenvector's sign is arbitrary.
