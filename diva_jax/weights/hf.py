"""transformers' CLIPModel and SiglipModel <-> open_clip: names, layouts and config files.

A `Recipe` says how some tensors of one side make some of the other: joined along the first axis, transposed or
reshaped, and split again. Attention is fused in open_clip and not in transformers; in SigLIP's pooling head it is
the other way round. Values are moved, never computed, so both ways are exact.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from diva_jax.common.errors import UserError, listing
from diva_jax.models.backbones import HALF, OPENAI_MEAN, OPENAI_STD, Spec, TextSpec
from diva_jax.weights.tensors import Tensor, Tensors


@dataclasses.dataclass(frozen=True)
class Recipe:
    """`open_clip` tensors, one after the other, hold the same rows as the `hf` ones.

    Attributes:
      open_clip, hf: names.
      shares: how the rows divide among the open_clip names (among hf names they divide evenly).
      transposed: the matrix is [in, out] in open_clip and [out, in] in transformers.
      lead: a leading axis of 1 that open_clip has and transformers has not (-1: the other way round).
    """

    open_clip: tuple[str, ...]
    hf: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    transposed: bool = False
    lead: int = 0


_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TIMM_LAYER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_LEAVES = ("weight", "bias")


def _both(ours: str, theirs: str) -> list[Recipe]:
    return [Recipe((f"{ours}.{leaf}",), (f"{theirs}.{leaf}",)) for leaf in _LEAVES]


def _layers(count: int, ours: str, theirs: str, names: Mapping[str, str], fused: str) -> list[Recipe]:
    """`count` transformer blocks; `fused` names the joint projection of queries, keys and values."""
    out = []
    for i in range(count):
        a, b = f"{ours}.{i}", f"{theirs}.encoder.layers.{i}"
        for leaf in _LEAVES:
            parts = tuple(f"{b}.self_attn.{p}_proj.{leaf}" for p in "qkv")
            out.append(Recipe((f"{a}.{fused}{leaf}",), parts))
        for mine, its in names.items():
            out += _both(f"{a}.{mine}", f"{b}.{its}")
    return out


def _clip(spec: Spec) -> list[Recipe]:
    v, e = "vision_model", "vision_model.embeddings"
    return [
        Recipe(("visual.class_embedding",), (f"{e}.class_embedding",)),
        Recipe(("visual.conv1.weight",), (f"{e}.patch_embedding.weight",)),
        Recipe(("visual.positional_embedding",), (f"{e}.position_embedding.weight",)),
        *_both("visual.ln_pre", f"{v}.pre_layrnorm"),
        *_layers(spec.layers, "visual.transformer.resblocks", v, _LAYER, "attn.in_proj_"),
        *_both("visual.ln_post", f"{v}.post_layernorm"),
        Recipe(("visual.proj",), ("visual_projection.weight",), transposed=True),
        *_text(spec, ""),
        Recipe(("text_projection",), ("text_projection.weight",), transposed=True),
        Recipe(("logit_scale",), ("logit_scale",)),
    ]


def _text(spec: Spec, prefix: str) -> list[Recipe]:
    t = "text_model"
    return [
        Recipe((f"{prefix}token_embedding.weight",), (f"{t}.embeddings.token_embedding.weight",)),
        Recipe((f"{prefix}positional_embedding",), (f"{t}.embeddings.position_embedding.weight",)),
        *_layers(spec.text.layers, f"{prefix}transformer.resblocks", t, _LAYER, "attn.in_proj_"),
        *_both(f"{prefix}ln_final", f"{t}.final_layer_norm"),
    ]


def _siglip(spec: Spec) -> list[Recipe]:
    v, ours, head = "vision_model", "visual.trunk", "vision_model.head"
    pool = [
        Recipe(
            (f"{ours}.attn_pool.q.{leaf}", f"{ours}.attn_pool.kv.{leaf}"),
            (f"{head}.attention.in_proj_{leaf}",),
            shares=(1, 2),
        )
        for leaf in _LEAVES
    ]
    return [
        *_both(f"{ours}.patch_embed.proj", f"{v}.embeddings.patch_embedding"),
        Recipe((f"{ours}.pos_embed",), (f"{v}.embeddings.position_embedding.weight",), lead=1),
        *_layers(spec.layers, f"{ours}.blocks", v, _TIMM_LAYER, "attn.qkv."),
        *_both(f"{ours}.norm", f"{v}.post_layernorm"),
        Recipe((f"{ours}.attn_pool.latent",), (f"{head}.probe",)),
        *pool,
        *_both(f"{ours}.attn_pool.proj", f"{head}.attention.out_proj"),
        *_both(f"{ours}.attn_pool.norm", f"{head}.layernorm"),
        *_both(f"{ours}.attn_pool.mlp.fc1", f"{head}.mlp.fc1"),
        *_both(f"{ours}.attn_pool.mlp.fc2", f"{head}.mlp.fc2"),
        *_text(spec, "text."),
        *_both("text.text_projection", "text_model.head"),
        Recipe(("logit_scale",), ("logit_scale",), lead=-1),
        Recipe(("logit_bias",), ("logit_bias",), lead=-1),
    ]


def recipes(spec: Spec) -> list[Recipe]:
    """Every tensor of both towers and the logits' scale and bias."""
    return _siglip(spec) if spec.arch == "siglip" else _clip(spec)


