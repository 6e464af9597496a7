"""Backbones: vision encoders, each a row of data over one of a few architectures.

A new checkpoint of a known architecture is one row of `TABLE` (or the same fields in a config file) and no code.

An architecture is a module of this package, found by listing it, whose name is `Spec.arch`. It defines everything
that differs by architecture; what several of them use is in the subpackage `shared`:

- `Vision(spec, *, rngs, dtype, param_dtype, remat)`, an NNX module with random weights and
  `encode(images) -> Features`; where it has a text tower to compare patches with, also
  `encode_dense(images, last) -> patch tokens in the text's space`, see `shared.dense`.
- `flops(spec) -> float`: floating-point operations of the forward pass over one image.
- `MARK`: the tensor, without `visual.`, by which a checkpoint of this architecture is recognised.
- `VISION`, `TEXT`: `models.names.Table`s between our towers and open_clip's checkpoints; `TEXT` is None where there
  is no text tower.
- `positions(spec) -> shared.positions.Positions`: the learned position embeddings, which depend on the resolution.
- `OTHERS`: tensors of a whole checkpoint that belong to neither tower and are kept in exports.
- `shapes(tensors) -> dict`: the fields of `Spec` that the shapes of a checkpoint's vision tower tell.
- `PREPROCESS`: mean, std, resize_mode and interpolation where a config does not state them.
- `reads_open_clip(vision_cfg) -> bool`, `from_open_clip(model_cfg) -> dict`, `to_open_clip(spec) -> dict`: between
  `Spec` and open_clip's config, see `shared.open_clip_config`; the second only where the first may be true.
- `TRANSFORMERS`: a `shared.transformers_layout.Layout`, or None where transformers has no such model.
- `LIBRARY`: the library that reads the vision tower's state dict: "open_clip" or "timm".
"""

import dataclasses
import functools
import importlib
import pkgutil
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from diva_jax.common.errors import UserError, listing

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


class Features(NamedTuple):
    """The output of a backbone for a batch of images.

    Attributes:
      tokens: patch tokens in raster order, [B, P, D]; in the same space as `pooled` for CLIP, EVA02-CLIP (after the
        final norm and the projection) and DINOv2 (after the final norm), after the trunk's final norm for SigLIP.
      pooled: the image embedding, [B, D], not normalised.
    """

    tokens: jax.Array
    pooled: jax.Array


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """The text tower that belongs to a backbone; fields as in open_clip's `text_cfg`.

    Attributes:
      context_length: tokens per text.
      vocab_size, width, heads, layers, mlp_dim: of the transformer; no layers: there is no text tower.
      causal: whether a token attends to the tokens before it alone.
      pool: the token whose state is projected: "argmax" (the highest id, CLIP's end-of-text token), "eos" (the first
        one whose id is `eos_id`) or "last" (the last position).
      proj_bias: SigLIP projects with a linear layer and a bias, CLIP with a bare matrix.
      norm_eps: of the LayerNorms.
      tokenizer: "clip" (BPE, lower-cased), "siglip" (SentencePiece on canonicalised text) or "xlm" (SentencePiece,
        case and punctuation kept).
      activation: of the MLPs; empty: the vision tower's.
      eos_id: see `pool`.
      kept_positions: where a checkpoint has another context_length: that many position embeddings are kept and the
        others are stretched to fit, see `weights.resample.to_context`; -1: such a checkpoint is refused.
    """

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 768
    heads: int = 12
    layers: int = 12
    mlp_dim: int = 3072
    causal: bool = True
    pool: str = "argmax"
    proj_bias: bool = False
    norm_eps: float = 1e-5
    tokenizer: str = "clip"
    activation: str = ""
    eos_id: int = 2
    kept_positions: int = -1


# Of a backbone that has a vision tower alone.
NO_TEXT = TextSpec(context_length=0, vocab_size=0, width=0, heads=0, layers=0, mlp_dim=0, tokenizer="")


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything about a backbone that is not code.

    Attributes:
      arch: the architecture, a module of `diva_jax.models.backbones`.
      open_clip_name: the open_clip model this is, for users and exports.
      source: where its weights are: a file, folder or hub id that `diva_jax.weights` reads, or the workdir of a run.
      image_size, patch_size: pixels.
      width, layers, heads, mlp_dim: of the transformer.
      embed_dim: D of `Features`.
      activation: of the MLPs, a name in `layers.ACTIVATIONS`; for dinov2 also "swiglu".
      norm_eps: of the LayerNorms.
      mean, std: per channel, of images in [0, 1].
      resize_mode, interpolation: how open_clip prepares a test image ("shortest" and centre crop, or "squash").
      select: which patch tokens join the pooled one as condition: "all", "none", "random:K" (K uniform draws with
        replacement), or "runs:K" (means over runs of K along the raster order, remainder dropped).
      add_text: "token" (text and features token by token) or "mean" (mean text token added to every one).
      readout: the readout with which this row's MMVP-VLM score was published (authors' evaluation code).
      text: the text tower's spec; `NO_TEXT` where there is none.
      registers: register tokens (dinov2).
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
    registers: int = 0

    @property
    def has_text(self) -> bool:
        """Whether a text tower belongs to this backbone."""
        return self.text.layers > 0

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches per image."""
        return self.grid**2


_L14 = Spec(
    open_clip_name="ViT-L-14-quickgelu",
    source="hf-hub:timm/vit_large_patch14_clip_224.openai",
    select="random:76",
    add_text="token",
    readout="cls + mean(random 76), l2",
)
# OpenAI's ViT-B/16, which DIVA's authors did not tune.
VIT_B16 = Spec(
    open_clip_name="ViT-B-16-quickgelu",
    source="hf-hub:timm/vit_base_patch16_clip_224.openai",
    patch_size=16,
    width=768,
    layers=12,
    heads=12,
    mlp_dim=3072,
    embed_dim=512,
    text=TextSpec(width=512, heads=8, layers=12, mlp_dim=2048),
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

# Used by the demo and the tests with random weights; no checkpoint of it exists.
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


@functools.cache
def architectures() -> dict[str, ModuleType]:
    """Name -> module of every architecture: the modules of this package that are no subpackages."""
    listed = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)
    return {name: importlib.import_module(f"{__name__}.{name}") for name in listed}


def architecture(name: str) -> ModuleType:
    """The module of an architecture.

    Raises:
      UserError: there is no architecture of this name; lists those that exist.
    """
    if name not in architectures():
        raise UserError(f"backbone.arch={name!r} is no known architecture: use one of {listing(list(architectures()))}")
    return architectures()[name]


def build(spec: Spec, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False) -> nnx.Module:
    """The vision tower of `spec` with random weights.

    Args:
      spec: sizes, activation and epsilon.
      rngs: source of the initial values; under `nnx.eval_shape` shapes and dtypes alone are made.
      dtype: what activations are computed in.
      param_dtype: what weights are held in.
      remat: recompute each block in the backward pass: less memory, a third more work, the same gradient.

    Raises:
      UserError: the architecture is not known, or cannot have these sizes.
    """
    return architecture(spec.arch).Vision(spec, rngs=rngs, dtype=dtype, param_dtype=param_dtype, remat=remat)
