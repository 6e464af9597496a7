"""How much arithmetic one training image needs, counted from the config: the numerator of MFU.

Model FLOPs: matrix products and convolutions alone, a multiply-add as two, every convolution with its full window;
what remat computes again does not count. Backward: once more the forward work for the gradient of a layer's input,
and once more for that of its weights, where they are wanted; attention's two products have four.
"""

import dataclasses

from diva_jax.models.backbones import Spec, architecture
from diva_jax.models.backbones.shared.transformer import block_flops
from diva_jax.models.diffusion.latent_code import LatentCode
from diva_jax.models.diffusion.unet import UNetConfig
from diva_jax.models.diffusion.vae import AutoencoderConfig


@dataclasses.dataclass
class Tally:
    """Forward and backward FLOPs of frozen layers, in the order in which they run.

    `reached` is whether what flows depends on the condition yet: before that nothing has a gradient. `by_class`:
    whether the condition is a class embedding, added in every residual block, and not the context.
    """

    forward: float = 0.0
    backward: float = 0.0
    reached: bool = False
    by_class: bool = False

    def layer(self, positions: int, n_in: int, n_out: int, window: int = 1) -> None:
        """A linear layer or a convolution with `positions` outputs."""
        work = 2 * positions * n_in * n_out * window
        self.forward += work
        self.backward += work * self.reached

    def attention(self, n: int, m: int, width: int, cross: bool = False) -> None:
        """Scores and weighted sum of n queries and m keys; with `cross`, the keys are the context's."""
        self.forward += 4 * n * m * width
        if cross and self.by_class:  # Keys and values are constant.
            products = 2 if self.reached else 0
        else:  # Of the first cross-attention, the queries alone have no gradient.
            products = 4 if self.reached else 3 if cross else 0
        self.backward += 2 * n * m * width * products

    def resnet(self, positions: int, n_in: int, n_out: int) -> None:
        self.layer(positions, n_in, n_out, 9)
        if n_in != n_out:
            self.layer(positions, n_in, n_out)
        self.reached |= self.by_class
        self.layer(positions, n_out, n_out, 9)

    def transformer(self, n: int, width: int, tokens: int, context: int) -> None:
        """Stable Diffusion's: projections, self-attention, cross-attention, GEGLU."""
        for _ in range(4):  # in; query, key, value
            self.layer(n, width, width)
        self.attention(n, n, width)
        self.layer(n, width, width)
        self.layer(n, width, width)  # the query of the condition
        self.attention(n, tokens, width, cross=True)
        if self.by_class:
            self.forward += 2 * tokens * context * 2 * width
        else:
            self.reached = True
            self.layer(tokens, context, 2 * width)
        self.layer(n, width, width)
        self.layer(n, width, 8 * width)
        self.layer(n, 4 * width, width)
        self.layer(n, width, width)  # out


def unet(config: UNetConfig, size: int, tokens: int, by_class: bool = False) -> Tally:
    """One pass over latents of size x size; backward to the condition alone: the tokens or, with `by_class`, the class
    embedding.
    """
    t, channels, context = Tally(by_class=by_class), config.block_out_channels, config.cross_attention_dim
    side, n = size, channels[0]
    t.layer(side**2, config.in_channels, n, 9)
    skips = [n]
    for level, width in enumerate(channels):
        for _ in range(config.layers_per_block[level]):
            t.resnet(side**2, n, width)
            if config.cross_down[level]:
                t.transformer(side**2, width, tokens, context)
            n = width
            skips.append(n)
        if level < len(channels) - 1:
            side = -(-side // 2)
            t.layer(side**2, n, n, 9)
            skips.append(n)
    t.resnet(side**2, n, n)
    t.transformer(side**2, n, tokens, context)
    t.resnet(side**2, n, n)
    for i, level in enumerate(reversed(range(len(channels)))):
        width = channels[level]
        for _ in range(config.layers_per_block[level] + 1):
            t.resnet(side**2, n + skips.pop(), width)
            if config.cross_up[i]:
                t.transformer(side**2, width, tokens, context)
            n = width
        if level:
            side = -(-size // 2 ** (level - 1))
            t.layer(side**2, n, n, 9)
    t.layer(side**2, n, config.out_channels, 9)
    return t


def vae(config: LatentCode, size: int) -> float:
    """Encoding one size x size image."""
    if not isinstance(config, AutoencoderConfig):
        return config.flops(size)
    t, n, side = Tally(), config.block_out_channels[0], size
    t.layer(side**2, config.in_channels, n, 9)
    for level, width in enumerate(config.block_out_channels):
        for _ in range(config.layers_per_block):
            t.resnet(side**2, n, width)
            n = width
        if level < len(config.block_out_channels) - 1:
            side //= 2
            t.layer(side**2, n, n, 9)
    t.resnet(side**2, n, n)
    for _ in range(4):
        t.layer(side**2, n, n)
    t.attention(side**2, side**2, n)
    t.resnet(side**2, n, n)
    t.layer(side**2, n, 2 * config.latent_channels, 9)
    return t.forward


def vision(spec: Spec) -> float:
    """The backbone's forward pass over one image; with its backward pass, three times as much."""
    return architecture(spec.arch).flops(spec)


def text(spec: Spec) -> float:
    """The forward pass of the backbone's text tower over one text; the embedding of tokens has no products."""
    tower = spec.text
    return (
        tower.layers * block_flops(tower.context_length, tower.width, tower.mlp_dim) + 2 * tower.width * spec.embed_dim
    )
