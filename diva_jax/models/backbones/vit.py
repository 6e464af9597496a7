"""CLIP's Vision Transformer (arXiv 2103.00020), as OpenAI and open_clip run it; MetaCLIP 2's (arXiv 2507.22062) too."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.common.errors import UserError, brief
from diva_jax.common.fields import between
from diva_jax.models.backbones import OPENAI_MEAN, OPENAI_STD, Features, Spec
from diva_jax.models.backbones.shared import open_clip_config as occ, transformers_layout as hf
from diva_jax.models.backbones.shared.transformer import blocks, embedded, run, run_dense
from diva_jax.models.layers import Layers, Matrix
from diva_jax.models.library_config import LibraryConfig

CHECKPOINT = occ.checkpoint("vit")
shapes = CHECKPOINT.shapes


class Vision(nnx.Module):
    """The vision tower of `spec` with random weights; arguments as `backbones.build`'s."""

    def __init__(self, spec: Spec, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False):
        make = Layers(rngs, dtype, param_dtype)
        width, eps = spec.width, spec.norm_eps
        self.dtype, self.remat = dtype, remat
        self.patch_embed = make.conv(3, width, spec.patch_size, spec.patch_size, bias=False)
        near_zero = nnx.initializers.normal(width**-0.5)
        self.class_embed = make.param(near_zero, width)
        self.pos_embed = make.param(near_zero, 1 + spec.patches, width)
        self.norm_pre = make.layer_norm(width, eps)
        self.blocks = blocks(make, spec.layers, width, spec.heads, spec.mlp_dim, spec.activation, eps)
        self.norm = make.layer_norm(width, eps)
        self.proj = Matrix(make.param(near_zero, width, spec.embed_dim), dtype)

    def encode(self, images: jax.Array) -> Features:
        """Normalised float images [B, H, W, 3] -> tokens [B, P, D] and pooled [B, D], in `dtype`. CLIP itself projects
        the class token alone; DIVA applies the final norm and the projection to every token (authors' code)."""
        x = run(self.blocks, self._embedded(images), remat=self.remat)
        x = self.proj(self.norm(x))  # [B, 1 + P, D]
        return Features(tokens=x[:, 1:], pooled=x[:, 0])

    def encode_dense(self, images: jax.Array, last: str = "plain") -> jax.Array:
        """Images as for `encode` -> patch tokens [B, P, D] in the text's space; `last` of `transformer.VARIANTS`."""
        return self.proj(self.norm(run_dense(self.blocks, self._embedded(images), last)))[:, 1:]

    def encode_early(self, images: jax.Array, layers: int) -> jax.Array:
        """Images as for `encode` -> patch tokens after this many blocks, without a norm, [B, P, width]."""
        return run(self.blocks[:layers], self._embedded(images), remat=self.remat)[:, 1:]

    def _embedded(self, images: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] -> the first block's input, [B, 1 + P, width]."""
        return self.norm_pre(embedded(self, images, self.class_embed))


_FIXED = occ.TOWER_FIXED | occ.OPTIONS["vit_fixed"]


def from_open_clip(model: LibraryConfig) -> dict:
    """The fields of Spec that open_clip's model config gives the vision tower."""
    vision = model.section("vision_cfg")
    vision.check({*occ.OPTIONS["vit"], *occ.OPTIONS["vision_without_effect"], *occ.TIMM_DEFAULTS}, _FIXED)
    if isinstance(vision.options.get("layers"), list | tuple):
        vision.refuse("layers", "a list of layers means a ResNet, use a ViT")
    width, head_width = vision.get("width", 768), vision.get("head_width", 64)
    if width % head_width:
        vision.refuse("head_width", f"it must divide the width, {width}")
    if model.options.get("init_logit_bias") is not None:
        model.refuse("init_logit_bias", "only SigLIP models have a bias on their logits")
    return dict(
        image_size=occ.side(vision, "image_size", 224),
        patch_size=occ.side(vision, "patch_size", 16),
        width=width,
        layers=vision.get("layers", 12),
        heads=width // head_width,
        mlp_dim=int(width * vision.get("mlp_ratio", 4.0, between(1e-6, 1e6))),
        activation=occ.activation(vision, model.get("quick_gelu", False)),
        norm_eps=occ.norm_eps(vision),
    )


def to_open_clip(spec: Spec) -> dict:
    """open_clip's model config of the vision tower: all but embed_dim and text_cfg."""
    vision = dict(
        **{option: getattr(spec, option) for option in ("image_size", "layers", "width", "patch_size")},
        head_width=spec.width // spec.heads,
        mlp_ratio=occ.mlp_ratio(spec.width, spec.mlp_dim),
        **occ.tower_options(spec.activation, spec.norm_eps),
    )
    return dict(quick_gelu=spec.activation == "quick_gelu", vision_cfg=vision)


_MODELS = {"clip": "CLIPModel", "metaclip_2": "MetaClip2Model"}


def _from_config(config: Mapping[str, Any], preprocessor: Mapping, where: str) -> tuple[Spec, frozenset[str]]:
    (vision, activation), (text, text_activation) = hf.tower_options(config, hf.DEFAULTS["vit"], where)
    if type(eos := text.get("eos_token_id", 49407)) is not int:
        raise UserError(f"{where} has text_config.eos_token_id={brief(eos)}: it must be one id")
    if config["model_type"] == "metaclip_2":
        pools = dict(pool="eos", eos_id=eos, tokenizer="xlm")
    else:  # For 2, which older configs have, transformers pools at the highest id, as open_clip does.
        pools = {} if eos in (2, text["vocab_size"] - 1) else dict(pool="eos", eos_id=eos)
    spec = Spec(
        arch="vit",
        **hf.vision_fields(vision)
        | hf.preprocessing(preprocessor, vision["image_size"], OPENAI_MEAN, OPENAI_STD, where),
        embed_dim=hf.options(config, {"projection_dim": 512}, where)["projection_dim"],
        activation=activation,
        text=hf.text_spec(text, activation, text_activation, **pools),
    )
    return spec, frozenset()


def _to_config(spec: Spec, dtype: str) -> dict:
    text = spec.text
    hf.require_text(spec, text.causal and not text.proj_bias and text.pool in ("argmax", "eos"))
    kind = "metaclip_2" if text.pool == "eos" and text.tokenizer == "xlm" else "clip"
    projection = dict(projection_dim=spec.embed_dim)
    if kind == "metaclip_2":
        special = dict(bos_token_id=0, pad_token_id=1, eos_token_id=text.eos_id)
    elif text.pool == "eos" and text.eos_id == 2:
        raise UserError("transformers pools a CLIP model with eos_token_id 2 at the highest id: use --format=open_clip")
    elif text.pool == "eos":
        special = dict(bos_token_id=text.eos_id - 1, eos_token_id=text.eos_id)
    elif text.vocab_size == 49408:
        special = dict(bos_token_id=49406, eos_token_id=49407)
    else:
        special = dict(eos_token_id=2)  # transformers' code for "pool at the highest id", open_clip's rule.
    return hf.two_towers(spec, dtype, kind, _MODELS[kind], projection, projection | special, **projection)


TRANSFORMERS = hf.Layout(_MODELS, "vision_model.", _from_config, _to_config, "CLIP")
