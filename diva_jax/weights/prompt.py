"""The text condition: a prompt through Stable Diffusion's tokenizer and text encoder, once."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.models.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from diva_jax.models.layers import abstract
from diva_jax.weights import diffusers, names, readers


def tokenize(folder: Path, prompt: str, length: int) -> np.ndarray:
    """Token ids [1, length], int32, padded as the folder's tokenizer says.

    Raises:
      UserError: the tokenizer's files are missing or broken.
    """
    from transformers import CLIPTokenizer

    if not (folder / "vocab.json").exists() and not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} holds no vocab.json: the diffusers folder needs its tokenizer, fetch it again")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True)["input_ids"]
    return np.asarray([ids], np.int32)


def encode_prompt(folder: Path, config) -> tuple[jax.Array, list[Path]]:
    """The prompt's last hidden state after the final LayerNorm, in float32.

    Args:
      folder: a diffusers folder with `tokenizer` and `text_encoder`.
      config: `config.diffusion`.

    Returns:
      ([1, text_tokens, width], the files of the text encoder).

    Raises:
      UserError: files are missing, or of another architecture than `config.text_encoder`.
    """
    ids = tokenize(folder / "tokenizer", config.prompt, config.text_tokens)
    part = folder / "text_encoder"
    there = TextEncoderConfig.from_dict(readers.read_json(part / "config.json"))
    here = TextEncoderConfig.from_dict(config.text_encoder.to_dict())
    if there != here:
        raise UserError(f"{part} is of another architecture than config.diffusion.text_encoder: {there} and not {here}")
    tensors = readers.weights_in(part, "model", "pytorch_model")
    encoder = abstract(lambda rngs: TextEncoder(there, rngs=rngs))
    encoder = names.load_into(encoder, tensors, diffusers.TEXT_ENCODER, source=str(part))
    return nnx.jit(lambda m, x: m(x))(encoder, jnp.asarray(ids)), tensors.files
