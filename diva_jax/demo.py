"""Writes the data and weights for configs/tiny.py: python -m diva_jax.demo --out=data/tiny.

Photographs in tar shards (the format of img2dataset), some of them as files, an open_clip folder with both towers, and
a diffusers folder. The models are tiny and random; file formats and readers are those of full-size models.
"""

import json
from pathlib import Path

import jax
from absl import flags
from flax import nnx

from diva_jax.common import cli
from diva_jax.common.errors import UserError
from diva_jax.data import tokenizers
from diva_jax.models.backbones import TINY, Spec
from diva_jax.models.diffusion import presets
from diva_jax.models.layers import Keys

_OUT = flags.DEFINE_string("out", None, "The folder to write.")


def write_clip(folder: Path, spec: Spec, seed: int = 0) -> None:
    """Writes an open_clip folder with random weights: both towers and logit_scale."""
    import numpy as np

    from diva_jax.models import backbones
    from diva_jax.models.backbones.shared.open_clip_config import to_open_clip
    from diva_jax.models.backbones.shared.text import Text
    from diva_jax.weights import clip, names, writers

    vision = backbones.build(spec, rngs=Keys(seed))
    text = Text(spec, rngs=Keys(seed + 1))
    tensors = names.to_torch(nnx.state(vision), clip.vision_table(spec))
    tensors |= names.to_torch(nnx.state(text), clip.text_table(spec))
    tensors["logit_scale"] = np.asarray(np.log(1 / 0.07), np.float32)
    writers.write_open_clip(folder, tensors, to_open_clip(spec))


def write_byte_tokenizer(folder: Path) -> None:
    """Writes CLIP's byte-level vocabulary without merges, 514 tokens, as transformers' vocab.json and merges.txt."""
    letters = tokenizers.BYTE_LETTERS
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}, indent=1))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def write_stable_diffusion(folder: Path, config: dict, seed: int = 0) -> None:
    """Writes a diffusers folder of a result of `presets.preset` with random weights; of the VAE, only the encoder."""
    from diva_jax.models.diffusion.text_encoder import TextEncoder, TextEncoderConfig
    from diva_jax.models.diffusion.unet import UNet, UNetConfig
    from diva_jax.models.diffusion.vae import VAE, VAEConfig
    from diva_jax.weights import diffusers, names, writers

    def write(part: str, kind: str, model: nnx.Module, table: names.Table, file: str):
        (folder / part).mkdir(parents=True, exist_ok=True)
        writers.write_safetensors(folder / part / file, names.to_torch(nnx.state(model), table))
        (folder / part / "config.json").write_text(json.dumps(kind | config[part], indent=1))

    rngs = Keys(seed)
    unet = UNet(UNetConfig.from_dict(config["unet"]), rngs=rngs)
    vae = VAE(VAEConfig.from_dict(config["vae"]), rngs=rngs)
    text = TextEncoder(TextEncoderConfig.from_dict(config["text_encoder"]), rngs=rngs)
    weights = "diffusion_pytorch_model.safetensors"
    write("unet", {"_class_name": "UNet2DConditionModel"}, unet, diffusers.UNET, weights)
    write("vae", {"_class_name": "AutoencoderKL"}, vae, diffusers.VAE, weights)
    write("text_encoder", {"model_type": "clip_text_model"}, text, diffusers.TEXT_ENCODER, "model.safetensors")
    files = {
        "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler"} | config["scheduler"],
        "tokenizer/tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "pad_token": "!",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
        },
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1))
    write_byte_tokenizer(folder / "tokenizer")


def write_all(out: Path) -> None:
    """Writes photographs, towers and diffusion model into a folder; existing files are overwritten."""
    from diva_jax.data import photos

    print(f"writing photographs to {out / 'photos'} and {out / 'images'}", flush=True)
    photos.pack_photos(out / "photos")
    photos.write_folder(out / "images", count=24)
    print(f"writing a tiny CLIP to {out / 'clip'}", flush=True)
    write_clip(out / "clip", TINY)
    write_byte_tokenizer(out / "clip")
    print(f"writing a tiny Stable Diffusion to {out / 'stable-diffusion'}", flush=True)
    write_stable_diffusion(out / "stable-diffusion", presets.preset("tiny"))


def main() -> None:
    if not _OUT.value:
        raise UserError("--out is missing: give a folder, e.g. --out=data/tiny")
    jax.config.update("jax_platforms", "cpu")
    write_all(Path(_OUT.value))
    print(
        "Wrote photos (tar shards), images (files), clip (open_clip folder) and stable-diffusion (diffusers folder) to "
        f"{_OUT.value}."
    )


def entry() -> None:
    cli.run(main)


if __name__ == "__main__":
    entry()
