"""The text towers of CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343), as open_clip runs them."""

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.models.backbones import Spec, architecture
from diva_jax.models.backbones.shared.transformer import blocks, run
from diva_jax.models.layers import Layers
from diva_jax.models.names import Table

# Tensors of checkpoints that belong to no tower; OpenAI's own archives carry their sizes as tensors.
NEITHER = (r"logit_scale", r"logit_bias", r"(text\.)?attn_mask", r"input_resolution|context_length|vocab_size")
_BLOCK_LEAF = (
    r"(ln_[12]\.(weight|bias)|attn\.in_proj_(weight|bias)|attn\.out_proj\.(weight|bias)"
    r"|mlp\.c_(fc|proj)\.(weight|bias))"
)
# The text tower's tensors, for tables of vision towers to ignore.
TEXT_NAMES = (
    rf"(text\.)?transformer\.resblocks\.\d+\.{_BLOCK_LEAF}",
    r"(text\.)?token_embedding\.weight",
    r"(text\.)?positional_embedding",
    r"(text\.)?ln_final\.(weight|bias)",
    r"(text\.)?text_projection(\.weight|\.bias)?",
)
# open_clip's names within the blocks of its own transformer.
BLOCKS = (
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def text_table(arch: str, prefix: str = "") -> Table:
    """Our `Text` <-> open_clip's names, which begin with `prefix`. A model that open_clip makes with `custom_text` has
    its text tower under `text.`. Where `prefix` is empty, both are read and the names without it are written."""
    rename = (
        *BLOCKS,
        (r"^token_embed\.", "token_embedding."),
        (r"^pos_embed$", "positional_embedding"),
        (r"^norm\.", "ln_final."),
        (r"^proj(\.|$)", r"text_projection\1"),
        (r"^", prefix),
    )
    aliases = () if prefix else ((r"^text\.", ""),)
    return Table(f"{arch} text tower", rename, ignore=(r"visual\..+", *NEITHER), aliases=aliases)


def require_text(spec: Spec) -> None:
    """Raises a UserError where no text tower belongs to `spec`."""
    if not spec.has_text or architecture(spec.arch).TEXT is None:
        raise UserError(f"a {spec.arch} backbone has no text tower: leave out what compares images with texts")


class Text(nnx.Module):
    """The text tower of `spec` with random weights; arguments as `backbones.build`'s. A UserError where it has none."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False):
        make, text = Layers(rngs, dtype, param_dtype), spec.text
        require_text(spec)
        width, eps = text.width, text.norm_eps
        self.dtype, self.remat, self.pool, self.eos_id = dtype, remat, text.pool, text.eos_id
        self.proj_bias = text.proj_bias
        self.token_embed = make.embed(text.vocab_size, width)
        self.pos_embed = make.param(nnx.initializers.normal(0.01), text.context_length, width)
        activation = text.activation or spec.activation
        self.blocks = blocks(make, text.layers, width, text.heads, text.mlp_dim, activation, eps, causal=text.causal)
        self.norm = make.layer_norm(width, eps)
        if text.proj_bias:
            self.proj = make.linear(width, spec.embed_dim)
        else:
            self.proj = make.param(nnx.initializers.normal(width**-0.5), width, spec.embed_dim)

    def encode(self, tokens: jax.Array) -> jax.Array:
        """Token ids, int32 [B, context_length] -> text embedding [B, embed_dim], not normalised."""
        return self.embed(self.states(tokens), tokens)

    def states(self, tokens: jax.Array) -> jax.Array:
        """Token ids, int32 [B, context_length] -> states after the last block, before the final norm, [B, N, D]."""
        x = self.token_embed(tokens) + self.pos_embed[...].astype(self.dtype)
        return run(self.blocks, x, remat=self.remat)

    def embed(self, states: jax.Array, tokens: jax.Array) -> jax.Array:
        """The rest of `encode`: states [B, N, D] and the ids that they are of -> text embedding [B, embed_dim]."""
        if self.pool == "last":
            at = tokens.shape[1] - 1
        else:  # The end-of-text token has the highest id of CLIP's vocabulary.
            at = jnp.argmax(tokens if self.pool == "argmax" else tokens == self.eos_id, axis=-1)
        x = self.norm(states[jnp.arange(states.shape[0]), at])  # [B, D]
        return self.proj(x) if self.proj_bias else x @ self.proj[...].astype(self.dtype)
