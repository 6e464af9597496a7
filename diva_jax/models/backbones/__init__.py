"""Backbones: CLIP vision encoders, each a row of data over one of a few architectures.

An architecture is a module of this package, found by `Spec.arch`, that defines `Vision(spec, ...)` with
`encode(images) -> Features`. A new checkpoint of a known architecture is one row of `TABLE` (or the same
fields in a config file) and no code.
"""

import dataclasses
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from diva_jax.common.errors import UserError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


class Features(NamedTuple):
    """What a backbone sees in a batch of images.

    Attributes:
      tokens: patch tokens in raster order, [B, P, D], in the same space as `pooled` for CLIP towers (after
        the final norm and the projection), after the trunk's final norm for SigLIP.
      pooled: the image embedding, [B, D], not normalised.
    """

    tokens: jax.Array
    pooled: jax.Array


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """The text tower that belongs to a backbone; fields as in open_clip's `text_cfg`."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 768
    heads: int = 12
    layers: int = 12
    mlp_dim: int = 3072
    causal: bool = True
    pool: str = "argmax"  # argmax: at the end-of-text token (the highest id); last: at the last position.
    proj_bias: bool = False  # SigLIP projects with a linear layer and a bias, CLIP with a bare matrix.
    norm_eps: float = 1e-5
    tokenizer: str = "clip"  # clip: BPE, lower-cased; siglip: SentencePiece, canonicalised.


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything about a backbone that is not code.

    Attributes:
      arch: the architecture, a module of `diva_jax.models.backbones`.
      open_clip_name: the open_clip model this is, for users and exports.
      source: where its weights are, anything that `diva_jax.weights` reads.
      image_size, patch_size: pixels.
      width, layers, heads, mlp_dim: of the transformer.
      embed_dim: D of `Features`.
      activation: of the MLPs, a name in `layers.ACTIVATIONS`.
      norm_eps: of the LayerNorms.
      mean, std: per channel, of images in [0, 1].
      resize_mode, interpolation: how open_clip prepares a test image ("shortest" and centre crop, or "squash").
      select: which patch tokens join the pooled one as condition: "all", "random:K" (K uniform draws with
        replacement), or "runs:K" (means over runs of K along the raster order, remainder dropped).
      add_text: "token" (text and features token by token) or "mean" (mean text token added to every one).
      readout: the readout with which this row's MMVP-VLM score was published (authors' evaluation code).
      text: the text tower's spec.
    """

    arch: str = "vit"
    open_clip_name: str = ""
    source: str = ""
    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_dim: int = 4096
    embed_dim: int = 768
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    select: str = "all"
    add_text: str = "mean"
    readout: str = "pooled"
    text: TextSpec = TextSpec()

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2


_L14 = Spec(
    open_clip_name="ViT-L-14-quickgelu",
    source="hf-hub:timm/vit_large_patch14_clip_224.openai",
    select="random:76",
    add_text="token",
    readout="cls + mean(random 76), l2",
)
_H14_TEXT = TextSpec(width=1024, heads=16, layers=24, mlp_dim=4096)
_H14 = Spec(
    open_clip_name="ViT-H-14-quickgelu",
    source="hf-hub:timm/vit_huge_patch14_clip_224.metaclip_2pt5b",
    width=1280,
    layers=32,
    heads=16,
    mlp_dim=5120,
    embed_dim=1024,
    readout="l2(cls) + mean(l2(all)), l2",
    text=_H14_TEXT,
)
_SIGLIP = Spec(
    arch="siglip",
    open_clip_name="ViT-SO400M-14-SigLIP",
    source="hf-hub:timm/ViT-SO400M-14-SigLIP",
    width=1152,
    layers=27,
    heads=16,
    mlp_dim=4304,
    embed_dim=1152,
    activation="gelu",
    norm_eps=1e-6,
    mean=HALF,
    std=HALF,
    resize_mode="squash",
    select="runs:6",
    readout="l2(cls)",
    text=TextSpec(
        context_length=16,
        vocab_size=32000,
        width=1152,
        heads=16,
        layers=27,
        mlp_dim=4304,
        causal=False,
        pool="last",
        proj_bias=True,
        norm_eps=1e-6,
        tokenizer="siglip",
    ),
)
_r = dataclasses.replace

# The backbones that the authors tuned, as their code conditions on them; `select` of dfn_h14_378 is int(0.5 * 729).
TABLE: dict[str, Spec] = {
    "vitl14": _L14,
    "vitl14_336": _r(
        _L14,
        open_clip_name="ViT-L-14-336-quickgelu",
        source="hf-hub:timm/vit_large_patch14_clip_336.openai",
        image_size=336,
    ),
    "metaclip_l14": _r(
        _L14,
        source="hf-hub:timm/vit_large_patch14_clip_224.metaclip_2pt5b",
        select="all",
        add_text="mean",
        readout="l2(cls) + mean(l2(all)), l2",
    ),
    "metaclip_h14": _H14,
    "dfn_h14": _r(_H14, source="hf-hub:apple/DFN5B-CLIP-ViT-H-14", resize_mode="squash", readout="l2(cls)"),
    "dfn_h14_378": _r(
        _H14,
        open_clip_name="ViT-H-14-378-quickgelu",
        source="hf-hub:apple/DFN5B-CLIP-ViT-H-14-378",
        image_size=378,
        resize_mode="squash",
        select="random:364",
        readout="l2(cls) + mean(l2(random 364))",
    ),
    "siglip_so400m": _SIGLIP,
    "siglip_so400m_384": _r(
        _SIGLIP,
        text=_r(_SIGLIP.text, context_length=64),
        open_clip_name="ViT-SO400M-14-SigLIP-384",
        source="hf-hub:timm/ViT-SO400M-14-SigLIP-384",
        image_size=384,
        select="runs:10",
    ),
}

# The demo's and the tests': random weights, no checkpoint of it exists.
TINY = Spec(
    open_clip_name="tiny",
    image_size=56,
    patch_size=14,
    width=96,
    layers=3,
    heads=4,
    mlp_dim=384,
    embed_dim=48,
    select="random:7",
    text=TextSpec(width=32, heads=2, layers=1, mlp_dim=128),
)


def parse_spec(section: ConfigDict) -> Spec:
    """The Spec that a config section describes, hashable.

    Args:
      section: with the fields of `Spec`, e.g. `config.backbone`.
    """
    fields = section.to_dict()
    text = TextSpec(**fields.pop("text"))
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return Spec(**fields, text=text)


def spec_of(config: ConfigDict) -> Spec:
    """The Spec of the backbone that a run tunes, `config.backbone`."""
    return parse_spec(config.backbone)


def architecture(name: str):
    """The module `diva_jax.models.backbones.<name>`; a UserError names the known ones otherwise."""
    if name not in ("vit", "siglip"):
        raise UserError(f"backbone.arch={name!r} is no known architecture: use vit or siglip")
    return importlib.import_module(f"{__name__}.{name}")


def build(spec: Spec, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False):
    """The vision tower of `spec` with random weights (under `nnx.eval_shape`: its shapes alone)."""
    return architecture(spec.arch).Vision(spec, rngs=rngs, dtype=dtype, param_dtype=param_dtype, remat=remat)
