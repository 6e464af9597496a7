"""Name tables of the CLIP and SigLIP towers, between our modules and open_clip's checkpoints.

An open_clip checkpoint holds both towers and the logits' scale and bias. The table of one tower is strict
about that tower's names, knows and ignores the rest, and so refuses a name that neither has.
"""

from diva_jax.models.backbones import Spec
from diva_jax.weights.names import Table

# What is in checkpoints and belongs to no tower; OpenAI's own archives carry their sizes as tensors.
_NEITHER = (r"logit_scale", r"logit_bias", r"(text\.)?attn_mask", r"input_resolution|context_length|vocab_size")
_BLOCK_LEAF = (
    r"(ln_[12]\.(weight|bias)|attn\.in_proj_(weight|bias)|attn\.out_proj\.(weight|bias)"
    r"|mlp\.c_(fc|proj)\.(weight|bias))"
)
_TEXT = (
    rf"(text\.)?transformer\.resblocks\.\d+\.{_BLOCK_LEAF}",
    r"(text\.)?token_embedding\.weight",
    r"(text\.)?positional_embedding",
    r"(text\.)?ln_final\.(weight|bias)",
    r"(text\.)?text_projection(\.weight|\.bias)?",
)
_BLOCKS = (
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def vision_table(spec: Spec) -> Table:
    """Our `Vision` <-> `visual.*`: open_clip's own names for CLIP, timm's in `visual.trunk.*` for SigLIP."""
    if spec.arch == "siglip":
        rename = ((r"^patch_embed\.", "patch_embed.proj."), (r"^", "visual.trunk."))
    else:
        rename = (
            *_BLOCKS,
            (r"^patch_embed\.", "conv1."),
            (r"^class_embed$", "class_embedding"),
            (r"^pos_embed$", "positional_embedding"),
            (r"^norm_pre\.", "ln_pre."),
            (r"^norm\.", "ln_post."),
            (r"^", "visual."),
        )
    return Table(f"{spec.arch} vision tower", rename, ignore=(*_TEXT, *_NEITHER))


def text_table(spec: Spec) -> Table:
    """Our `Text` <-> `text.*` for SigLIP, names at top level for CLIP.

    open_clip writes CLIP's text tower under `text.` too where a model was made with `custom_text`; both read.
    """
    rename = (
        *_BLOCKS,
        (r"^token_embed\.", "token_embedding."),
        (r"^pos_embed$", "positional_embedding"),
        (r"^norm\.", "ln_final."),
        (r"^proj(\.|$)", r"text_projection\1"),
    )
    what, ignore = f"{spec.arch} text tower", (r"visual\..+", *_NEITHER)
    if spec.arch == "siglip":
        return Table(what, (*rename, (r"^", "text.")), ignore=ignore)
    return Table(what, rename, ignore=ignore, aliases=((r"^text\.", ""),))