def _swap(recipe: Recipe, shape: tuple, to_hf: bool) -> tuple:
    """The joint tensor's shape on the other side."""
    if recipe.transposed:
        return shape[::-1]
    if recipe.lead:
        # Adds the axis on the side that has it, drops it on the other.
        return shape[1:] if (recipe.lead > 0) == to_hf else (1, *shape)
    return shape


def _convert(recipe: Recipe, tensors: Mapping[str, Any], to_hf: bool) -> dict[str, Tensor]:
    names, out = (recipe.open_clip, recipe.hf) if to_hf else (recipe.hf, recipe.open_clip)
    parts = [tensors[n] for n in names]
    first = tuple(parts[0].shape)
    shape = first if len(parts) == 1 else (sum(p.shape[0] for p in parts), *first[1:])
    joint_shape = _swap(recipe, shape, to_hf)

    def joint() -> np.ndarray:
        arrays = [np.asarray(p) for p in parts]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return array.T if recipe.transposed else array.reshape(joint_shape)

    if len(out) == 1:
        return {out[0]: Tensor(joint_shape, parts[0].dtype, joint)}
    shares = (1,) * len(out) if to_hf else recipe.shares
    if joint_shape[0] % sum(shares):
        raise UserError(f"{names[0]} has {joint_shape[0]} rows, which do not divide into {listing(out)}")
    unit, found, start = joint_shape[0] // sum(shares), {}, 0
    for name, share in zip(out, shares, strict=True):
        rows = slice(start * unit, (start + share) * unit)
        shape = (share * unit, *joint_shape[1:])
        found[name] = Tensor(shape, parts[0].dtype, lambda rows=rows: joint()[rows])
        start += share
    return found


def to_open_clip(tensors: Tensors, spec: Spec, source: str) -> Tensors:
    """transformers' names and layouts -> open_clip's, lazily.

    Raises:
      UserError: names are missing or unknown; lists them.
    """
    plan = recipes(spec)
    known = {n for r in plan for n in r.hf}
    constants = {f"{m}_model.embeddings.position_ids" for m in ("text", "vision")}
    missing = [n for n in known if n not in tensors]
    unknown = [n for n in tensors if n not in known | constants]
    if missing or unknown:
        parts = [f"{what}: {listing(sorted(n))}" for what, n in (("missing", missing), ("unknown", unknown)) if n]
        raise UserError(f"{source} does not fit its config.json: {'; '.join(parts)}")
    return Tensors({n: t for r in plan for n, t in _convert(r, tensors, False).items()}, tensors.files)


def from_open_clip(tensors: Mapping[str, Any], spec: Spec) -> dict[str, Tensor]:
    """open_clip's names and layouts -> transformers', lazily; `tensors` holds both towers."""
    return {n: t for r in recipes(spec) for n, t in _convert(r, tensors, True).items()}


