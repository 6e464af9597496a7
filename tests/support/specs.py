"""Tiny backbones of every architecture, with sizes that are not powers of two and unusual head widths."""

import dataclasses

from diva_jax.models.backbones import HALF, IMAGENET_MEAN, IMAGENET_STD, NO_TEXT, TABLE, TINY, Spec, TextSpec

_replace = dataclasses.replace


def _spec(image_size, patch_size, width, layers, heads, mlp_dim, embed_dim, arch="vit", **kw) -> Spec:
    sizes = dict(image_size=image_size, patch_size=patch_size, width=width, layers=layers)
    return Spec(arch, **sizes, heads=heads, mlp_dim=mlp_dim, embed_dim=embed_dim, **kw)


_AS_SIGLIP = dict(causal=False, pool="last", proj_bias=True, norm_eps=1e-6, tokenizer="siglip")
_SIGLIP = dict(arch="siglip", activation="gelu", norm_eps=1e-6, mean=HALF, std=HALF, resize_mode="squash")
_IMAGENET = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD)
_TEXT = TextSpec(context_length=13, vocab_size=101, width=60, heads=5, layers=3, mlp_dim=240)

# Heads of width 80 as in H/14.
QUICK = _spec(42, 14, 160, 3, 2, 330, 52, text=_TEXT)
# 38 px are not a multiple of the patch size: 3 px are unused.
GELU = _spec(38, 7, 60, 2, 5, 240, 71, activation="gelu", norm_eps=1e-6, text=_TEXT)
SIGLIP = _spec(38, 7, 48, 3, 3, 137, 48, **_SIGLIP, text=_replace(_TEXT, mlp_dim=224, **_AS_SIGLIP))
# SigLIP 2: the text tower has the tanh approximation of GELU, as in open_clip.
SIGLIP2 = _replace(SIGLIP, text=_replace(SIGLIP.text, activation="gelu_tanh"))
# MetaCLIP 2: pooling at the first token of a given id, which is not the highest.
_XLM = dict(pool="eos", eos_id=2, tokenizer="xlm")
METACLIP2 = _replace(QUICK, text=_replace(_TEXT, **_XLM))
_GELU_TEXT = _replace(_TEXT, activation="gelu")
EVA02 = _spec(42, 6, 48, 2, 3, 133, 20, "eva02", activation="silu", norm_eps=1e-6, text=_GELU_TEXT)
DINOV2 = _spec(42, 6, 36, 2, 3, 144, 36, "dinov2", activation="gelu", norm_eps=1e-6, **_IMAGENET, text=NO_TEXT)
DINOV2_REG = _replace(DINOV2, registers=3)
DINOV2_SWIGLU = _replace(DINOV2, activation="swiglu", mlp_dim=96)

# One of each vision tower.
TOWERS = dict(quick_gelu=QUICK, gelu=GELU, siglip=SIGLIP, eva02=EVA02)
DINOV2S = dict(dinov2=DINOV2, dinov2_reg=DINOV2_REG, dinov2_swiglu=DINOV2_SWIGLU)
TOWERS |= DINOV2S

# Whole models that are in transformers too.
CLIP_FOLDER = _spec(30, 6, 48, 2, 3, 96, 20, text=TextSpec(11, 99, 128, 2, 2, 512))
SIGLIP_FOLDER = _spec(42, 14, 48, 2, 4, 100, 48, **_SIGLIP, text=TextSpec(10, 77, 48, 4, 2, 100, **_AS_SIGLIP))
SIGLIP2_FOLDER = _replace(SIGLIP_FOLDER, text=_replace(SIGLIP_FOLDER.text, activation="gelu_tanh"))
METACLIP2_FOLDER = _replace(CLIP_FOLDER, text=_replace(CLIP_FOLDER.text, **_XLM))

# Towers of evaluations, with CLIP's whole vocabulary and a small one of SigLIP's.
_EVAL_TEXT = TextSpec(width=32, heads=2, layers=2, mlp_dim=128)
EVAL_CLIP = _spec(42, 14, 48, 2, 3, 192, 20, readout="cls + mean(random 5), l2", text=_EVAL_TEXT)
_EVAL_SIGLIP_TEXT = TextSpec(64, 2000, 36, 2, 2, 144, **_AS_SIGLIP)
EVAL_SIGLIP = _replace(SIGLIP, layers=2, readout="l2(cls)", text=_EVAL_SIGLIP_TEXT)

# The tower that small.py's runs train.
_TRAINED = dict(image_size=21, patch_size=7, width=24, layers=2, heads=3, mlp_dim=40, embed_dim=20)
TRAINED = _replace(TINY, **_TRAINED, select="random:5")
# A SigLIP with the names of a published one.
_TEACHER = dict(image_size=30, patch_size=10, width=36, layers=2, heads=3, mlp_dim=50, embed_dim=36)
TEACHER = _replace(TABLE["siglip_so400m"], **_TEACHER)
# DFN's ViT-H/14, which has heads of width 80 and squashes its images.
_H14 = dict(image_size=42, width=160, heads=2, layers=2, mlp_dim=640, embed_dim=24, text=CLIP_FOLDER.text)
H14 = _replace(TABLE["dfn_h14_378"], open_clip_name="", **_H14)
# transformers' CLIP with the head width that OpenAI's own files assume.
OPENAI = _replace(CLIP_FOLDER, width=128, heads=2)
