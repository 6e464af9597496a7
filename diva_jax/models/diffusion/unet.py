"""Stable Diffusion's U-Net, equivalent to diffusers' `UNet2DConditionModel`, with channels last."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.common.fields import between
from diva_jax.common.json_files import packaged
from diva_jax.models.diffusion.blocks import Downsample, ResnetBlock, Transformer, Upsample, call
from diva_jax.models.layers import Array, Layers
from diva_jax.models.library_config import LibraryConfig

_OPTIONS = packaged(__file__, "options.json")["unet"]
# Option -> its implemented values; diffusers' default is the first.
_FIXED = _OPTIONS["fixed"]
# Most of the options without effect belong to others that are not implemented. Two do not: softmax is always computed
# in float32, and a frozen network has no dropout.
_USED = {*_OPTIONS["used"], *_OPTIONS["without_effect"]}
_DEFAULTS = dict(in_channels=4, out_channels=4, cross_attention_dim=1280, norm_num_groups=32)
_DEFAULTS |= dict(use_linear_projection=False)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Shape of a U-Net, per resolution finest first; the defaults are Stable Diffusion 2.1-base's. `sample_size` is the
    side of the latents in training; any size is accepted. `layers_per_block` are the residual blocks of the down
    blocks; the up blocks have one more. `cross_down` and `cross_up` say whether each block has transformers, in order
    of execution, over a context of `cross_attention_dim` channels. `class_embed_dim` are the channels of
    `class_labels`, which are added to the time embedding (2.1-unclip's image embedding and noise level), if any."""

    sample_size: int | tuple[int, ...] | None = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (5, 10, 20, 20)
    cross_down: tuple[bool, ...] = (True, True, True, False)
    cross_up: tuple[bool, ...] = (False, True, True, True)
    cross_attention_dim: int = 1024
    use_linear_projection: bool = True
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    class_embed_dim: int | None = None

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "UNetConfig":
        """Reads a diffusers folder's `unet/config.json`; a UserError where an option is not implemented. Despite its
        name, `attention_head_dim` is the *number* of heads; `num_attention_heads` overrides it."""
        file = LibraryConfig(options, "the U-Net's config")
        file.require_class("UNet2DConditionModel")
        hint = "use a Stable Diffusion 1.5, 2.1-base, 2.1 or 2.1-unclip checkpoint"
        file.check({*_USED, *_OPTIONS["of_ema"]}, _FIXED, lists=True, hint=hint)
        channels = file.sizes("block_out_channels", (320, 640, 1280, 1280))
        n = len(channels)
        classes = options.get("class_embed_type")
        count = "num_attention_heads" if options.get("num_attention_heads") else "attention_head_dim"
        sample_size = options.get("sample_size")
        config = cls(
            sample_size=tuple(sample_size) if isinstance(sample_size, list) else sample_size,
            block_out_channels=channels,
            layers_per_block=file.sizes("layers_per_block", 2, n),
            heads=file.sizes(count, 8, n),
            cross_down=_cross(file, "down_block_types", (True, True, True, False), n),
            cross_up=_cross(file, "up_block_types", (False, True, True, True), n),
            norm_eps=file.get("norm_eps", 1e-5, between(0, 1)),
            class_embed_dim=file.get("projection_class_embeddings_input_dim", 0) if classes else None,
            **{name: file.get(name, default) for name, default in _DEFAULTS.items()},
        )
        file.require_multiple("block_out_channels", channels, "norm_num_groups", [config.norm_num_groups] * n)
        file.require_multiple("block_out_channels", channels, count, config.heads)
        return config


def _cross(file: LibraryConfig, name: str, default: tuple[bool, ...], count: int) -> tuple[bool, ...]:
    """Which blocks have transformers, according to their class names."""
    if name not in file.options and len(default) == count:
        return default
    return tuple(t.startswith("CrossAttn") for t in file.names(name, (), count))


