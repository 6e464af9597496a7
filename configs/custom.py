r"""DIVA on any other vision encoder, with no code.

Weights that describe themselves, an open_clip or transformers folder or hub id, need nothing but their path:

    python -m diva_jax.main --config=configs/custom.py:hf-hub:laion/CLIP-ViT-B-16-laion2B-s34B-b88K \
        --workdir=runs/b16 --config.data.path='data/cc3m/{00000..00331}.tar'

A bare file does not state its heads and its activation: a name of MODELS or DINOV2 below does. `-quickgelu` is
appended to an open_clip ViT whose weights were trained so (OpenAI's, MetaCLIP's, DFN's):

    python -m diva_jax.main --config=configs/custom.py:ViT-bigG-14 --workdir=runs/bigg \
        --config.backbone.source=bigg.safetensors --config.data.path='data/cc3m/{00000..00331}.tar'

Another Stable Diffusion model than 2.1-base is a diffusers folder or hub id after a comma:

    python -m diva_jax.main --config=configs/custom.py:ViT-B-16,hf-hub:stable-diffusion-v1-5/stable-diffusion-v1-5 ...

Every field can also be set on the command line: --config.backbone.image_size=336 (position embeddings are
interpolated), --config.backbone.select=random:128, --config.backbone.add_text=token. Hours and scores: none published.
"""

from pathlib import Path

from diva_jax import config as base
from diva_jax.common.errors import UserError, listing
from diva_jax.models.backbones import IMAGENET_MEAN, IMAGENET_STD, NO_TEXT, Spec
from diva_jax.models.backbones.shared.open_clip_config import from_open_clip
from diva_jax.weights.origins import open_source
from diva_jax.weights.places import diffusers_folder
from diva_jax.weights.readers import read_json

_ARGUMENT = "the argument of configs/custom.py"


def _text(width: int, heads: int, layers: int, **others) -> dict:
    return dict(width=width, heads=heads, layers=layers, **others)


def _vit(embed_dim: int, text: dict, **vision) -> dict:
    return dict(embed_dim=embed_dim, vision_cfg=vision, text_cfg=text)


def _eva02(embed_dim: int, text: dict, size: int, name: str) -> dict:
    vision = dict(image_size=size, timm_model_name=f"eva02_{name}", timm_pool="token", timm_proj=None)
    return dict(embed_dim=embed_dim, vision_cfg=vision, text_cfg=text, custom_text=True)


def _siglip2(width: int, text: dict, size: int, name: str) -> dict:
    vision = dict(image_size=size, timm_model_name=f"vit_{name}_siglip_{size}", timm_pool="map", timm_proj="none")
    rules = dict(no_causal_mask=True, proj_bias=True, pool_type="last", context_length=64, vocab_size=256000)
    rules |= dict(norm_kwargs={"eps": 1e-6}, act_kwargs={"approximate": "tanh"})
    rules |= dict(hf_tokenizer_name="timm/ViT-B-16-SigLIP2", tokenizer_kwargs={"clean": "canonicalize"})
    return dict(embed_dim=width, vision_cfg=vision, text_cfg=text | rules, custom_text=True, init_logit_bias=-10)


_B, _L, _H, _G = _text(512, 8, 12), _text(768, 12, 12), _text(1024, 16, 24), _text(1280, 20, 32)
_VIT_L = dict(patch_size=14, width=1024, layers=24)
_VIT_H = dict(patch_size=14, width=1280, layers=32, head_width=80)
_VIT_BIGG = dict(patch_size=14, width=1664, layers=48, head_width=104, mlp_ratio=4.9231)
# MetaCLIP 2's vocabulary is XLM-V's.
_WORLDWIDE = dict(hf_tokenizer_name="facebook/xlm-v-base", pool_type="eos", eos_id=2, vocab_size=901629)
_SO400M = _text(1152, 16, 27, mlp_ratio=3.7362)

