"""Tiny backbones of every architecture; sizes that are no powers of two, heads of unusual width."""

import dataclasses

from diva_jax.models.backbones import HALF, IMAGENET_MEAN, IMAGENET_STD, NO_TEXT, TABLE, TINY, Spec, TextSpec

_replace = dataclasses.replace

_TEXT = TextSpec(context_length=13, vocab_size=101, width=60, heads=5, layers=3, mlp_dim=240)
_SIGLIP_TEXT = _replace(
    _TEXT, mlp_dim=224, causal=False, pool="last", proj_bias=True, norm_eps=1e-6, tokenizer="siglip"
)

# Heads of width 80 as in H/14.
QUICK = Spec(image_size=42, patch_size=14, width=160, layers=3, heads=2, mlp_dim=330, embed_dim=52, text=_TEXT)
# Of 38 px, the patches of 7 leave 3 unused.
GELU = Spec(
    image_size=38,
    patch_size=7,
    width=60,
    layers=2,
    heads=5,
    mlp_dim=240,
    embed_dim=71,
    activation="gelu",
    norm_eps=1e-6,
    text=_TEXT,
)
SIGLIP = Spec(
    arch="siglip",
    image_size=38,
    patch_size=7,
    width=48,
    layers=3,
    heads=3,
    mlp_dim=137,
    embed_dim=48,
    activation="gelu",
    norm_eps=1e-6,
    mean=HALF,
    std=HALF,
    resize_mode="squash",
    text=_SIGLIP_TEXT,
)
# SigLIP 2: as open_clip runs it, the text tower has tanh's approximation of GELU.
SIGLIP2 = _replace(SIGLIP, text=_replace(_SIGLIP_TEXT, activation="gelu_tanh"))
# MetaCLIP 2: pooling at the first token of a given id, which is not the highest.
METACLIP2 = _replace(QUICK, text=_replace(_TEXT, pool="eos", eos_id=2, tokenizer="xlm"))
EVA02 = Spec(
    arch="eva02",
    image_size=42,
    patch_size=6,
    width=48,
    layers=2,
    heads=3,
    mlp_dim=133,
    embed_dim=20,
    activation="silu",
    norm_eps=1e-6,
    text=_replace(_TEXT, activation="gelu"),
)
DINOV2 = Spec(
    arch="dinov2",
    image_size=42,
    patch_size=6,
    width=36,
    layers=2,
    heads=3,
    mlp_dim=144,
    embed_dim=36,
    activation="gelu",
    norm_eps=1e-6,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    text=NO_TEXT,
)
DINOV2_REG = _replace(DINOV2, registers=3)
DINOV2_SWIGLU = _replace(DINOV2, activation="swiglu", mlp_dim=96)

# One of each vision tower.
TOWERS = {
    "quick_gelu": QUICK,
    "gelu": GELU,
    "siglip": SIGLIP,
    "eva02": EVA02,
    "dinov2": DINOV2,
    "dinov2_reg": DINOV2_REG,
    "dinov2_swiglu": DINOV2_SWIGLU,
}

# Whole models that transformers has too.
CLIP_FOLDER = Spec(
    image_size=30,
    patch_size=6,
    width=48,
    layers=2,
    heads=3,
    mlp_dim=96,
    embed_dim=20,
    text=TextSpec(context_length=11, vocab_size=99, width=128, heads=2, layers=2, mlp_dim=512),
)
SIGLIP_FOLDER = Spec(
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
SIGLIP2_FOLDER = _replace(SIGLIP_FOLDER, text=_replace(SIGLIP_FOLDER.text, activation="gelu_tanh"))
METACLIP2_FOLDER = _replace(CLIP_FOLDER, text=_replace(CLIP_FOLDER.text, pool="eos", eos_id=2, tokenizer="xlm"))

# Towers of evaluations, with CLIP's whole vocabulary and a small one of SigLIP's.
_EVAL_TEXT = TextSpec(width=32, heads=2, layers=2, mlp_dim=128)
EVAL_CLIP = Spec(
    image_size=42,
    patch_size=14,
    width=48,
    layers=2,
    heads=3,
    mlp_dim=192,
    embed_dim=20,
    readout="cls + mean(random 5), l2",
    text=_EVAL_TEXT,
)
EVAL_SIGLIP = _replace(
    SIGLIP,
    layers=2,
    readout="l2(cls)",
    text=_replace(
        _EVAL_TEXT,
        context_length=64,
        vocab_size=2000,
        width=36,
        causal=False,
        pool="last",
        proj_bias=True,
        norm_eps=1e-6,
        mlp_dim=144,
        tokenizer="siglip",
    ),
)

# The tower that small.py's runs train.
TRAINED = _replace(
    TINY,
    image_size=21,
    patch_size=7,
    width=24,
    layers=2,
    heads=3,
    mlp_dim=40,
    embed_dim=20,
    select="random:5",
)
# The frozen second encoder of a distillation.
TEACHER = _replace(
    TABLE["siglip_so400m"],
    image_size=30,
    patch_size=10,
    width=36,
    layers=2,
    heads=3,
    mlp_dim=50,
    embed_dim=36,
)
# DFN's ViT-H/14, which has heads of width 80 and squashes its images.
H14 = _replace(
    TABLE["dfn_h14_378"],
    open_clip_name="",
    image_size=42,
    width=160,
    heads=2,
    layers=2,
    mlp_dim=640,
    embed_dim=24,
    text=CLIP_FOLDER.text,
)
# transformers' CLIP with the head width that OpenAI's own files assume.
OPENAI = _replace(CLIP_FOLDER, width=128, heads=2)
