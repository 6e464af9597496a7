"""The pre-norm transformer that CLIP's and SigLIP's towers, vision and text, are all made of."""

import jax
from flax import nnx

from diva_jax.models.layers import ACTIVATIONS, Layers, attention, split_qkv

Array = jax.Array


class Attention(nnx.Module):
    """Self-attention with one fused projection to queries, keys and values."""

    def __init__(self, make: Layers, width: int, heads: int, causal: bool):
        self.heads, self.causal = heads, causal
        self.qkv = make.linear(width, 3 * width)
        self.proj = make.linear(width, width)

    def __call__(self, x: Array) -> Array:  # [B, N, D] -> [B, N, D]
        q, k, v = split_qkv(self.qkv(x), self.heads)
        return self.proj(attention(q, k, v, causal=self.causal))


class Mlp(nnx.Module):
    def __init__(self, make: Layers, width: int, hidden: int, activation: str):
        self.activation = activation
        self.fc1 = make.linear(width, hidden)
        self.fc2 = make.linear(hidden, width)

    def __call__(self, x: Array) -> Array:  # [..., D] -> [..., D]
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nnx.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(
        self,
        make: Layers,
        width: int,
        heads: int,
        mlp_dim: int,
        activation: str,
        norm_eps: float,
        *,
        causal: bool = False,
    ):
        self.norm1 = make.layer_norm(width, norm_eps)
        self.attn = Attention(make, width, heads, causal)
        self.norm2 = make.layer_norm(width, norm_eps)
        self.mlp = Mlp(make, width, mlp_dim, activation)

    def __call__(self, x: Array) -> Array:  # [B, N, D] -> [B, N, D]
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def blocks(make: Layers, layers: int, *args, **kw) -> nnx.List:
    """`layers` blocks, `Block(make, *args, **kw)`.

    What each block adds to the stream is made smaller by sqrt(2 * layers), as CLIP initialises it, so that
    the stream's variance does not grow with depth.
    """
    stack = [Block(make, *args, **kw) for _ in range(layers)]
    for block in stack:
        for out in (block.attn.proj, block.mlp.fc2):
            out.kernel[...] *= (2 * layers) ** -0.5
    return nnx.List(stack)


def run(stack: nnx.List, x: Array, *, remat: bool = False) -> Array:
    """[B, N, D] through all blocks; `remat` recomputes each block's insides in the backward pass."""
    step = nnx.remat(Block.__call__) if remat else Block.__call__
    for block in stack:
        x = step(block, x)
    return x
