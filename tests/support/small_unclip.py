"""un²CLIP with the backbone and, but for the class embedding, the diffusion model of small.py."""

from pathlib import Path

import numpy as np
import small

from diva_jax import config, demo
from diva_jax.weights import writers


def diffusion() -> dict:
    sd = small.diffusion()
    sd["unet"] |= dict(
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * small.SPEC.embed_dim,
    )
    sd["scheduler"] = sd["scheduler"] | dict(prediction_type="v_prediction")
    return sd


def small_config(**fields):
    """Float32, AdamW, 24-pixel crops, batches of 8; `fields` by dotted name, dots as double underscores."""
    c = config.default(small.SPEC, diffusion(), "unclip")
    c.update(dtype="float32", frozen_dtype="float32", steps=10, batch_size=8, accum=1)
    c.diffusion.text_tokens = 6
    c.data.image_size = 24
    c.optim.update(name="adamw", lr=1e-2, warmup=0.2)
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return c


def write_generator(folder: Path) -> None:
    """A diffusers folder of Stable unCLIP with random weights."""
    demo.write_stable_diffusion(folder, diffusion())
    rng, d = np.random.default_rng(5), small.SPEC.embed_dim
    (folder / "image_normalizer").mkdir()
    writers.write_safetensors(
        folder / "image_normalizer" / "diffusion_pytorch_model.safetensors",
        {
            "mean": rng.normal(size=(1, d)).astype(np.float32),
            "std": rng.uniform(0.5, 1.5, (1, d)).astype(np.float32),
        },
    )