# transformers' name of an activation <-> ours. SigLIP's published configs say tanh for weights that were trained,
# and are run by open_clip, with the exact GELU.
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_DEFAULTS = {
    "clip": (
        dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
        dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8),
        dict(image_size=224, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5),
        dict(vocab_size=49408, max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5),
    ),
    "siglip": (
        dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
        dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
        dict(image_size=224, patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
        dict(vocab_size=32000, max_position_embeddings=64, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
    ),
}


def spec_of(config: Mapping[str, Any], preprocessor: Mapping[str, Any], where: str) -> Spec:
    """The Spec that a transformers folder describes.

    Args:
      config: its config.json.
      preprocessor: its preprocessor_config.json, or {}.
      where: named in errors.

    Raises:
      UserError: it is no CLIPModel or SiglipModel, or has an activation that is not implemented.
    """
    kind = config.get("model_type")
    if kind not in _DEFAULTS:
        raise UserError(f"{where} is a {kind!r} model: give the folder of a whole CLIPModel or SiglipModel")
    sizes_v, sizes_t, rest_v, rest_t = _DEFAULTS[kind]
    vision = sizes_v | rest_v | (config.get("vision_config") or {})
    text = sizes_t | rest_t | (config.get("text_config") or {})
    for cfg in (vision, text):
        if cfg["hidden_act"] not in _ACTIVATIONS:
            raise UserError(f"{where} has hidden_act={cfg['hidden_act']!r}: use one of {listing(list(_ACTIVATIONS))}")
    if vision["hidden_act"] != text["hidden_act"]:
        raise UserError(
            f"{where} has hidden_act {vision['hidden_act']} in the vision and {text['hidden_act']} in the text tower: "
            "one activation for both is what is implemented here"
        )
    siglip, act = kind == "siglip", _ACTIVATIONS[vision["hidden_act"]]
    if siglip:
        act, embed_dim, text_kw = (
            "gelu",
            vision["hidden_size"],
            dict(causal=False, pool="last", proj_bias=True, tokenizer="siglip"),
        )
    else:
        embed_dim, text_kw = config.get("projection_dim", 512), {}
    squash = siglip or ("size" in preprocessor and not preprocessor.get("do_center_crop", True))
    return Spec(
        arch="siglip" if siglip else "vit",
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        width=vision["hidden_size"],
        layers=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        mlp_dim=vision["intermediate_size"],
        embed_dim=embed_dim,
        activation=act,
        norm_eps=vision["layer_norm_eps"],
        mean=tuple(preprocessor.get("image_mean") or (HALF if siglip else OPENAI_MEAN)),
        std=tuple(preprocessor.get("image_std") or (HALF if siglip else OPENAI_STD)),
        resize_mode="squash" if squash else "shortest",
        text=TextSpec(
            context_length=text["max_position_embeddings"],
            vocab_size=text["vocab_size"],
            width=text["hidden_size"],
            heads=text["num_attention_heads"],
            layers=text["num_hidden_layers"],
            mlp_dim=text["intermediate_size"],
            norm_eps=text["layer_norm_eps"],
            **text_kw,
        ),
    )


def _tower(spec: Spec | TextSpec, activation: str, embed_dim: int) -> dict:
    return dict(
        hidden_size=spec.width,
        intermediate_size=spec.mlp_dim,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        hidden_act=activation,
        layer_norm_eps=spec.norm_eps,
        projection_dim=embed_dim,
    )


def config_of(spec: Spec, dtype: str) -> dict:
    """The content of config.json for `spec`.

    Raises:
      UserError: transformers has no such model.
    """
    text, siglip = spec.text, spec.arch == "siglip"
    wanted = (False, "last", True) if siglip else (True, "argmax", False)
    if (text.causal, text.pool, text.proj_bias) != wanted:
        raise UserError(
            f"transformers has no {spec.arch} text tower with causal={text.causal}, pool={text.pool!r}, "
            f"proj_bias={text.proj_bias}: use --format=open_clip"
        )
    act = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[spec.activation]
    vision_config = _tower(spec, act, spec.embed_dim) | dict(
        image_size=spec.image_size, patch_size=spec.patch_size, num_channels=3
    )
    text_config = _tower(text, act, spec.embed_dim) | dict(
        vocab_size=text.vocab_size, max_position_embeddings=text.context_length
    )
    if siglip:
        for cfg in (vision_config, text_config):
            del cfg["projection_dim"]
        text_config["projection_size"] = spec.embed_dim
    elif text.vocab_size == 49408:
        text_config |= dict(bos_token_id=49406, eos_token_id=49407)
    else:
        text_config["eos_token_id"] = 2  # transformers' code for "pool at the highest id", open_clip's rule.
    kind = "Siglip" if siglip else "CLIP"
    vision_config["model_type"] = f"{kind.lower()}_vision_model"
    text_config["model_type"] = f"{kind.lower()}_text_model"
    top = dict(architectures=[f"{kind}Model"], model_type=kind.lower(), dtype=dtype)
    if not siglip:
        top["projection_dim"] = spec.embed_dim
    return top | dict(vision_config=vision_config, text_config=text_config)


def preprocessor_of(spec: Spec) -> dict:
    """The content of preprocessor_config.json: the test-time transform of `spec`."""
    square = dict(height=spec.image_size, width=spec.image_size)
    squash, siglip = spec.resize_mode == "squash", spec.arch == "siglip"
    crop = {} if siglip else dict(do_center_crop=not squash, crop_size=square)
    return dict(
        image_processor_type="SiglipImageProcessor" if siglip else "CLIPImageProcessor",
        do_convert_rgb=True,
        do_resize=True,
        size=square if squash else dict(shortest_edge=spec.image_size),
        resample={"bicubic": 3, "bilinear": 2}[spec.interpolation],
        **crop,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )
