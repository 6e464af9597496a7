"""A whole objective, small enough to compile in seconds: two levels of U-Net and VAE, two backbone blocks."""

import jax
import numpy as np
from specs import TRAINED as SPEC

from diva_jax import config
from diva_jax.models.diffusion import presets
from diva_jax.training import sharding
from diva_jax.training.step import Program


def diffusion() -> dict:
    sd = presets.preset("tiny")
    sd["unet"] |= dict(
        block_out_channels=(8, 16),
        attention_head_dim=(2, 4),
        cross_attention_dim=24,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    sd["vae"] |= dict(block_out_channels=(8, 12), down_block_types=("DownEncoderBlock2D",) * 2)
    sd["text_encoder"] |= dict(hidden_size=24, intermediate_size=40)
    return sd


def small_config(**fields):
    """Float32, AdamW, 24-pixel crops, batches of 8; `fields` by dotted name, dots as double underscores."""
    c = config.default(SPEC, diffusion())
    c.update(dtype="float32", frozen_dtype="float32", steps=10, batch_size=8, accum=1)
    c.diffusion.text_tokens = 6
    c.data.image_size = 24
    c.optim.update(name="adamw", lr=1e-2, warmup=0.2)
    for name, value in fields.items():
        *path, leaf = name.split("__")
        node = c
        for part in path:
            node = node[part]
        node[leaf] = value
    return c


def program(c, devices: int = 1) -> Program:
    return Program(c, sharding.make_mesh(c.mesh, jax.devices()[:devices]))


def random_arrays(p: Program, seed: int = 0) -> dict:
    """Every parameter of a program, the text condition too, on its sharding; norms and biases randomised."""
    rng, out = np.random.default_rng(seed), {}
    for name, a in p.arrays.items():
        noise = rng.normal(size=a.shape)
        if name.endswith("/kernel"):
            value = noise / np.prod(a.shape[:-1]) ** 0.5
        else:
            value = 0.3 * noise + name.endswith("/scale")
        out[name] = jax.device_put(value.astype(a.dtype), p.shardings[name])
    return out


def batch(p: Program, step: int, size: int | None = None) -> dict:
    """A batch of random pictures, the same for any mesh."""
    c = p.config
    b, s = size or c.batch_size, c.data.image_size
    rng = np.random.default_rng((7, step))
    coarse = rng.integers(0, 256, (b, s // 4, s // 4, 3))
    noise = rng.integers(-20, 21, (b, s, s, 3))
    image = np.clip(np.repeat(np.repeat(coarse, 4, 1), 4, 2) + noise, 0, 255).astype(np.uint8)
    rows = np.arange(b, dtype=np.int32)
    return jax.tree.map(lambda x: jax.device_put(x, p.batch_sharding), {"image": image, "row": rows})
