"""The config of the commands in test_stages_killed.py: OBJECTIVE:FOLDER, an objective of two stages and its files.

Stage 1 has three steps and stage 2 four.
"""

import os

import small
import small_genhancer

from diva_jax import config

OBJECTIVES = ("genhancer", "dcr")


def write_files(folder) -> None:
    """Photographs, the encoder and the generators of both objectives, with random weights."""
    from flax import nnx

    from diva_jax import demo
    from diva_jax.data.photos import pack_photos
    from diva_jax.models.diffusion.vae import VAE
    from diva_jax.models.layers import Keys
    from diva_jax.objectives import genhancer
    from diva_jax.weights import flux, names, writers

    pack_photos(folder / "photos", count=8, per_shard=8)
    demo.write_clip(folder / "clip", small_genhancer.SPEC)
    demo.write_stable_diffusion(folder / "stable-diffusion", small.diffusion())
    vae = VAE(genhancer._vae(small_genhancer.small_config().genhancer.vae), rngs=Keys(3))
    writers.write_safetensors(folder / "ae.safetensors", names.to_torch(nnx.state(vae), flux.VAE))


def _genhancer(folder: str):
    c = small_genhancer.small_config(genhancer__stage1_steps=3)
    c.genhancer.vae.source = f"{folder}/ae.safetensors"
    return c


def _dcr(folder: str):
    """With dropout in the adapters, whose keys must not depend on where a run was resumed."""
    c = config.default(small_genhancer.SPEC, small.diffusion(), "dcr")
    c.update(dtype="float32", frozen_dtype="float32", batch_size=8)
    c.diffusion.update(source=f"{folder}/stable-diffusion", text_tokens=6)
    c.condition.warmup_steps, c.optim.lr = 3, 1e-3
    c.dcr.update(group=2, tile=3)
    c.dcr.lora.rank = 3
    return c


def get_config(given: str):
    objective, _, folder = given.partition(":")
    c = {"genhancer": _genhancer, "dcr": _dcr}[objective](folder)
    c.steps, c.backbone.source = 4, f"{folder}/clip"
    c.data.path, c.data.threads = f"{folder}/photos", 1
    c.checkpoint.every, c.log.every, c.log.tensorboard = 1, 1, False
    c.compile_cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "auto")
    return c
