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
    from diva_jax.models.backbones.shared.transformer import Text
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
    from diva_jax.models.diffusion.unet import TextEncoder, TextEncoderConfig, UNet, UNetConfig
    from diva_jax.models.diffusion.vae import VAE, VAEConfig
    from diva_jax.weights import names, writers

    rngs, weights = Keys(seed), "diffusion_pytorch_model.safetensors"
    unet = UNet(UNetConfig.from_dict(config["unet"]), rngs=rngs)
    vae = VAE(VAEConfig.from_dict(config["vae"]), rngs=rngs)
    text = TextEncoder(TextEncoderConfig.from_dict(config["text_encoder"]), rngs=rngs)
    models = {
        "unet": (unet, names.UNET, weights),
        "vae": (vae, names.VAE, weights),
        "text_encoder": (text, names.TEXT_ENCODER, "model.safetensors"),
    }
    for name, content in json.loads(Path(__file__).with_suffix(".json").read_text("utf-8")).items():
        path, part = folder / name, name.partition("/")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content | config.get(part, {}), indent=1))
    for part, (model, table, file) in models.items():
        writers.write_safetensors(folder / part / file, names.to_torch(nnx.state(model), table))
    write_byte_tokenizer(folder / "tokenizer")


def main() -> None:
    if not _OUT.value:
        raise UserError("--out is missing: give a folder, e.g. --out=data/tiny")
    jax.config.update("jax_platforms", "cpu")
    out = Path(_OUT.value)
    from diva_jax.data import photos

    print(f"writing photographs to {out / 'photos'} and {out / 'images'}", flush=True)
    photos.pack_photos(out / "photos")
    photos.write_folder(out / "images", count=24)
    print(f"writing a tiny CLIP to {out / 'clip'}", flush=True)
    write_clip(out / "clip", TINY)
    write_byte_tokenizer(out / "clip")
    print(f"writing a tiny Stable Diffusion to {out / 'stable-diffusion'}", flush=True)
    write_stable_diffusion(out / "stable-diffusion", presets.preset("tiny"))
    print(
        "Wrote photos (tar shards), images (files), clip (open_clip folder) and stable-diffusion (diffusers folder) to "
        f"{_OUT.value}."
    )


if __name__ == "__main__":
    cli.run(main)
