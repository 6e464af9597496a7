"""Parity of the text encoder with transformers' `CLIPTextModel`: hidden states, names, and unsupported configs."""

import functools

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import close, filled, randomise, tensors
from safetensors.numpy import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from diva_jax.common.errors import UserError
from diva_jax.models.diffusion.presets import PRESETS
from diva_jax.models.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from diva_jax.models.layers import Keys
from diva_jax.weights import names
from diva_jax.weights.diffusers import TEXT_ENCODER

TINY = PRESETS["sd21"]["text_encoder"] | dict(hidden_size=36, intermediate_size=100, layer_norm_eps=1e-3)
TINY |= dict(max_position_embeddings=19, num_attention_heads=3, num_hidden_layers=2, vocab_size=53)
TINY |= dict(bos_token_id=51, eos_token_id=52)


def build(options) -> TextEncoder:
    return TextEncoder(TextEncoderConfig.from_dict(options), rngs=Keys(0))


def load(options, weights) -> TextEncoder:
    return filled(nnx.eval_shape(lambda: build(options)), weights, TEXT_ENCODER)


@functools.cache
def pair(activation):
    options = TINY | dict(hidden_act=activation)
    theirs = randomise(CLIPTextModel(CLIPTextConfig(**options)))
    return theirs, load(options, tensors(theirs))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("count", [19, 7])
def test_parity(activation, count):
    theirs, ours = pair(activation)
    tokens = np.random.default_rng(0).integers(1, 51, (2, count))
    tokens[:, 0], tokens[0, 4:], tokens[1, 5:], tokens[:, 4] = 51, 0, 52, 52
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens))[0]
    close(jax.jit(ours.__call__)(tokens), expected, 2e-5)


def test_too_many_tokens_are_refused():
    _, ours = pair("gelu")
    with pytest.raises(UserError, match="20 tokens, shorten it to 19"):
        ours(np.zeros((1, 20), int))


def test_names_of_all_versions(tmp_path):
    theirs, ours = pair("gelu")
    theirs.save_pretrained(tmp_path)
    now = load_file(tmp_path / "model.safetensors")
    # Older versions had a prefix, and the oldest ones also saved the position ids.
    old = {f"text_model.{name}": array for name, array in now.items()}
    old["text_model.embeddings.position_ids"] = np.arange(19)[None]
    for weights in (now, old):
        loaded = names.flat(load(TINY, weights))
        assert all(np.array_equal(loaded[p].get_value(), v.get_value()) for p, v in names.flat(ours).items())
