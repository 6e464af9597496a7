"""The encoder of FLUX's autoencoder: Stable Diffusion's without `quant_conv`, with 16 channels and a shift."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from diva_jax.common.fields import Rule, between, field
from diva_jax.models.diffusion import options as opt
from diva_jax.models.diffusion.vae import Encoder, VAEConfig
from diva_jax.models.layers import Array, Keys, Layers


@dataclasses.dataclass(frozen=True)
class FluxVAEConfig:
    """Shape of the encoder; the defaults are FLUX.1's."""

    in_channels: int = field(3, "The channels of the images.", between(1, 1024))
    latent_channels: int = field(16, "The channels of the latents.", between(1, 2**20))
    block_out_channels: tuple[int, ...] = field(
        (128, 256, 512, 512),
        "The channels at each resolution, finest first; each resolution is half of the one before.",
        Rule(lambda v: v and all(isinstance(n, int) and n > 0 for n in v), "must be whole numbers above 0"),
    )
    layers_per_block: int = field(2, "The residual blocks at each resolution.", between(1, 64))
    norm_num_groups: int = field(32, "The groups of every GroupNorm.", between(1, 2**20))
    scaling_factor: float = field(0.3611, "Latents are scaling_factor * (sample - shift_factor).")
    shift_factor: float = field(0.1159, "Latents are scaling_factor * (sample - shift_factor).")

    @property
    def downscale(self) -> int:
        """Ratio of the image size to the size of the latents."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def moment_channels(self) -> int:
        """Channels of the posterior's moments: mean and logarithm of the variance."""
        return 2 * self.latent_channels

    @property
    def encoder(self) -> VAEConfig:
        """The shape as one of Stable Diffusion's."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "shift_factor"}
        return VAEConfig(**fields, use_quant_conv=False)

    def build(self, **kw) -> "FluxVAE":
        """The encoder of this shape; arguments as those of `FluxVAE`."""
        return FluxVAE(self, **kw)

    def latents(self, moments: Array, noise: Array | None = None) -> Array:
        """Returns scaling_factor * (mean + exp(logvar / 2) * noise - shift_factor), float32 or wider.

        Args:
          moments: [..., 2 * latent_channels], as `FluxVAE.moments` returns them.
          noise: standard normal, [..., latent_channels]; None: the mean of the posterior.

        Returns:
          [..., latent_channels].
        """
        moments = moments.astype(jnp.promote_types(moments.dtype, jnp.float32))
        mean, logvar = jnp.split(moments, 2, axis=-1)
        sample = mean if noise is None else mean + jnp.exp(logvar / 2) * noise
        return self.scaling_factor * (sample - self.shift_factor)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "FluxVAEConfig":
        """Reads the content of a diffusers folder's `vae/config.json`.

        Raises:
          UserError: an option is not implemented, or values are inconsistent.
        """
        there = VAEConfig.from_dict({k: v for k, v in options.items() if k != "shift_factor"})
        fields = {f.name: getattr(there, f.name) for f in dataclasses.fields(cls) if f.name != "shift_factor"}
        return cls(**fields, shift_factor=opt.number(options, "shift_factor", 0.0, "autoencoder", -1e6, 1e6))


class FluxVAE(nnx.Module):
    """Encodes images to latents.

    Args:
      config: the shape.
      rngs, dtype, param_dtype: see `Layers`.
    """

    def __init__(self, config: FluxVAEConfig, *, rngs: Keys, dtype=jnp.float32, param_dtype=jnp.float32):
        self.config = config
        self.encoder = Encoder(config.encoder, Layers(rngs, dtype, param_dtype))

    def moments(self, images: Array) -> Array:
        """Mean and logarithm of the variance of the posterior, one after the other.

        Args:
          images: [B, H, W, in_channels], RGB in [-1, 1].

        Returns:
          [B, H / downscale, W / downscale, 2 * latent_channels], sizes rounded down.
        """
        return self.encoder(images)

    def encode(self, images: Array, noise: Array | None = None) -> Array:
        """Latents [B, h, w, latent_channels] of images as for `moments`, see `FluxVAEConfig.latents`."""
        return self.config.latents(self.moments(images), noise)