def timestep_embedding(timesteps: Array, n: int) -> Array:
    """Returns cosines, then sines, of the timesteps [B] at n/2 frequencies from 1 to about 1/10000, [B, n] float32.
    These are the position embeddings of arXiv 1706.03762, section 3.5, in another order. They are in float32 for every
    dtype of the model: in bfloat16, neighbouring timesteps near 999 have the same value."""
    half = n // 2
    # Values are rounded to float32 at the same places as in diffusers. Since timesteps reach 999, an error of one unit
    # in the last place of a frequency changes the fifth digit of the result.
    exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)  # numpy's float32 exp is less accurate.
    args = timesteps.astype(jnp.float32)[:, None] * frequencies  # [B, n/2]
    return jnp.concatenate([jnp.cos(args), jnp.sin(args)], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Two linear layers with SiLU in between: [B, n_in] -> [B, n_out]."""

    def __init__(self, n_in: int, n_out: int, layers: Layers):
        self.linear_1 = layers.linear(n_in, n_out)
        self.linear_2 = layers.linear(n_out, n_out)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class Level(NamedTuple):
    """Makes the layers of a U-Net or a VAE at one resolution, of `n` channels. `attention` makes an attention,
    `padding` is that of `Downsample`, and the others are those of `ResnetBlock`."""

    n: int
    groups: int
    epsilon: float
    layers: Layers
    attention: Callable[[], nnx.Module]
    padding: tuple[int, int] = (1, 1)
    time_dim: int | None = None

    def resnet(self, n_in: int) -> ResnetBlock:
        return ResnetBlock(n_in, self.n, self.groups, self.epsilon, self.layers, self.time_dim)


class DownBlock(nnx.Module):
    """`depth` residual blocks, the first `cross` of them followed by a transformer, then downsampling by two if
    `downsample`. The block at the coarsest resolution, in the middle, has two and one."""

    def __init__(self, n_in: int, depth: int, cross: int, downsample: bool, make: Level, remat: bool):
        self.remat = remat
        self.resnets = nnx.List([make.resnet(make.n if i else n_in) for i in range(depth)])
        self.attentions = nnx.List([make.attention() for _ in range(cross)])
        self.downsamplers = nnx.List([Downsample(make.n, make.padding, make.layers)] if downsample else [])

    def __call__(self, x: Array, time: Array | None = None, context: Array | None = None) -> list[Array]:
        """[B, H, W, n_in] -> the skip connections for the up blocks; the last one is the input of the next block."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = call(resnet, x, time, remat=self.remat)
            if i < len(self.attentions):
                x = call(self.attentions[i], x, context, remat=self.remat)
            skips.append(x)
        for downsample in self.downsamplers:
            skips.append(downsample(x))
        return skips


class UpBlock(nnx.Module):
    """Residual blocks, one for each skip connection of `n_skips` channels; then as `DownBlock`, but upsampling."""

    def __init__(self, n_in: int, n_skips: list[int], cross: bool, upsample: bool, make: Level, remat: bool):
        self.remat = remat
        self.resnets = nnx.List([make.resnet((make.n if i else n_in) + n) for i, n in enumerate(n_skips)])
        self.attentions = nnx.List([make.attention() for _ in range(len(n_skips) if cross else 0)])
        self.upsamplers = nnx.List([Upsample(make.n, make.layers)] if upsample else [])

    def __call__(self, x: Array, skips: list[Array], time: Array, context: Array) -> Array:
        """Removes its skip connections from the end of `skips`, and upsamples to the size of the last remaining one."""
        for i, resnet in enumerate(self.resnets):
            x = call(resnet, jnp.concatenate([x, skips.pop()], axis=-1), time, remat=self.remat)
            if self.attentions:
                x = call(self.attentions[i], x, context, remat=self.remat)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[1:3])
        return x


class UNet(nnx.Module):
    """Predicts the noise (or the velocity) of noisy latents; arguments as `backbones.build`'s. The time and class
    embeddings are computed in at least float32. With `remat`, the backward pass recomputes the activations of residual
    blocks and transformers instead of storing them, with the same result."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat=False):
        layers = Layers(rngs, dtype, param_dtype)
        precise = Layers(rngs, jnp.promote_types(dtype, jnp.float32), param_dtype)
        channels, last = config.block_out_channels, len(config.block_out_channels) - 1
        self.config, self.dtype = config, dtype
        self.conv_in = layers.conv(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0], precise)
        if config.class_embed_dim is not None:
            self.class_embedding = TimestepEmbedding(config.class_embed_dim, 4 * channels[0], precise)

        levels, groups, epsilon = [], config.norm_num_groups, config.norm_eps
        for n, heads in zip(channels, config.heads, strict=True):
            given = (n, config.cross_attention_dim, heads, groups, config.use_linear_projection, layers)
            attention = functools.partial(Transformer, *given)
            levels.append(Level(n, groups, epsilon, layers, attention, time_dim=4 * channels[0]))
        down, up, skips = [], [], [channels[0]]  # The last: channels of the skip connections.
        for i, depth in enumerate(config.layers_per_block):
            n_in = channels[max(i - 1, 0)]
            down.append(DownBlock(n_in, depth, depth * config.cross_down[i], i < last, levels[i], remat))
            skips += [channels[i]] * (depth + (i < last))
        self.down_blocks = nnx.List(down)
        self.mid_block = DownBlock(channels[-1], 2, 1, False, levels[-1], remat)
        for i in range(last, -1, -1):
            n_skips = [skips.pop() for _ in range(config.layers_per_block[i] + 1)]
            n_in, cross = channels[min(i + 1, last)], config.cross_up[last - i]
            up.append(UpBlock(n_in, n_skips, cross, i > 0, levels[i], remat))
        self.up_blocks = nnx.List(up)
        self.conv_norm_out = layers.group_norm(channels[0], groups, epsilon)
        self.conv_out = layers.conv(channels[0], config.out_channels, 3, padding=1)

    def __call__(self, sample: Array, timesteps: Array, context: Array, class_labels: Array | None = None) -> Array:
        """The prediction for one denoising step, [B, H, W, out_channels], in `dtype`, of noisy latents [B, H, W,
        in_channels] at timesteps [B] under a context [B, N, cross_attention_dim], for any H, W and N. A U-Net with a
        class embedding needs class_labels [B, class_embed_dim], and no other takes them: else a UserError."""
        width = self.config.class_embed_dim
        if (width is None) != (class_labels is None):
            need = f"needs class_labels of width {width}" if width is not None else "takes no class_labels"
            raise UserError(f"this U-Net {need}: use another objective or another Stable Diffusion checkpoint")
        time = self.time_embedding(timestep_embedding(timesteps, self.config.block_out_channels[0]))
        if class_labels is not None:
            time = time + self.class_embedding(class_labels)
        time = time.astype(self.dtype)  # [B, 4 * block_out_channels[0]]
        context = context.astype(self.dtype)
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], time, context)
        x = self.mid_block(skips[-1], time, context)[-1]
        for block in self.up_blocks:
            x = block(x, skips, time, context)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
