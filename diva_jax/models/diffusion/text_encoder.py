"""Stable Diffusion's text encoder, CLIP's as transformers has it: tokens to the context of the U-Net."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.common.fields import between, one_of
from diva_jax.models.attention import attention
from diva_jax.models.layers import ACTIVATIONS, Array, Layers, heads
from diva_jax.models.library_config import LibraryConfig


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Shape of a text encoder, see `backbones.TextSpec`; the defaults are Stable Diffusion 2.1-base's."""

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 1024
    layers: int = 23
    heads: int = 16
    mlp_dim: int = 4096
    activation: str = "gelu"
    norm_eps: float = 1e-5

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "TextEncoderConfig":
        """Reads `text_encoder/config.json`, with the defaults of transformers; a UserError for other models."""
        file = LibraryConfig(options, "the text encoder's config")
        file.require_class("clip_text_model", "model_type", "CLIPTextModel")
        config = cls(
            vocab_size=file.get("vocab_size", 49408),
            context_length=file.get("max_position_embeddings", 77),
            width=file.get("hidden_size", 512),
            layers=file.get("num_hidden_layers", 12, between(1, 64)),
            heads=file.get("num_attention_heads", 8),
            mlp_dim=file.get("intermediate_size", 2048),
            activation=file.get("hidden_act", "quick_gelu", one_of("gelu", "quick_gelu")),
            norm_eps=file.get("layer_norm_eps", 1e-5, between(0, 1)),
        )
        file.require_multiple("hidden_size", [config.width], "num_attention_heads", [config.heads])
        return config


class TextEncoderLayer(nnx.Module):
    """Causal self-attention and MLP, each after a LayerNorm and with a residual: [B, N, W] -> [B, N, W]."""

    def __init__(self, config: TextEncoderConfig, layers: Layers):
        n = config.width
        self.config = config
        self.layer_norm1 = layers.layer_norm(n, config.norm_eps)
        self.q_proj, self.k_proj = layers.linear(n, n), layers.linear(n, n)
        self.v_proj, self.out_proj = layers.linear(n, n), layers.linear(n, n)
        self.layer_norm2 = layers.layer_norm(n, config.norm_eps)
        self.fc1 = layers.linear(n, config.mlp_dim)
        self.fc2 = layers.linear(config.mlp_dim, n)

    def __call__(self, x: Array, keys: Array | None = None) -> Array:
        y = self.layer_norm1(x)
        q, k, v = (heads(project(y), self.config.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.out_proj(attention(q, k, v, causal=True, mask=keys))
        return x + self.fc2(ACTIVATIONS[self.config.activation](self.fc1(self.layer_norm2(x))))


class TextEncoder(nnx.Module):
    """Encodes tokens to the context of the U-Net; `rngs`, `dtype` and `param_dtype` as in `Layers`."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        layers = Layers(rngs, dtype, param_dtype)
        self.config = config
        self.token_embedding = layers.embed(config.vocab_size, config.width)
        self.position_embedding = layers.embed(config.context_length, config.width)
        self.layers = nnx.List(TextEncoderLayer(config, layers) for _ in range(config.layers))
        self.final_layer_norm = layers.layer_norm(config.width, config.norm_eps)

    def __call__(self, tokens: Array, mask: Array | None = None) -> Array:
        """The last hidden state of tokens [B, N] after the final LayerNorm, [B, N, width], in `dtype`; a UserError
        where N is too large. `mask`, [B, N] bool, has the tokens that are attended to (those before a query alone, as
        always); None: all, padding included."""
        n = tokens.shape[1]
        if n > self.config.context_length:
            raise UserError(f"the text has {n} tokens, shorten it to {self.config.context_length}, the encoder's limit")
        x = self.token_embedding(tokens) + self.position_embedding(jnp.arange(n))
        keys = None if mask is None else mask[:, None, None]  # [B, 1, 1, N], for every head and query.
        for layer in self.layers:
            x = layer(x, keys)
        return self.final_layer_norm(x)
