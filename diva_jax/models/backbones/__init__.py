"""Backbones: vision encoders, each a row of data over one of a few architectures.

A new checkpoint of a known architecture is one row of `TABLE` (or the same fields in a config file) and no code.

An architecture is a module of this package, found by listing it, whose name is `Spec.arch`. It defines everything
that differs by architecture; what several of them use is in the subpackage `shared`:

- `Vision(spec, *, rngs, dtype, param_dtype, remat)`, an NNX module with random weights and
  `encode(images) -> Features`; where it has a text tower to compare patches with, also
  `encode_dense(images, last) -> patch tokens in the text's space`, see `shared.transformer`.
- `CHECKPOINT`: its names in checkpoints, a `shared.open_clip_config.Checkpoint`.
- `shapes(tensors) -> dict`: the fields of `Spec` that the shapes of a checkpoint tell, `CHECKPOINT.shapes` or more.
- `from_open_clip(model: LibraryConfig) -> dict`, `to_open_clip(spec) -> dict`: with open_clip's own tower, between
  `Spec` and open_clip's config, see `shared.open_clip_config`.
- `TRANSFORMERS`: a `shared.transformers_layout.Layout`, or None where transformers has no such model.
"""

import dataclasses
import functools
import importlib
import pkgutil
import re
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from diva_jax.common import fields
from diva_jax.common.errors import UserError, listing
from diva_jax.common.fields import Rule, between, choice, field, finite, one_of
from diva_jax.common.json_files import packaged
from diva_jax.models.layers import ACTIVATIONS

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


class Features(NamedTuple):
    """The output of a backbone: patch tokens in raster order, [B, P, D], and the image embedding, [B, D], not
    normalised. Tokens are in the space of the embedding for CLIP, EVA02-CLIP (after the final norm and the projection)
    and DINOv2 (after the final norm); SigLIP's are those after the trunk's final norm."""

    tokens: jax.Array
    pooled: jax.Array


_MAX_WIDTH = 2**20  # With this width, a single matrix has terabytes.
_MAX_TOKENS = 2**16
_INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")
_SELECT = re.compile(r"all|none|(random|runs):[1-9]\d{0,4}")
_RESIZE_MODE = re.compile(r"(shortest|squash)(:[1-9]\d{0,4})?")


def _are_levels(values) -> bool:
    return len(values) == 3 and all(finite(v) and 0 <= v <= 1 for v in values)


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """The text tower that belongs to a backbone; fields as in open_clip's `text_cfg`."""

    context_length: int = field(77, "The number of tokens of a text.", between(0, _MAX_TOKENS))
    vocab_size: int = field(49408, "The size of the vocabulary.", between(0, 2**24))
    width: int = field(768, "The width of the transformer.", between(0, _MAX_WIDTH))
    heads: int = field(12, "The heads of the transformer's attention.", between(0, 1024))
    layers: int = field(12, "The blocks of the transformer; with 0 there is no text tower.", between(0, 1024))
    mlp_dim: int = field(3072, "The hidden width of the transformer's MLPs.", between(0, _MAX_WIDTH))
    causal: bool = field(True, "Whether a token attends to the tokens before it alone.")
    pool: str = choice(
        ("argmax", "eos", "last"),
        "The token whose state is projected is that with the highest id, CLIP's end-of-text token (argmax), the "
        "first one whose id is eos_id (eos), or the last one (last).",
    )
    proj_bias: bool = field(False, "Whether the projection has a bias, as SigLIP's, or is a bare matrix, as CLIP's.")
    norm_eps: float = field(1e-5, "The epsilon of the LayerNorms.", between(0, 1))
    tokenizer: str = choice(
        ("clip", "siglip", "xlm", ""),
        "The tokenizer is lower-cased BPE (clip), SentencePiece on canonicalised text (siglip), or SentencePiece "
        "that keeps case and punctuation (xlm).",
    )
    activation: str = choice(("", *ACTIVATIONS), "The activation of the MLPs; empty: the vision tower's.")
    eos_id: int = field(2, "The id of the end-of-text token, for pool=eos.", between(0, 2**24))
    kept_positions: int = field(
        -1,
        "For a checkpoint with another context_length, this many position embeddings are kept and the others are "
        "stretched to fit; with -1 such a checkpoint is refused.",
    )


