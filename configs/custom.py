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
from diva_jax.common.fields import parse
from diva_jax.common.json_files import packaged
from diva_jax.models import backbones
from diva_jax.models.backbones import Spec
from diva_jax.models.backbones.shared import open_clip_config
from diva_jax.weights.formats import read_json
from diva_jax.weights.origins import diffusers_folder, open_source

_ARGUMENT = "the argument of configs/custom.py"


# As in open_clip's model_configs; what is left out has open_clip's defaults (224 px, 12 layers of width 768 in heads
# of 64, mlp_ratio 4).
MODELS = packaged(open_clip_config.__file__, "open_clip.json")


# By their names on torch.hub, at the resolution of their position embeddings; `_reg`: with four registers.
DINOV2 = {name: parse(Spec, row, name) for name, row in packaged(backbones.__file__, "dinov2.json").items()}


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
    """`arg`: BACKBONE or BACKBONE,DIFFUSION. The first is a name of MODELS (default ViT-B-16) or DINOV2, or a path or
    hub id of weights that describe themselves, the second a diffusers folder or hub id."""
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
        return open_clip_config.from_open_clip(MODELS[name] | dict(quick_gelu=name != arg), name=arg)
    if not any(c in arg for c in "/:.") and not Path(arg).exists():
        raise UserError(
            f"configs/custom.py:{arg} is neither a name nor a path or hub id of weights; names are "
            f"{listing([*MODELS, *DINOV2], 100)}"
        )
    return open_source(arg, _ARGUMENT).described(arg)
