"""The encoders of Stable Diffusion's VAE and of FLUX's, equivalent to diffusers' `AutoencoderKL`, channels last."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.common.fields import Rule, between, field
from diva_jax.common.json_files import packaged
from diva_jax.models.diffusion.blocks import ContextAttention
from diva_jax.models.diffusion.unet import DownBlock, Level
from diva_jax.models.layers import Array, Layers, widened
from diva_jax.models.library_config import LibraryConfig

_EPSILON = 1e-6
_OPTIONS = packaged(__file__, "options.json")["vae"]
# Option -> its implemented values; diffusers' default is the first.
_FIXED = _OPTIONS["fixed"]
# The options without effect are those of the decoder, of half precision in diffusers, and of tiling.
_USED = {*_OPTIONS["used"], *_OPTIONS["without_effect"]}
_DEFAULTS = dict(in_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=32, scaling_factor=0.18215)
_DEFAULTS |= dict(use_quant_conv=True, shift_factor=0.0)
_FACTOR = between(1e-6, 1e6)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an encoder of images to latents."""

    in_channels: int = field(3, "The channels of the images.", between(1, 1024))
    latent_channels: int = field(4, "The channels of the latents.", between(1, 2**20))
    block_out_channels: tuple[int, ...] = field(
        (128, 256, 512, 512),
        "The channels at each resolution, finest first; each resolution is half of the one before.",
        Rule(lambda v: v and all(isinstance(n, int) and n > 0 for n in v), "must be whole numbers above 0"),
    )
    layers_per_block: int = field(2, "The residual blocks at each resolution.", between(1, 64))
    norm_num_groups: int = field(32, "The groups of every GroupNorm.", between(1, 2**20))
    scaling_factor: float = field(0.18215, "Latents are scaling_factor * sample.", _FACTOR)

    @property
    def downscale(self) -> int:
        """Ratio of the image size to the size of the latents."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def moment_channels(self) -> int:
        """Channels of the posterior's moments: mean and logarithm of the variance."""
        return 2 * self.latent_channels

    def build(self, **kw) -> "VAE":
        """The encoder of this shape; arguments as those of `VAE`."""
        return VAE(self, **kw)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """Reads a diffusers folder's `vae/config.json`; a UserError for options that are not implemented."""
        file = LibraryConfig(options, "the VAE's config")
        file.require_class("AutoencoderKL")
        rules = {f.name: f.metadata["rule"] for f in dataclasses.fields(cls) if f.name in _DEFAULTS}
        hint = "use a Stable Diffusion 1.5, 2.1-base, 2.1 or 2.1-unclip checkpoint"
        file.check({*_USED, *rules}, _FIXED, lists=True, hint=hint)
        found = {name: file.get(name, _DEFAULTS[name], rule) for name, rule in rules.items()}
        channels, groups = file.sizes("block_out_channels", (64,)), found["norm_num_groups"]
        file.names("down_block_types", ("DownEncoderBlock2D",), len(channels))
        file.require_multiple("block_out_channels", channels, "norm_num_groups", [groups] * len(channels))
        return cls(block_out_channels=channels, **found)


@dataclasses.dataclass(frozen=True)
class VAEConfig(AutoencoderConfig):
    """Shape of a VAE; the defaults are Stable Diffusion's."""

    use_quant_conv: bool = field(True, "Whether there is a 1x1 convolution on the moments.")

    def latents(self, moments: Array, noise: Array | None = None) -> Array:
        """See `LatentCode`: scaling_factor * mean, in `moments`' dtype, or scaling_factor * (mean + std * noise), in
        the wider of the dtypes of both. As in diffusers, the logarithm of the variance is clamped to [-30, 20]."""
        mean, logvar = jnp.split(moments, 2, axis=-1)
        if noise is None:
            return self.scaling_factor * mean
        return self.scaling_factor * (mean + jnp.exp(0.5 * jnp.clip(logvar.astype(noise.dtype), -30, 20)) * noise)


@dataclasses.dataclass(frozen=True)
class FluxVAEConfig(AutoencoderConfig):
    """Shape of FLUX's encoder: Stable Diffusion's without `quant_conv`; the defaults are FLUX.1's."""

    use_quant_conv: ClassVar[bool] = False
    latent_channels: int = field(16, "The channels of the latents.", between(1, 2**20))
    scaling_factor: float = field(0.3611, "Latents are scaling_factor * (sample - shift_factor).", _FACTOR)
    shift_factor: float = field(0.1159, "Latents are scaling_factor * (sample - shift_factor).", between(-1e6, 1e6))

    def latents(self, moments: Array, noise: Array | None = None) -> Array:
        """See `LatentCode`: scaling_factor * (mean + exp(logvar / 2) * noise - shift_factor), float32 or wider."""
        mean, logvar = jnp.split(widened(moments), 2, axis=-1)
        sample = mean if noise is None else mean + jnp.exp(logvar / 2) * noise
        return self.scaling_factor * (sample - self.shift_factor)


class PixelAttention(ContextAttention):
    """Single-head self-attention over the pixels of a feature map, with a GroupNorm and a residual."""

    def __init__(self, n: int, groups: int, layers: Layers):
        super().__init__(n, n, 1, layers, bias=True)
        self.group_norm = layers.group_norm(n, groups, _EPSILON)

    def __call__(self, x: Array, context: None = None) -> Array:
        """[B, H, W, n] -> [B, H, W, n]."""
        y = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])  # [B, H*W, n]
        return x + super().__call__(y, y).reshape(x.shape)


class VAEEncoder(nnx.Module):
    """[B, H, W, in_channels] -> moments, [B, h, w, 2 * latent_channels]."""

    def __init__(self, config: AutoencoderConfig, layers: Layers):
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = layers.conv(config.in_channels, channels[0], 3, padding=1)
        last, depth = len(channels) - 1, config.layers_per_block
        # Only the right and bottom edges are padded.
        attentions = [functools.partial(PixelAttention, n, groups, layers) for n in channels]
        levels = [Level(n, groups, _EPSILON, layers, a, (0, 1)) for n, a in zip(channels, attentions, strict=True)]
        self.down_blocks = nnx.List(
            DownBlock(channels[max(i - 1, 0)], depth, 0, i < last, level, False) for i, level in enumerate(levels)
        )
        self.mid_block = DownBlock(channels[-1], 2, 1, False, levels[-1], False)
        self.conv_norm_out = layers.group_norm(channels[-1], groups, _EPSILON)
        self.conv_out = layers.conv(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x)[-1]
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """Encodes images to latents; the config's class says how they follow from the posterior. Others as for `Layers`."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        layers = Layers(rngs, dtype, param_dtype)
        self.config = config
        self.encoder = VAEEncoder(config, layers)
        if config.use_quant_conv:
            self.quant_conv = layers.conv(2 * config.latent_channels, 2 * config.latent_channels, 1)

    def moments(self, images: Array) -> Array:
        """Mean and logarithm of the variance, not clamped, of the latents' posterior, before the scaling factor, in
        `dtype`. RGB images [B, H, W, in_channels] in [-1, 1] -> [B, H / downscale, W / downscale, 2 * latent_channels],
        the means first, sizes rounded down."""
        moments = self.encoder(images)
        return self.quant_conv(moments) if self.config.use_quant_conv else moments

    def encode(self, images: Array, noise: Array | None = None) -> Array:
        """Returns the latents of images as for `moments`: see the config's `latents`, whose `noise` draws a sample."""
        return self.config.latents(self.moments(images), noise)
