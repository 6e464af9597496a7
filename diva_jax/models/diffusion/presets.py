"""Presets of the published Stable Diffusion models, with the names and values of their diffusers folders' config
files.
"""

import copy

_SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="epsilon",
)
_UNET_21 = dict(
    sample_size=64,
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
    norm_num_groups=32,
    norm_eps=1e-5,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)
_VAE = dict(
    in_channels=3,
    latent_channels=4,
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    layers_per_block=2,
    norm_num_groups=32,
    scaling_factor=0.18215,
)
_TEXT_21 = dict(
    vocab_size=49408,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    max_position_embeddings=77,
    hidden_act="gelu",
    layer_norm_eps=1e-5,
)
_TEXT_15 = dict(
    _TEXT_21,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    hidden_act="quick_gelu",
)
_V = dict(_SCHEDULER, prediction_type="v_prediction")


def _unclip(embed_dim: int) -> dict:
    """The U-Net of Stable unCLIP for image embeddings of this width."""
    class_input = dict(class_embed_type="projection", projection_class_embeddings_input_dim=2 * embed_dim)
    return dict(_UNET_21, sample_size=96, **class_input)


# For the demo and the tests, which use random weights; there is no published checkpoint.
_TINY = dict(
    unet=dict(
        _UNET_21,
        sample_size=8,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1,
        attention_head_dim=(2, 2, 4, 4),
        cross_attention_dim=48,
        norm_num_groups=8,
    ),
    vae=dict(_VAE, block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4),
    text_encoder=dict(
        _TEXT_21,
        vocab_size=514,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
    scheduler=_SCHEDULER,
)

PRESETS: dict[str, dict] = {
    "tiny": _TINY,
    "sd21_base": dict(unet=_UNET_21, vae=_VAE, text_encoder=_TEXT_21, scheduler=_SCHEDULER),
    "sd21": dict(unet=dict(_UNET_21, sample_size=96), vae=_VAE, text_encoder=_TEXT_21, scheduler=_V),
    # Stable unCLIP: conditioned on [image embedding, code of the embedding's noise level], OpenAI ViT-L/14's (768) and
    # OpenCLIP ViT-H/14's (1024).
    "unclip_l": dict(unet=_unclip(768), vae=_VAE, text_encoder=_TEXT_21, scheduler=_V),
    "unclip_h": dict(unet=_unclip(1024), vae=_VAE, text_encoder=_TEXT_21, scheduler=_V),
    "sd15": dict(
        unet=dict(_UNET_21, attention_head_dim=8, cross_attention_dim=768, use_linear_projection=False),
        vae=_VAE,
        text_encoder=_TEXT_15,
        scheduler=_SCHEDULER,
    ),
}


def preset(name: str) -> dict:
    """Returns a copy of a preset: {"unet": ..., "vae": ..., "text_encoder": ..., "scheduler": ...}."""
    return copy.deepcopy(PRESETS[name])
