"""Patch tokens for dense prediction against plain PyTorch on the weights of open_clip's and timm's towers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from helpers import close, filled
from specs import QUICK, SIGLIP
from torch_towers import checkpoint, torch_tower

from diva_jax.models.backbones import build
from diva_jax.models.backbones.shared.dense import VARIANTS
from diva_jax.models.layers import Keys
from diva_jax.weights.clip import vision_table

SPECS = {"clip": QUICK, "siglip": SIGLIP}


def attend(weights, q, k, v, heads):
    """The variants written out: [B, N, D] thrice -> [B, N, D]."""
    b, n, d = q.shape

    def split(x):
        return x.reshape(b, n, heads, d // heads).transpose(1, 2)

    def softmax(a, c):
        return (split(a) @ split(c).transpose(-1, -2) / (d // heads) ** 0.5).softmax(-1)

    table = {
        "plain": lambda: softmax(q, k),
        "maskclip": lambda: torch.eye(n).expand(b, heads, n, n),
        "sclip": lambda: softmax(q, q) + softmax(k, k),
        "clearclip": lambda: softmax(q, q),
    }[weights]()
    return (table @ split(v)).transpose(1, 2).reshape(b, n, d)


def clip_tokens(tower, images, last, spec):
    x = tower._embeds(images)
    *before, block = tower.transformer.resblocks
    for one in before:
        x = one(x)
    q, k, v = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
    y = block.attn.out_proj(attend(last, q, k, v, spec.heads))
    if last != "clearclip":
        y = x + y
        y = y + block.mlp(block.ln_2(y))
    return (tower.ln_post(y) @ tower.proj)[:, 1:]


def siglip_tokens(tower, images, last, spec):
    x = tower._pos_embed(tower.patch_embed(images))
    *before, block = tower.blocks
    for one in before:
        x = one(x)
    q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    y = block.attn.proj(attend(last, q, k, v, spec.heads))
    if last != "clearclip":
        y = x + y
        y = y + block.mlp(block.norm2(y))
    y, pool = tower.norm(y), tower.attn_pool
    y = pool.proj(pool.kv(y).chunk(2, dim=-1)[1])
    return y + pool.mlp(pool.norm(y))


@pytest.mark.parametrize("last", VARIANTS)
@pytest.mark.parametrize("name", SPECS)
def test_tokens_equal_torchs(name, last):
    spec = SPECS[name]
    tower = torch_tower(spec).eval()
    abstract = nnx.eval_shape(lambda: build(spec, rngs=Keys(0)))
    ours = filled(abstract, checkpoint(spec, tower), vision_table(spec))
    images = np.random.default_rng(3).standard_normal((2, spec.image_size, spec.image_size, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = clip_tokens if name == "clip" else siglip_tokens
        want = theirs(tower, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), last, spec).numpy()
    got = ours.encode_dense(images, last)
    assert got.shape == (2, spec.patches, spec.embed_dim)
    close(got, want, 1e-5)
    if last == "plain" and name == "clip":
        close(ours.encode(images).tokens, want, 1e-5)
