"""Writes what configs/tiny.py needs: python -m diva_jax.demo --out=data/tiny.

Photographs in tar shards as img2dataset writes them, an open_clip folder with both towers and a diffusers
folder, the towers tiny and random: the same files, through the same readers, as at full size.
"""

import json
from pathlib import Path

import jax
from absl import flags
from flax import nnx

from diva_jax.common import cli
from diva_jax.common.errors import UserError
from diva_jax.models.backbones import TINY, Spec
from diva_jax.models.diffusion import presets
from diva_jax.models.layers import Keys

_OUT = flags.DEFINE_string("out", None, "The folder to write.")


def write_clip(folder: Path, spec: Spec, seed: int = 0) -> None:
    """An open_clip folder of random towers: vision, text and logit_scale."""
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


def _byte_tokenizer() -> tuple[dict[str, int], str]:
    """CLIP's byte-level vocabulary without a single merge: (vocab, merges.txt)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}, "#version: 0.2\n"


def write_stable_diffusion(folder: Path, config: dict, seed: int = 0) -> None:
    """A diffusers folder of random models (the VAE's encoder alone).

    Args:
      folder: made where missing.
      config: as `presets.preset` gives it.
      seed: of the weights.
    """
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
    vocab, merges = _byte_tokenizer()
    files = {
        "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler"} | config["scheduler"],
        "tokenizer/vocab.json": vocab,
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
    (folder / "tokenizer/merges.txt").write_text(merges)


def write_all(out: Path) -> None:
    """Photographs, towers and diffusion model; what is already there is written anew."""
    from diva_jax.data.photos import pack_photos

    pack_photos(out / "photos")
    write_clip(out / "clip", TINY)
    write_stable_diffusion(out / "stable-diffusion", presets.preset("tiny"))


def main() -> None:
    if not _OUT.value:
        raise UserError("--out is missing: give a folder, e.g. --out=data/tiny")
    jax.config.update("jax_platforms", "cpu")
    write_all(Path(_OUT.value))
    print(f"{_OUT.value}: photos (tar shards), clip (open_clip folder), stable-diffusion (diffusers folder)")


if __name__ == "__main__":
    cli.run(main)
