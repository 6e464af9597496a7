"""CLIP's Vision Transformer (arXiv 2103.00020), as OpenAI and open_clip run it."""

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.models.backbones import Features, Spec
from diva_jax.models.backbones.transformer import blocks, run
from diva_jax.models.layers import Layers


class Vision(nnx.Module):
    """The vision tower of `spec` with random weights.

    Args:
      spec: sizes, activation and epsilon.
      rngs: source of the initial values.
      dtype: what activations are computed in.
      param_dtype: what weights are held in.
      remat: recompute each block in the backward pass: less memory, a third more work, the same gradient.
    """

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False):
        make = Layers(rngs, dtype, param_dtype)
        width, eps = spec.width, spec.norm_eps
        self.dtype, self.remat = dtype, remat
        self.patch_embed = make.conv(3, width, spec.patch_size, spec.patch_size, bias=False)
        near_zero = nnx.initializers.normal(width**-0.5)
        self.class_embed = make.param(near_zero, width)
        self.pos_embed = make.param(near_zero, 1 + spec.patches, width)
        self.norm_pre = make.layer_norm(width, eps)
        self.blocks = blocks(make, spec.layers, width, spec.heads, spec.mlp_dim, spec.activation, eps)
        self.norm = make.layer_norm(width, eps)
        self.proj = make.param(near_zero, width, spec.embed_dim)

    def encode(self, images: jax.Array) -> Features:
        """Normalised float images [B, H, W, 3] -> tokens [B, P, D] and pooled [B, D], in `dtype`.

        CLIP itself projects the class token alone; DIVA takes every token through the final norm and the
        projection (authors' code).
        """
        x = self.patch_embed(images.astype(self.dtype))  # [B, grid, grid, width]
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = jnp.broadcast_to(self.class_embed[...].astype(self.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.pos_embed[...].astype(self.dtype)  # [B, 1 + P, width]
        x = run(self.blocks, self.norm_pre(x), remat=self.remat)
        x = self.norm(x) @ self.proj[...].astype(self.dtype)  # [B, 1 + P, D]
        return Features(tokens=x[:, 1:], pooled=x[:, 0])
