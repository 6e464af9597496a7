"""The text condition: a prompt through Stable Diffusion's tokenizer and text encoder, once."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.models.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from diva_jax.models.layers import abstract
from diva_jax.weights import loading
from diva_jax.weights.tensors import Tensors


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


def encode_prompt(folder: Path, prompt: str, tokens: int, config: TextEncoderConfig, tensors: Tensors) -> np.ndarray:
    """The prompt's last hidden state after the final LayerNorm.

    Args:
      folder: a diffusers folder with `tokenizer`.
      prompt: its text.
      tokens: it is padded to this many.
      config: of the text encoder.
      tensors: its weights.

    Returns:
      float32 [1, tokens, width].

    Raises:
      UserError: files are missing, or the weights do not fit `config`.
    """
    ids = tokenize(folder / "tokenizer", prompt, tokens)
    graph, state = nnx.split(abstract(lambda rngs: TextEncoder(config, rngs=rngs)))
    encoder = nnx.merge(graph, loading.fill_diffusers(tensors, config, state))
    return np.asarray(nnx.jit(lambda m, x: m(x))(encoder, jnp.asarray(ids)))
