"""GenHancer at a size that compiles in seconds: two encoder blocks, one double and one single block."""

import dataclasses

import small

from diva_jax import config
from diva_jax.models.backbones import HALF

SPEC = dataclasses.replace(small.SPEC, image_size=28)
SIGLIP = dataclasses.replace(
    SPEC, arch="siglip", embed_dim=24, activation="gelu", norm_eps=1e-6, mean=HALF, std=HALF, resize_mode="squash"
)
_SECTIONS = dict(
    denoiser=dict(
        in_channels=12,
        vector_dim=20,
        text_dim=28,
        width=36,
        heads=3,
        double_blocks=1,
        single_blocks=1,
        axes=(4, 2, 6),
        mlp_ratio=2.0,
    ),
    vae=dict(latent_channels=3, block_out_channels=(8, 12), layers_per_block=1, norm_num_groups=4),
    lora=dict(rank=3, alpha=6.0),
)


def small_config(spec=SPEC, **fields):
    """Float32, two stages of five steps, batches of 8; `fields` by dotted name, dots as double underscores."""
    c = config.default(spec, objective="genhancer")
    c.update(dtype="float32", frozen_dtype="float32", steps=5, batch_size=8, accum=1)
    for section, values in _SECTIONS.items():
        c.genhancer[section].update(values)
    c.genhancer.stage1_steps = 5
    for name, value in fields.items():
        *path, leaf = name.split("__")
        node = c
        for part in path:
            node = node[part]
        node[leaf] = value
    return c