# The text tower of a backbone that has only a vision tower.
NO_TEXT = TextSpec(context_length=0, vocab_size=0, width=0, heads=0, layers=0, mlp_dim=0, tokenizer="")


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything about a backbone that is not code."""

    arch: str = field("vit", "The architecture, a module of diva_jax.models.backbones.")
    open_clip_name: str = field("", "The name of this model in open_clip, for users and exports.")
    source: str = field("", "The weights are of this file, folder, hub id or run's workdir.")
    image_size: int = field(224, "The side of the images that the tower sees [pixels].", between(1, 2**14))
    patch_size: int = field(14, "The side of a patch [pixels].", between(1, 2**14))
    width: int = field(1024, "The width of the transformer.", between(1, _MAX_WIDTH))
    layers: int = field(24, "The blocks of the transformer.", between(1, 1024))
    heads: int = field(16, "The heads of the transformer's attention.", between(1, 1024))
    mlp_dim: int = field(4096, "The hidden width of the transformer's MLPs.", between(1, _MAX_WIDTH))
    embed_dim: int = field(768, "The width of the image embedding.", between(1, _MAX_WIDTH))
    activation: str = choice((*ACTIVATIONS, "swiglu"), "The activation of the MLPs; swiglu is for dinov2 alone.")
    norm_eps: float = field(1e-5, "The epsilon of the LayerNorms.", between(0, 1))
    mean: tuple[float, ...] = field(
        OPENAI_MEAN,
        "The mean of each channel of images in [0, 1], which is subtracted.",
        Rule(_are_levels, "must be three numbers from 0 to 1, as images are in [0, 1]"),
    )
    std: tuple[float, ...] = field(
        OPENAI_STD,
        "The standard deviation of each channel of images in [0, 1], by which they are divided.",
        Rule(lambda v: _are_levels(v) and min(v) > 0, "must be three numbers above 0, none above 1"),
    )
    resize_mode: str = field(
        "shortest",
        "Test images are resized by their shorter side and cropped (shortest), or squashed to a square (squash); "
        "shortest:K and squash:K resize to K pixels and crop, as transformers does.",
        Rule(_RESIZE_MODE.fullmatch, "must be shortest, squash, shortest:K or squash:K, where K is a number of pixels"),
    )
    interpolation: str = field("bicubic", "Test images are resized with this interpolation.", one_of(*_INTERPOLATIONS))
    select: str = field(
        "all",
        "The patch tokens that join the pooled one as condition are all, none, K that are drawn uniformly with "
        "replacement (random:K), or the means over runs of K along the raster order, without a remainder (runs:K).",
        Rule(_SELECT.fullmatch, "must be all, none, random:K or runs:K, where K is a number of patches below 100000"),
    )
    add_text: str = choice(
        ("mean", "token"),
        "The text's tokens are added to the features token by token (token), or their mean to every one (mean).",
    )
    readout: str = field("pooled", "This backbone's MMVP-VLM score was published with this readout of the authors.")
    text: TextSpec = TextSpec()
    registers: int = field(0, "The number of register tokens (dinov2).", between(0, 1024))

    @property
    def has_text(self) -> bool:
        """Whether a text tower belongs to this backbone."""
        return self.text.layers > 0

    @property
    def resize(self) -> int:
        """The side to which test images are resized before the crop [pixels]."""
        return int(self.resize_mode.partition(":")[2] or self.image_size)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches per image."""
        return self.grid**2


# The backbones that the authors tuned, as their code conditions on them; `select` of dfn_h14_378 is int(0.5 * 729).
TABLE: dict[str, Spec] = {name: fields.parse(Spec, row, name) for name, row in packaged(__file__, "specs.json").items()}
# OpenAI's ViT-B/16, which DIVA's authors did not tune; DINOv2 ViT-L/14 with registers, the frozen teacher of several
# methods; and one for the demo and the tests, of which no checkpoint exists.
VIT_B16, DINOV2_L, TINY = (TABLE.pop(name) for name in ("vitb16", "dinov2_l", "tiny"))


def check(spec: Spec, where: str) -> Spec:
    """Returns a Spec whose values are possible; `where` is what it describes, such as a file or `config.backbone`."""
    fields.check(dataclasses.asdict(spec), fields.declared(Spec), where)
    architecture(spec.arch, where)
    towers = {"": spec}
    if spec.has_text:
        towers["text."] = spec.text
        sizes = ("width", "mlp_dim", "heads", "context_length", "vocab_size")
        if zero := [size for size in sizes if not getattr(spec.text, size)]:
            raise UserError(f"{where}.text.{zero[0]}=0 must be at least 1")
        if not spec.text.tokenizer:
            raise UserError(f"{where}.text.tokenizer='' must be clip, siglip or xlm")
    for prefix, tower in towers.items():
        if tower.width % tower.heads:
            raise UserError(f"{where}.{prefix}heads={tower.heads} must divide the width, {tower.width}")
    if spec.image_size < spec.patch_size:
        raise UserError(f"{where}.image_size={spec.image_size} must be at least patch_size, {spec.patch_size}")
    if spec.activation == "swiglu" and (spec.arch != "dinov2" or spec.has_text):
        raise UserError(f"{where}.activation=swiglu is dinov2's alone: use one of {listing(list(ACTIVATIONS))}")
    if spec.resize < spec.image_size:
        raise UserError(f"{where}.resize_mode={spec.resize_mode} must resize to at least {spec.image_size}, image_size")
    return spec


def spec_of(config: ConfigDict, section: str = "backbone") -> Spec:
    """The hashable Spec of `config.backbone` or another section; a UserError for unknown or impossible fields."""
    return check(fields.parse(Spec, config[section], f"config.{section}"), f"config.{section}")


@functools.cache
def architectures() -> dict[str, ModuleType]:
    """Name -> module of every architecture: the modules of this package that are no subpackages."""
    listed = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)
    return {name: importlib.import_module(f"{__name__}.{name}") for name in listed}


def architecture(name: str, where: str = "backbone") -> ModuleType:
    """The module of an architecture, that of what `where` describes; a UserError where there is none of this name."""
    if name not in architectures():
        raise UserError(f"{where}.arch={name!r} is no known architecture: use one of {listing(list(architectures()))}")
    return architectures()[name]


def build(spec: Spec, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False) -> nnx.Module:
    """The vision tower of `spec` with random weights; a UserError where its architecture is not known or cannot have
    these sizes. Under `nnx.eval_shape` only shapes and dtypes are made. Activations are of `dtype`, weights of
    `param_dtype`. `remat` recomputes blocks in the backward pass: less memory, a third more work, the same gradient."""
    return architecture(spec.arch).Vision(spec, rngs=rngs, dtype=dtype, param_dtype=param_dtype, remat=remat)
