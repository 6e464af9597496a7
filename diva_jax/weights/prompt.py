"""The text condition: the states of a prompt from Stable Diffusion's tokenizer and text encoder."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.data.tokenizers import FolderTokenizer
from diva_jax.models.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from diva_jax.models.layers import abstract
from diva_jax.weights import loading
from diva_jax.weights.tensors import Tensors


def tokenizer(folder: Path, length: int) -> FolderTokenizer:
    """The tokenizer of a diffusers folder, which pads as its files say; a UserError without its files."""
    if not (folder / "vocab.json").exists() and not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} has no vocab.json: the diffusers folder needs its tokenizer, download it again")
    return FolderTokenizer(folder, length, kind="clip")


def encode_prompt(
    folder: Path, prompt: str, tokens: int, config: TextEncoderConfig, tensors: Tensors, mask_padding: bool = False
) -> np.ndarray:
    """The last hidden state of a prompt, padded to `tokens`, after the final LayerNorm: float32 [1, tokens, width].

    `folder` is a diffusers folder with `tokenizer`, `tensors` are the text encoder's. With `mask_padding`, padding is
    not attended to; Stable Diffusion's own pipeline attends to it. A UserError where files are missing, or do not fit
    `config`.
    """
    ids, mask = tokenizer(folder / "tokenizer", tokens).encode([prompt])
    if not 0 <= ids.min() <= ids.max() < config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has the id {ids.max()}, but the text encoder only {config.vocab_size} tokens: "
            "fetch the folder again"
        )
    graph, state = nnx.split(abstract(lambda rngs: TextEncoder(config, rngs=rngs)))
    encoder = nnx.merge(graph, loading.fill_diffusers(tensors, config, state))
    masks = (jnp.asarray(mask),) if mask_padding else ()
    return np.asarray(nnx.jit(lambda m, *args: m(*args))(encoder, jnp.asarray(ids), *masks))
