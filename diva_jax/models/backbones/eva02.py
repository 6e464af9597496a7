"""EVA02-CLIP's vision tower (arXiv 2303.15389), as timm and open_clip run it.

Rotary position embeddings of the patches beside the learned ones, SwiGLU MLPs, and norms inside attention and MLP
(sub-LN). The base and large models; EVA02-CLIP-E is of another architecture and is not implemented.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diva_jax.models.backbones import Features, Spec
from diva_jax.models.backbones.shared import open_clip_config as occ
from diva_jax.models.backbones.shared.transformer import Block, blocks, embedded, run
from diva_jax.models.layers import Layers, attention, heads

CHECKPOINT = occ.checkpoint("eva02")
shapes = CHECKPOINT.shapes
TRANSFORMERS = None
# The grid of patches, of pretraining, that the rotary embeddings of every grid are scaled to.
_ROTARY_GRID = 16
_ROTARY_BASE = 10000.0


def rotary_table(grid: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Sines and cosines of the rotary embeddings (arXiv 2104.09864): float64 [1 + grid * grid, width of a head]. Half
    of a head encodes the row and half the column, two neighbours alike; the class token, first, is not rotated."""
    bands = _ROTARY_BASE ** -(np.arange(width // 4) / (width // 4))
    at = np.arange(grid) * _ROTARY_GRID / grid
    rows, columns = np.meshgrid(at, at, indexing="ij")
    angles = np.stack([rows, columns], -1)[..., None] * bands  # [grid, grid, 2, width / 4]
    angles = np.repeat(angles.reshape(grid * grid, width // 2), 2, axis=-1)
    angles = np.concatenate([np.zeros((1, width)), angles])
    return np.sin(angles), np.cos(angles)


def _rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """[B, N, H, D], each pair of neighbours rotated by its angle, in x's dtype."""
    turned = jnp.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return (x * cos[:, None] + turned * sin[:, None]).astype(x.dtype)


class RotaryAttention(nnx.Module):
    """Self-attention with rotary embeddings and a norm before the output's projection."""

    def __init__(self, make: Layers, spec: Spec):
        width, self.heads = spec.width, spec.heads
        self.q_proj = make.linear(width, width)
        self.k_proj = make.linear(width, width, bias=False)
        self.v_proj = make.linear(width, width)
        self.norm = make.layer_norm(width, spec.norm_eps)
        self.proj = make.linear(width, width)

    def __call__(self, x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:  # [B, N, D] -> [B, N, D]
        q, k, v = (heads(layer(x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.proj(self.norm(attention(_rotate(q, sin, cos), _rotate(k, sin, cos), v)))


class SwiGLUMlp(nnx.Module):
    """SwiGLU (arXiv 2002.05202) with a norm before the last layer."""

    def __init__(self, make: Layers, spec: Spec):
        self.fc1_g = make.linear(spec.width, spec.mlp_dim)
        self.fc1_x = make.linear(spec.width, spec.mlp_dim)
        self.norm = make.layer_norm(spec.mlp_dim, spec.norm_eps)
        self.fc2 = make.linear(spec.mlp_dim, spec.width)

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., D] -> [..., D]
        return self.fc2(self.norm(jax.nn.silu(self.fc1_g(x)) * self.fc1_x(x)))


class RotaryBlock(Block):
    """A block with rotary attention and a SwiGLU MLP."""

    def __init__(self, make: Layers, spec: Spec):
        self.norm1 = make.layer_norm(spec.width, spec.norm_eps)
        self.attn = RotaryAttention(make, spec)
        self.norm2 = make.layer_norm(spec.width, spec.norm_eps)
        self.mlp = SwiGLUMlp(make, spec)


class Vision(nnx.Module):
    """The vision tower of `spec` with random weights; arguments as `backbones.build`'s."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False):
        make = Layers(rngs, dtype, param_dtype)
        width = spec.width
        self.dtype, self.remat = dtype, remat
        self.grid, self.head_width = spec.grid, width // spec.heads
        near_zero = nnx.initializers.normal(width**-0.5)
        self.cls_token = make.param(near_zero, 1, 1, width)
        self.pos_embed = make.param(near_zero, 1, 1 + spec.patches, width)
        self.patch_embed = make.conv(3, width, spec.patch_size, spec.patch_size)
        self.blocks = blocks(make, spec.layers, spec, block=RotaryBlock)
        self.norm = make.layer_norm(width, spec.norm_eps)
        self.head = make.linear(width, spec.embed_dim)

    def encode(self, images: jax.Array) -> Features:
        """Normalised float images [B, H, W, 3] -> tokens [B, P, D] and pooled [B, D], in `dtype`. EVA02-CLIP projects
        the class token alone; here every token goes through the final norm and the projection."""
        x = embedded(self, images, self.cls_token)  # [B, 1 + P, width]
        angles_dtype = jnp.promote_types(self.dtype, jnp.float32)
        sin, cos = (jnp.asarray(table, angles_dtype) for table in rotary_table(self.grid, self.head_width))
        x = self.head(self.norm(run(self.blocks, x, sin, cos, remat=self.remat)))  # [B, 1 + P, D]
        return Features(tokens=x[:, 1:], pooled=x[:, 0])
