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


def tokenize(folder: Path, prompt: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(token ids [1, length], int32, padded as the folder's tokenizer says; bool [1, length], false for padding).

    Raises:
      UserError: the tokenizer's files are missing or broken.
    """
    from transformers import CLIPTokenizer

    if not (folder / "vocab.json").exists() and not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} holds no vocab.json: the diffusers folder needs its tokenizer, fetch it again")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    found = tokenizer(prompt, padding="max_length", max_length=length, truncation=True)
    return np.asarray([found["input_ids"]], np.int32), np.asarray([found["attention_mask"]], bool)


def encode_prompt(
    folder: Path, prompt: str, tokens: int, config: TextEncoderConfig, tensors: Tensors, mask_padding: bool = False
) -> np.ndarray:
    """The prompt's last hidden state after the final LayerNorm.

    Args:
      folder: a diffusers folder with `tokenizer`.
      prompt: its text.
      tokens: it is padded to this many.
      config: of the text encoder.
      tensors: its weights.
      mask_padding: whether padding is not attended to. Stable Diffusion's own pipeline attends to it.

    Returns:
      float32 [1, tokens, width].

    Raises:
      UserError: files are missing, or the weights do not fit `config`.
    """
    ids, mask = tokenize(folder / "tokenizer", prompt, tokens)
    graph, state = nnx.split(abstract(lambda rngs: TextEncoder(config, rngs=rngs)))
    encoder = nnx.merge(graph, loading.fill_diffusers(tensors, config, state))
    masks = (jnp.asarray(mask),) if mask_padding else ()
    return np.asarray(nnx.jit(lambda m, *args: m(*args))(encoder, jnp.asarray(ids), *masks))
