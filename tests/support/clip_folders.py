"""Folders of transformers' CLIPModel and SiglipModel, small and random."""

from helpers import randomise

from diva_jax.models.backbones import HALF, Spec, TextSpec
from diva_jax.weights import hf

CLIP = Spec(
    image_size=30,
    patch_size=6,
    width=48,
    layers=2,
    heads=3,
    mlp_dim=96,
    embed_dim=20,
    text=TextSpec(context_length=11, vocab_size=99, width=128, heads=2, layers=2, mlp_dim=512),
)
SIGLIP = Spec(
    arch="siglip",
    image_size=42,
    patch_size=14,
    width=48,
    layers=2,
    heads=4,
    mlp_dim=100,
    embed_dim=48,
    activation="gelu",
    norm_eps=1e-6,
    mean=HALF,
    std=HALF,
    resize_mode="squash",
    text=TextSpec(10, 77, 48, 4, 2, 100, causal=False, pool="last", proj_bias=True, norm_eps=1e-6, tokenizer="siglip"),
)


def siglip_folder(folder, spec=SIGLIP, act="gelu", **save):
    """A transformers SiglipModel of `spec` with random weights, saved; returns the model."""
    from transformers import SiglipConfig, SiglipModel

    cfg = hf.to_transformers(spec, "float32")
    for part in ("vision_config", "text_config"):
        cfg[part]["hidden_act"] = act
    config = SiglipConfig(vision_config=cfg["vision_config"], text_config=cfg["text_config"])
    model = randomise(SiglipModel(config))
    model.save_pretrained(folder, **save)
    return model


def clip_folder(folder, spec=CLIP, **save):
    from transformers import CLIPConfig, CLIPModel

    cfg = hf.to_transformers(spec, "float32")
    config = CLIPConfig(
        vision_config=cfg["vision_config"], text_config=cfg["text_config"], projection_dim=cfg["projection_dim"]
    )
    model = randomise(CLIPModel(config))
    model.save_pretrained(folder, **save)
    return model
