"""The text condition: the states of a prompt from Stable Diffusion's tokenizer and text encoder."""

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
    """Returns token ids [1, length], int32, padded as the folder's tokenizer specifies.

    Raises:
      UserError: the tokenizer's files are missing or invalid.
    """
    from transformers import CLIPTokenizer

    if not (folder / "vocab.json").exists() and not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} has no vocab.json: the diffusers folder needs its tokenizer, download it again")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True)["input_ids"]
    return np.asarray([ids], np.int32)


def encode_prompt(folder: Path, prompt: str, tokens: int, config: TextEncoderConfig, tensors: Tensors) -> np.ndarray:
    """Computes the last hidden state of a prompt, after the final LayerNorm.

    Args:
      folder: a diffusers folder with `tokenizer`.
      prompt: the text.
      tokens: the number of tokens to which it is padded.
      config: the text encoder.
      tensors: the weights of the text encoder.

    Returns:
      float32 [1, tokens, width].

    Raises:
      UserError: files are missing, or the weights do not fit `config`.
    """
    ids = tokenize(folder / "tokenizer", prompt, tokens)
    graph, state = nnx.split(abstract(lambda rngs: TextEncoder(config, rngs=rngs)))
    encoder = nnx.merge(graph, loading.fill_diffusers(tensors, config, state))
    return np.asarray(nnx.jit(lambda m, x: m(x))(encoder, jnp.asarray(ids)))
