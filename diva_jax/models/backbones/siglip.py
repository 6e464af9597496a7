"""SigLIP's Vision Transformer (arXiv 2303.15343), as timm and open_clip run it."""

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.models.backbones import Features, Spec
from diva_jax.models.backbones.transformer import Mlp, blocks, run
from diva_jax.models.layers import Layers, attention, heads


class AttentionPool(nnx.Module):
    """A learned query looks at all patch tokens; then an MLP with a residual."""

    def __init__(self, make: Layers, spec: Spec):
        width = spec.width
        self.heads, self.dtype = spec.heads, make.dtype
        self.latent = make.param(nnx.initializers.truncated_normal(width**-0.5), 1, 1, width)
        self.q = make.linear(width, width)
        self.kv = make.linear(width, 2 * width)
        self.proj = make.linear(width, width)
        self.norm = make.layer_norm(width, spec.norm_eps)
        self.mlp = Mlp(make, width, spec.mlp_dim, spec.activation)

    def __call__(self, tokens: jax.Array) -> jax.Array:  # [B, P, D] -> [B, D]
        q = self.q(self.latent[...].astype(self.dtype))  # [1, 1, D]
        q = jnp.broadcast_to(q, (tokens.shape[0], *q.shape[1:]))
        k, v = jnp.split(self.kv(tokens), 2, axis=-1)
        x = self.proj(attention(heads(q, self.heads), heads(k, self.heads), heads(v, self.heads)))
        return (x + self.mlp(self.norm(x)))[:, 0]


class Vision(nnx.Module):
    """The vision tower of `spec` with random weights; `spec.embed_dim` is `spec.width`.

    Args:
      spec: sizes, activation and epsilon.
      rngs: source of the initial values.
      dtype: what activations are computed in.
      param_dtype: what weights are held in.
      remat: recompute each block in the backward pass: less memory, a third more work, the same gradient.

    Raises:
      UserError: `spec.embed_dim` is not `spec.width`.
    """

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False):
        make = Layers(rngs, dtype, param_dtype)
        width, eps = spec.width, spec.norm_eps
        if spec.embed_dim != width:
            raise UserError(
                f"a siglip backbone has no projection: set embed_dim={spec.embed_dim} to its width, {width}"
            )
        self.dtype, self.remat = dtype, remat
        self.patch_embed = make.conv(3, width, spec.patch_size, spec.patch_size)
        self.pos_embed = make.param(nnx.initializers.truncated_normal(width**-0.5), 1, spec.patches, width)
        self.blocks = blocks(make, spec.layers, width, spec.heads, spec.mlp_dim, spec.activation, eps)
        self.norm = make.layer_norm(width, eps)
        self.attn_pool = AttentionPool(make, spec)

    def encode(self, images: jax.Array) -> Features:
        """Normalised float images [B, H, W, 3] -> tokens [B, P, D] and pooled [B, D], in `dtype`.

        An image whose side is no multiple of the patch (384 by 14) loses the rest at its right and bottom.
        """
        x = self.patch_embed(images.astype(self.dtype))  # [B, grid, grid, D]
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.pos_embed[...].astype(self.dtype)
        tokens = self.norm(run(self.blocks, x, remat=self.remat))  # [B, P, D]
        return Features(tokens=tokens, pooled=self.attn_pool(tokens))
