"""Names of Stable Diffusion's parts in diffusers' and transformers' checkpoints."""

from diva_jax.weights.names import Table

# Our modules have diffusers' names, except for the positions in its feed-forward list.
UNET = Table(
    "diffusers U-Net",
    rename=((r"\bff\.proj\.", "ff.net.0.proj."), (r"\bff\.out\.", "ff.net.2.")),
)

VAE = Table(
    "encoder of the diffusers VAE",
    ignore=(r"decoder\..*", r"post_quant_conv\..*"),
    # Names of older checkpoints, before diffusers had one attention class.
    aliases=(
        (r"(mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
        (r"(mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
        (r"(mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
        (r"(mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
    ),
)

TEXT_ENCODER = Table(
    "transformers CLIPTextModel",
    rename=(
        (r"^(token|position)_embedding\.", r"embeddings.\1_embedding."),
        (r"^layers\.", "encoder.layers."),
        (r"\.(q|k|v|out)_proj\.", r".self_attn.\1_proj."),
        (r"\.(fc1|fc2)\.", r".mlp.\1."),
    ),
    # A constant that older versions saved, and the projection of CLIPTextModelWithProjection.
    ignore=(r"embeddings\.position_ids", r"text_projection\.weight"),
    # Older versions of transformers use this prefix for all names.
    aliases=((r"^text_model\.", ""),),
)
