"""How the last block is run for dense prediction, so that patch tokens keep to their place: a table of variants."""

import dataclasses

import jax
from flax import nnx

from diva_jax.models.layers import attention, split_qkv

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Last:
    """A variant of the last block: pairs of projections whose softmax attentions are summed (none: each token attends
    to itself alone), whether the block's input is added to the attention, and whether the MLP, with its residual,
    follows.
    """

    scores: tuple[str, ...] = ("qk",)
    residual: bool = True
    mlp: bool = True


VARIANTS: dict[str, Last] = {
    "plain": Last(),
    "maskclip": Last(()),  # arXiv 2112.01071.
    "sclip": Last(("qq", "kk")),  # arXiv 2312.01597, equation 3.
    "clearclip": Last(("qq",), residual=False, mlp=False),  # arXiv 2407.12442.
}


def run_dense(stack: nnx.List, x: Array, last: str) -> Array:
    """[B, N, D] through all `shared.transformer.Block`s, the last one as the variant `last` of `VARIANTS`."""
    *before, block = stack
    for one in before:
        x = one(x)
    how = VARIANTS[last]
    projected = dict(zip("qkv", split_qkv(block.attn.qkv(block.norm1(x)), block.attn.heads), strict=True))
    v = projected["v"]
    mixed = v.reshape(*v.shape[:-2], -1)
    if how.scores:
        mixed = sum(attention(projected[a], projected[b], v) for a, b in how.scores)
    y = block.attn.proj(mixed)
    x = x + y if how.residual else y
    return x + block.mlp(block.norm2(x)) if how.mlp else x