# As in open_clip's model_configs; what is left out has open_clip's defaults (224 px, 12 layers of width 768 in heads
# of 64, mlp_ratio 4).
MODELS = {
    "ViT-B-32": _vit(512, _B, patch_size=32),
    "ViT-B-32-256": _vit(512, _B, patch_size=32, image_size=256),
    "ViT-B-16": _vit(512, _B, patch_size=16),
    "ViT-L-16": _vit(768, _L, patch_size=16, width=1024, layers=24),
    "ViT-L-14": _vit(768, _L, **_VIT_L),
    "ViT-L-14-336": _vit(768, _L, **_VIT_L, image_size=336),
    "ViT-H-14": _vit(1024, _H, **_VIT_H),
    "ViT-H-14-378": _vit(1024, _H, **_VIT_H, image_size=378),
    "ViT-g-14": _vit(1024, _H, patch_size=14, width=1408, layers=40, head_width=88, mlp_ratio=4.3637),
    "ViT-bigG-14": _vit(1280, _G, **_VIT_BIGG),
    "ViT-H-14-worldwide": _vit(1024, _H | _WORLDWIDE, **_VIT_H),
    "ViT-H-14-worldwide-378": _vit(1024, _H | _WORLDWIDE, **_VIT_H, image_size=378),
    "ViT-bigG-14-worldwide": _vit(1280, _G | _WORLDWIDE, **_VIT_BIGG),
    "ViT-bigG-14-worldwide-378": _vit(1280, _G | _WORLDWIDE, **_VIT_BIGG, image_size=378),
    "EVA02-B-16": _eva02(512, _B, 224, "base_patch16_clip_224"),
    "EVA02-L-14": _eva02(768, _L, 224, "large_patch14_clip_224"),
    "EVA02-L-14-336": _eva02(768, _L, 336, "large_patch14_clip_336"),
    "ViT-B-32-SigLIP2-256": _siglip2(768, _text(768, 12, 12), 256, "base_patch32"),
    "ViT-B-16-SigLIP2": _siglip2(768, _text(768, 12, 12), 224, "base_patch16"),
    "ViT-B-16-SigLIP2-256": _siglip2(768, _text(768, 12, 12), 256, "base_patch16"),
    "ViT-B-16-SigLIP2-384": _siglip2(768, _text(768, 12, 12), 384, "base_patch16"),
    "ViT-B-16-SigLIP2-512": _siglip2(768, _text(768, 12, 12), 512, "base_patch16"),
    "ViT-L-16-SigLIP2-256": _siglip2(1024, _text(1024, 16, 24), 256, "large_patch16"),
    "ViT-L-16-SigLIP2-384": _siglip2(1024, _text(1024, 16, 24), 384, "large_patch16"),
    "ViT-L-16-SigLIP2-512": _siglip2(1024, _text(1024, 16, 24), 512, "large_patch16"),
    "ViT-SO400M-14-SigLIP2": _siglip2(1152, _SO400M, 224, "so400m_patch14"),
    "ViT-SO400M-14-SigLIP2-378": _siglip2(1152, _SO400M, 378, "so400m_patch14"),
    "ViT-SO400M-16-SigLIP2-256": _siglip2(1152, _SO400M, 256, "so400m_patch16"),
    "ViT-SO400M-16-SigLIP2-384": _siglip2(1152, _SO400M, 384, "so400m_patch16"),
    "ViT-SO400M-16-SigLIP2-512": _siglip2(1152, _SO400M, 512, "so400m_patch16"),
    "ViT-gopt-16-SigLIP2-256": _siglip2(1536, _SO400M, 256, "giantopt_patch16"),
    "ViT-gopt-16-SigLIP2-384": _siglip2(1536, _SO400M, 384, "giantopt_patch16"),
}


def _dinov2(width: int, layers: int, heads: int, mlp_dim: int, activation: str = "gelu", registers: int = 0) -> Spec:
    return Spec(
        arch="dinov2",
        image_size=518,
        patch_size=14,
        width=width,
        layers=layers,
        heads=heads,
        mlp_dim=mlp_dim,
        embed_dim=width,
        activation=activation,
        norm_eps=1e-6,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        text=NO_TEXT,
        registers=registers,
    )


_DINOV2 = {
    "vits14": (384, 12, 6, 1536),
    "vitb14": (768, 12, 12, 3072),
    "vitl14": (1024, 24, 16, 4096),
    "vitg14": (1536, 40, 24, 4096, "swiglu"),
}
# By their names on torch.hub, at the resolution of their position embeddings; `_reg`: with four registers.
DINOV2 = {f"dinov2_{name}": _dinov2(*sizes) for name, sizes in _DINOV2.items()}
DINOV2 |= {f"dinov2_{name}_reg": _dinov2(*sizes, registers=4) for name, sizes in _DINOV2.items()}


def _diffusion(source: str) -> dict:
    """The parts of a diffusers folder, as its own config files describe them."""
    folder = diffusers_folder(source, _ARGUMENT)
    files = {part: folder / part / "config.json" for part in ("unet", "vae", "text_encoder")}
    files |= {"scheduler": folder / "scheduler" / "scheduler_config.json"}
    read = {part: read_json(file).items() for part, file in files.items()}
    return {
        part: {k: v for k, v in options if v is not None and not k.startswith("_")} for part, options in read.items()
    }


def get_config(arg: str | None = None):
    """`arg`: BACKBONE or BACKBONE,DIFFUSION.

    The first is a name of MODELS (default ViT-B-16) or DINOV2, or a path or hub id of weights that describe themselves,
    the second a diffusers folder or hub id.
    """
    arg, source = arg or "ViT-B-16", ""
    if not Path(arg).exists():
        arg, _, source = arg.partition(",")
    config = base.default(_backbone(arg), _diffusion(source) if source else "sd21_base")
    if source:
        config.diffusion.source = source
    return config


def _backbone(arg: str) -> Spec:
    if arg in DINOV2:
        return DINOV2[arg]
    name = arg.removesuffix("-quickgelu")
    if name in MODELS:
        return from_open_clip(MODELS[name] | dict(quick_gelu=name != arg), name=arg)
    if not any(c in arg for c in "/:.") and not Path(arg).exists():
        raise UserError(
            f"configs/custom.py:{arg} is neither a name nor a path or hub id of weights; names are "
            f"{listing([*MODELS, *DINOV2], 100)}"
        )
    return open_source(arg, _ARGUMENT).described(arg)
