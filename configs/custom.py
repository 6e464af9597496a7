r"""DIVA on any other open_clip ViT, with no code.

Weights that describe themselves, an open_clip or transformers folder or hub id, need nothing but their path:

    python -m diva_jax.main --config=configs/custom.py:hf-hub:laion/CLIP-ViT-B-16-laion2B-s34B-b88K \
        --workdir=runs/b16 --config.data.path='data/cc3m/{00000..00331}.tar'

A bare file says nothing of its heads and activation: a name of MODELS below does, `-quickgelu` appended where the
weights were trained so (OpenAI's, MetaCLIP's, DFN's):

    python -m diva_jax.main --config=configs/custom.py:ViT-bigG-14 --workdir=runs/bigg \
        --config.backbone.source=bigg.safetensors --config.data.path='data/cc3m/{00000..00331}.tar'

Every field can also be set on the command line: --config.backbone.image_size=336 (position embeddings are
interpolated), --config.backbone.select=random:128, --config.backbone.add_text=token. Hours and scores: none published.
"""

from diva_jax import config as base
from diva_jax.models.backbones.shared.open_clip_config import from_open_clip
from diva_jax.weights.sources import open_clip_source


def _vit(embed_dim: int, text: tuple[int, int, int], **vision) -> dict:
    width, heads, layers = text
    return dict(embed_dim=embed_dim, vision_cfg=vision, text_cfg=dict(width=width, heads=heads, layers=layers))


# As in open_clip's model_configs; what is left out has open_clip's defaults (224 px, 12 layers of width 768 in heads
# of 64, mlp_ratio 4).
MODELS = {
    "ViT-B-32": _vit(512, (512, 8, 12), patch_size=32),
    "ViT-B-16": _vit(512, (512, 8, 12), patch_size=16),
    "ViT-L-16": _vit(768, (768, 12, 12), patch_size=16, width=1024, layers=24),
    "ViT-g-14": _vit(1024, (1024, 16, 24), patch_size=14, width=1408, layers=40, head_width=88, mlp_ratio=4.3637),
    "ViT-bigG-14": _vit(1280, (1280, 20, 32), patch_size=14, width=1664, layers=48, head_width=104, mlp_ratio=4.9231),
}


def get_config(arg: str | None = None):
    """`arg`: a name of MODELS (default ViT-B-16), or the path or hub id of weights that describe themselves."""
    arg = arg or "ViT-B-16"
    name = arg.removesuffix("-quickgelu")
    if name in MODELS:
        return base.default(from_open_clip(MODELS[name] | dict(quick_gelu=name != arg), name=arg))
    source = open_clip_source(arg, "the argument of configs/custom.py")
    spec = source.described(arg)
    return base.default(spec)
