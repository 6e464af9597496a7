"""The config of the commands in test_genhancer_killed.py: GenHancer with the files in the folder of the argument."""

import os

import small_genhancer


def write_files(folder) -> None:
    """Photographs, the encoder and the autoencoder, with random weights."""
    from flax import nnx

    from diva_jax import demo
    from diva_jax.data.photos import pack_photos
    from diva_jax.models.diffusion.flux_vae import FluxVAE
    from diva_jax.models.layers import Keys
    from diva_jax.objectives import genhancer
    from diva_jax.weights import flux, names, writers

    pack_photos(folder / "photos", count=8, per_shard=8)
    demo.write_clip(folder / "clip", small_genhancer.SPEC)
    vae = FluxVAE(genhancer._vae(small_genhancer.small_config()), rngs=Keys(3))
    writers.write_safetensors(folder / "ae.safetensors", names.to_torch(nnx.state(vae), flux.VAE))


def get_config(folder: str):
    c = small_genhancer.small_config(steps=4, genhancer__stage1_steps=3)
    c.backbone.source, c.genhancer.vae.source = f"{folder}/clip", f"{folder}/ae.safetensors"
    c.data.path, c.data.threads = f"{folder}/photos", 1
    c.checkpoint.every, c.log.every, c.log.tensorboard = 1, 1, False
    c.compile_cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "auto")
    return c
