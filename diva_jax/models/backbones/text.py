"""The text towers of CLIP and SigLIP, as open_clip runs them."""

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.models.backbones import Spec
from diva_jax.models.backbones.transformer import blocks, run
from diva_jax.models.layers import Layers


class Text(nnx.Module):
    """The text tower that belongs to `spec` (its `text`, `embed_dim` and `activation`), random weights.

    Args:
      spec: sizes, activation, epsilon, mask and pooling.
      rngs: source of the initial values.
      dtype: what activations are computed in.
      param_dtype: what weights are held in.

    Raises:
      UserError: `spec.text.pool` is neither "argmax" nor "last".
    """

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        make, text = Layers(rngs, dtype, param_dtype), spec.text
        if text.pool not in ("argmax", "last"):
            raise UserError(f"text.pool={text.pool!r} is no known pooling: use argmax or last")
        width, eps = text.width, text.norm_eps
        self.dtype, self.pool, self.proj_bias = dtype, text.pool, text.proj_bias
        self.token_embed = make.embed(text.vocab_size, width)
        self.pos_embed = make.param(nnx.initializers.normal(0.01), text.context_length, width)
        self.blocks = blocks(
            make, text.layers, width, text.heads, text.mlp_dim, spec.activation, eps, causal=text.causal
        )
        self.norm = make.layer_norm(width, eps)
        if text.proj_bias:
            self.proj = make.linear(width, spec.embed_dim)
        else:
            self.proj = make.param(nnx.initializers.normal(width**-0.5), width, spec.embed_dim)

    def encode(self, tokens: jax.Array) -> jax.Array:
        """Token ids, int32 [B, context_length] -> text embedding [B, embed_dim], not normalised."""
        x = self.token_embed(tokens) + self.pos_embed[...].astype(self.dtype)  # [B, N, D]
        x = run(self.blocks, x)
        # The end-of-text token has the highest id of CLIP's vocabulary.
        at = jnp.argmax(tokens, axis=-1) if self.pool == "argmax" else tokens.shape[1] - 1
        x = self.norm(x[jnp.arange(x.shape[0]), at])  # [B, D]
        return self.proj(x) if self.proj_bias else x @ self.proj[...].astype(self.dtype)
