"""The pre-norm transformer of CLIP's and SigLIP's towers, vision and text."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.models.adapters import DROPOUT
from diva_jax.models.attention import parts
from diva_jax.models.backbones import Spec, architecture
from diva_jax.models.layers import ACTIVATIONS, Array, Layers, attention, split_qkv
from diva_jax.models.platform import split


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
    """Two linear layers with an activation between them."""

    def __init__(self, make: Layers, width: int, hidden: int, activation: str):
        self.activation = activation
        self.fc1 = make.linear(width, hidden)
        self.fc2 = make.linear(hidden, width)

    def __call__(self, x: Array) -> Array:  # [..., D] -> [..., D]
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nnx.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, make: Layers, width: int, heads: int, mlp_dim: int, activation: str, eps: float, causal=False):
        self.norm1 = make.layer_norm(width, eps)
        self.attn = Attention(make, width, heads, causal)
        self.norm2 = make.layer_norm(width, eps)
        self.mlp = Mlp(make, width, mlp_dim, activation)

    def __call__(self, x: Array, *args: Array) -> Array:  # [B, N, D] -> [B, N, D]
        x = x + self.attn(self.norm1(x), *args)
        return x + self.mlp(self.norm2(x))


def blocks(make: Layers, layers: int, *args, block: Callable[..., nnx.Module] = Block, **kw) -> nnx.List:
    """`layers` blocks, `block(make, *args, **kw)`. The output of each block's branches is divided by sqrt(2 * layers),
    as CLIP initialises it, so that the variance of the residual stream does not grow with depth."""
    stack = [block(make, *args, **kw) for _ in range(layers)]
    for one in stack:
        for out in (one.attn.proj, one.mlp.fc2):
            # A new variable: assignment to a traced one takes time proportional to all parameters made so far.
            out.kernel = nnx.Param(out.kernel[...] * (2 * layers) ** -0.5)
    return nnx.List(stack)


def run(stack: nnx.List, x: Array, *args: Array, remat: bool = False) -> Array:
    """[B, N, D] through all blocks, each called with `args` too; `remat` recomputes them in the backward pass. It takes
    each block in parts of the batch where these are faster, but for dropout, whose keys are those of all images."""
    if not remat:
        for block in stack:
            x = block(x, *args)
        return x
    count = 1 if DROPOUT.get() is not None else parts(x.shape, stack[0].attn.heads)
    for graph, state in map(nnx.split, stack):
        step = jax.checkpoint(lambda state, x, graph=graph: nnx.merge(graph, state)(x, *args), prevent_cse=count == 1)
        step = partial(step, state)
        x = step(x) if count == 1 else jax.lax.map(step, split(x, count)).swapaxes(0, 1).reshape(x.shape)
    return x


def embedded(tower: nnx.Module, images: Array, first: nnx.Param | None = None) -> Array:
    """Images [B, H, W, 3] -> the class token `first`, if any, and patches, with their positions, [B, N, width]."""
    x = tower.patch_embed(images.astype(tower.dtype))  # [B, grid, grid, width]
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    if first is not None:
        x = jnp.concatenate([jnp.broadcast_to(first[...].astype(tower.dtype), (x.shape[0], 1, x.shape[-1])), x], axis=1)
    return x + tower.pos_embed[...].astype(tower.dtype)


# How the last block is run for dense prediction, so that patch tokens keep to their place: pairs of projections whose
# softmax attentions are summed (none: each token attends to itself alone), whether the block's input is added to the
# attention, and whether the MLP, with its residual, follows.
VARIANTS: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    "plain": (("qk",), True, True),
    "maskclip": ((), True, True),  # arXiv 2112.01071.
    "sclip": (("qq", "kk"), True, True),  # arXiv 2312.01597, equation 3.
    "clearclip": (("qq",), False, False),  # arXiv 2407.12442.
}


def run_dense(stack: nnx.List, x: Array, last: str) -> Array:
    """[B, N, D] through all `shared.transformer.Block`s, the last one as the variant `last` of `VARIANTS`."""
    *before, block = stack
    x = run(before, x)
    scores, residual, mlp = VARIANTS[last]
    projected = dict(zip("qkv", split_qkv(block.attn.qkv(block.norm1(x)), block.attn.heads), strict=True))
    v = projected["v"]
    mixed = v.reshape(*v.shape[:-2], -1)
    if scores:
        mixed = sum(attention(projected[a], projected[b], v) for a, b in scores)
    y = block.attn.proj(mixed)
    x = x + y if residual else y
    return x + block.mlp(block.norm2(x)) if mlp else x


def require_text(spec: Spec) -> None:
    """Raises a UserError where no text tower belongs to `spec`."""
    if not spec.has_text or architecture(spec.arch).CHECKPOINT.text is None:
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
